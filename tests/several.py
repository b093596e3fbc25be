"""Several recipes, one after the other, in the same processes: starting these costs more than most
of what is tested.

    python -m torch.distributed.run --standalone --nproc-per-node 3 tests/several.py JOBS

JOBS is a json file: a list of [recipe, flags]. With `--gradients FILE` the gradients of every step,
averaged over the processes, are kept in FILE, and nothing is left that depends on the number of
processes (README, "GPUs and precision").
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import PartialState
from runs import load
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fewshot.detectors import fsce
from fewshot.detectors.attention_rpn import BACKGROUND, AttentionRPN
from fewshot.detectors.faster_rcnn import RPN
from fewshot.detectors.meta_rcnn import MetaDetector
from fewshot.detectors.mpsr import TwoBranchRPN
from fewshot.training import launch


def main() -> None:
    jobs, gradients = json.loads(Path(sys.argv[1]).read_text()), sys.argv[3:]
    torch.set_num_threads(1)
    # the end of a recipe would end the processes' group
    destroy, PartialState.destroy_process_group = (
        PartialState.destroy_process_group,
        lambda *_: None,
    )
    kept: dict[str, list[torch.Tensor]] = {}  # of every step: job and stage
    job = ""

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters
        ]
        if launch.signals.waiting:  # in the loop, not in a test that adapts
            kept[f"{job} {sum(key.split()[0] == job for key in kept)}"] = gradients

    if gradients:
        nothing_by_chance()
        nothing_together()
        register_optimizer_step_pre_hook(keep)
    for job, flags in jobs:
        module = load(job)
        module.main(tyro.cli(module.Args, args=f"{flags} --workers 0".split()))
    if gradients and PartialState().is_main_process:
        torch.save(kept, gradients[0])
    PartialState().wait_for_everyone()
    PartialState.destroy_process_group = destroy
    PartialState().destroy_process_group()


def nothing_by_chance() -> None:
    """Batch norms stay in eval mode; of what a step chooses by chance it takes the first, and
    nothing is dropped.
    """
    _BatchNorm.train = lambda self, mode=True: nn.Module.train(self, False)
    shuffled = torch.randperm
    torch.randperm = lambda n, **more: shuffled(n, **more) if more else torch.arange(n)
    torch.randn_like = torch.zeros_like
    nn.functional.dropout = lambda x, *_, **more: x
    MetaDetector.drawn = lambda self, labels, support_labels: torch.stack(
        [label[0] for label in labels]
    )


def nothing_together() -> None:
    """No loss compares or chooses among what several pictures have."""
    fsce.contrastive_loss = lambda features, *_, **more: features.sum() * 0
    TwoBranchRPN.proposals = RPN.proposals  # all, not the best of a batch

    losses = AttentionRPN.relation_losses

    def relation_losses(self, logits, deltas, rois, negative):
        labels = [
            torch.full_like(r.labels, BACKGROUND) if away else r.labels
            for r, away in zip(rois, negative)
        ]
        of_all = nn.functional.cross_entropy(logits, torch.cat(labels))  # not of the hardest
        return losses(self, logits, deltas, rois, negative) | {"cls": of_all}

    AttentionRPN.relation_losses = relation_losses


if __name__ == "__main__":
    main()

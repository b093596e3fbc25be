"""Jobs in the same processes, one after the other: starting these costs more than most of what is
tested.

    python -m torch.distributed.run --standalone --nproc-per-node 3 tests/several.py JOBS

JOBS is a json file, a list of
- [recipe, flags];
- [recipe, flags, FILE], which keeps in FILE the gradients of every step, averaged over the
  processes, with nothing left that depends on the number of processes (README, "GPUs and
  precision");
- ["module:function", FILE], which keeps in FILE what a test's function gives.
"""

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import runs
import torch
from accelerate import PartialState
from first_losses import flags_of_test
from runs import DETECTORS, FEW, RECIPES
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fewshot.detectors import fsce
from fewshot.detectors.attention_rpn import BACKGROUND, AttentionRPN
from fewshot.detectors.faster_rcnn import RPN
from fewshot.detectors.meta_rcnn import MetaDetector
from fewshot.detectors.mpsr import TwoBranchRPN
from fewshot.training import launch

# what so many processes do by default: test kept runs, and share the steps of recipes
TESTED = {2: ("maml", "meta_rcnn"), 3: ("proto_net", "tfa")}
SHARED = ("baseline", "proto_net", "tfa")


def start(jobs: list, folder: Path, processes: int, **options: Any) -> str:
    """What so many processes say that are started once and do these jobs."""
    path = folder / f"jobs-{processes}.json"
    path.write_text(json.dumps(jobs))
    done = runs.launch(Path(__file__), str(path), processes, **options)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def launched(top: Path, finished: Callable[[str], Path], processes: int) -> Path:
    """The folder of what so many processes left, which are started once for all tests by default."""

    def make(folder: Path) -> None:
        jobs = []
        for recipe in TESTED[processes]:
            shutil.copytree(finished(recipe), folder / recipe)
            jobs.append([recipe, f"{flags_of_test(recipe)} --out {folder / recipe}"])
        if processes == 2:
            jobs += [both_stages_job("meta_rcnn", folder / "stages", processes)] * 2
            jobs.append(["test_maml:descend", str(folder / "maml.pt")])
        else:
            jobs += [gradient_job(recipe, folder) for recipe in SHARED]
        (folder / "said.txt").write_text(start(jobs, folder, processes))

    return runs.once(top / f"{processes}-processes", make)


def both_stages_job(recipe: str, folder: Path, processes: int) -> list[str]:
    return [recipe, f"{FEW[recipe]} --batch-size {processes} --test-images 2 --out {folder}"]


def gradient_job(recipe: str, folder: Path) -> list[str]:
    """Keeps the gradients of a step of every stage, with six pictures or tasks."""
    flags = f"{FEW[recipe]} --iters 1 --batch-size 6 --out {folder / 'shared' / recipe}"
    if recipe in DETECTORS:
        flags += " --save-every 1 --lr 0"  # fine-tuning then starts at the same place
    else:
        flags += " --eval-every 1"
    if recipe == "pmf":
        flags += " --test-steps 1 --test-lr 0.01"
    return [recipe, flags, str(folder / f"{recipe}.pt")]


def main() -> None:
    torch.set_num_threads(1)
    runs.draw_scenes_once()
    # the end of a recipe would end the processes' group
    with mock.patch.object(PartialState, "destroy_process_group", lambda *_: None):
        for what, *rest in json.loads(Path(sys.argv[1]).read_text()):
            do(what, *rest)
            PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def do(what: str, flags: str, file: str | None = None) -> None:
    if what in RECIPES + runs.TRAINING_FREE + runs.PROTOTYPES and file is None:
        runs.run_here(what, flags)
        return
    if file is not None:
        with by_no_chance(), kept_gradients() as kept:
            runs.run_here(what, flags)
    else:
        file, (module, function) = flags, what.split(":")
        kept = getattr(importlib.import_module(module), function)()
    if PartialState().is_main_process:
        torch.save(kept, file)


@contextmanager
def kept_gradients() -> Iterator[list[list[torch.Tensor]]]:
    """Those of every step that is trained inside the block."""
    kept: list[list[torch.Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if launch.signals.waiting:  # in the loop, not in a test that adapts
            kept.append(
                [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
            )

    hook = register_optimizer_step_pre_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()


@contextmanager
def by_no_chance() -> Iterator[None]:
    """Inside the block batch norms stay in eval mode; of what a step chooses by chance it takes the
    first, and nothing is dropped; no loss compares or chooses among what several pictures have.
    """
    shuffled, losses = torch.randperm, AttentionRPN.relation_losses

    def relation_losses(self, logits, deltas, rois, negative):
        labels = [
            torch.full_like(r.labels, BACKGROUND) if away else r.labels
            for r, away in zip(rois, negative)
        ]
        of_all = nn.functional.cross_entropy(logits, torch.cat(labels))  # not of the hardest
        return losses(self, logits, deltas, rois, negative) | {"cls": of_all}

    changes = [
        (_BatchNorm, "train", lambda self, mode=True: nn.Module.train(self, False)),
        (torch, "randperm", lambda n, **more: shuffled(n, **more) if more else torch.arange(n)),
        (torch, "randn_like", torch.zeros_like),
        (nn.functional, "dropout", lambda x, *_, **more: x),
        (
            MetaDetector,
            "drawn",
            lambda self, labels, _: torch.stack([label[0] for label in labels]),
        ),
        (fsce, "contrastive_loss", lambda features, *_, **more: features.sum() * 0),
        (TwoBranchRPN, "proposals", RPN.proposals),  # all, not the best of a batch
        (AttentionRPN, "relation_losses", relation_losses),
    ]
    with ExitStack() as stack:
        for owner, name, other in changes:
            stack.enter_context(mock.patch.object(owner, name, other))
        yield


if __name__ == "__main__":
    main()

"""Several recipes, one after the other, in the same processes: starting these costs more than most of what is tested.

    python -m torch.distributed.run --standalone --nproc-per-node 3 tests/several.py JOBS

JOBS is a json file: a list of [recipe, flags]. With `--gradients FILE` batch norms stay in eval mode, and what every
step's gradients were, averaged over the processes, is kept in FILE.
"""

import json
import sys
from pathlib import Path

import torch
import tyro
from accelerate import PartialState
from test_recipes import load
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_pre_hook


def main() -> None:
    jobs, gradients = json.loads(Path(sys.argv[1]).read_text()), sys.argv[3:]
    torch.set_num_threads(1)
    # the end of a recipe would end the processes' group
    destroy, PartialState.destroy_process_group = PartialState.destroy_process_group, lambda *_: None
    kept: dict[str, torch.Tensor] = {}
    job = ""
    if gradients:
        _BatchNorm.train = lambda self, mode=True: nn.Module.train(self, False)

        def keep(optimizer: torch.optim.Optimizer, *_) -> None:
            number = sum(key.startswith(f"{job} ") and key.endswith(" 0") for key in kept)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for i, p in enumerate(parameters):
                kept[f"{job} step {number} {i}"] = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()

        register_optimizer_step_pre_hook(keep)
    for job, flags in jobs:
        module = load(job)
        module.main(tyro.cli(module.Args, args=f"{flags} --workers 0".split()))
    if gradients and PartialState().is_main_process:
        torch.save(kept, gradients[0])
    PartialState().wait_for_everyone()
    PartialState.destroy_process_group = destroy
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()

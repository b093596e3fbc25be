"""The same command gives the same weights, and neither the number of processes nor what else a process did matters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_recipes import CLASSIFIERS, DETECTORS, QUICK, RECIPES, result_of, run_here, some

SEVERAL = Path(__file__).parent / "several.py"
FEW = {  # two steps, and little of all else
    recipe: QUICK[recipe]
    + (
        " --iters 2 --save-every 2 --test-images 1"
        if recipe in DETECTORS
        else " --iters 2 --eval-every 2 --val-tasks 1 --tasks 1"
    )
    for recipe in RECIPES
}
FOLDERS = {recipe: ("base", "1shot-seed0") if recipe in DETECTORS else ("",) for recipe in RECIPES}
COUNTS = (1, 2, 3)


def several(folder: Path, jobs: list[tuple[str, str]], processes: int, *options: str, hash_seed: int = 0) -> None:
    """The recipes, in so many processes that are started once."""
    path = folder / f"jobs-{processes}-{hash_seed}.json"
    path.write_text(json.dumps(jobs))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(start if processes > 1 else []), str(SEVERAL), str(path), *options]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-5000:]


def check_same_run(recipe: str, first: Path, second: Path) -> None:
    """Weights to the bit, and results."""
    for folder in FOLDERS[recipe]:
        a, b = (load_file(run / folder / "model.safetensors") for run in (first, second))
        assert a.keys() == b.keys()
        different = [name for name in a if not torch.equal(a[name], b[name])]
        assert not different, f"{recipe}: {len(different)} of {len(a)} tensors differ, the first is {different[0]}"
        assert result_of(first / folder) == result_of(second / folder)


@pytest.mark.parametrize("recipe", some(RECIPES, {*CLASSIFIERS, "meta_rcnn", "tfa"}))
def test_the_same_command_gives_the_same_weights(recipe, tmp_path):
    for name in ("first", "second"):
        run_here(recipe, f"{FEW[recipe]} --out {tmp_path / name}")
    check_same_run(recipe, tmp_path / "first", tmp_path / "second")


@pytest.mark.slow
@pytest.mark.parametrize("processes", COUNTS)
def test_other_processes_give_the_same_weights(processes, tmp_path):
    """In which strings have other hashes and objects other addresses: no order comes from a set."""
    flags = {recipe: FEW[recipe] + f" --batch-size {processes}" for recipe in RECIPES}
    for number in (1, 2):
        jobs = [(recipe, f"{flags[recipe]} --out {tmp_path / str(number) / recipe}") for recipe in RECIPES]
        several(tmp_path, jobs, processes, hash_seed=number)
    for recipe in RECIPES:
        check_same_run(recipe, tmp_path / "1" / recipe, tmp_path / "2" / recipe)
    print(f"{len(RECIPES)} recipes trained twice in {processes} processes: the same bits")

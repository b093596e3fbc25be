"""The same command gives the same weights, and neither the number of processes nor what else a
process did matters.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import (
    CLASSIFIERS,
    DETECTORS,
    PROTOTYPES,
    QUICK,
    RECIPES,
    TRAINING_FREE,
    result_of,
    results_of_tests,
    run_here,
    some,
)
from safetensors.torch import load_file

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


def several(
    folder: Path, jobs: list[tuple[str, str]], processes: int, *options: str, hash_seed: int = 0
) -> None:
    """The recipes, in so many processes that are started once."""
    path = folder / f"jobs-{processes}-{hash_seed}.json"
    path.write_text(json.dumps(jobs))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(start if processes > 1 else []), str(SEVERAL), str(path), *options]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": str(hash_seed),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-5000:]


def check_same_run(recipe: str, first: Path, second: Path) -> None:
    """Weights to the bit, and results."""
    for folder in FOLDERS[recipe]:
        a, b = (load_file(run / folder / "model.safetensors") for run in (first, second))
        assert a.keys() == b.keys()
        different = [name for name in a if not torch.equal(a[name], b[name])]
        assert not different, (
            f"{recipe}: {len(different)} of {len(a)} tensors differ, the first is {different[0]}"
        )
        assert result_of(first / folder) == result_of(second / folder)


@pytest.mark.parametrize("recipe", some(RECIPES, {*CLASSIFIERS, "meta_rcnn", "tfa"}))
def test_the_same_command_gives_the_same_weights(recipe, tmp_path):
    for name in ("first", "second"):
        run_here(recipe, f"{FEW[recipe]} --out {tmp_path / name}")
    check_same_run(recipe, tmp_path / "first", tmp_path / "second")


def gradients(folder: Path, recipes: list[str], processes: int) -> dict[str, list[torch.Tensor]]:
    """Of one step of every stage, with six pictures, or tasks, shared by so many processes."""
    flags = {r: FEW[r].replace(" 2", " 1") + " --batch-size 6" for r in recipes}
    flags |= {
        r: f"{flags[r]} --lr 0" for r in recipes if r in DETECTORS
    }  # fine-tuning then starts at the same place
    flags |= {"pmf": f"{flags['pmf']} --test-steps 1 --test-lr 0.01"} if "pmf" in recipes else {}
    jobs = [
        (recipe, f"{flags[recipe]} --out {folder / str(processes) / recipe}") for recipe in recipes
    ]
    several(folder, jobs, processes, "--gradients", str(folder / f"{processes}.pt"))
    return torch.load(folder / f"{processes}.pt")


def check_gradients(folder: Path, recipes: list[str], processes: int) -> None:
    one, shared = (gradients(folder, recipes, n) for n in (1, processes))
    assert one.keys() == shared.keys() and {name.split()[0] for name in one} == set(recipes)
    for name in one:
        largest = max(float(g.abs().max()) for g in one[name])
        error = max(
            float((a - b).abs().max()) for a, b in zip(one[name], shared[name], strict=True)
        )
        print(f"{name}: gradients up to {largest:.3g}, relative error {error / largest:.1e}")
        assert largest > 1e-5 and error < 2e-4 * largest, name


def test_processes_share_a_step(tmp_path):
    """The gradient is that of one process that has the whole batch."""
    check_gradients(tmp_path, ["baseline", "proto_net", "tfa"], 3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_every_recipes_steps(processes, tmp_path):
    check_gradients(tmp_path, RECIPES, processes)


def check_tests(folder: Path, recipes: list[str], counts: list[int]) -> None:
    """7 tasks and 11 pictures, which neither number of processes divides, give what one process
    finds.
    """
    free, found = [r for r in recipes if r in TRAINING_FREE], {}
    tasks = {r: "--test-images 11" if r in DETECTORS + PROTOTYPES else "--tasks 7" for r in recipes}
    trained = [r for r in recipes if r in RECIPES]
    several(folder, [(r, f"{FEW[r]} {tasks[r]} --out {folder / r}") for r in trained], 1)
    for n in [1, *counts]:
        here = folder / f"by-{n}"
        jobs = [
            (r, f"{'--shots 1' * (r in DETECTORS)} {tasks[r]} --out {folder / r} --test-only")
            for r in trained
        ]
        starts = dict.fromkeys(free, f"--init {folder / 'baseline'} --features {here / 'features'}")
        starts |= {
            r: f"--base {folder / 'tfa' / 'base'} --shots 1" for r in recipes if r in PROTOTYPES
        }
        jobs += [(r, f"{tasks[r]} --out {here / r} {start}") for r, start in starts.items()]
        several(folder, jobs, n)
        results = {r: results_of_tests(folder / r / FOLDERS[r][-1]) for r in trained}
        results |= {
            r: [result_of(here / r / ("1shot-seed0" if r in PROTOTYPES else ""))] for r in starts
        }
        found[n] = {
            r: {k: v for k, v in one.items() if k != "settings"} for r, (one,) in results.items()
        }
    for n in counts:
        assert set(found[n]) == set(recipes)
        assert [r for r in recipes if found[n][r] != found[1][r]] == []
    print(
        f"tests of {len(recipes)} recipes: the same in {', '.join(map(str, counts))} processes as in one"
    )


def test_three_processes_test_to_the_same_numbers(tmp_path):
    check_tests(tmp_path, ["proto_net", "tfa"], [3])


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [CLASSIFIERS + TRAINING_FREE, DETECTORS + PROTOTYPES], ids=["classifiers", "detectors"]
)
def test_all_recipes_test_to_the_same_numbers(part, tmp_path):
    check_tests(tmp_path, part, [2, 3])


@pytest.mark.slow
@pytest.mark.parametrize("processes", COUNTS)
def test_other_processes_give_the_same_weights(processes, tmp_path):
    """In which strings have other hashes and objects other addresses: no order comes from a set."""
    flags = {recipe: FEW[recipe] + f" --batch-size {processes}" for recipe in RECIPES}
    for number in (1, 2):
        jobs = [
            (recipe, f"{flags[recipe]} --out {tmp_path / str(number) / recipe}")
            for recipe in RECIPES
        ]
        several(tmp_path, jobs, processes, hash_seed=number)
    for recipe in RECIPES:
        check_same_run(recipe, tmp_path / "1" / recipe, tmp_path / "2" / recipe)
    print(f"{len(RECIPES)} recipes trained twice in {processes} processes: the same bits")

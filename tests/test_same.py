"""The same command gives the same weights, and neither the number of processes nor what else a
process did matters.
"""

import shutil
from pathlib import Path

import pytest
import several
import torch
from first_losses import KEPT, RUNS, flags_of_test
from runs import (
    CLASSIFIERS,
    DETECTORS,
    FEW,
    PROTOTYPES,
    RECIPES,
    TRAINING_FREE,
    differences,
    metrics,
    result_of,
    results_of_tests,
    run_here,
    some,
)
from test_maml import descend, small


@pytest.mark.parametrize("recipe", some(RECIPES, {*CLASSIFIERS, "meta_rcnn", "tfa"}))
def test_the_same_command_gives_the_same_weights(recipe, finished, tmp_path):
    run_here(recipe, f"{RUNS[recipe]} {KEPT[recipe in DETECTORS]} --out {tmp_path}")
    assert not differences(finished(recipe), tmp_path)


def check_gradients(recipe: str, file: Path, folder: Path) -> None:
    """Those in the file, of several processes, are those of this one that has the whole batch."""
    *job, kept = several.gradient_job(recipe, folder)
    several.do(*job, kept)
    one, shared = torch.load(kept), torch.load(file)
    assert len(one) == len(shared) == 1 + (recipe in DETECTORS)

    for stage, (ours, theirs) in enumerate(zip(one, shared)):
        largest = max(float(g.abs().max()) for g in ours)
        error = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
        print(f"{recipe} {stage}: gradients up to {largest:.3g}, relative error {error / largest}")
        assert largest > 1e-5 and error < 2e-4 * largest, (recipe, stage)


@pytest.mark.parametrize("recipe", several.SHARED)
def test_three_processes_share_a_step(recipe, launched, tmp_path):
    """The gradient is that of one process that has the whole batch."""
    check_gradients(recipe, launched(3) / f"{recipe}.pt", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_every_recipes_steps(processes, tmp_path):
    together = tmp_path / "together"
    together.mkdir()
    several.start([several.gradient_job(r, together) for r in RECIPES], together, processes)
    for recipe in RECIPES:
        check_gradients(recipe, together / f"{recipe}.pt", tmp_path)


def test_two_processes_average_their_meta_gradients(launched):
    begin, end = small(4)[0].state_dict(), descend()
    for name, tensor in torch.load(launched(2) / "maml.pt").items():
        torch.testing.assert_close(tensor, end[name], rtol=0, atol=1e-9)
    assert (end["head.weight"] - begin["head.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("recipe", "processes"), [(r, n) for n, recipes in several.TESTED.items() for r in recipes]
)
def test_processes_test_to_the_same_numbers(recipe, processes, launched):
    """Of tasks and pictures, whose number the processes do not divide evenly."""
    folder = launched(processes) / recipe / ("2shot-seed0" if recipe in DETECTORS else "")
    (again,) = results_of_tests(folder)
    assert again | {"settings": 0} == result_of(folder) | {"settings": 0}
    assert again["settings"]["run"]["processes"] == processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [CLASSIFIERS + TRAINING_FREE, DETECTORS + PROTOTYPES], ids=["classifiers", "detectors"]
)
def test_all_recipes_test_to_the_same_numbers(part, finished, tmp_path):
    trained = [recipe for recipe in part if recipe in RECIPES]
    found = {}
    for n in (1, 2, 3):
        here = tmp_path / str(n)
        for recipe in trained:
            shutil.copytree(finished(recipe), here / recipe)
        jobs = [[recipe, f"{flags_of_test(recipe)} --out {here / recipe}"] for recipe in trained]
        for recipe in part:
            if recipe in TRAINING_FREE:
                init = f"--init {finished('baseline')} --features {here / 'features'}"
                jobs.append([recipe, f"{init} --tasks 7 --out {here / recipe}"])
            elif recipe in PROTOTYPES:
                base = f"--base {finished('tfa') / 'base'} --shots 2"
                jobs.append([recipe, f"{base} --test-images 5 --out {here / recipe}"])
        several.start(jobs, here, n)

        found[n] = {}
        for recipe in part:
            folder = here / recipe / ("2shot-seed0" if recipe in DETECTORS + PROTOTYPES else "")
            (found[n][recipe],) = (
                results_of_tests(folder) if recipe in trained else [metrics(folder)]
            )
            del found[n][recipe]["settings"]
    for n in (2, 3):
        assert [recipe for recipe in part if found[n][recipe] != found[1][recipe]] == []


def test_both_stages_in_two_processes(launched):
    """And the same command again shows what is there."""
    for stage in ("base", "1shot-seed0"):
        assert metrics(launched(2) / "stages" / stage)["settings"]["run"]["processes"] == 2
    assert (launched(2) / "said.txt").read_text().count("is finished") == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_every_detectors_stages_in_several_processes(processes, tmp_path):
    jobs = [several.both_stages_job(r, tmp_path / r, processes) for r in DETECTORS]
    assert several.start(jobs * 2, tmp_path, processes).count("is finished") == 2 * len(DETECTORS)
    for recipe in DETECTORS:
        assert metrics(tmp_path / recipe / "base") and metrics(tmp_path / recipe / "1shot-seed0")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_other_processes_give_the_same_weights(processes, tmp_path):
    """In which strings have other hashes and objects other addresses: no order comes from a set."""
    for number in ("1", "2"):
        here = tmp_path / number
        here.mkdir()
        jobs = [[r, f"{FEW[r]} --batch-size {processes} --out {here / r}"] for r in RECIPES]
        several.start(jobs, here, processes, hash_seed=number)
    for recipe in RECIPES:
        assert not differences(tmp_path / "1" / recipe, tmp_path / "2" / recipe)

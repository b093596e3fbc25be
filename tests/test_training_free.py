"""Recipes that train nothing: a backbone as it is, features once, balanced and imbalanced tasks."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from runs import TRAINING_FREE, launch, load, metrics, parse, results_of_tests, run_here

import fewshot
from fewshot import InputError, weights
from fewshot.data import episodes
from fewshot.data.classification import open_dataset
from fewshot.evaluation import frozen, meta_test

TASKS = "--tasks 12 --queries 4 --workers 0"
INDUCTIVE = {"simple_shot", "logistic"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of class folders with pictures of noise about a colour of the class, and a trained
    model of it.
    """
    root, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    for part, classes in (("train", 6), ("val", 5), ("test", 6)):
        for c in range(classes):
            place = root / "data" / part / f"{part}{c}"
            place.mkdir(parents=True)
            colour = rng.uniform(40, 215, 3)
            for i in range(25):
                noise = rng.normal(colour, 40, (20, 20, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noise).save(place / f"{i}.png")
    flags = (
        f"--dataset {root / 'data'} --size 32 --iters 4 --eval-every 4 --val-tasks 4 --batch-size 8"
    )
    run_here("baseline", f"{flags} --tasks 4 --queries 4 --out {root / 'baseline'}")
    return root


def flags(small: Path, out: Path) -> str:
    start = (
        f"--dataset {small / 'data'} --init {small / 'baseline'} --features {small / 'features'}"
    )
    return f"{start} --out {out} {TASKS}"


@pytest.mark.parametrize("imbalance", [None, 2.0], ids=["balanced", "imbalanced"])
@pytest.mark.parametrize("recipe", TRAINING_FREE)
def test_a_run_is_what_its_tasks_give_one_by_one(recipe, imbalance, small, tmp_path):
    """Through kept features and all tasks at once, and task by task through the network, the
    accuracy is the same.
    """
    unequal = "" if imbalance is None else f"--imbalance {imbalance}"
    run_here(recipe, f"{flags(small, tmp_path)} {unequal} --save-tasks")
    found = json.loads((tmp_path / "tasks.json").read_text())
    assert metrics(tmp_path)["setting"] == ("inductive" if recipe in INDUCTIVE else "transductive")
    model = fewshot.load(tmp_path).network  # built by the library, not by the recipe
    state, about = weights.load(tmp_path / "model.safetensors")
    assert about["backbone"] == "conv4" and set(state) == set(model.state_dict())
    dataset = open_dataset(str(small / "data"), "", "test", size=32)
    transform = meta_test.transforms.test_transform(dataset)
    draw = (
        episodes.draw if imbalance is None else partial(episodes.draw_imbalanced, alpha=imbalance)
    )
    for shots in (1, 5):
        for task in range(4):
            drawn = draw(dataset, ways=5, shots=shots, queries=4, seed=0, index=task)
            drawn, counts = drawn if imbalance is not None else (drawn, [4] * 5)
            pixels = [
                torch.stack([dataset.pixels(i) for i in part.ravel()])
                for part in (drawn.support, drawn.query)
            ]
            with torch.no_grad():
                support, query = (
                    model.features(transform(x, torch.ones(len(x)), None)) for x in pixels
                )
            answers = model.classify(support[None], query[None], 5)[0].argmax(1).numpy()
            accuracy = (answers == np.arange(5).repeat(counts)).mean() * 100
            assert abs(accuracy - found[str(shots)][task]) < 1e-3
    assert np.mean(found["5"]) > 40, "colours tell the classes apart"


def test_features_are_extracted_once(small, tmp_path, monkeypatch):
    base = f"--dataset {small / 'data'} --init {small / 'baseline'} --features {tmp_path / 'features'} {TASKS}"
    run_here("simple_shot", f"{base} --out {tmp_path / 'a'}")
    kept = sorted(path.name for path in (tmp_path / "features").iterdir())
    assert (
        len(kept) == 2
        and kept[0].endswith("-features.safetensors")
        and kept[1].endswith("-mean.safetensors")
    )
    extract = frozen.extract
    monkeypatch.setattr(frozen, "extract", None)
    run_here("bd_cspn", f"{base} --out {tmp_path / 'b'} --imbalance 2")
    run_here("tim", f"{base} --out {tmp_path / 'c'} --steps 3 --shots 3")
    # of another network they are made anew
    state, about = weights.load(small / "baseline" / "model.safetensors")
    state["features.blocks.0.0.bias"] += 1
    weights.save_state(tmp_path / "other.safetensors", state, about)
    monkeypatch.setattr(frozen, "extract", extract)
    other = base.replace(str(small / "baseline"), str(tmp_path / "other.safetensors"))
    run_here("tim", f"{other} --out {tmp_path / 'd'} --steps 3")
    assert len(list((tmp_path / "features").iterdir())) == 3
    # and of other pictures
    first = next((small / "data" / "test").rglob("*.png"))
    before = first.read_bytes()
    try:
        Image.new("RGB", (20, 20)).save(first)
        run_here("tim", f"{base} --out {tmp_path / 'e'} --steps 3")
    finally:
        first.write_bytes(before)
    assert len(list((tmp_path / "features").iterdir())) == 4


def test_a_damaged_file_of_features_is_named(small, tmp_path):
    base = f"--dataset {small / 'data'} --init {small / 'baseline'} --features {tmp_path / 'features'} {TASKS}"
    run_here("tim", f"{base} --out {tmp_path / 'a'} --steps 3")
    (path,) = (tmp_path / "features").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit, match=rf"{path.name} is damaged .*: delete it"):
        run_here("tim", f"{base} --out {tmp_path / 'b'} --steps 3")


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from runs import run_here
from fewshot.evaluation import frozen

folder, how, flags = sys.argv[1:]
extract = frozen.extract

def slowly(*arguments):
    print("begun to extract", flush=True)
    while how == "slow" and not os.path.exists(f"{folder}/go"):
        time.sleep(0.02)
    return extract(*arguments)

def killed(tensors, path):
    Path(path).write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)

frozen.extract = slowly
if how == "killed":
    frozen.save_file = killed
run_here("pt_map", flags)
"""


@pytest.mark.slow  # tests/test_cache.py has the same lock
def test_one_program_extracts_and_another_waits(small, tmp_path):
    """And nothing is taken of what a program that was killed had written."""
    base = f"--dataset {small / 'data'} --init {small / 'baseline'} --features {tmp_path / 'features'} {TASKS}"
    options = {
        "stdout": subprocess.PIPE,
        "text": True,
        "env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    }

    def begun(how: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-c",
            PROGRAM,
            str(tmp_path),
            how,
            f"{base} --out {tmp_path / how}",
        ]
        return subprocess.Popen(command, **options)

    killed = begun("killed")
    killed.communicate(timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert any(path.suffix == ".tmp" for path in (tmp_path / "features").iterdir())
    first = begun("slow")
    while "begun to extract" not in first.stdout.readline():
        assert first.poll() is None
    second, said = begun("quick"), ""
    while "waiting for it" not in said:
        said = second.stdout.readline()
        assert said and "begun to extract" not in said
    (tmp_path / "go").touch()
    assert "begun to extract" not in second.communicate(timeout=100)[0] and second.returncode == 0
    first.communicate(timeout=100)
    assert first.returncode == 0 and len(list((tmp_path / "features").iterdir())) == 1
    run_here("pt_map", flags(small, tmp_path / "alone"))
    alone, *others = (metrics(tmp_path / name)["shots"] for name in ("alone", "slow", "quick"))
    assert others == [alone, alone]


def test_the_base_mean_is_that_of_all_training_pictures(small, tmp_path):
    run_here("simple_shot", flags(small, tmp_path))
    model = fewshot.load(tmp_path)
    dataset = open_dataset(str(small / "data"), "", "train", size=32)
    accelerator = Accelerator(cpu=True)
    features = meta_test.extract(accelerator, model.network, dataset, np.arange(len(dataset)))
    torch.testing.assert_close(model.network.mean, features.mean(0))
    assert model.network.mean.abs().sum() > 0


def test_a_model_is_tested_again_from_its_file_and_used(small, tmp_path):
    run_here("laplacian_shot", f"{flags(small, tmp_path)} --shots 1 --lam 0.5")
    again = f"--test-only --out {tmp_path} --dataset {small / 'data'} --features {tmp_path / 'f'} {TASKS}"
    run_here("laplacian_shot", f"{again} --shots 3 --imbalance 1")
    (result,) = results_of_tests(tmp_path)
    assert (
        result["settings"]["trained"]["lam"] == 0.5
        and result["settings"]["tested"]["imbalance"] == 1
    )
    with pytest.raises(SystemExit, match=r"made with lam=0\.5, not 0\.6"):
        run_here("laplacian_shot", f"{again} --lam 0.6")
    model = fewshot.load(tmp_path)
    pictures = sorted((small / "data" / "test" / "test0").glob("*.png"))[:6]
    others = sorted((small / "data" / "test" / "test1").glob("*.png"))[:6]
    model.support([*pictures[:3], *others[:2]], ["a"] * 3 + ["b"] * 2)
    guesses = model.predict([*pictures[3:], *others[2:]])
    assert [guess.name for guess in guesses] == ["a"] * 3 + ["b"] * 4


def test_imbalanced_tasks():
    by_class = [np.arange(i * 100, (i + 1) * 100) for i in range(8)]
    seen = set()
    for index in range(50):
        drawn, counts = episodes.draw_imbalanced(by_class, 5, 5, 15, 2.0, seed=3, index=index)
        assert counts.sum() == len(drawn.query) == 75 and drawn.support.shape == (5, 5)
        assert (drawn.query // 100 == drawn.classes.repeat(counts)).all()
        assert not set(drawn.query) & set(drawn.support.ravel()), "no query is a support"
        one, same = episodes.draw_imbalanced(by_class, 5, 1, 15, 2.0, seed=3, index=index)
        assert (
            (one.query == drawn.query).all()
            and (one.support == drawn.support[:, :1]).all()
            and (same == counts).all()
        )
        seen.add(tuple(counts))
    assert len(seen) == 50
    spread = [
        episodes.draw_imbalanced(by_class, 5, 1, 15, a, 0, i)[1].std()
        for a in (0.5, 2, 100)
        for i in range(50)
    ]
    wide, published, narrow = np.mean(np.reshape(spread, (3, 50)), 1)
    assert wide > published > narrow
    with pytest.raises(
        InputError, match=r"may get all 75 queries .* has 40 pictures; give --queries 7 or fewer"
    ):
        episodes.draw_imbalanced([c[:40] for c in by_class], 5, 5, 15, 2.0, 0, 0)
    with pytest.raises(InputError, match="--imbalance 0: give a number above 0"):
        episodes.draw_imbalanced(by_class, 5, 5, 15, 0, 0, 0)


@pytest.mark.parametrize("given", ["", "--init x --backbone torchvision/resnet18"])
def test_one_backbone_has_to_be_given(given, tmp_path):
    with pytest.raises(
        SystemExit, match=r"give a trained model, say --init .*, or else a pretrained network, say"
    ):
        run_here("tim", f"{given} --out {tmp_path / 'run'} {TASKS}")
    assert not (tmp_path / "run").exists()


def test_roots_of_negative_features_are_refused(small, tmp_path):
    """Hard-swish gives such; PT-MAP says so in a line, and takes them as zeros if told to."""
    base = f"--dataset {small / 'data'} --backbone torchvision/mobilenet_v3_small --weights none --size 32"
    base += f" --features {tmp_path / 'f'} {TASKS}"
    with pytest.raises(SystemExit, match="features are below 0: clamp them or leave it out"):
        run_here("pt_map", f"{base} --out {tmp_path / 'a'}")
    run_here("pt_map", f"{base} --out {tmp_path / 'b'} --clamp")
    assert np.isfinite(metrics(tmp_path / "b")["shots"]["1"]["accuracy"])


def test_default_folders_tell_what_differs():
    start = "--init runs/baseline/glyphs-conv4-seed0"
    variants = [
        start,
        f"{start} --imbalance 2",
        f"{start} --test-dataset cub",
        "--backbone torchvision/resnet18",
    ]
    folders = [
        frozen.default_folder("tim", parse("tim", f"{flags} --seed {seed}"))
        for flags in variants
        for seed in (0, 1)
    ]
    assert (
        len(set(folders)) == 8 and folders[0] == "runs/tim/glyphs-baseline-glyphs-conv4-seed0-seed0"
    )


def test_every_method_is_in_the_table():
    assert set(TRAINING_FREE) <= set(fewshot.methods.CLASSIFIERS)
    assert all(recipe == load(recipe).METHOD for recipe in TRAINING_FREE)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_do_not_matter(processes, small, tmp_path):
    run_here("bd_cspn", f"{flags(small, tmp_path / 'one')} --save-tasks")
    several = flags(small, tmp_path / "several").replace(
        str(small / "features"), str(tmp_path / "features")
    )
    done = launch("bd_cspn", f"{several} --save-tasks", processes=processes)
    assert done.returncode == 0, done.stderr
    one, many = (
        json.loads((tmp_path / name / "tasks.json").read_text()) for name in ("one", "several")
    )
    assert one == many

"""Recipes run by tests: their names and quick flags, in this process or as their own, and what they
leave behind.
"""

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
import tyro
from filelock import FileLock
from safetensors.torch import load_file

from fewshot.data import detection
from fewshot.training.run import Training

ROOT = Path(__file__).parents[1]
EVERY = sorted(p.stem for p in (ROOT / "recipes").glob("*.py"))
# tests/test_training_free.py has what is to be said of these
TRAINING_FREE = [
    recipe for recipe in EVERY if "frozen.opened" in (ROOT / "recipes" / f"{recipe}.py").read_text()
]
PROTOTYPES = ["prototype_detector"]  # trains nothing either: tests/test_prototype_detector.py
RECIPES = [recipe for recipe in EVERY if recipe not in TRAINING_FREE + PROTOTYPES]
# a few steps of everything: small enough for every test run, large enough to go through all the
# code
TEST = "--iters 8 --eval-every 4 --val-tasks 4 --tasks 10"
EPISODIC, SUPERVISED = f"{TEST} --train-ways 5 --train-queries 4", f"{TEST} --batch-size 8"
QUICK = {
    "baseline": SUPERVISED,
    "baseline_plus": SUPERVISED,
    "neg_margin": SUPERVISED,
    "proto_net": EPISODIC,
    "matching_net": EPISODIC,
    "relation_net": EPISODIC,
    "meta_baseline": EPISODIC,
    "feat": EPISODIC,
    "frn": EPISODIC,
    "pmf": "--size 16 --iters 8 --eval-every 4 --val-tasks 4 --tasks 4 --train-queries 4",
    "maml": "--iters 8 --eval-every 4 --val-tasks 2 --tasks 4 --train-queries 4 --batch-size 2",
} | dict.fromkeys(
    ("attention_rpn", "defrcn", "fsce", "fsdetview", "meta_rcnn", "mpsr", "tfa", "vfa"),
    "--iters 6 --save-every 3 --shots 1 --batch-size 2 --test-images 12",
)
DETECTORS = [recipe for recipe in RECIPES if "--shots 1" in QUICK[recipe]]
CLASSIFIERS = [recipe for recipe in RECIPES if recipe not in DETECTORS]
# two steps, and little of all else
FEWER = {
    True: "--iters 2 --save-every 2 --test-images 1",
    False: "--iters 2 --eval-every 2 --val-tasks 1 --tasks 1",
}
FEW = {recipe: f"{QUICK[recipe]} {FEWER[recipe in DETECTORS]}" for recipe in RECIPES}


# what fine-tuning leaves as base training made it
FROZEN = {
    "attention_rpn": ("trunk.", "rpn."),
    "defrcn": ("trunk.conv1.", "trunk.bn1.", "trunk.layer1.", "trunk.layer2.", "trunk.stage4."),
    "fsce": ("trunk.conv1.", "trunk.stages."),
    "fsdetview": ("trunk.", "rpn.", "product.fc.", "difference.fc."),
    "meta_rcnn": ("trunk.", "rpn."),
    "mpsr": (),
    "tfa": ("trunk.", "rpn.", "fc1.", "fc2."),
    "vfa": ("trunk.", "rpn."),
}


def some(cases: list, fast: set) -> list:
    """Test cases of which all but the `fast` ones are slow."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[] if case in fast else [pytest.mark.slow],
        )
        for case in cases
    ]


def draw_scenes_once() -> None:
    """From now on this process lays out and draws each glyph scene once: half of what a small
    detector's run costs.
    """
    lay_out = detection._scene

    @functools.cache
    def scene(number: int):
        scene = lay_out(number)
        object.__setattr__(scene, "draw", functools.cache(scene.draw))
        return scene

    detection._scene = scene


def load(recipe: str | Path) -> ModuleType:
    """The module of a recipe, given by its name or as a file."""
    path = recipe if isinstance(recipe, Path) else ROOT / "recipes" / f"{recipe}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and worker processes look the module up
    spec.loader.exec_module(module)
    return module


def parse(recipe: str, flags: str):
    return tyro.cli(load(recipe).Args, args=flags.split())


def run_here(recipe: str | Path, flags: str) -> None:
    """The recipe in this process, without loader workers unless `flags` ask for some."""
    module = load(recipe)
    module.main(tyro.cli(module.Args, args=f"--workers 0 {flags}".split()))


@contextmanager
def after_each_step(act: Callable[[int, Mapping[str, torch.Tensor]], None]) -> Iterator[None]:
    """Inside the block every training calls act(step, losses) when a step is logged."""
    log = Training.log

    def logged(training: Training, step: int, losses: Mapping, *ids, **more) -> None:
        log(training, step, losses, *ids, **more)
        act(step, losses)

    Training.log = logged
    try:
        yield
    finally:
        Training.log = log


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, once for all test processes."""
    made = folder.with_name(f"{folder.name}.made")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            make(folder)
            made.touch()
    return folder


def launch(
    script: str | Path,
    flags: str,
    processes: int = 1,
    launcher: str = "",
    hash_seed: str = "random",
) -> subprocess.CompletedProcess:
    """A recipe, by its name, or another script as its own process(es) on the CPU."""
    command = [sys.executable, "-m"]
    if processes > 1:  # accelerate starts a single process where there is no GPU
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    else:
        command += ["accelerate.commands.launch", *launcher.split()]
    path = script if isinstance(script, Path) else ROOT / "recipes" / f"{script}.py"
    settings = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": hash_seed}
    return subprocess.run(
        [*command, str(path), *flags.split()],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=550,
    )


def killed(
    recipe: str, flags: str, out: Path, when: Path, number: int = signal.SIGKILL
) -> tuple[int, str]:
    """The exit status of the recipe in a process of its own, sent a signal as soon as a file is
    there, and what it said.
    """
    command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *flags.split()]
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.time() + 120
    while not when.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    said = process.communicate()[0]
    assert when.exists(), said[-3000:]
    return process.returncode, said


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def result_of(folder: Path) -> dict:
    """metrics.json without the run's settings, which name its folder and id."""
    return {key: value for key, value in metrics(folder).items() if key != "settings"}


def results_of_tests(folder: Path) -> list[dict]:
    """What --test-only wrote."""
    paths = [p for p in sorted(folder.glob("test-*.json")) if p.stem.count("-") == 1]
    return [json.loads(path.read_text()) for path in paths]


def files(folder: Path) -> dict[str, str]:
    """The hash of every file of a run, but for the lock's and tests' own."""
    paths = [
        p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(("lock", "test-"))
    ]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def differences(first: Path, second: Path) -> list[str]:
    """In what two finished runs differ, stage by stage: tensors of their models, to the bit, and
    results.
    """
    stages = [path.parent.relative_to(first) for path in sorted(first.rglob("metrics.json"))]
    assert stages, f"{first} is not finished"
    found = []
    for stage in stages:
        a, b = (load_file(run / stage / "model.safetensors") for run in (first, second))
        found += [
            f"{second / stage}: {name}"
            for name in sorted(a.keys() | b.keys())
            if name not in a or name not in b or not torch.equal(a[name], b[name])
        ]
        if result_of(first / stage) != result_of(second / stage):
            found.append(f"{second / stage}: results")
    return found

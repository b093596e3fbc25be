"""Recipes run by tests: their names and quick flags, in this process or as their own, and what they
leave behind.
"""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import tyro

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


# the recipes that differ in how they run: an episode, a task's adaptation, two stages; the others
# are slow tests
DIFFERENT = {"maml", "meta_rcnn", "proto_net"}
MOMENTS = ("base", "between", "finetune")


def load(recipe: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(recipe, ROOT / "recipes" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[recipe] = module  # dataclasses and worker processes look the module up
    spec.loader.exec_module(module)
    return module


def parse(recipe: str, flags: str):
    return tyro.cli(load(recipe).Args, args=flags.split())


def run_here(recipe: str, flags: str) -> None:
    """The recipe in this process, without loader workers."""
    module = load(recipe)
    module.main(tyro.cli(module.Args, args=f"{flags} --workers 0".split()))


def launch(
    recipe: str, flags: str, processes: int = 1, launcher: str = ""
) -> subprocess.CompletedProcess:
    """The recipe as its own process(es) on the CPU."""
    command = [sys.executable, "-m"]
    if processes > 1:  # accelerate starts a single process where there is no GPU
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    else:
        command += ["accelerate.commands.launch", *launcher.split()]
    command += [str(ROOT / "recipes" / f"{recipe}.py"), *flags.split()]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


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


def killed(recipe: str, flags: str, out: Path, when: Path, number: int = signal.SIGKILL) -> int:
    """The exit status of the recipe in a process of its own, sent a signal as soon as a file is
    there.
    """
    command = [
        sys.executable,
        str(ROOT / "recipes" / f"{recipe}.py"),
        *flags.split(),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.time() + 120
    while not when.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.said = process.communicate()[0]
    assert when.exists(), process.said[-3000:]
    killed.said = process.said
    return process.returncode

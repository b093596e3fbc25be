"""Golden first losses: what every recipe computes in its first three steps, stage by stage, on the
embedded data.

    python tests/first_losses.py            compares with tests/goldens/first_losses.json and prints the differences
    python tests/first_losses.py --renew    writes the file anew: only where a commit says which numbers moved, and why

One thread, float32, no workers. Rewriting must not move a digit here; another processor may round
otherwise, which is what the tolerance of tests/test_first_losses.py is for.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from runs import DETECTORS, after_each_step, once, run_here
from runs import load as module_of  # noqa: F401

FILE = Path(__file__).parent / "goldens" / "first_losses.json"
STEPS = 3
CLASSIFIER = f"--iters {STEPS} --eval-every 100 --val-tasks 2 --tasks 2 --workers 0"
EPISODIC = f"{CLASSIFIER} --train-queries 4"
DETECTOR = f"--iters {STEPS} --batch-size 2 --test-images 1 --shots 2 --workers 0"
RUNS = {
    "baseline": f"{CLASSIFIER} --batch-size 16",
    "baseline_plus": f"{CLASSIFIER} --batch-size 16",
    "neg_margin": f"{CLASSIFIER} --batch-size 16",
    "proto_net": EPISODIC,
    "proto_net as published": f"{EPISODIC} --distance squared",
    "matching_net": EPISODIC,
    "relation_net": EPISODIC,
    "meta_baseline": f"{EPISODIC} --train-ways 5",
    "maml": EPISODIC,
    "feat": EPISODIC,
    "frn": f"{EPISODIC} --train-ways 5",
    "pmf": f"{EPISODIC} --test-steps 1",
    "tfa": DETECTOR,
    "tfa novel": f"{DETECTOR} --stage novel",
    "fsce": DETECTOR,
    "mpsr": DETECTOR,
    "attention_rpn": DETECTOR,
    "meta_rcnn": DETECTOR,
    "vfa": DETECTOR,
    "defrcn": DETECTOR,
    "fsdetview": DETECTOR,
}
# in which kept runs differ, none of which moves a loss: two saves, and tests that neither 2 nor 3
# processes divide evenly
KEPT = {True: "--save-every 2 --test-images 5", False: "--eval-every 2 --tasks 7"}


def first_losses(name: str, folder: Path, more: str = "") -> list[dict[str, float]]:
    """The terms of the loss in every step of every stage of a run of `RUNS`, into `folder`, in
    order.
    """
    seen: list[dict[str, float]] = []

    def remember(step: int, losses: dict[str, torch.Tensor]) -> None:
        numbers = {key: float(value.detach().double()) for key, value in losses.items()}
        seen.append({"step": step} | numbers)

    recipe = name.split()[0]
    # goes on from a base model, which no step has moved, or rounding would have
    if "--stage" in RUNS[name]:
        run_here(recipe, f"{DETECTOR} {more} --stage base --lr 0 --out {folder}")
    with after_each_step(remember):
        run_here(recipe, f"{RUNS[name]} {more} --out {folder}")
    return seen


def kept(top: Path, name: str) -> Path:
    """The folder of a finished run of `RUNS`, its losses beside it (`losses_of`), made once for all
    test processes.
    """

    def make(folder: Path) -> None:
        losses = first_losses(name, folder, KEPT[name.split()[0] in DETECTORS])
        losses_of(folder).write_text(json.dumps(losses))

    return once(top / name.replace(" ", "_"), make)


def flags_of_test(recipe: str) -> str:
    """With which --test-only tests a kept run as it was tested."""
    if recipe in DETECTORS:
        return "--test-only --shots 2 --test-images 5"
    return "--test-only --tasks 7" + (" --test-steps 1" if recipe == "pmf" else "")


def losses_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def largest_difference(a: list[dict[str, float]], b: list[dict[str, float]]) -> float:
    """The largest relative difference of a term; infinite where steps or terms differ."""
    if [list(step) for step in a] != [list(step) for step in b]:
        return float("inf")
    pairs = [(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x]
    return max(abs(x - y) / max(abs(x), abs(y), 1e-12) for x, y in pairs)


def main() -> None:
    torch.set_num_threads(1)
    names = [name for name in RUNS if not sys.argv[2:] or name in sys.argv[2:]]
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as top:
        found = {name: first_losses(name, Path(top) / name.replace(" ", "_")) for name in names}
    if "--renew" in sys.argv[1:]:
        FILE.write_text(json.dumps(golden | found, indent=1) + "\n")
    for name in names:
        print(f"{name:24} {largest_difference(found[name], golden.get(name, [])):.2e}")


if __name__ == "__main__":
    main()

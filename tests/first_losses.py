"""Golden first losses: what every recipe computes in its first three steps, stage by stage, on the
embedded data.

    python tests/first_losses.py            compares with tests/goldens/first_losses.json and prints the differences
    python tests/first_losses.py --renew    writes the file anew: only where a commit says which numbers moved, and why

One thread, float32, no workers. Rewriting must not move a digit here; another processor may round
otherwise, which is what the tolerance of tests/test_first_losses.py is for.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
import tyro

ROOT = Path(__file__).parents[1]
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


def module_of(recipe: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"golden_{recipe}", ROOT / "recipes" / f"{recipe}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look the module up
    spec.loader.exec_module(module)
    return module


def first_losses(name: str, folder: Path) -> list[dict[str, float]]:
    """The terms of the loss in every step of every stage of a run of `RUNS`, into `folder`, in
    order.
    """
    from fewshot.training import run

    seen: list[dict[str, float]] = []
    log = run.Training.log

    def remember(record, step, losses, ids=()):
        seen.append(
            {"step": step} | {key: float(value.detach().double()) for key, value in losses.items()}
        )
        return log(record, step, losses, ids)

    recipe = name.split()[0]
    module = module_of(recipe)
    run.Training.log = remember
    try:
        out = folder / name.replace(" ", "_")
        if (
            "--stage" in RUNS[name]
        ):  # goes on from a base model, which no step has moved, or rounding would have
            base = [*DETECTOR.split(), "--stage", "base", "--lr", "0", "--out", str(out)]
            module.main(tyro.cli(module.Args, args=base))
            seen.clear()
        module.main(tyro.cli(module.Args, args=[*RUNS[name].split(), "--out", str(out)]))
    finally:
        run.Training.log = log
    return seen


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
    with tempfile.TemporaryDirectory() as folder:
        found = {name: first_losses(name, Path(folder)) for name in names}
    if "--renew" in sys.argv[1:]:
        FILE.write_text(json.dumps(golden | found, indent=1) + "\n")
    for name in names:
        print(f"{name:24} {largest_difference(found[name], golden.get(name, [])):.2e}")


if __name__ == "__main__":
    main()

"""Faults of a running training: kills at any moment, full disks, data that go, and processes and workers that die.

Kills after a state is saved and signals to a single process are in test_recipes.py, damaged states in test_state.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# three saves, as the third is the first that removes a state
TINY = {
    "proto_net": "--size 16 --iters 3 --eval-every 1 --val-tasks 4 --tasks 4 --train-ways 5 --train-queries 4",
    "meta_rcnn": "--iters 3 --save-every 1 --shots 1 --batch-size 2 --test-images 1 --short 96 --support-size 96"
    " --rois 16",
}
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def kills(folder: Path, recipe: str, flags: str = "", **plan) -> dict:
    """The report of tests/killed.py, which must not have found anything wrong."""
    folder.mkdir(exist_ok=True)
    plan |= {"recipe": recipe, "flags": f"{TINY[recipe]} {flags}"}
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(folder), json.dumps(plan)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((folder / "report.json").read_text())
    assert not report["wrong"], f"{len(report['wrong'])} of {report['killed']} kills: " + "\n".join(report["wrong"])
    return report


def all_files_are_watched(straight: Path, names: list[str]) -> bool:
    """Whether the operations on files that were counted are of every file that a run leaves."""
    touched = {Path(name.split(" ")[-1].removesuffix(".tmp")).name for name in names}
    return {path.name for path in straight.rglob("*") if path.is_file()} <= touched


@pytest.mark.parametrize(("recipe", "spread"), [("proto_net", 4), ("meta_rcnn", 2)])
def test_killed_at_an_operation_on_files(recipe, spread, tmp_path):
    """Wherever in writing its files a run is killed, --resume ends with the weights, results and log of a straight one.

    Killed from the beginning of the run to its end, in both stages of a detector.
    """
    report = kills(tmp_path, recipe, spread=spread)
    assert report["killed"] == spread
    assert all_files_are_watched(tmp_path / "straight", report["names"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TINY)
def test_killed_at_every_operation_on_files(recipe, tmp_path):
    report = kills(tmp_path, recipe, every=True)
    print(f"{recipe}: killed at each of {report['killed']} operations")
    assert report["killed"] == len(report["names"]) > 70


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stage"), [("proto_net", ""), ("meta_rcnn", "--stage base"), ("meta_rcnn", "--stage finetune")]
)
def test_killed_at_random_moments(recipe, stage, tmp_path):
    finished = {}
    if "finetune" in stage:
        kills(tmp_path / "before", recipe, "--stage base")
        finished["finished"] = str(tmp_path / "before" / "straight")
    report = kills(tmp_path / "killed", recipe, stage, random=20, **finished)
    print(f"{recipe} {stage}: killed at {report['killed']} random moments")
    assert report["killed"] == 20


RESUMED = [{"at": ["begin log.jsonl"], "spread": 2}, pytest.param({"every": True}, marks=pytest.mark.slow)]


@pytest.mark.parametrize("where", RESUMED, ids=["some", "every"])
def test_killed_again_in_the_resumption(where, tmp_path):
    """What was killed between the renames of a save, when only the state before it is there, and then in going on."""
    report = kills(tmp_path, "proto_net", first="os.rename last.tmp", **where)
    print(f"proto_net: killed again at {report['killed']} operations")
    assert report["killed"] == (3 if "at" in where else len(report["names"]))

"""A run of many steps keeps to the memory and the open files that it began with, and so do its
loading processes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
# a picture, or episode, as small as it gets: the steps are what counts
FLAGS = {
    "proto_net": "--train-ways 2 --train-shots 1 --train-queries 1 --val-tasks 2 --tasks 2 --queries 2 --shots 1",
    "tfa": "--stage base --batch-size 1 --rois 4 --test-images 1 --short 64",
}
WATCH = """
import multiprocessing, os, sys
import torch
from runs import load
from fewshot.training import run
import tyro

recipe, every, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
torch.set_num_threads(1)
steps = run.Training.steps

def resident(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def watched(self, batches):
    for step, batch in steps(self, batches):
        yield step, batch
        if step % every == 0:
            workers = [child.pid for child in multiprocessing.active_children()]
            sizes = [resident(pid) for pid in (os.getpid(), *workers)]
            files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), *workers)]
            print("WATCHED", step, *(f"{size:.1f}" for size in sizes), "FILES", *files, flush=True)

run.Training.steps = watched
module = load(recipe)
module.main(tyro.cli(module.Args, args=flags))
"""


def watched(
    recipe: str, steps: int, every: int, folder: Path
) -> tuple[list[list[float]], list[list[int]]]:
    """Resident MB and open files, of the run and its workers, every so many steps."""
    save = "--eval-every" if recipe == "proto_net" else "--save-every"
    flags = f"{FLAGS[recipe]} --iters {steps} {save} {every} --workers 2 --out {folder}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WATCH, recipe, str(every), *flags.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = re.findall(r"^WATCHED \d+ (.*) FILES (.*)$", done.stdout, re.M)
    assert len(seen) == steps // every
    memory = [[float(x) for x in sizes.split()] for sizes, _ in seen]
    files = [[int(x) for x in counts.split()] for _, counts in seen]
    return memory, files


def check(recipe: str, steps: int, every: int, room: float, folder: Path) -> None:
    """From the second third to the last nothing grows by more than `room` MB, and no file stays
    open.

    What a process keeps is the least that it has in that time: batches on their way come and go, by
    megabytes.
    """
    memory, files = watched(recipe, steps, every, folder)
    first = len(memory) // 3
    assert all(len(sizes) == 3 for sizes in memory), "the run and its two workers"
    second, last = (
        [min(sizes) for sizes in zip(*part)]
        for part in (memory[first : 2 * first], memory[2 * first :])
    )
    print(
        f"{recipe}, {steps} steps: {second} MB, then {last} MB; files {files[first]}, then {files[-1]}"
    )
    assert max(end - begun for begun, end in zip(second, last)) < room, memory
    late = files[2 * len(files) // 3 :]
    assert late[-1][0] <= files[first][0] + 1, files
    # batches on their way are open files too, now more, now fewer
    assert (
        max(max(counts[1:]) for counts in late)
        <= max(max(counts[1:]) for counts in files[: first + 1]) + 16
    ), files


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the system does not tell a process's memory"
)
@pytest.mark.parametrize(
    ("recipe", "steps", "every", "room"),
    [
        ("proto_net", 480, 20, 4),
        pytest.param("proto_net", 4000, 200, 3, marks=pytest.mark.slow),
        pytest.param("tfa", 1500, 100, 3, marks=pytest.mark.slow),
    ],
)
def test_nothing_grows(recipe, steps, every, room, tmp_path):
    check(recipe, steps, every, room, tmp_path)

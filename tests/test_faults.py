"""Faults of a running training: kills at any moment, full disks, data that go, and processes and
workers that die.

Kills after a state is saved and signals to a single process are in test_recipes.py, damaged states
in test_state.py.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import coco_format
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from runs import result_of, run_here
from safetensors.torch import load_file

from fewshot import InputError
from fewshot.data import detection, pictures
from fewshot.data.stream import Feed, stream
from fewshot.training import run

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
    command = [
        sys.executable,
        str(Path(__file__).with_name("killed.py")),
        str(folder),
        json.dumps(plan),
    ]
    most = 7200 if plan.get("every") or plan.get("random") else 300
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=most)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((folder / "report.json").read_text())
    assert not report["wrong"], f"{len(report['wrong'])} of {report['killed']} kills: " + "\n".join(
        report["wrong"]
    )
    return report


def all_files_are_watched(straight: Path, names: list[str]) -> bool:
    """Whether the operations on files that were counted are of every file that a run leaves."""
    touched = {Path(name.split(" ")[-1].removesuffix(".tmp")).name for name in names}
    return {path.name for path in straight.rglob("*") if path.is_file()} <= touched


@pytest.mark.parametrize(
    ("recipe", "spread"), [("proto_net", 3), pytest.param("meta_rcnn", 3, marks=pytest.mark.slow)]
)
def test_killed_at_an_operation_on_files(recipe, spread, tmp_path):
    """Wherever in writing its files a run is killed, --resume ends with the weights, results and
    log of a straight one.

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
    ("recipe", "stage"),
    [("proto_net", ""), ("meta_rcnn", "--stage base"), ("meta_rcnn", "--stage finetune")],
)
def test_killed_at_random_moments(recipe, stage, tmp_path):
    finished = {}
    if "finetune" in stage:
        kills(tmp_path / "before", recipe, "--stage base")
        finished["finished"] = str(tmp_path / "before" / "straight")
    report = kills(tmp_path / "killed", recipe, stage, random=20, **finished)
    print(f"{recipe} {stage}: killed at {report['killed']} random moments")
    assert report["killed"] == 20


RESUMED = [
    {"at": ["begin log.jsonl"], "spread": 2},
    pytest.param({"every": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("where", RESUMED, ids=["some", "every"])
def test_killed_again_in_the_resumption(where, tmp_path):
    """What was killed between the renames of a save, when only the state before it is there, and
    then in going on.
    """
    report = kills(tmp_path, "proto_net", first="os.rename last.tmp", **where)
    print(f"proto_net: killed again at {report['killed']} operations")
    assert report["killed"] == (3 if "at" in where else len(report["names"]))


# several processes

ERROR = r"error( \(process \d\))?: "


class Started:
    """A recipe in processes of its own; what it says goes to a file."""

    def __init__(self, recipe: str, flags: str, out: Path, processes: int = 1):
        command = [str(ROOT / "recipes" / f"{recipe}.py"), *flags.split(), "--out", str(out)]
        if processes > 1:
            command = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(processes),
                *command,
            ]
        self.log = out.with_name(f"{out.name}.log")
        with self.log.open("w") as log:
            streams = {
                "stdout": log,
                "stderr": log,
                "start_new_session": True,
            }  # a process group, as a terminal's
            self.process = subprocess.Popen([sys.executable, *command], env=ENVIRONMENT, **streams)

    def wait_for(self, file: Path) -> None:
        deadline = time.time() + 120
        while not file.exists() and time.time() < deadline:
            assert self.process.poll() is None, self.said()
            time.sleep(0.02)
        assert file.exists(), self.said()

    def ranks(self) -> list[psutil.Process]:
        """The launcher's processes, in order."""
        ranks = psutil.Process(self.process.pid).children()
        return sorted(ranks, key=lambda process: int(process.environ()["RANK"]))

    def ended(self, within: float = 60) -> int:
        """The exit status, which comes within a minute, and leaves no process behind."""
        below = (
            psutil.Process(self.process.pid).children(recursive=True)
            if self.process.poll() is None
            else []
        )
        try:
            status = self.process.wait(within)
        finally:
            left = psutil.wait_procs(below, timeout=10)[1]
            for process in left:
                process.kill()
        assert not left, self.said()
        return status

    def said(self) -> list[str]:
        text = re.sub(r"\x1b\[A|\r", "\n", self.log.read_text())  # how progress bars move
        return [line.strip() for line in text.splitlines() if line.strip()]

    def statuses(self) -> list[int]:
        """What the launcher says of how its processes ended."""
        return [
            int(code) for line in self.said() for code in re.findall(r"exitcode\s*: (-?\d+)", line)
        ]

    def lines(self, begin: str) -> list[str]:
        return [line for line in self.said() if re.match(begin, line)]

    def no_traceback_of_ours(self) -> bool:
        """The launcher of several processes ends with a traceback of its own."""
        return not any("recipes/" in line and "File " in line for line in self.said())


def same(straight: Path, folder: Path) -> bool:
    a, b = (load_file(place / "model.safetensors") for place in (straight, folder))
    return (
        a.keys() == b.keys()
        and all(torch.equal(a[n], b[n]) for n in a)
        and result_of(straight) == result_of(folder)
    )


def saved_step(folder: Path) -> int:
    return json.loads((folder / "last" / "record.json").read_text())["step"]


# A line in the log tells that ten steps are done; there are many more, and no save among them
LONG = (
    TINY["proto_net"].replace("--iters 3 --eval-every 1", "--iters 150 --eval-every 150")
    + " --batch-size 2"
)


@pytest.fixture(scope="module")
def straight_of_two(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert Started("proto_net", f"{LONG} --workers 0", out, processes=2).ended(300) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("who", ["first", "second", "all"])
def test_two_processes_are_told_to_stop(who, straight_of_two, tmp_path):
    """By SIGTERM to one of them, or Ctrl-C to all and their launcher: both stop after the same
    step, whose state is saved once; two processes go on with it."""
    out = tmp_path / "run"
    began = Started("proto_net", f"{LONG} --workers 0", out, processes=2)
    began.wait_for(out / "log.jsonl")
    if who == "all":
        os.killpg(began.process.pid, signal.SIGINT)
    else:
        began.ranks()[who == "second"].send_signal(signal.SIGTERM)
    assert began.ended() != 0
    # the launcher may end the other before it has ended by itself
    assert who == "all" or {128 + signal.SIGTERM} <= set(began.statuses()) <= {
        128 + signal.SIGTERM,
        -signal.SIGTERM,
    }
    (line,) = began.lines("interrupted: ")
    assert f"step {saved_step(out)} of {out} is saved" in line and began.no_traceback_of_ours()
    assert not (out / "last.old").exists(), "saved more than once"
    resumed = Started("proto_net", f"{LONG} --workers 0 --resume", out, processes=2)
    assert resumed.ended(300) == 0, resumed.said()
    assert same(straight_of_two, out)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_killed(rank, tmp_path):
    """The other ends within a minute, with a line."""
    out, flags = (
        tmp_path / "run",
        LONG.replace("--eval-every 150", "--eval-every 10") + " --workers 0",
    )
    began = Started("proto_net", flags, out, processes=2)
    began.wait_for(out / "last")
    began.ranks()[rank].kill()
    assert began.ended() != 0
    lines = began.lines(ERROR)
    assert len(lines) <= 1 and began.no_traceback_of_ours(), (
        began.said()
    )  # the launcher may end it before it says why
    assert all("another process has ended" in line for line in lines)
    resumed = Started("proto_net", f"{flags} --resume", out, processes=2)
    assert resumed.ended(300) == 0, resumed.said()
    assert saved_step(out) == 150 and (out / "metrics.json").exists()


# data that go


def squares(folder: Path, classes: int = 12, each: int = 6) -> Path:
    """A folder of class folders."""
    draw = np.random.default_rng(0)
    for name in (f"class{i:02d}" for i in range(classes)):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(
                folder / name / f"{i}.png"
            )
    return folder


def scenes(folder: Path) -> Path:
    """A few glyph scenes in COCO's format."""
    for part, number in (("train", 80), ("test", 6)):
        whole = detection.open_detection("glyphs", "", part=part)
        coco_format.write(whole.with_records(whole.records[:number]), folder)
    return folder


OWN = {
    "proto_net": "--size 16 --iters 8 --eval-every 8 --val-tasks 4 --tasks 4 --ways 2 --queries 1 --train-ways 4 "
    "--train-shots 1 --train-queries 1",
    "meta_rcnn": "--stage base --novel-classes glyph-15 glyph-16 --backbone small --short 96 "
    "--long 96 --support-size 96 --iters 8 --save-every 8 --batch-size 2 --rois 8",
}


def own(recipe: str, folder: Path) -> Path:
    return {"proto_net": squares, "meta_rcnn": scenes}[recipe](folder)


class Reading:
    """Notes (number of steps done, file) of every picture that is read, and does something `after`
    a step.
    """

    def __init__(self, monkeypatch):
        self.read, self.done, self.after = [], 0, {}
        decode, log = pictures.decode, run.Training.log

        def noted(file, name, *mode):
            self.read.append((self.done, str(name)))
            return decode(file, name, *mode)

        def logged(record, step, *terms, **ids):
            log(record, step, *terms, **ids)
            self.done = step
            self.after.pop(step, lambda: None)()

        monkeypatch.setattr(pictures, "decode", noted)
        monkeypatch.setattr(run.Training, "log", logged)


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def remove_all(file: Path) -> None:
    """The whole data set, as of a disk that is not there any more: its classes' or its pictures'
    folders.
    """
    shutil.rmtree(file.parents[1])


@pytest.mark.parametrize("recipe", ["proto_net", pytest.param("meta_rcnn", marks=pytest.mark.slow)])
def test_data_that_go_in_the_middle_of_training(recipe, monkeypatch, tmp_path):
    """One line names the file and the step; when the data are back, the run goes on from the step
    before.
    """
    data, reading = own(recipe, tmp_path / "data"), Reading(monkeypatch)
    shutil.copytree(data, tmp_path / "copy")
    flags, folder = f"{OWN[recipe]} --dataset {data}", "base" if recipe == "meta_rcnn" else ""
    run_here(recipe, f"{flags} --out {tmp_path / 'straight'}")
    file = next(Path(name) for done, name in reversed(reading.read) if 4 <= done < 8)
    for happen in (remove, truncate, remove_all):
        out = tmp_path / happen.__name__
        reading.after[3] = partial(happen, file)
        with pytest.raises(SystemExit) as ended:
            run_here(recipe, f"{flags} --out {out}")
        said, broken = str(ended.value), out / folder
        step = saved_step(broken)
        assert said.startswith("error: ") and "\n" not in said and 3 <= step < 8
        assert str(data if happen is remove_all else file) in said
        assert f"met in step {step + 1}, step {step} of {broken} is saved" in said
        shutil.copytree(tmp_path / "copy", data, dirs_exist_ok=True)
        run_here(recipe, f"{flags} --out {out} --resume")
        assert same(tmp_path / "straight" / folder, broken)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OWN)
def test_data_that_only_one_of_two_processes_misses(recipe, tmp_path):
    """Both end after the same step, whose state is saved, and one says why."""
    data = own(recipe, tmp_path / "data")
    flags = f"{OWN[recipe]} --dataset {data} --workers 0".replace("--iters 8", "--iters 150")
    flags += " --batch-size 2" if recipe == "proto_net" else ""
    out, folder = tmp_path / "run", "base" if recipe == "meta_rcnn" else ""
    began = Started(recipe, flags, out, processes=2)
    began.wait_for(out / folder / "log.jsonl")
    files = (
        sorted(data.rglob("0.png")) or sorted(data.rglob("*.png"))[:1]
    )  # a picture of every class, or one
    contents = [file.read_bytes() for file in files]
    for file in files:
        truncate(file)
    assert began.ended() != 0
    (line,) = began.lines(ERROR)
    assert ".png: not readable" in line
    assert (
        f"step {saved_step(out / folder)} of {out / folder} is saved" in line
        and began.no_traceback_of_ours()
    )
    for file, whole in zip(files, contents):
        file.write_bytes(whole)
    resumed = Started(recipe, f"{flags} --resume", out, processes=2)
    assert resumed.ended(300) == 0, resumed.said()


# full disks


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of its own of 64 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"may not mount a disk: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, room: int) -> None:
    """Leave so many bytes."""
    with (disk / "filler").open("wb") as filler:
        state = os.statvfs(disk)
        os.posix_fallocate(filler.fileno(), 0, state.f_bavail * state.f_frsize - room)


def full_at(recipe: str, rooms: list[int], disk: Path, monkeypatch) -> set[str]:
    """A run whose disk has only so much room from step 2 on ends with a line, and goes on when
    there is room.

    What the lines call that could not be written.
    """
    reading, out, folder = (
        Reading(monkeypatch),
        disk / "run",
        "base" if recipe == "meta_rcnn" else "",
    )
    flags = TINY[recipe] + (" --stage base" if folder else "")
    run_here(recipe, f"{flags} --out {disk.parent / 'straight'}")
    named = set()
    for room in rooms:
        reading.after[2] = partial(fill, disk, room)
        with pytest.raises(SystemExit) as ended:
            run_here(recipe, f"{flags} --out {out}")
        said = str(ended.value)
        assert said.startswith("error: ") and "\n" not in said, said
        assert str(out / folder) in said and "make room on the disk" in said, said
        assert saved_step(out / folder) >= 1 and not (out / folder / "metrics.json").exists()
        (disk / "filler").unlink()
        run_here(recipe, f"{flags} --out {out} --resume")
        assert same(disk.parent / "straight" / folder, out / folder)
        named.add(
            " ".join(
                re.findall(
                    r"model\.safetensors|state of step|log\.jsonl|[a-z]+\.png|[a-z]+\.json", said
                )
            )
        )
        shutil.rmtree(out)
    return named


def test_a_full_disk(disk, monkeypatch):
    assert full_at("proto_net", [0, 100_000], disk, monkeypatch) == {"state of step"}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "most"), [("proto_net", 1_200_000), ("meta_rcnn", 18_000_000)])
def test_a_disk_that_is_full_at_any_write(recipe, most, disk, monkeypatch):
    """`most` is what the run writes after its second step."""
    rooms = [most * i // 12 for i in range(12)]
    named = full_at(recipe, rooms, disk, monkeypatch)
    print(f"{recipe}: {len(rooms)} sizes of a full disk; not written: {named}")
    assert named


# loaders that die


@pytest.mark.parametrize("recipe", ["proto_net", pytest.param("meta_rcnn", marks=pytest.mark.slow)])
def test_a_loader_is_killed(recipe, tmp_path):
    """As the system does when memory is short: a line, no hang, and the state before is gone on
    from.
    """
    stage = "base" if recipe == "meta_rcnn" else ""
    flags = TINY[recipe].replace("--iters 3", "--iters 60").replace("every 1 ", "every 10 ")
    flags += " --stage base" if stage else ""
    out = tmp_path / "run"
    began = Started(recipe, f"{flags} --workers 2", out)
    began.wait_for(out / stage / "last")
    psutil.Process(began.process.pid).children()[0].kill()
    assert began.ended() == 1
    (line,) = began.lines(ERROR)
    assert "a process that loads data was ended" in line and "--resume goes on" in line
    assert began.no_traceback_of_ours() and not any("Traceback" in said for said in began.said())
    run_here(recipe, f"{flags} --out {out} --resume")
    run_here(recipe, f"{flags} --out {tmp_path / 'straight'}")
    assert same(tmp_path / "straight" / stage, out / stage)


def broken_connection() -> None:
    raise ConnectionResetError(104, "Connection reset by peer")


class HandedOver:
    """What a loader makes, if it is killed while this is handed over: it cannot be unpickled."""

    def __reduce__(self) -> tuple:
        return broken_connection, ()


def test_a_loader_is_killed_while_it_hands_over_a_batch():
    with pytest.raises(
        InputError, match=r"^a process that loads data was ended.* \(ConnectionResetError .*peer\)$"
    ):
        next(stream(lambda order: HandedOver(), [0], Feed(workers=1)))

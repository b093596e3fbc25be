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
from PIL import Image
from runs import after_each_step, differences, run_here

from fewshot import InputError
from fewshot.data import detection, pictures
from fewshot.data.stream import Feed, stream

ROOT = Path(__file__).parents[1]
# three saves, as the third is the first that removes a state
TINY = {
    "proto_net": "--size 16 --iters 3 --eval-every 1 --val-tasks 4 --tasks 4 --train-ways 5 --train-queries 4",
    "meta_rcnn": "--iters 3 --save-every 1 --shots 1 --batch-size 2 --test-images 1 --short 96 --support-size 96"
    " --rois 16",
}
AGAIN = {"first": "os.rename last.tmp"}  # killed there, and then in the resumption
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def kills(folder: Path, *plans: dict) -> list[dict]:
    """The reports of tests/killed.py, which must not have found anything wrong."""
    folder.mkdir(exist_ok=True)
    for plan in plans:
        plan["flags"] = f"{TINY[plan['recipe']]} {plan.get('flags', '')}"
    program = str(Path(__file__).with_name("killed.py"))
    command = [sys.executable, program, str(folder), json.dumps(plans)]
    slow = any(plan.get("every") or plan.get("random") for plan in plans)
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=7200 if slow else 300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = json.loads((folder / "reports.json").read_text())
    for plan, report in zip(plans, reports):
        print(f"{plan['recipe']}: killed {report['killed']} times")
        assert not report["wrong"], "\n".join(report["wrong"])
    return reports


def test_killed_at_an_operation_on_files(tmp_path):
    """Wherever in writing its files a run is killed, --resume ends with the weights, results and
    log of a straight one: from the beginning of a run to its end; again in the resumption, of what
    was killed between the renames of a save, when only the state before it is there; and in the
    last stage of a detector.
    """
    first, again, tuning = kills(
        tmp_path,
        {"recipe": "proto_net", "spread": 3},
        {"recipe": "proto_net", "at": ["begin log.jsonl"], "spread": 1, **AGAIN},
        {"recipe": "meta_rcnn", "at": ["half of 1shot-seed0/last.tmp"]},
    )
    assert (first["killed"], again["killed"], tuning["killed"]) == (3, 2, 1)
    # the operations that were counted are of every file that a run leaves
    touched = {Path(name.split(" ")[-1].removesuffix(".tmp")).name for name in first["names"]}
    left = {path.name for path in (tmp_path / "0" / "straight").rglob("*") if path.is_file()}
    assert left <= touched


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", [{"recipe": "proto_net"}, {"recipe": "meta_rcnn"}, {"recipe": "proto_net", **AGAIN}]
)
def test_killed_at_every_operation_on_files(plan, tmp_path):
    (report,) = kills(tmp_path, plan | {"every": True})
    assert report["killed"] == len(report["names"]) and ("first" in plan or report["killed"] > 70)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stage"),
    [("proto_net", ""), ("meta_rcnn", "--stage base"), ("meta_rcnn", "--stage finetune")],
)
def test_killed_at_random_moments(recipe, stage, tmp_path):
    plan = {"recipe": recipe, "flags": stage, "random": 20}
    if "finetune" in stage:
        kills(tmp_path / "before", {"recipe": recipe, "flags": "--stage base"})
        plan["finished"] = str(tmp_path / "before" / "0" / "straight")
    (report,) = kills(tmp_path / "killed", plan)
    assert report["killed"] == 20


# several processes

ERROR = r"error( \(process \d\))?: "


class Started:
    """A recipe in processes of its own; what it says goes to a file."""

    def __init__(self, recipe: str, flags: str, out: Path, processes: int = 1):
        command = [str(ROOT / "recipes" / f"{recipe}.py"), *flags.split(), "--out", str(out)]
        if processes > 1:
            several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            command = ["-m", *several, *command]
        self.log = out.with_name(f"{out.name}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                env=ENVIRONMENT,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a process group, as a terminal's
            )

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
    assert not differences(straight_of_two, out)


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

    def __init__(self) -> None:
        self.read, self.done, self.after = [], 0, {}

    def step(self, step: int, losses: dict) -> None:
        self.done = step
        self.after.pop(step, lambda: None)()


@pytest.fixture
def reading(monkeypatch) -> Iterator[Reading]:
    reading, decode = Reading(), pictures.decode

    def noted(file, name, *mode):
        reading.read.append((reading.done, str(name)))
        return decode(file, name, *mode)

    monkeypatch.setattr(pictures, "decode", noted)
    with after_each_step(reading.step):
        yield reading


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
def test_data_that_go_in_the_middle_of_training(recipe, reading, tmp_path):
    """One line names the file and the step; when the data are back, the run goes on from the step
    before.
    """
    data = own(recipe, tmp_path / "data")
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
        assert not differences(tmp_path / "straight" / folder, broken)


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


def full_at(recipe: str, rooms: list[int], disk: Path, reading: Reading) -> set[str]:
    """A run whose disk has only so much room from step 2 on ends with a line, and goes on when
    there is room.

    What the lines call that could not be written.
    """
    out, folder = disk / "run", "base" if recipe == "meta_rcnn" else ""
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
        assert not differences(disk.parent / "straight" / folder, out / folder)
        files = r"model\.safetensors|state of step|log\.jsonl|[a-z]+\.png|[a-z]+\.json"
        named.add(" ".join(re.findall(files, said)))
        shutil.rmtree(out)
    return named


def test_a_full_disk(disk, reading):
    assert full_at("proto_net", [0, 100_000], disk, reading) == {"state of step"}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "most"), [("proto_net", 1_200_000), ("meta_rcnn", 18_000_000)])
def test_a_disk_that_is_full_at_any_write(recipe, most, disk, reading):
    """`most` is what the run writes after its second step."""
    rooms = [most * i // 12 for i in range(12)]
    named = full_at(recipe, rooms, disk, reading)
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
    assert not differences(tmp_path / "straight" / stage, out / stage)


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

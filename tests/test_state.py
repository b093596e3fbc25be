"""A run's state that something happened to: the one before is gone on from, or one line says what
to do; full disks.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_run import Args, train

FILES = "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "record.json"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def say(**changes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(
            json.dumps(
                {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "gone"}
            )
        )

    return change


def write(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text)


# name of a fault, the file that it happens to, what happens, and what the line says of it
FAULTS = [
    (f"{how.__name__} {file}", file, how, r"is damaged")
    for file in FILES
    for how in (flip, halve, empty, Path.unlink, become_a_folder)
]
FAULTS += [
    ("record no json", "record.json", write("step 8"), "is damaged"),
    (
        "record of another type",
        "record.json",
        write("[8, 0.5]"),
        "record.json is not one of a state's",
    ),
    ("record of nothing", "record.json", write("null"), "record.json is not one of a state's"),
    (
        "record in latin-1",
        "record.json",
        lambda path: path.write_bytes(b'{"step": "\xe9"}'),
        "is damaged",
    ),
    ("step 99", "record.json", say(step=99), "record.json tells of step 99 of 12"),
    ("step -3", "record.json", say(step=-3), "record.json tells of step -3 of 12"),
    ("step text", "record.json", say(step="8"), "record.json tells of step '8' of 12"),
    ("step half", "record.json", say(step=8.5), "record.json tells of step 8.5 of 12"),
    ("step true", "record.json", say(step=True), "record.json tells of step True of 12"),
    ("no step", "record.json", say(step="gone"), "record.json is not one of a state's"),
    ("no best", "record.json", say(best="gone"), "record.json is not one of a state's"),
    ("best text", "record.json", say(best="good"), "record.json is not one of a state's"),
    ("no checksums", "record.json", say(files="gone"), "record.json is not one of a state's"),
    ("checksums a list", "record.json", say(files=[1]), "record.json is not one of a state's"),
    ("a file elsewhere", "record.json", say(files={"../../args.json": 1}), "is damaged"),
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A run of 12 steps that broke after the states of steps 4 and 8, and the weights that it
    should end with.
    """
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(SystemExit):
        train(folder / "run", 12, Args(), poison=10)
    return folder / "run", train(folder / "straight", 12, Args()).weight


@pytest.mark.parametrize("fault", FAULTS, ids=[name for name, *_ in FAULTS])
def test_a_damaged_state_is_not_gone_on_from(fault, stopped, tmp_path, capsys):
    _, file, happen, message = fault
    run, weight = stopped
    shutil.copytree(run, tmp_path / "run")
    happen(tmp_path / "run" / "last" / file)
    # the state before is whole: it goes on from there, says so, and ends with the same weights
    once = shutil.copytree(tmp_path / "run", tmp_path / "once")
    assert torch.equal(train(once, 12, Args(resume=True)).weight, weight)
    told = capsys.readouterr().out
    assert "resuming after step 4" in told and "last is damaged" in told
    # both are damaged: one line, and nothing is changed
    happen(tmp_path / "run" / "last.old" / file)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=rf"{message}.*--overwrite begins anew"):
        train(tmp_path / "run", 12, Args(resume=True))
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {p: c for p, c in before.items() if "lock" not in p.name} == {
        p: c for p, c in after.items() if "lock" not in p.name
    }
    assert torch.equal(train(tmp_path / "run", 12, Args(overwrite=True)).weight, weight)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '{"id": 1}', '{"method": 5}', '"method"'],
    ids=lambda text: text or "empty",
)
def test_damaged_arguments_are_named(text, stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "run")
    (tmp_path / "run" / "args.json").write_text(text)
    with pytest.raises(
        SystemExit, match=r"args.json cannot be read .*: --overwrite begins anew|give another --out"
    ):
        train(tmp_path / "run", 12, Args(resume=True))


@pytest.mark.parametrize("text", ["", "{", "\x00\x01", '[1]\n"a"\n', '{"step": "x"}\n', "é\n" * 9])
def test_the_log_is_only_a_log(text, stopped, tmp_path):
    run, weight = stopped
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").write_bytes(text.encode("latin-1"))
    assert torch.equal(train(tmp_path / "run", 12, Args(resume=True)).weight, weight)


def test_a_full_disk_keeps_the_state_before(stopped, tmp_path):
    """Files that may not grow beyond a limit stand for it: writing fails in the middle of a save."""
    folder = tmp_path / "run"
    program = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_run import Args, train

def shrink(step):
    if step == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))

train({str(folder)!r}, 12, Args(), stop=shrink)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "make room on the disk" in last and str(folder) in last
    assert json.loads((folder / "last" / "record.json").read_text())["step"] == 4
    assert not (folder / "last.tmp").exists()
    assert torch.equal(train(folder, 12, Args(resume=True)).weight, stopped[1])

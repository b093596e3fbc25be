"""A run's state that something happened to: the one before is gone on from, or one line says what
to do; full disks.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_run import Args, train


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def be_of_step_99(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 99}))


# the file that something happens to, and what happens
FAULTS = [
    ("model.safetensors", flip),
    ("optimizer.bin", halve),
    ("random_states_0.pkl", Path.unlink),
    ("scheduler.bin", become_a_folder),
    ("record.json", lambda path: path.write_text("[8, 0.5]")),
    ("record.json", be_of_step_99),
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


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all files but the lock's."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name]
    return {path: path.read_bytes() for path in paths}


@pytest.mark.parametrize(("file", "happen"), FAULTS)
def test_a_damaged_state_is_not_gone_on_from(file, happen, stopped, tmp_path, capsys):
    run, weight = stopped
    broken = shutil.copytree(run, tmp_path / "run")
    happen(broken / "last" / file)

    # the state before is whole: it goes on from there, says so, and ends with the same weights
    once = shutil.copytree(broken, tmp_path / "once")
    assert torch.equal(train(once, 12, Args(resume=True)).weight, weight)
    told = capsys.readouterr().out
    assert "resuming after step 4" in told and "last is damaged" in told

    # both are damaged: one line, and nothing is changed
    happen(broken / "last.old" / file)
    before = contents(broken)
    with pytest.raises(SystemExit, match=r"is damaged.*--overwrite begins anew"):
        train(broken, 12, Args(resume=True))
    assert contents(broken) == before
    assert torch.equal(train(broken, 12, Args(overwrite=True)).weight, weight)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"id": 1}', '{"method": 5}', '{"method": "tiny", "files": 5}'],
    ids=lambda text: text or "empty",
)
def test_damaged_arguments_are_named(text, stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "run")
    (tmp_path / "run" / "args.json").write_text(text)
    with pytest.raises(
        SystemExit, match=r"args.json cannot be read .*: --overwrite begins anew|give another --out"
    ):
        train(tmp_path / "run", 12, Args(resume=True))


@pytest.mark.parametrize("text", ["", "\x00{", '[1]\n"a"\n', '{"step": "x"}\n', "é\n" * 9])
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

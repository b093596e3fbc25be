"""A run's state on disk: the last two are kept, with checksums, so that none that is damaged is
ever gone on from.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from fewshot import InputError
from fewshot.training import launch

LAST, BEFORE, WRITING = "last", "last.old", "last.tmp"
RECORD = "record.json"


class State(NamedTuple):
    """Where a state is, the step that it was saved after, the best score until then, and what is
    wrong with others.
    """

    path: Path
    step: int
    best: float | None
    damaged: str | None


def exists(folder: Path) -> bool:
    # a kill between the two renames of `save` leaves only the one before
    return any((folder / name).is_dir() for name in (LAST, BEFORE))


def remove(folder: Path) -> None:
    for name in (LAST, BEFORE, WRITING):
        shutil.rmtree(folder / name, ignore_errors=True)


def save(accelerator: Accelerator, folder: Path, step: int, best: float | None) -> None:
    """Write Accelerate's state after `step`, atomically; the one before is kept beside it.

    Raises:
        InputError: it cannot be written, as when the disk is full; nothing else is changed then.
    """
    temporary = folder / WRITING
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    failure = None
    try:
        accelerator.save_state(str(temporary))
    # torch's and safetensors' own for a full disk
    except (OSError, RuntimeError, SafetensorError) as error:
        failure = str(error).partition("\n")[0]
    failure = next(filter(None, gather_object([failure])), None)

    def finish() -> None:
        try:
            if failure is not None:
                raise OSError(failure)
            sums = {path.name: _checksum(path) for path in sorted(temporary.iterdir())}
            (temporary / RECORD).write_text(json.dumps({"step": step, "best": best, "files": sums}))
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise InputError(
                f"{folder}: the state of step {step} cannot be written ({error}): make room on the disk; --resume then "
                "goes on from the state before"
            ) from None
        shutil.rmtree(folder / BEFORE, ignore_errors=True)
        if (folder / LAST).exists():
            os.rename(folder / LAST, folder / BEFORE)
        os.rename(temporary, folder / LAST)

    launch.on_main_only(accelerator, finish)


def find(folder: Path, steps: int) -> State | None:
    """The latest whole state of a run of so many steps; None if none was ever saved.

    Raises:
        InputError: there are only damaged ones; the message says in what, and what to do.
    """
    wrong: list[str] = []
    for path in (folder / LAST, folder / BEFORE):
        if path.is_dir():
            try:
                record = _read(path, steps)
                return State(path, record["step"], record["best"], "; ".join(wrong) or None)
            except (OSError, ValueError, KeyError, TypeError) as error:
                wrong.append(f"{path} is damaged ({error!r})")
    if wrong:
        raise InputError(
            f"{'; '.join(wrong)}: nothing is left to go on from; --overwrite begins anew"
        )
    return None


def keep(folder: Path, last: State) -> None:
    """Make the state that was found, and loaded by every process, the last one; the next save
    removes the one before.

    Else that save would remove the only whole state before its own has its name.
    """
    if last.path.name == BEFORE:
        shutil.rmtree(folder / LAST, ignore_errors=True)
        os.rename(last.path, folder / LAST)


def _read(path: Path, steps: int) -> dict[str, Any]:
    """What a state says of itself. Raises OSError, ValueError, KeyError or TypeError where that, or
    a file, is not as it was written.
    """
    record = json.loads((path / RECORD).read_text())
    for name, checksum in dict(record["files"]).items():
        if _checksum(path / Path(name).name) != checksum:
            raise ValueError(f"{name} is not what was written")
    if not 0 <= record["step"] <= steps:
        raise ValueError(f"{RECORD} tells of step {record['step']} of {steps}")
    return record


def _checksum(path: Path) -> int:
    sum_so_far = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            sum_so_far = zlib.crc32(part, sum_so_far)
    return sum_so_far

"""A recipe that is killed at any of its file operations, or at any moment, is resumed and compared
with a straight run.

    python killed.py FOLDER PLANS    # a json list of dicts, see `Kills`; writes FOLDER/reports.json

One process imports everything once, and each run is a fork of it: SIGKILL then ends that run as it
would end any.
"""

import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import tqdm
from runs import differences, draw_scenes_once, run_here
from safetensors.torch import load_file

WRITES = os.O_WRONLY | os.O_RDWR


class Operations:
    """Counts what this process does to the files of a folder, and ends it by SIGKILL at the `at`-th
    operation.

    Opening a file to write counts twice, before, and when it is there with nothing, or half a line,
    in it; so do the files that torch and safetensors write, before, and when half is written.
    """

    def __init__(self) -> None:
        self.folder, self.at, self.names, self.dying = "", 0, [], False

    def watch(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.names = f"{folder}{os.sep}", at, []

    def point(
        self, name: str, path: Path | str, half_done: Callable[[], Any] | None = None
    ) -> None:
        self.names.append(f"{name} {os.path.relpath(path, self.folder)}")
        if len(self.names) == self.at:
            self.dying = True
            if half_done is not None:
                half_done()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple) -> None:
        if (
            not self.folder
            or self.dying
            or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
        ):
            return
        path = args[0]
        if (
            event in ("os.remove", "os.rmdir", "os.mkdir") and args[-1] >= 0
        ):  # relative to an open folder, in rmtree
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[-1]}"), os.fsdecode(path))
        if not isinstance(path, (str, os.PathLike)) or not os.path.abspath(path).startswith(
            self.folder
        ):
            return
        if event != "open":
            self.point(event, path)
        elif args[2] & WRITES:
            self.point("open", path)
            self.point("begin", path, lambda: self.begin(path, args[2]))

    def begin(self, path: str, flags: int) -> None:
        file = os.open(path, flags, 0o666)
        if flags & os.O_APPEND:
            os.write(file, b'{"step": 1, "lo')

    def writing(self, write: Callable, place: int) -> Callable:
        """`write`, one of torch's or safetensors', whose argument number `place` is the path."""

        @functools.wraps(write)
        def watched(*args: Any, **options: Any) -> Any:
            path = args[place]
            inside = isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(
                self.folder or "\0"
            )
            if inside:
                self.point("write", path)
            result = write(*args, **options)
            if inside:
                self.point("half of", path, lambda: os.truncate(path, os.path.getsize(path) // 2))
            return result

        return watched


operations = Operations()


def forked(work: Callable[[], Any], log: Path, kill_after: float | None = None) -> int:
    """The exit status of work() in a process of its own, below 0 if a signal ended it; what it says
    goes to `log`.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with log.open("w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            np.random.seed(
                os.getpid()
            )  # whatever the parent's streams hold, no run may depend on it
            random.seed(os.getpid())
            torch.manual_seed(os.getpid())
            work()
            status = 0
        except SystemExit as error:
            print(error, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lines(log: Path) -> list[dict]:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def different(straight: Path, folder: Path) -> list[str]:
    """What of every stage in `folder` is not as in the straight run: files, weights, results, log,
    state.
    """
    files = [
        {str(p.relative_to(top)) for p in top.rglob("*") if "last.old" not in str(p)}
        for top in (straight, folder)
    ]
    if files[0] != files[1]:
        return sorted(files[0] ^ files[1])

    found = differences(straight, folder)
    for path in sorted(straight.rglob("metrics.json")):
        a, b = path.parent, folder / path.parent.relative_to(straight)
        x, y = (load_file(stage / "last" / "model.safetensors") for stage in (a, b))
        if x.keys() != y.keys() or not all(torch.equal(x[name], y[name]) for name in x):
            found.append(f"{b}: last weights")
        if lines(a / "log.jsonl") != lines(b / "log.jsonl"):
            found.append(f"log of {b}: {lines(b / 'log.jsonl')}")
        records = [json.loads((stage / "last" / "record.json").read_text()) for stage in (a, b)]
        if any(records[0][key] != records[1][key] for key in ("step", "best")):
            found.append(f"state of {b}")
    return found


class Kills:
    """Kills the plan's `recipe` with `flags` at each of `at`, the first operation so
    named, at so many `spread` evenly over all, or at `every` one; and at `random` moments.

    With `finished`, a folder that has the stage before. With `first`, an operation's name, a run is
    killed at the third of that name, and then, at all the above, the run that resumes it.
    """

    def __init__(self, top: Path, plan: dict[str, Any]):
        top.mkdir()
        self.top, self.plan, self.source = top, plan, plan.get("finished")
        self.wrong: list[str] = []  # what was not as it should be
        self.killed = 0

    def report(self) -> dict[str, Any]:
        names, again, took = self.operations()
        for number in self.chosen(names):
            out = self.folder(f"killed-{number}")
            what = f"killed at operation {number} of {len(names)}, {names[number - 1]}"
            status = self.forked(out, again, number)
            if status == -signal.SIGKILL:
                self.resume(out, what, names[: number - 1])
            else:
                self.wrong.append(f"{what}: was not, but ended with {status}: {self.said()}")
        self.kill_at_random(again, took)
        return {"names": names, "killed": self.killed, "wrong": self.wrong}

    def operations(self) -> tuple[list[str], str, float]:
        """Names of all operations of the run that will be killed, its further flags, how long it
        takes.
        """
        began, again = time.monotonic(), ""
        straight = self.folder("straight")
        self.run(straight)  # here, so that what it reads, forks have
        names = operations.names
        if "first" in self.plan:
            begun, again = self.folder("begun"), " --resume"
            number = [i for i, name in enumerate(names, 1) if name == self.plan["first"]][2]
            assert self.forked(begun, at=number) == -signal.SIGKILL
            self.source, began = begun, time.monotonic()
            assert self.forked(self.folder("counted"), again) == 0, self.said()
            names = json.loads((self.top / "counted.json").read_text())
        return names, again, time.monotonic() - began

    def chosen(self, names: list[str]) -> list[int]:
        if self.plan.get("every"):
            return list(range(1, len(names) + 1))
        spread, numbers = self.plan.get("spread", 0), []
        for part in self.plan.get("at", []):
            numbers.append(next(i for i, name in enumerate(names, 1) if part in name))
        return numbers + [round((i + 0.5) * len(names) / spread) + 1 for i in range(spread)]

    def kill_at_random(self, again: str, took: float) -> None:
        draw, moments = random.Random(0), 0
        while moments < self.plan.get("random", 0):
            delay, out = draw.uniform(0, took), self.folder(f"random-{moments}")
            if self.forked(out, again, kill_after=delay) == -signal.SIGKILL:
                moments += 1
                self.resume(out, f"killed after {delay:.3f} s")
            else:  # it had ended before
                took = delay
                shutil.rmtree(out)

    def folder(self, name: str) -> Path:
        out = self.top / name
        return Path(shutil.copytree(self.source, out)) if self.source else out

    def run(self, out: Path, more: str = "", at: int = 0) -> None:
        operations.watch(out, at)
        run_here(self.plan["recipe"], f"{self.plan['flags']} --out {out}{more}")
        (out.parent / f"{out.name}.json").write_text(json.dumps(operations.names))

    def forked(
        self, out: Path, more: str = "", at: int = 0, kill_after: float | None = None
    ) -> int:
        return forked(lambda: self.run(out, more, at), self.top / "run.log", kill_after)

    def said(self) -> str:
        return (self.top / "run.log").read_text()[-2000:]

    def resume(self, out: Path, what: str, done: Sequence[str] = ()) -> None:
        """Checks the run that resumes what was killed in `out` after these operations: it loses no
        state either.
        """
        self.killed += 1
        before = 2 * ("first" in self.plan)
        saves = Counter(
            out / Path(name.split()[1]).parent
            for name in done
            if re.match(r"os.rename .*last.tmp", name)
        )
        saves = {stage: count + before for stage, count in saves.items()} or {out: before}
        saves = {
            stage: count for stage, count in saves.items() if not (stage / "metrics.json").exists()
        }

        status = self.forked(out, " --resume")
        found = re.findall(r"(\S+): resuming after step (\d+)", (self.top / "run.log").read_text())
        steps = {Path(place): int(step) for place, step in found}
        if status != 0:
            self.wrong.append(f"{what}: {self.said()}")
        elif any(steps.get(stage, 0) < count for stage, count in saves.items()):
            self.wrong.append(f"{what}: had saved {saves}, resumed {steps}")
        else:
            self.wrong += [f"{what}: {other}" for other in different(self.top / "straight", out)]
        shutil.rmtree(out)


def main(top: Path, plans: list[dict[str, Any]]) -> None:
    tqdm.tqdm.monitor_interval = 0  # its thread would not live on in a fork
    # forks share the usual one, which a killed run may hold for ever
    tqdm.tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    draw_scenes_once()
    sys.addaudithook(operations.audit)
    torch.save = operations.writing(torch.save, 1)
    safetensors.torch.serialize_file = operations.writing(safetensors.torch.serialize_file, 1)
    reports = [Kills(top / str(i), plan).report() for i, plan in enumerate(plans)]
    (top / "reports.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

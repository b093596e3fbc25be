"""A recipe that is killed at any of its file operations, or at any moment, is resumed and compared
with a straight run.

    python killed.py FOLDER PLAN    # a json dict, see `main`; writes FOLDER/report.json

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
from runs import result_of, run_here
from safetensors.torch import load_file

from fewshot.data import detection

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
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in log.read_text().splitlines()
    ]


def difference(straight: Path, folder: Path) -> str | None:
    """What of every stage in `folder` is not as in the straight run: weights, results, log, state,
    files.
    """
    names = [
        {str(p.relative_to(top)) for p in top.rglob("*") if "last.old" not in str(p)}
        for top in (straight, folder)
    ]
    if names[0] != names[1]:
        return f"files: {sorted(names[0] ^ names[1])}"
    for path in sorted(straight.rglob("metrics.json")):
        a, b = path.parent, folder / path.parent.relative_to(straight)
        for file in ("model.safetensors", "last/model.safetensors"):
            x, y = load_file(a / file), load_file(b / file)
            if x.keys() != y.keys() or not all(torch.equal(x[name], y[name]) for name in x):
                return f"weights of {b / file}"
        if result_of(a) != result_of(b):
            return f"results of {b}"
        if lines(a / "log.jsonl") != lines(b / "log.jsonl"):
            return f"log of {b}: {lines(b / 'log.jsonl')}"
        records = [json.loads((place / "last" / "record.json").read_text()) for place in (a, b)]
        if any(records[0][key] != records[1][key] for key in ("step", "best")):
            return f"state of {b}"
    return None


def main(top: Path, plan: dict[str, Any]) -> None:
    """Kills the plan's `recipe` with `flags` at each of `at`, operations counted from 1 or the
    first so named, at so many `spread` evenly over all, or at `every` one; and at `random` moments.

    With `finished`, a folder that has the stage before. With `first`, an operation's name, a run is
    killed at the third of that name, and then, at all the above, the run that resumes it.

    The report: `names` of all operations of the run, `killed`, and `wrong`, a list of what was not
    as it should be.
    """
    tqdm.tqdm.monitor_interval = 0  # its thread would not live on in a fork
    tqdm.tqdm.set_lock(
        threading.RLock()
    )  # forks share the usual one, which a killed run may hold for ever
    torch.set_num_threads(1)
    detection._glyph_records = functools.cache(detection._glyph_records)
    sys.addaudithook(operations.audit)
    torch.save = operations.writing(torch.save, 1)
    safetensors.torch.serialize_file = operations.writing(safetensors.torch.serialize_file, 1)

    recipe, flags = plan["recipe"], plan["flags"]
    source, again, wrong, killed = plan.get("finished"), "", [], 0

    def folder(name: str) -> Path:
        return Path(shutil.copytree(source, top / name)) if source else top / name

    def run(out: Path, more: str = "", at: int = 0) -> None:
        operations.watch(out, at)
        run_here(recipe, f"{flags} --out {out}{more}")
        (out.parent / f"{out.name}.json").write_text(json.dumps(operations.names))

    straight = folder("straight")
    run(straight)  # here, so that what it reads, forks have
    if "first" in plan:
        begun = folder("begun")
        number = [i for i, name in enumerate(operations.names, 1) if name == plan["first"]][2]
        assert forked(lambda: run(begun, "", number), top / "begun.log") == -signal.SIGKILL
        source, again = begun, " --resume"
    began = time.monotonic()
    counted = folder("counted")
    status = forked(lambda: run(counted, again), top / "counted.log")
    took = time.monotonic() - began
    assert status == 0, (top / "counted.log").read_text()
    names = json.loads((top / "counted.json").read_text())
    total = len(names)
    spread = plan.get("spread", 0)
    at = range(1, total + 1) if plan.get("every") else plan.get("at", [])
    at = [
        one if isinstance(one, int) else next(i for i, name in enumerate(names, 1) if one in name)
        for one in at
    ]
    at = [*at, *(round((i + 0.5) * total / spread) + 1 for i in range(spread))]
    draw = random.Random(0)

    def resumed(out: Path, what: str, done: Sequence[str] = ()) -> None:
        """Checks the run that resumes what was killed in `out` after these operations: it loses no
        state either.
        """
        nonlocal killed
        killed += 1
        saves = Counter(
            Path(name.split()[1]).parent for name in done if re.match(r"os.rename .*last.tmp", name)
        )
        saves = {out / stage: count + ("first" in plan) * 2 for stage, count in saves.items()}
        saves |= {out: 2} if "first" in plan and not saves else {}
        saves = {
            stage: count for stage, count in saves.items() if not (stage / "metrics.json").exists()
        }
        status = forked(lambda: run(out, " --resume"), top / "run.log")
        said = (top / "run.log").read_text()
        found = {
            Path(place): int(step)
            for place, step in re.findall(r"(\S+): resuming after step (\d+)", said)
        }
        if status != 0:
            wrong.append(f"{what}: {said[-2000:]}")
        elif any(found.get(stage, 0) < count for stage, count in saves.items()):
            wrong.append(f"{what}: had saved {saves}, resumed {found}")
        elif (other := difference(straight, out)) is not None:
            wrong.append(f"{what}: {other}")
        shutil.rmtree(out)

    for number in at:
        out = folder(f"killed-{number}")
        status = forked(functools.partial(run, out, again, number), top / "killed.log")
        what = f"{recipe} killed at operation {number} of {total}, {names[number - 1]}"
        if status != -signal.SIGKILL:
            wrong.append(
                f"{what}: was not, but ended with {status}: {(top / 'killed.log').read_text()[-2000:]}"
            )
            continue
        resumed(out, what, names[: number - 1])
    moments = 0
    while moments < plan.get("random", 0):
        delay, out = draw.uniform(0, took), folder(f"random-{moments}")
        if (
            forked(functools.partial(run, out, again), top / "killed.log", kill_after=delay)
            == -signal.SIGKILL
        ):
            moments += 1
            resumed(out, f"{recipe} killed after {delay:.3f} s")
        else:  # it had ended before
            took = delay
            shutil.rmtree(out)
    report = {"names": names, "killed": killed, "wrong": wrong}
    (top / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

"""Folders of runs: how they are named, whether something is left to do in them, and who holds them.
One holds

    args.json  log.jsonl  metrics.json  curves.png  model.safetensors  last/  lock

where `last/` is Accelerate's state for `--resume` (`last.old/` the one before), `model.safetensors`
is all that testing needs, and metrics.json comes last: a folder that has it is a finished run.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from filelock import FileLock, Timeout

from fewshot import InputError, weights
from fewshot.training import state
from fewshot.training.launch import on_main

# flags of a test that change no number of its result
OUTPUT = ("save_tasks", "classwise", "scramble_supports", "test_root")
# what a resumed run may change beside the flags of the block `# run`, but for the seed
RESUME_MAY_CHANGE = (*OUTPUT, "share_proposals", "test_proposals", "calibrate")
# what a run may have left that began before runs listed their files
UNLISTED = (
    "log.jsonl curves.png metrics.json model.safetensors shots.json shots.png detections.json "
    "detections.png confusion.png tasks.json"
).split()


class Stage(NamedTuple):
    """A part of what a command asks for: one training, or one test of a saved model.

    name: "base", "novel", "finetune", "supports" or "train"; or else "test".
    args: the recipe's arguments, with what is this stage's own.
    folder: of its run.
    metadata: of a test: what the model's file says of itself.
    """

    name: str
    args: Any
    folder: str
    metadata: Mapping[str, Any] | None = None


def default(method: str, dataset: str, *more: Any) -> str:
    """runs/METHOD/DATASET-MORE-...: one folder for one run, so that what differs in these does not
    meet.

    A data set that is a path gives all its parts, without the root, and so does a backbone's
    library/name.
    """
    parts = [part for part in Path(dataset).parts if part not in ("/", "..", ".")]
    parts += [str(part).replace("/", "-") for part in more if part is not None]
    return f"runs/{method}/{'-'.join(parts)}"


@cache
def blocks(arguments: type) -> dict[str, str]:
    """The block of every flag of a recipe's `Args`: "test" of those that stand below `# test`.

    Raises:
        InputError: the source of the class cannot be read.
    """
    try:
        source = inspect.getsource(arguments)
    except (OSError, TypeError):
        raise InputError(
            f"the source of {arguments.__name__} cannot be read, whose comments (# test, # run) say "
            "which flags a test takes: put the recipe into a file, and import or launch that"
        ) from None

    block, found = "", {}
    for line in source.splitlines():
        comment = re.fullmatch(r"\s*# (\w+)", line)
        flag = re.match(r"\s*(\w+): ", line)
        if comment:
            block = comment[1]
        elif flag:
            found[flag[1]] = block
    return found


def of_tests(args: Any) -> set[str]:
    """The flags that a test takes from the command; all else is the model's own, from its file."""
    chosen = {name for name, block in blocks(type(args)).items() if block in ("test", "run")}
    return chosen | {"data_root", "cache"}


def due(
    accelerator: Accelerator, method: str, stage: Stage, alike: Sequence[str] | None = None
) -> Stage | None:
    """The stage, if there is something to do in its folder, else None; on every process.

    A finished run of the same arguments is shown, not repeated; only `--overwrite` replaces it.
    With `--test-only` it is the test of the model that is there (`saved`).

    Args:
        alike: what a finished run must agree in; by default all that a resumed one must.

    Raises:
        InputError: another process has the folder; it holds a run of other arguments, or an
            unfinished one and neither `--resume` nor `--overwrite` is given; or there is no model
            to test.
    """
    if stage.args.test_only:
        return saved(stage)
    return None if on_main(accelerator, lambda: _finished(method, stage, alike)) else stage


def _finished(method: str, stage: Stage, alike: Sequence[str] | None) -> bool:
    folder, args = Path(stage.folder), stage.args
    if args.overwrite or not (folder / "args.json").exists():
        return False

    with lock(folder):
        before = began(folder)
        if not (folder / "metrics.json").exists():
            if state.exists(folder) and not args.resume:
                raise InputError(
                    f"{folder} holds an unfinished run: --resume goes on with it, --overwrite begins anew"
                )
            return False

        check_same(folder, method, before, args, "give another --out, or --overwrite", alike)
        try:
            result = summary(json.loads((folder / "metrics.json").read_text()))
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise InputError(
                f"{folder}/metrics.json cannot be read ({error!r:.200}): --test-only tests the model again, "
                "--overwrite begins anew"
            ) from None
    print(f"{folder} is finished (--overwrite would replace it): {result}", flush=True)
    return True


def resumes(args: Any, folder: str | Path) -> bool:
    """Whether the run in `folder` goes on from a state, so that what comes before the first step
    need not be done.
    """
    return args.resume and state.exists(Path(folder))


def saved(stage: Stage) -> Stage:
    """The test of the model in a stage's folder: with the arguments that it was made with, but for
    those of tests.

    Raises:
        InputError: there is no model, or a flag asks for another one than this.
    """
    metadata = weights.describe_file(Path(stage.folder) / "model.safetensors")
    fields = type(stage.args).__dataclass_fields__
    made = {}
    for name in sorted(fields.keys() & metadata["args"].keys() - of_tests(stage.args)):
        value, mine = metadata["args"][name], getattr(stage.args, name)
        value = tuple(value) if isinstance(value, list) else value  # json has no tuples
        if mine not in (value, fields[name].default):
            raise InputError(
                f"the model in {stage.folder} was made with {name}={value}, not {mine}: leave that flag out"
            )
        made[name] = value
    return Stage("test", replace(stage.args, **made), stage.folder, metadata)


def result_file(args: Any, folder: str | Path) -> Path:
    """Where the result of these arguments is: metrics.json or, of a `--test-only`, a file that
    tells its settings.
    """
    if not args.test_only:
        return Path(folder) / "metrics.json"
    settings = json.dumps(tested(args), sort_keys=True, default=str)
    return Path(folder) / f"test-{uuid.uuid5(uuid.NAMESPACE_OID, settings).hex[:8]}.json"


def tested(args: Any) -> dict[str, Any]:
    """The settings of a test."""
    flags = blocks(type(args))
    return {k: v for k, v in vars(args).items() if flags.get(k) == "test" and k not in OUTPUT}


def trained(args: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a model was trained with: those of its arguments that two runs of one
    setting have in common.
    """
    # a folder of class folders has no other name than its place
    place = {"data_root"} if made.get("dataset") == "folder" else set()
    return {k: v for k, v in made.items() if k not in of_tests(args) - place}


def summary(metrics: Mapping[str, Any]) -> str:
    """The main numbers of a result in a line."""
    if "shots" in metrics:
        shots = (
            f"{k}-shot {v['accuracy']:.2f} ± {v['ci95']:.2f} %" for k, v in metrics["shots"].items()
        )
        return f"{metrics['ways']}-way, {', '.join(shots)}"
    for name in ("AP50", "AP"):
        if name in metrics:
            return f"{name} " + ", ".join(f"{group} {v:.1f}" for group, v in metrics[name].items())
    return "done"


def write_json(path: Path, value: Any) -> None:
    """Write json so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def lock(folder: Path) -> FileLock:
    """The folder's lock, taken; the system releases it when the process ends, however it ends."""
    lock, holder = FileLock(folder / "lock"), folder / "lock.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            who = "process {pid} on {host}, since {since}".format(**json.loads(holder.read_text()))
        except (OSError, ValueError, KeyError):
            who = "another process"
        raise InputError(
            f"{folder} is in use by {who}: wait for it, or give another --out"
        ) from None
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    write_json(holder, {"pid": os.getpid(), "host": platform.node(), "since": since})
    return lock


def began(folder: Path) -> dict[str, Any]:
    """The arguments that the folder's run was begun with, its method, its id, and its `files`."""
    try:
        began = {"id": None, "files": UNLISTED, **json.loads((folder / "args.json").read_text())}
        files = [Path(name).name for name in began["files"]]
        return began | {"method": str(began["method"]), "files": files}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder}/args.json cannot be read ({error}): --overwrite begins anew"
        ) from None


def list_files(folder: Path, names: Iterable[str]) -> None:
    """Note in args.json that the folder's run writes these too."""
    run = began(folder)
    write_json(folder / "args.json", run | {"files": sorted({*run["files"], *names})})


def remove_files(folder: Path) -> None:
    """Remove what a run in this folder, and later tests of its model, have written."""
    try:
        names = began(folder)["files"]
    except InputError:  # there was none, or args.json is damaged
        names = UNLISTED
    for path in (*folder.glob("test-????????[-.]*"), *(folder / name for name in names)):
        path.unlink(missing_ok=True)
    state.remove(folder)


def check_same(
    folder: Path,
    method: str,
    before: Mapping[str, Any],
    args: Any,
    advice: str,
    alike: Sequence[str] | None = None,
) -> None:
    """Raises InputError naming the first argument in which the folder's run differs from this one.

    Compared are those of `alike`, or else all but what a resumed run may change.
    """
    if before["method"] != method:
        raise InputError(
            f"{folder} is a run of {before['method']}, not of {method}; give another --out"
        )

    now = json.loads(json.dumps(vars(args)))
    if alike is None:
        free = {name for name, block in blocks(type(args)).items() if block == "run"} - {"seed"}
        # a newer version may have flags of its own
        alike = sorted((now.keys() & before.keys()) - free - set(RESUME_MAY_CHANGE))
    for name in alike:
        if before.get(name) != now.get(name):
            raise InputError(
                f"{folder} was begun with {name}={before.get(name)}, not {now.get(name)}; {advice}"
            )


# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; with more it is NORMAL + 2.4 /
# degrees to 0.1 %
STUDENT = """12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131
2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042"""
STUDENT = [float(quantile) for quantile in STUDENT.split()]
NORMAL = 1.960


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of independent values, and half the width of its 95 % interval by Student's t; None
    of one value.
    """
    n = len(values)
    if n < 2:
        return float(np.mean(values)), None
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else NORMAL + 2.4 / (n - 1)
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / np.sqrt(n))

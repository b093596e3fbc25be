"""Folders of runs: how they are named, whether something is left to do in them, and whose they are
meanwhile. One holds

    args.json  log.jsonl  metrics.json  curves.png  model.safetensors  last/  lock

where `last/` is Accelerate's state for `--resume` (`last.old/` the one before), `model.safetensors`
is all that testing needs, and metrics.json comes last: a folder that has it is a finished run.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from filelock import FileLock, Timeout

from fewshot import InputError, weights
from fewshot.training import state
from fewshot.training.launch import on_main

# Arguments that change how a run is carried out, not what it computes: a resumed run may change
# these.
FREE_ARGS = {
    "resume",
    "overwrite",
    "wandb",
    "workers",
    "out",
    "test_only",
    "stage",
    "save_every",
    "features",
}
FREE_ARGS |= {
    "share_proposals",
    "test_proposals",
    "scramble_supports",
    "save_tasks",
    "classwise",
    "seeds",
    "calibrate",
}
# What a test may choose; all else is the model's own, and comes from its file.
TEST_ARGS = {
    "data_root",
    "cache",
    "ways",
    "shots",
    "queries",
    "tasks",
    "save_tasks",
    "test_temperature",
    "test_steps",
}
TEST_ARGS |= {"test_dataset", "test_root", "imbalance", "features", "test_lr"}
TEST_ARGS |= {
    "test_images",
    "classwise",
    "share_proposals",
    "test_proposals",
    "scramble_supports",
    "at_once",
    "seed",
}
TEST_ARGS |= {
    "calibrate",
    "out",
    "workers",
    "resume",
    "overwrite",
    "test_only",
    "wandb",
    "stage",
    "base",
    "seeds",
}
# What two runs of one setting may differ in.
UNTOLD = FREE_ARGS | {"seed", "data_root", "test_root", "cache", "at_once"}
UNTOLD -= {"share_proposals", "test_proposals", "calibrate"}
# What a base model must have in common with what is fine-tuned from it.
BASE_ARGS = (
    "dataset",
    "novel_classes",
    "split",
    "backbone",
    "style",
    "short",
    "long",
    "support_size",
)


def default(method: str, dataset: str, *more: Any) -> str:
    """runs/METHOD/DATASET-MORE-...: one folder for one run, so that what differs in these does not
    meet.

    A data set that is a path gives all its parts, without the root, and so does a backbone's
    library/name.
    """
    parts = [part for part in Path(dataset).parts if part not in ("/", "..", ".")]
    return f"runs/{method}/{'-'.join([*parts, *(str(part).replace('/', '-') for part in more if part is not None)])}"


def due(
    accelerator: Accelerator, method: str, args: Any, folder: str | Path, shared: bool = False
) -> bool:
    """Whether there is something to do for the run in `folder`; on every process.

    A finished run of the same arguments is shown, not repeated, and False; only `--overwrite`
    replaces it. With `shared`, a finished base model counts if what shaped it agrees (`BASE_ARGS`),
    whatever else differs. With `--test-only` it is `saved`, and True.

    Raises:
        InputError: another process has the folder; it holds a run of other arguments, or an
            unfinished one and neither `--resume` nor `--overwrite` is given; or there is no model
            to test.
    """
    folder = Path(folder)
    if args.test_only:
        return bool(saved(accelerator, args, folder))

    def look() -> bool:
        if not (folder / "args.json").exists() or args.overwrite:
            return True
        with lock(folder):
            before, now = began(folder), json.loads(json.dumps(vars(args)))
            if (folder / "metrics.json").exists():
                check_same(
                    folder,
                    method,
                    before,
                    now,
                    BASE_ARGS if shared else None,
                    "give another --out, or --overwrite",
                )
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
                return False
            if not args.resume and state.exists(folder):
                raise InputError(
                    f"{folder} holds an unfinished run: --resume goes on with it, --overwrite begins anew"
                )
            return True

    return on_main(accelerator, look)


def resumes(args: Any, folder: str | Path) -> bool:
    """Whether the run in `folder` goes on from a state, so that what comes before the first step
    need not be done.
    """
    return args.resume and state.exists(Path(folder))


def saved(accelerator: Accelerator, args: Any, folder: str | Path) -> dict[str, Any]:
    """What the model in `folder` says of itself; `args` get what it was made with, but for
    `TEST_ARGS`.

    Raises:
        InputError: there is no model, or a flag asks for another one than this.
    """
    about = on_main(accelerator, lambda: weights.describe_file(Path(folder) / "model.safetensors"))
    fields = type(args).__dataclass_fields__
    for name, value in about["args"].items():
        if name in fields and name not in TEST_ARGS:
            mine, value = getattr(args, name), tuple(value) if isinstance(value, list) else value
            if mine not in (value, fields[name].default):
                raise InputError(
                    f"the model in {folder} was made with {name}={value}, not {mine}: leave that flag out"
                )
            setattr(args, name, value)
    return about


def result_file(args: Any, folder: str | Path) -> Path:
    """Where the result of these arguments is: metrics.json or, of a `--test-only`, a file that
    tells its settings.
    """
    if not args.test_only:
        return Path(folder) / "metrics.json"
    digest = uuid.uuid5(
        uuid.NAMESPACE_OID, json.dumps(tested(args), sort_keys=True, default=str)
    ).hex[:8]
    return Path(folder) / f"test-{digest}.json"


def tested(args: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if k in TEST_ARGS - UNTOLD}


def summary(metrics: Mapping[str, Any]) -> str:
    """The main numbers of a result in a line."""
    if "shots" in metrics:
        shots = (
            f"{k}-shot {v['accuracy']:.2f} ± {v['ci95']:.2f} %" for k, v in metrics["shots"].items()
        )
        return f"{metrics['ways']}-way, {', '.join(shots)}"
    name = next((name for name in ("AP50", "AP") if name in metrics), None)
    return (
        f"{name} " + ", ".join(f"{group} {v:.1f}" for group, v in metrics[name].items())
        if name
        else "done"
    )


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
    """The arguments that the folder's run was begun with, its method and its id."""
    try:
        began = {"id": None, **json.loads((folder / "args.json").read_text())}
        return began | {"method": str(began["method"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder}/args.json cannot be read ({error}): --overwrite begins anew"
        ) from None


def check_same(
    folder: Path,
    method: str,
    before: dict[str, Any],
    now: dict[str, Any],
    only: Sequence[str] | None,
    advice: str,
) -> None:
    """Raises InputError naming the first argument in which the folder's run differs from this one."""
    if before["method"] != method:
        raise InputError(
            f"{folder} is a run of {before['method']}, not of {method}; give another --out"
        )
    # a newer version may have flags of its own
    names = sorted(set(before) & set(now)) if only is None else only
    for name in names:
        if name not in FREE_ARGS | {"method", "id"} and before.get(name) != now.get(name):
            raise InputError(
                f"{folder} was begun with {name}={before.get(name)}, not {now.get(name)}; {advice}"
            )


# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; with more it is NORMAL + 2.4 /
# degrees to 0.1 %
STUDENT = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
STUDENT += (
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)
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

"""The beginning and the end of a program, its signals, and what its processes say to each other.

With `run` and `meta_test` this is the only place that knows Accelerate's corners.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn
from tqdm.auto import tqdm

from fewshot import InputError

T = TypeVar("T")
# nothing left, of the disk, of a quota, of what a file may have
DISK_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
# What torch says when another process is gone, and what that means
ENDED = {
    "DataLoader worker (pid": "a process that loads data was ended, as the system does when memory is short: give "
    "fewer --workers",
    "gloo/transport": "another process has ended, look for what it says",
}


class Signals:
    """Ctrl-C and SIGTERM: inside a loop they wait for the end of the step, elsewhere, or twice,
    they end at once.
    """

    def __init__(self) -> None:
        self.received, self.waiting = 0, False

    def __call__(self, number: int, frame: Any) -> None:
        if not self.waiting or self.received:
            self.received = number
            raise KeyboardInterrupt
        self.received = number


signals = Signals()
ending = ExitStack()  # what is to be given back when the block of `started` ends, however it ends


@contextmanager
def started(method: str, args: Any) -> Iterator[Accelerator]:
    """The Accelerator of this launch, seeded; at the end of the block its trackers and processes
    are ended.

    Precision, devices and processes come from `accelerate launch` (or its config file), nothing
    else does. An `InputError`, a loss that is not finite, a full disk, an interruption and another
    process's end end the program with one line and a status that is not 0; any other exception with
    its traceback, as it is a mistake of ours.
    """
    accelerator = Accelerator(
        log_with="wandb" if args.wandb else None, step_scheduler_with_optimizer=False
    )
    who = "" if accelerator.is_main_process else f" (process {accelerator.process_index})"
    signals.received, signals.waiting = 0, False
    handlers = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, signals)
    except ValueError:  # not in the main thread: whoever runs recipes in threads handles signals
        handlers = {}
    try:
        check_together(accelerator)
        if accelerator.gradient_accumulation_steps > 1:
            raise InputError(
                "gradient accumulation is not supported: leave it out, and give a smaller --batch-size"
            )
        if args.resume and args.overwrite:
            raise InputError(
                "--resume goes on with a run, --overwrite begins it anew: give one of them"
            )
        set_seed(args.seed)
        yield accelerator
        accelerator.end_training()
    except KeyboardInterrupt as error:
        end_trackers(accelerator)
        if accelerator.is_main_process:
            tqdm.write(
                f"interrupted: {error or f'the same command with --resume goes on with {method}'}"
            )
        raise SystemExit(128 + (signals.received or signal.SIGINT)) from None
    except Exception as error:
        line = _explained(error, method, args)
        if line is None:
            raise
        end_trackers(accelerator)
        raise SystemExit(f"error{who}: {line}") from None
    finally:
        ending.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _explained(error: Exception, method: str, args: Any) -> str | None:
    """What a user is told of an error; None of one that is a mistake of ours."""
    if isinstance(error, (InputError, FloatingPointError)):
        return str(error)

    if isinstance(error, OSError) and error.errno in DISK_FULL:
        # a failed write does not name its file
        where = "" if error.filename else f"{args.out or f'runs/{method}'}: "
        return f"{where}{error}: make room on the disk; --resume then goes on with {method}"

    if isinstance(error, RuntimeError):
        first = str(error).strip().partition("\n")[0]
        for words, reason in ENDED.items():
            if words in str(error):
                return f"{reason} ({first}); --resume goes on with {method}"
    return None


def check_together(accelerator: Accelerator) -> None:
    """Raises InputError if several processes were started of which each would work alone, as on
    CPUs by default.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and accelerator.num_processes == 1:
        raise InputError(
            f"{started} processes were started, but each works alone without a GPU: set ACCELERATE_USE_CPU=1, or start "
            "them by accelerate launch --cpu"
        )


def end_after_another(accelerator: Accelerator, group: torch.distributed.ProcessGroup) -> NoReturn:
    """Ends this process, quietly, after one that has failed: whoever ends first has the launcher
    end the others.
    """
    try:
        torch.distributed.barrier(group)
    except RuntimeError as error:  # what is waited for: the other has said why, and is gone
        end_trackers(accelerator)
        raise SystemExit(1) from error
    raise RuntimeError("a process that had failed went on")


def end_trackers(accelerator: Accelerator) -> None:
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """work() of the main process, on every process; an `InputError` that it raises is raised on
    all.
    """
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [work()]
        except InputError as error:
            outcome = [error]
    (result,) = broadcast_object_list(outcome)
    if isinstance(result, InputError):
        raise result
    return result


def gather_by_id(accelerator: Accelerator, results: dict[Any, T]) -> dict[Any, T]:
    """Merge every process's `{id: result}` into one dict, sorted by id, on every process.

    Keyed by id, the outcome does not depend on how many processes there are or who did what; a
    picture that two processes both did counts once.
    """
    merged = {key: value for part in gather_object([results]) for key, value in part.items()}
    return dict(sorted(merged.items()))


def synchronised(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model itself, without Accelerate's and torch.compile's wrappers, its buffers those of the
    main process.

    After a step under DistributedDataParallel batch norms have other statistics on every process;
    what is tested must be what is saved.
    """
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    if torch.distributed.is_initialized():
        for buffer in bare.buffers():
            torch.distributed.broadcast(
                buffer.view(torch.uint8) if buffer.dtype is torch.bool else buffer, 0
            )
    return bare


def on_main_only(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """work() of the main process, there alone; an `InputError` that it raises is raised on all
    processes.
    """
    result: list[T] = []
    on_main(accelerator, lambda: result.append(work()))
    return result[0] if result else None


def mix(*numbers: int) -> int:
    """A seed for torch from several numbers: nearby ones give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)

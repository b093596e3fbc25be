"""The one way from (seed, step) to a batch on the device, for classification and detection alike.

Whatever a step holds is a pure function of the seed and the step's number. So a run that was
resumed equals one that never stopped, and neither processes nor workers change what is seen.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fewshot import InputError
from fewshot.data.transforms import Normalisation

WORKERS = weakref.WeakSet()  # the processes that load for our streams


class Word:
    """The first word of every seed: no two kinds of randomness that meet in a run share a stream.

    QUERY and TABLE are the same numbers as EPISODE and EPISODE_AUGMENT, but a run detects or it
    classifies, so they never meet. Other numbers would change what every run so far has drawn.
    """

    SHOTS, SAMPLES, AUGMENT, SUPPORT = range(10, 14)  # detection
    CROPS = 15  # of single objects
    QUERY, TABLE = 20, 21  # what Attention-RPN searches for, and its supports in tests
    EPISODE, EPISODE_AUGMENT, EPISODE_SAMPLES, IMBALANCE = range(20, 24)  # classification
    OBJECTS = 30  # which a trunk learns to name first


@dataclass(frozen=True)
class Feed:
    """Which steps a process loads, where to, and how: what a run's `feed` tells every
    loader.

    Attributes:
        seed: of the run.
        start, steps: the run's steps `start` to `steps` - 1, counted from 0, are loaded.
        rank, world: this process, and how many share a step.
        device: of the batches.
        workers: processes that make batches ahead of time; 0 makes them in this one.
    """

    seed: int = 0
    start: int = 0
    steps: int = 0
    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"
    workers: int = 0

    def numbers(self, step: int, total: int) -> range:
        """Which of the endless row of samples this process makes for a step of `total`: every
        world-th of them.
        """
        return range(step * total + self.rank, (step + 1) * total, self.world)

    def check(self, total: int, what: str) -> None:
        """Raises InputError unless a step, if there is one, can be divided among the processes."""
        if self.start < self.steps and (total < 1 or total % self.world):
            raise InputError(
                f"{total} {what} a step cannot be divided among {self.world} processes: use a multiple"
            )
        if self.seed < 0:
            raise InputError(f"seed {self.seed}: must not be negative")


def move(batch: Any, device: torch.device | str) -> Any:
    """A batch, a NamedTuple, with its tensors and those of its lists on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, list):
        return [move(part, device) for part in batch]
    if hasattr(batch, "_fields"):
        return batch._make(move(part, device) for part in batch)
    return batch


class _Made(Dataset):
    def __init__(self, make: Callable[[Any], Any]):
        self.make = make

    def __getitem__(self, order: Any) -> Any:
        try:
            return self.make(order)
        # Raised in a worker, an InputError's one line would be buried under tracebacks, and the
        # others would look as if the worker had been ended.
        except (InputError, OSError, EOFError) as error:
            return error


def _as_made(item: Any) -> Any:
    return item


def stream(
    make: Callable[[Any], Any],
    orders: Sequence,
    feed: Feed,
    normalisation: Normalisation | None = None,
) -> Iterator[Any]:
    """make(order) of every order, in turn, on the feed's device, made by its workers ahead of time.

    `make` gives a tensor or a NamedTuple of tensors, or a plain tuple of such; with a
    `normalisation` each part's own `normalised` is applied on the device. An `InputError` that
    `make` raises is raised here.
    """

    def delivered(part: Any) -> Any:
        part = move(part, device)
        return part if normalisation is None else part.normalised(normalisation)

    device = torch.device(feed.device)
    loader = DataLoader(
        _Made(make),
        batch_size=None,
        sampler=orders,
        collate_fn=_as_made,  # DataLoader's own would make tensors of arrays and lists of tuples
        num_workers=feed.workers,
        pin_memory=device.type == "cuda",
        # of its own: making an iterator must not draw from the global stream, or resumed runs would
        # differ
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_run,
    )
    for item in _received(loader):
        if isinstance(item, Exception):
            raise item
        # pinned by an older DataLoader, a tuple has become a list
        yield tuple(map(delivered, item)) if type(item) in (tuple, list) else delivered(item)


def _received(loader: DataLoader) -> Iterator[Any]:
    """What the workers make. One that is killed while it hands over a batch breaks the connection,
    not only itself.
    """
    batches = iter(loader)
    WORKERS.update(getattr(batches, "_workers", ()))  # none if batches are made in this process
    try:
        yield from batches
    # not of the data: `_Made` returns these
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        reason = f"{type(error).__name__} {error}".strip()
        raise InputError(
            "a process that loads data was ended, as the system does when memory is short: give fewer --workers "
            f"({reason})"
        ) from error


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach a whole process group; the run decides when its
    workers end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Of a stream that an error left open: Python would end them by SIGTERM, which they ignore, and
    wait forever.
    """
    left = [child for child in multiprocessing.active_children() if child in WORKERS]
    if left:
        # torch's handler would raise that they were killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in left:
        worker.kill()

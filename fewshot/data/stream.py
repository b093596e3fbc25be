"""The one way from (seed, step) to a batch on the device, for classification and detection alike.

Whatever a step holds is a pure function of the seed and the step's number. So a run that was
resumed equals one that never stopped, and neither processes nor workers change what is seen.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from fewshot import InputError
from fewshot.data.transforms import Normalisation

T = TypeVar("T", bound="Movable")


class Word:
    """The first word of every seed: no two kinds of randomness that meet in a run share a stream."""

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


class Movable(Protocol):
    """What a stream is made of."""

    def to(self: T, device: torch.device | str) -> T: ...

    def pin_memory(self: T) -> T: ...

    def normalised(self: T, normalisation: Normalisation) -> T: ...


class _Made(Dataset):
    def __init__(self, make: Callable[[Any], Any]):
        self.make = make

    def __getitem__(self, order: Any) -> Any:
        try:
            return self.make(order)
        # raised in a worker, its one line would be buried under tracebacks
        except InputError as error:
            return error


def stream(
    make: Callable[[Any], Any],
    orders: Sequence,
    feed: Feed,
    normalisation: Normalisation | None = None,
) -> Iterator[Any]:
    """make(order) of every order, in turn, on the feed's device, made by its workers ahead of time.

    `make` gives something `Movable`, or a tuple of such; with a `normalisation` these are
    normalised on the device. An `InputError` that it raises is raised here.
    """

    def delivered(part: Any) -> Any:
        part = part.to(device)
        return part if normalisation is None else part.normalised(normalisation)

    device = torch.device(feed.device)
    loader = DataLoader(
        _Made(make),
        batch_size=None,
        sampler=orders,
        num_workers=feed.workers,
        pin_memory=device.type == "cuda",
        # of its own: making an iterator must not draw from the global stream, or resumed runs would
        # differ
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_run,
    )
    for item in _received(loader):
        if isinstance(item, InputError):
            raise item
        # DataLoader makes lists of tuples
        yield tuple(map(delivered, item)) if isinstance(item, (tuple, list)) else delivered(item)


def _received(loader: DataLoader) -> Iterator[Any]:
    """What the workers make. One that is killed while it hands over a batch breaks the connection,
    not only itself.
    """
    try:
        yield from loader
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        # from the data, in a worker or here
        if not loader.num_workers or str(error).startswith("Caught "):
            raise
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
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children:
        # torch's handler would raise that they were killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in children:
        child.kill()

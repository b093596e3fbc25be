"""The one way from (seed, step) to a batch on the device, for classification and detection alike.

Whatever a step holds is a pure function of the seed and the step's number. So a run that was
resumed equals one that never stopped, and neither processes nor workers change what is seen.
"""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fewshot import InputError
from fewshot.data.transforms import Normalisation

if TYPE_CHECKING:
    from typing_extensions import Self

_workers: weakref.WeakSet = weakref.WeakSet()  # of the streams that are open


class Word:
    """The first word of every seed: no two kinds of randomness that meet in a run share a stream.

    Detection and classification never meet, and have some words in common.
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


@dataclass
class Movable:
    """What a stream is made of: a dataclass, whose tensors go to the device, alone or in lists.

    One that is normalised has `normalised(normalisation)`, which gives the same with float images.
    """

    on_cpu: ClassVar[tuple[str, ...]] = ()  # fields that stay there

    def to(self, device: torch.device | str) -> Self:
        return self._each(partial(Tensor.to, device=device, non_blocking=True), self.on_cpu)

    def pin_memory(self) -> Self:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor], but: Sequence[str] = ()) -> Self:
        changed = {}
        for name in {field.name for field in fields(self)} - set(but):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                changed[name] = [change(tensor) for tensor in value]
        return replace(self, **changed)


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
        batches = iter(loader)
        _workers.update(getattr(batches, "_workers", ()))  # torch has no public name for them
        yield from batches
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
    alive = [worker for worker in _workers if worker.is_alive()]
    if alive:
        # torch's handler would raise that they were killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in alive:
        worker.kill()

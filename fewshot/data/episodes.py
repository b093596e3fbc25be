"""Episodes, and the loaders that feed pictures to a device in an order that is a pure function of the seed.

Whatever a step holds, its classes, pictures and augmentation, follows from the seed and the step's number. So a run
that was resumed equals one that never stopped, and neither processes nor workers change what is seen.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fewshot import InputError
from fewshot.data.classification import ImageSet
from fewshot.data.transforms import Transform

# The first word of every seed, so that no two kinds of randomness share a stream.
EPISODE, AUGMENTATION, ORDER = range(20, 23)


@dataclass
class Episode:
    """Tasks with one number of ways, shots and queries; support and query images come class by class.

    support:         (tasks, ways * shots, 3, H, W) normalised float images, all shots of class 0 first
    support_labels:  (tasks, ways * shots) int64 in [0, ways)
    query:           (tasks, ways * queries, 3, H, W) likewise
    query_labels:    (tasks, ways * queries) int64 in [0, ways)
    classes:         (tasks, ways) the data set's number of each class
    indices:         (tasks,) number of each episode in the endless stream of its seed
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor
    classes: Tensor
    indices: Tensor


class Draw(NamedTuple):
    """Classes (ways,) and image indices, support (ways, shots) and query (ways, queries), of one task."""

    classes: np.ndarray
    support: np.ndarray
    query: np.ndarray


def check(dataset: ImageSet | Sequence[np.ndarray], ways: int, shots: int, queries: int) -> None:
    """Raises InputError if some episode could not be drawn: to be called before an hour of training, not after it."""
    _check_numbers(dataset, ways, shots, queries)
    for label in range(len(_by_class(dataset))):
        _check_class(dataset, label, shots, queries)


def draw(dataset: ImageSet | Sequence[np.ndarray], ways: int, shots: int, queries: int, seed: int, index: int) -> Draw:
    """Episode `index` of the endless stream of `seed`: a pure function of its arguments.

    Classes are a random permutation cut to `ways`; of each, a permutation of its images is cut to size, the queries
    first. So episodes that differ in shots only share classes and queries, and the fewer shots are among the more.

    `dataset` may also be just the image indices of each class. Raises InputError when there are not enough.
    """
    _check_numbers(dataset, ways, shots, queries)
    by_class = _by_class(dataset)
    rng = _rng(EPISODE, seed, index)
    classes = rng.permutation(len(by_class))[:ways]
    for label in classes:
        _check_class(dataset, label, shots, queries)
    images = np.stack([rng.permutation(by_class[label])[: queries + shots] for label in classes])
    return Draw(classes, images[:, queries:], images[:, :queries])


def reference_episodes(
    dataset: ImageSet | Sequence[np.ndarray], ways: int, shots: int, queries: int, count: int, seed: int
) -> list[Draw]:
    """The first `count` episodes of mmfewshot's own stream, for comparing results with its published ones.

    It tests on 2000 of seed 0, and trains and validates on those of seed 0 too. There is no jumping ahead: classes are
    shuffled on from one episode to the next with numpy's legacy generator. Raises InputError as `draw` does.
    """
    check(dataset, ways, shots, queries)
    by_class = _by_class(dataset)
    rng = np.random.RandomState(seed)
    order = np.arange(len(by_class))
    drawn = []
    for _ in range(count):
        rng.shuffle(order)
        classes = order[:ways].copy()
        images = np.stack([rng.choice(by_class[label], shots + queries, replace=False) for label in classes])
        drawn.append(Draw(classes, images[:, :shots], images[:, shots:]))
    return drawn


def episode_loader(
    dataset: ImageSet,
    ways: int,
    shots: int,
    queries: int,
    *,
    tasks: int,
    seed: int,
    start: int,
    steps: int,
    rank: int,
    world: int,
    device: torch.device | str,
    transform: Transform,
    workers: int,
) -> Iterator[Episode]:
    """This process's share of the episodes of steps `start` to `steps` - 1, on the device.

    Step t (from 0) is of episodes t * tasks to (t + 1) * tasks - 1, of which process `rank` of `world` takes every
    world-th. `tasks`, the episodes of a step over all processes, must be a multiple of `world`. Pictures are decoded by
    `workers` processes, or by this one if 0.

    Raises InputError at once for episodes that cannot be drawn, and while loading for a picture that cannot be read.
    """
    check(dataset, ways, shots, queries)
    _check_share(tasks, world, "episodes")
    plan = _EpisodePlan(dataset, ways, shots, queries, tasks, seed, rank, world, transform.draws)
    batches = _load(dataset, plan, range(start, steps), device, transform, workers)
    supports = ways * shots

    def episodes() -> Iterator[Episode]:
        for images, (classes, indices) in batches:
            images = images.unflatten(0, (len(indices), -1))  # (tasks / world, ways * (shots + queries), 3, H, W)
            labels = torch.arange(ways, device=images.device).repeat(len(indices), 1)
            yield Episode(
                support=images[:, :supports],
                support_labels=labels.repeat_interleave(shots, 1),
                query=images[:, supports:],
                query_labels=labels.repeat_interleave(queries, 1),
                classes=classes,
                indices=indices,
            )

    return episodes()


def class_batch_loader(
    dataset: ImageSet,
    *,
    batch_size: int,
    seed: int,
    start: int,
    steps: int,
    rank: int,
    world: int,
    device: torch.device | str,
    transform: Transform,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches (images (b, 3, H, W), labels (b,), image indices (b,)) of ordinary supervised training.

    They are those of steps `start` to `steps` - 1.

    Samples come from an endless row of permutations of the data set, so that batches are always full. Step t is of
    samples t * batch_size to (t + 1) * batch_size - 1, of which process `rank` of `world` takes every world-th:
    b = batch_size / world. Raises InputError when that is not whole, and for a picture that cannot be read.
    """
    _check_share(batch_size, world, "images")
    plan = _SupervisedPlan(dataset.labels, batch_size, seed, rank, world, transform.draws)
    batches = _load(dataset, plan, range(start, steps), device, transform, workers)
    return ((images, labels, indices) for images, (labels, indices) in batches)


def image_loader(
    dataset: ImageSet,
    indices: Sequence[int] | np.ndarray,
    *,
    device: torch.device | str,
    transform: Transform,
    batch_size: int = 256,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """These pictures of a data set in this order, as batches (images (b, 3, H, W), indices (b,)), the last one short.

    `transform` must not be a random one. Raises InputError for a picture that cannot be read.
    """
    if transform.draws:
        raise ValueError("image_loader has no random numbers for a training transform; give it a test transform")
    plan = _ListPlan(np.asarray(indices, np.int64), batch_size)
    batches = _load(dataset, plan, range(-(-len(plan.indices) // batch_size)), device, transform, workers)
    return ((images, numbers) for images, (numbers,) in batches)


class _Step(NamedTuple):
    """What a step needs: images (n,), random numbers (n, draws) for their augmentation, and arrays to go with them."""

    images: np.ndarray
    uniforms: np.ndarray
    extra: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _EpisodePlan:
    dataset: ImageSet
    ways: int
    shots: int
    queries: int
    tasks: int
    seed: int
    rank: int
    world: int
    draws: int

    def __call__(self, step: int) -> _Step:
        indices = step * self.tasks + np.arange(self.rank, self.tasks, self.world)
        drawn = [draw(self.dataset, self.ways, self.shots, self.queries, self.seed, i) for i in indices.tolist()]
        images = np.concatenate([np.concatenate([d.support, d.query], axis=None) for d in drawn])
        shape = len(images) // len(indices), self.draws
        uniforms = [_rng(AUGMENTATION, self.seed, i).random(shape, np.float32) for i in indices.tolist()]
        return _Step(images, np.concatenate(uniforms), (np.stack([d.classes for d in drawn]), indices))


@dataclass(frozen=True)
class _SupervisedPlan:
    labels: np.ndarray
    batch_size: int
    seed: int
    rank: int
    world: int
    draws: int

    def __call__(self, step: int) -> _Step:
        samples = (step * self.batch_size + np.arange(self.rank, self.batch_size, self.world)).tolist()
        n = len(self.labels)
        images = np.array([_order(n, self.seed, sample // n)[sample % n] for sample in samples])
        uniforms = np.stack([_rng(AUGMENTATION, self.seed, i).random(self.draws, np.float32) for i in samples])
        return _Step(images, uniforms, (self.labels[images], images))


@dataclass(frozen=True)
class _ListPlan:
    indices: np.ndarray
    batch_size: int

    def __call__(self, step: int) -> _Step:
        images = self.indices[step * self.batch_size : (step + 1) * self.batch_size]
        return _Step(images, np.zeros((len(images), 0), np.float32), (images,))


@dataclass(frozen=True)
class _Steps(Dataset):
    """Item t: what step t needs, decoded: uint8 (n, 3, S, S), aspects (n,), uniforms (n, draws), and its extra."""

    dataset: ImageSet
    plan: Callable[[int], _Step]

    def __getitem__(self, step: int) -> tuple | InputError:
        try:
            images, uniforms, extra = self.plan(step)
            pixels = torch.stack([self.dataset.pixels(i) for i in images.tolist()])
        except InputError as error:
            return error  # raised here, in a worker, its one line would drown in a traceback
        aspect = np.array([self.dataset.aspect(i) for i in images.tolist()], np.float32)
        return pixels, aspect, uniforms, extra


def _load(
    dataset: ImageSet, plan: Callable[[int], _Step], steps: range, device: torch.device | str, transform: Transform,
    workers: int,
) -> Iterator[tuple[Tensor, list[Tensor]]]:  # fmt: skip
    """Images (n, 3, H, W) and the extra of each of these steps, on the device."""
    device = torch.device(device)
    loader = DataLoader(
        _Steps(dataset, plan),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # so that making an iterator leaves the global stream alone
    )
    for item in loader:
        if isinstance(item, InputError):
            raise item
        pixels, aspect, uniforms, extra = item
        pixels, aspect, uniforms = (x.to(device, non_blocking=True) for x in (pixels, aspect, uniforms))
        yield transform(pixels, aspect, uniforms), [x.to(device, non_blocking=True) for x in extra]


def _rng(kind: int, seed: int, number: int) -> np.random.Generator:
    if seed < 0:
        raise InputError(f"seed {seed}: must not be negative")
    return np.random.default_rng((kind, seed, number))


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n samples that an epoch is; two of them, as a batch may straddle a border."""
    return _rng(ORDER, seed, epoch).permutation(n)


def _by_class(dataset: ImageSet | Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    return dataset.by_class if isinstance(dataset, ImageSet) else dataset


def _check_numbers(dataset: ImageSet | Sequence[np.ndarray], ways: int, shots: int, queries: int) -> None:
    for number, what in ((ways, "ways"), (shots, "shots"), (queries, "queries")):
        if number < 1:
            raise InputError(f"{number} {what}: an episode needs at least 1")
    if ways > len(_by_class(dataset)):
        where = f"{dataset.name} {dataset.split}" if isinstance(dataset, ImageSet) else "the data set"
        raise InputError(f"{ways} ways: {where} has {len(_by_class(dataset))} classes; ask for fewer ways")


def _check_class(dataset: ImageSet | Sequence[np.ndarray], label: int, shots: int, queries: int) -> None:
    images = len(_by_class(dataset)[label])
    if images < shots + queries:
        name = f"{dataset.classes[label]} of {dataset.name} {dataset.split}" if isinstance(dataset, ImageSet) else label
        raise InputError(
            f"class {name}: has {images} images, {shots} shots and {queries} queries take {shots + queries}; "
            "ask for fewer"
        )


def _check_share(total: int, world: int, what: str) -> None:
    if total % world or total < 1:
        raise InputError(f"{total} {what} per step: must be a multiple of the {world} processes")

"""Episodes, and the loaders that bring pictures, normalised, to a device in an order that follows
from the seed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewshot import InputError
from fewshot.data.image_set import ImageSet
from fewshot.data.stream import Feed, Word, stream
from fewshot.data.transforms import Transform

TEST_FLAGS = "--ways", "--shots", "--queries"  # what errors say to change
TRAIN_FLAGS = "--train-ways", "--train-shots", "--train-queries"


@dataclass
class Episode:
    """Tasks with one number of ways, shots and queries; support and query images come class by
    class.

    support:         (tasks, ways * shots, 3, H, W) normalised float images, all shots of class 0 first
    support_labels:  (tasks, ways * shots) int64 in [0, ways)
    query:           (tasks, ways * queries, 3, H, W) likewise
    query_labels:    (tasks, ways * queries) int64 in [0, ways)
    classes:         (tasks, ways) the data set's number of each class; stays on the CPU
    indices:         number of each episode in the endless stream of its seed
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor
    classes: Tensor
    indices: list[int]


class Draw(NamedTuple):
    """Classes (ways,) and image indices, support (ways, shots) and query (ways, queries), of one
    task.
    """

    classes: np.ndarray
    support: np.ndarray
    query: np.ndarray


def check(
    dataset: ImageSet | Sequence[np.ndarray],
    ways: int,
    shots: int,
    queries: int,
    flags: tuple[str, str, str] = TEST_FLAGS,
) -> None:
    """Raises InputError if some episode could not be drawn: to be called before an hour of
    training, not after it.

    `flags` are those that ways, shots and queries came from.
    """
    _check_numbers(dataset, ways, shots, queries, flags)
    by_class = _by_class(dataset)
    _check_class(
        dataset,
        min(range(len(by_class)), key=lambda label: len(by_class[label])),
        shots,
        queries,
        flags,
    )


def draw(
    dataset: ImageSet | Sequence[np.ndarray],
    ways: int,
    shots: int,
    queries: int,
    seed: int,
    index: int,
) -> Draw:
    """Episode `index` of the endless stream of `seed`: a pure function of its arguments.

    Classes are a random permutation cut to `ways`; of each, a permutation of its images is cut to
    size, the queries first. So episodes that differ in shots only share classes and queries, and
    the fewer shots are among the more.

    `dataset` may also be just the image indices of each class. Raises InputError when there are not
    enough.
    """
    _check_numbers(dataset, ways, shots, queries, TEST_FLAGS)
    by_class = _by_class(dataset)
    rng = _rng(Word.EPISODE, seed, index)
    classes = rng.permutation(len(by_class))[:ways]
    for label in classes:
        _check_class(dataset, label, shots, queries, TEST_FLAGS)
    images = np.stack([rng.permutation(by_class[label])[: queries + shots] for label in classes])
    return Draw(classes, images[:, queries:], images[:, :queries])


def draw_imbalanced(
    dataset: ImageSet | Sequence[np.ndarray],
    ways: int,
    shots: int,
    queries: int,
    alpha: float,
    seed: int,
    index: int,
) -> tuple[Draw, np.ndarray]:
    """`draw` of a task whose ways * queries queries are distributed over its classes as
    `dirichlet_queries` says.

    Returns:
        The draw, its queries (ways * queries,) class by class, and how many of them each class has
        (ways,).

    Raises:
        InputError: as `check_imbalanced`.
    """
    check_imbalanced(dataset, ways, shots, queries, alpha)
    by_class = _by_class(dataset)
    counts = dirichlet_queries(_rng(Word.IMBALANCE, seed, index), ways, ways * queries, alpha)
    rng = _rng(Word.EPISODE, seed, index)
    classes = rng.permutation(len(by_class))[:ways]
    images = [rng.permutation(by_class[label]) for label in classes]
    query = np.concatenate([order[:count] for order, count in zip(images, counts)])
    support = np.stack([order[count : count + shots] for order, count in zip(images, counts)])
    return Draw(classes, support, query), counts


def check_imbalanced(
    dataset: ImageSet | Sequence[np.ndarray], ways: int, shots: int, queries: int, alpha: float
) -> None:
    """Raises InputError if some task of `draw_imbalanced` could not be drawn, in which one class
    has all queries.
    """
    if alpha <= 0:
        raise InputError(f"--imbalance {alpha:g}: give a number above 0, as published 2")
    _check_numbers(dataset, ways, shots, queries, TEST_FLAGS)
    fewest = min(map(len, _by_class(dataset)))
    if fewest < ways * queries + shots:
        most = (fewest - shots) // ways
        advice = f"give --queries {most} or fewer" if most > 0 else "leave --imbalance out"
        raise InputError(
            f"--imbalance: a class may get all {ways * queries} queries of a task, but some class of "
            f"{_origin(dataset)} has {fewest} pictures; {advice}"
        )


def dirichlet_queries(
    rng: np.random.Generator | np.random.RandomState, ways: int, total: int, alpha: float = 2.0
) -> np.ndarray:
    """Numbers of a task's queries (ways,), `total` in all: the realistic protocol (Veilleux et al.,
    2021, section 3).

    Shares are drawn from the symmetric Dirichlet distribution, published with alpha 2, 5 ways and
    75 queries. A class may have none.
    """
    return rounded(rng.dirichlet(np.full(ways, alpha)), total)


def rounded(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers (ways,) that sum to `total`, near the shares (ways,) of it, which sum to 1.

    Those nearest to a half are rounded the other way, one after the other, until the sum is right.
    """
    counts = np.asarray(shares, np.float64) * total
    for i in np.abs(counts % 1 - 0.5).argsort(kind="stable"):
        excess = np.round(counts).sum() - total
        if excess:
            counts[i] = np.floor(counts[i]) if excess > 0 else np.ceil(counts[i])
    return np.round(counts).astype(int)


def reference_episodes(
    dataset: ImageSet | Sequence[np.ndarray],
    ways: int,
    shots: int,
    queries: int,
    count: int,
    seed: int,
) -> list[Draw]:
    """The first `count` episodes of mmfewshot's own stream, for comparing results with its
    published ones.

    It tests on 2000 of seed 0, and trains and validates on those of seed 0 too. There is no jumping
    ahead: classes are shuffled on from one episode to the next with numpy's legacy generator.
    Raises InputError as `draw` does.
    """
    check(dataset, ways, shots, queries)
    by_class = _by_class(dataset)
    rng = np.random.RandomState(seed)
    order = np.arange(len(by_class))
    drawn = []
    for _ in range(count):
        rng.shuffle(order)
        classes = order[:ways].copy()
        images = np.stack(
            [rng.choice(by_class[label], shots + queries, replace=False) for label in classes]
        )
        drawn.append(Draw(classes, images[:, :shots], images[:, shots:]))
    return drawn


def episode_loader(
    dataset: ImageSet,
    ways: int,
    shots: int,
    queries: int,
    feed: Feed,
    transform: Transform,
    *,
    tasks: int,
) -> Iterator[Episode]:
    """This process's share of the training episodes of the feed's steps, on its device.

    Step t (from 0) is of episodes t * tasks to (t + 1) * tasks - 1, of which process `rank` of
    `world` takes every world-th. `tasks`, the episodes of a step over all processes, must be a
    multiple of `world`.

    Raises InputError at once for episodes that cannot be drawn, and while loading for a picture
    that cannot be read.
    """
    check(dataset, ways, shots, queries, TRAIN_FLAGS)
    feed.check(tasks, "episodes")
    plan = partial(_plan_episodes, dataset, (ways, shots, queries), tasks, feed, transform.draws)
    batches = _load(dataset, plan, range(feed.start, feed.steps), feed, transform)
    supports = ways * shots

    def episodes() -> Iterator[Episode]:
        for images, planned in batches:
            tasks = len(planned.numbers)
            # (tasks / world, ways * (shots + queries), 3, H, W)
            images = images.unflatten(0, (tasks, -1))
            labels = torch.arange(ways, device=images.device).repeat(tasks, 1)
            yield Episode(
                support=images[:, :supports],
                support_labels=labels.repeat_interleave(shots, 1),
                query=images[:, supports:],
                query_labels=labels.repeat_interleave(queries, 1),
                classes=torch.from_numpy(planned.labels),
                indices=planned.numbers,
            )

    return episodes()


def class_batch_loader(
    dataset: ImageSet, feed: Feed, transform: Transform, *, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Batches (images (b, 3, H, W), labels (b,), image indices) of ordinary supervised training.

    Samples come from an endless row of permutations of the data set, so that batches are always
    full. Step t is of samples t * batch_size to (t + 1) * batch_size - 1, of which process `rank`
    of `world` takes every world-th: b = batch_size / world. Raises InputError when that is not
    whole, and for a picture that cannot be read.
    """
    feed.check(batch_size, "images")
    plan = partial(_plan_batch, dataset.labels, batch_size, feed, transform.draws)
    batches = _load(dataset, plan, range(feed.start, feed.steps), feed, transform)
    return ((images, planned.labels, planned.numbers) for images, planned in batches)


def image_loader(
    dataset: ImageSet,
    indices: Sequence[int] | np.ndarray,
    feed: Feed,
    transform: Transform,
    *,
    batch_size: int = 256,
) -> Iterator[tuple[Tensor, list[int]]]:
    """These pictures of a data set in this order, as batches (images (b, 3, H, W), indices), the
    last one short.

    The feed gives device and workers. `transform` must not be a random one. Raises InputError for a
    picture that cannot be read.
    """
    if transform.draws:
        raise ValueError(
            "image_loader has no random numbers for a training transform; give it a test transform"
        )
    indices = np.asarray(indices, np.int64)
    batches = range(-(-len(indices) // batch_size))
    loaded = _load(dataset, partial(_plan_list, indices, batch_size), batches, feed, transform)
    return ((images, planned.numbers) for images, planned in loaded)


class _Planned(NamedTuple):
    """What a step needs: which pictures, then their pixels; and what goes with them."""

    images: np.ndarray  # (n,) positions in the data set
    uniforms: Tensor  # (n, draws) random numbers for their augmentation
    # of pictures (n,); or an episode's classes (tasks, ways), an array, which stays on the CPU
    labels: Tensor | np.ndarray
    numbers: list[int]  # of episodes or pictures, for errors
    pixels: Tensor | None = None  # uint8 (n, 3, S, S)
    aspects: Tensor | None = None  # (n,)


def _plan_episodes(
    dataset: ImageSet, shape: tuple[int, int, int], tasks: int, feed: Feed, draws: int, step: int
) -> _Planned:
    numbers = list(feed.numbers(step, tasks))
    drawn = [draw(dataset, *shape, feed.seed, i) for i in numbers]
    images = np.concatenate([np.concatenate([d.support, d.query], axis=None) for d in drawn])
    each = len(images) // len(numbers), draws
    uniforms = [_rng(Word.EPISODE_AUGMENT, feed.seed, i).random(each, np.float32) for i in numbers]
    classes = np.stack([d.classes for d in drawn])
    return _Planned(images, torch.from_numpy(np.concatenate(uniforms)), classes, numbers)


def _plan_batch(labels: np.ndarray, batch_size: int, feed: Feed, draws: int, step: int) -> _Planned:
    samples, n = feed.numbers(step, batch_size), len(labels)
    images = np.array([_order(n, feed.seed, sample // n)[sample % n] for sample in samples])
    uniforms = np.stack(
        [_rng(Word.EPISODE_AUGMENT, feed.seed, i).random(draws, np.float32) for i in samples]
    )
    return _Planned(
        images, torch.from_numpy(uniforms), torch.from_numpy(labels[images]), images.tolist()
    )


def _plan_list(indices: np.ndarray, batch_size: int, step: int) -> _Planned:
    images = indices[step * batch_size : (step + 1) * batch_size]
    return _Planned(images, torch.zeros(len(images), 0), torch.zeros(0), images.tolist())


def _read(dataset: ImageSet, plan: Callable[[int], _Planned], step: int) -> _Planned:
    planned = plan(step)
    pixels = torch.stack([dataset.pixels(i) for i in planned.images.tolist()])
    aspects = torch.tensor(
        [dataset.aspect(i) for i in planned.images.tolist()], dtype=torch.float32
    )
    return planned._replace(pixels=pixels, aspects=aspects)


def _load(
    dataset: ImageSet,
    plan: Callable[[int], _Planned],
    steps: range,
    feed: Feed,
    transform: Transform,
) -> Iterator[tuple[Tensor, _Planned]]:
    """Images (n, 3, H, W) of each of these steps, on the feed's device, and what was planned."""
    for planned in stream(partial(_read, dataset, plan), steps, feed):
        yield transform(planned.pixels, planned.aspects, planned.uniforms), planned


def _rng(word: int, seed: int, number: int) -> np.random.Generator:
    """The generator of one `Word`."""
    if seed < 0:
        raise InputError(f"--seed {seed}: must not be negative")
    return np.random.default_rng((word, seed, number))


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n samples that an epoch is; two of them, as a batch may straddle a border."""
    return _rng(Word.EPISODE_SAMPLES, seed, epoch).permutation(n)


def _by_class(dataset: ImageSet | Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    return dataset.by_class if isinstance(dataset, ImageSet) else dataset


def _origin(dataset: ImageSet | Sequence[np.ndarray]) -> str:
    return dataset.origin if isinstance(dataset, ImageSet) else "the data set"


def _check_numbers(
    dataset: ImageSet | Sequence[np.ndarray],
    ways: int,
    shots: int,
    queries: int,
    flags: tuple[str, str, str],
) -> None:
    for number, flag in zip((ways, shots, queries), flags, strict=True):
        if number < 1:
            raise InputError(f"{flag} {number}: an episode needs at least 1")
    if ways > (classes := len(_by_class(dataset))):
        has = f"{classes} class{'es' * (classes > 1)}"
        raise InputError(
            f"{flags[0]} {ways}: {_origin(dataset)} has {has}; ask for fewer, or add classes"
        )


def _check_class(
    dataset: ImageSet | Sequence[np.ndarray],
    label: int,
    shots: int,
    queries: int,
    flags: tuple[str, str, str],
) -> None:
    images = len(_by_class(dataset)[label])
    if images < shots + queries:
        name = dataset.classes[label] if isinstance(dataset, ImageSet) else label
        has = f"{images} picture{'s' * (images > 1)}"
        fewer = (
            f"at most {flags[2]} {images - shots}"
            if images > shots
            else f"fewer {flags[1]} and {flags[2]}"
        )
        raise InputError(
            f"class {name} of {_origin(dataset)}: has {has}, {flags[1]} {shots} and {flags[2]} {queries} take "
            f"{shots + queries}; give {fewer}, or add pictures"
        )

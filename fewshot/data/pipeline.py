"""Pictures with boxes to batches: resized, mirrored, padded, normalised, in an order that follows
from the seed.

`Pipeline` makes samples of a `DetectionSet`'s pictures; `train_loader` and `test_loader` stream
them in batches. Boxes are xyxy in pixels throughout.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fewshot import InputError
from fewshot.data.detection import DetectionSet
from fewshot.data.stream import Feed, Word, stream
from fewshot.data.transforms import Normalisation


@dataclass
class Sample:
    """One picture as the network gets it, but for normalisation and padding."""

    id: str
    image: Tensor  # uint8 (3, h, w)
    boxes: Tensor  # float32 (n, 4), in the pixels of `image`
    labels: Tensor  # int64 (n,)
    scale: Tensor  # float32 (2,): x and y factors from the original picture to `image`


@dataclass(frozen=True)
class Pipeline:
    """How pictures become samples: resized with their aspect ratio kept, and mirrored half the time
    if `flip`.

    The factor is the largest for which the shorter side is at most `short` and the longer one at
    most `long` pixels; without either, sizes stay, and without `enlarge` it is at most 1. Of
    several `short` training draws one per sample. Batches are padded to a multiple of `multiple`.
    Testing neither flips nor draws: it takes the largest `short`, as all published settings do.
    """

    short: int | tuple[int, ...] | None = None
    long: int | None = None
    flip: bool = False
    multiple: int = 1
    enlarge: bool = True

    def describe(self) -> dict[str, int | bool | None]:
        """What a saved model says of the pictures that it is tested on: `Pipeline(**this)` makes
        such again.
        """
        short = max(self.short) if isinstance(self.short, tuple) else self.short
        return {
            "short": short,
            "long": self.long,
            "multiple": self.multiple,
            "enlarge": self.enlarge,
        }

    def resized(self, height: int, width: int, short: int | None = None) -> tuple[int, int]:
        """What pictures of such a height and width become, by default in tests."""
        short = self.describe()["short"] if short is None else short
        limits = ((self.long, max(height, width)), (short, min(height, width)))
        factor = min((limit / side for limit, side in limits if limit is not None), default=1)
        factor = factor if self.enlarge else min(factor, 1)
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))

    def resize(self, image: Tensor, short: int | None) -> tuple[Tensor, Tensor]:
        """uint8 (3, h, w) resized, and the factors (2,) of x and y by which it was."""
        old = image.shape[-2:]
        height, width = self.resized(*old, short)
        if (height, width) != old:
            # Not antialiased, because OpenCV's is not, with which published weights were trained.
            image = F.resize(image, [height, width], InterpolationMode.BILINEAR, antialias=False)
        return image, torch.tensor([width / old[1], height / old[0]])

    def sample(
        self, dataset: DetectionSet, index: int, rng: np.random.Generator | None = None
    ) -> Sample:
        """Picture `index` with the objects that may be trained on; `rng` is what training draws
        from.
        """
        record, image = dataset.records[index], dataset.image(index)
        usable = dataset.usable(record)
        labels = torch.from_numpy(record.labels[usable])

        shorts = self.short if isinstance(self.short, tuple) else (self.short,)
        draws = rng is not None and len(shorts) > 1
        short = shorts[rng.integers(len(shorts))] if draws else max(shorts)
        image, scale = self.resize(image, short)

        height, width = image.shape[-2:]
        boxes = torch.from_numpy(record.boxes[usable]) * scale.repeat(2)
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)

        if self.flip and rng is not None and rng.random() < 0.5:
            image = image.flip(-1)
            boxes[:, 0::2] = width - boxes[:, [2, 0]]
        return Sample(record.id, image, boxes, labels, scale)


class Batch(NamedTuple):
    """b samples, padded at the bottom and on the right to one size."""

    # uint8 (b, 3, H, W), zero where padded; float and normalised where a loader gives them
    images: Tensor
    sizes: list[tuple[int, int]]  # b times (height, width) without padding
    scales: Tensor  # float32 (b, 2): x and y factors from the original pictures
    boxes: list[Tensor]  # b times float32 (n, 4), in the pixels of `images`
    labels: list[Tensor]  # b times int64 (n,)
    ids: list[str]

    def normalised(self, normalisation: Normalisation) -> "Batch":
        """With float images for the network: zero where padded, whatever zero grey would have
        become.
        """
        images = normalisation(self.images)
        for image, (height, width) in zip(images, self.sizes):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return self._replace(images=images)


def collate(samples: Sequence[Sample], multiple: int = 1) -> Batch:
    """Pad samples to the largest height and width among them, rounded up to a multiple of
    `multiple`.
    """
    return Batch(
        images=collate_images([s.image for s in samples], multiple),
        sizes=[tuple(s.image.shape[-2:]) for s in samples],
        scales=torch.stack([s.scale for s in samples]),
        boxes=[s.boxes for s in samples],
        labels=[s.labels for s in samples],
        ids=[s.id for s in samples],
    )


def collate_images(images: Sequence[Tensor], multiple: int = 1) -> Tensor:
    """uint8 (b, 3, H, W) of images (3, h, w), padded with zeros to a multiple of `multiple`."""
    height, width = (-(-max(i.shape[d] for i in images) // multiple) * multiple for d in (1, 2))
    padded = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for place, image in zip(padded, images):
        place[:, : image.shape[1], : image.shape[2]] = image
    return padded


@dataclass(frozen=True)
class Shuffle:
    """Which picture sample i is: pictures come in an endless row of permutations.

    Args:
        n: number of pictures.
        wide: for each, whether it is, as bytes: the pictures of a batch are all wide or all tall,
            so that little is padded; a last batch of either kind is filled up with its first
            pictures. Empty: batches are mixed.
        batch_size: of such batches.
    """

    n: int
    wide: bytes = b""
    batch_size: int = 1

    @classmethod
    def of(cls, dataset: DetectionSet, batch_size: int, group: bool) -> "Shuffle":
        """Of the pictures of a set, with batches of one kind if `group`."""
        wide = bytes(record.width >= record.height for record in dataset.records)
        return cls(len(dataset), wide, batch_size) if group else cls(len(dataset))

    def picture(self, seed: int, number: int) -> int:
        """Position of sample `number`'s picture: a pure function of (seed, number)."""
        kinds = [self.wide.count(kind) for kind in (0, 1)]
        samples = (
            sum(-(-count // self.batch_size) for count in kinds) * self.batch_size
            if self.wide
            else self.n
        )
        epoch, position = divmod(number, samples)
        return int(_order(self, seed, epoch)[position])


@lru_cache(maxsize=2)
def _order(shuffle: Shuffle, seed: int, epoch: int) -> np.ndarray:
    rng = np.random.default_rng((Word.SAMPLES, seed, epoch))
    order = rng.permutation(shuffle.n)
    if not shuffle.wide:
        return order
    wide, batches = np.frombuffer(shuffle.wide, bool)[order], []
    for kind in (order[wide], order[~wide]):
        if len(kind):
            full = -(-len(kind) // shuffle.batch_size) * shuffle.batch_size
            batches.append(np.resize(kind, full).reshape(-1, shuffle.batch_size))
    return rng.permutation(np.concatenate(batches)).ravel()


def train_loader(
    dataset: DetectionSet,
    pipeline: Pipeline,
    feed: Feed,
    normalisation: Normalisation,
    *,
    batch_size: int,
    extra: Callable[[int, int], Any] | None = None,
    group: bool = False,
) -> Iterator[Any]:
    """This process's share of the batches of the feed's steps, normalised, on its device.

    Samples are numbered through an endless row of permutations of the pictures; step t trains on
    the `batch_size` samples from t * batch_size on, of which process `rank` of `world` takes every
    world-th. Sample i is a pure function of (seed, i). With `group` a batch's pictures are all wide
    or all tall. With `extra`, items are (batch, extra(seed, step)): made by the same worker, the
    same on all processes, and a NamedTuple with a method `normalised`.

    Raises:
        InputError: `batch_size` is not a multiple of `world`, or a picture cannot be read.
    """
    feed.check(batch_size, "pictures")
    if not len(dataset):
        raise InputError(f"{dataset.name}: no picture to train on")
    shuffle = Shuffle.of(dataset, batch_size, group)
    make = partial(_train_item, dataset, pipeline, shuffle, batch_size, feed, extra)
    return stream(make, range(feed.start, feed.steps), feed, normalisation)


def _train_item(
    dataset: DetectionSet,
    pipeline: Pipeline,
    shuffle: Shuffle,
    batch_size: int,
    feed: Feed,
    extra: Callable[[int, int], Any] | None,
    step: int,
) -> Any:
    samples = []
    for number in feed.numbers(step, batch_size):
        index = shuffle.picture(feed.seed, number)
        samples.append(
            pipeline.sample(
                dataset, index, np.random.default_rng((Word.AUGMENT, feed.seed, number))
            )
        )
    batch = collate(samples, pipeline.multiple)
    return (batch, extra(feed.seed, step)) if extra is not None else batch


def test_loader(
    dataset: DetectionSet,
    pipeline: Pipeline,
    feed: Feed,
    normalisation: Normalisation,
    *,
    batch_size: int = 1,
) -> Iterator[Batch]:
    """Every picture of process `rank`, which has those at rank, rank + world, ..., in order and
    without augmentation.

    Padding depends on what else is in a batch, and so, a little, do detections: pictures of several
    sizes are best tested one at a time.
    """
    mine = range(feed.rank, len(dataset), feed.world)
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return stream(partial(_test_item, dataset, pipeline), batches, feed, normalisation)


def _test_item(dataset: DetectionSet, pipeline: Pipeline, indices: range) -> Batch:
    return collate([pipeline.sample(dataset, index) for index in indices], pipeline.multiple)

"""Episodes of Attention-RPN: a picture with the objects of one class, and supports of that class
and of others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fewshot import InputError
from fewshot.data.detection import DetectionSet, objects_by_class
from fewshot.data.pipeline import Batch, Pipeline, Shuffle, collate
from fewshot.data.stream import Feed, Word, stream
from fewshot.data.transforms import Normalisation

ATTEMPTS = 100  # pictures tried for one on which enough classes are absent


def support_crop(
    image: Tensor, box: Sequence[float] | Tensor, size: int, context: int
) -> tuple[Tensor, Tensor]:
    """A square around an object, with `context` pixels more on both ends of its longer side, black
    outside the picture.

    Args:
        image: uint8 RGB (3, H, W).
        box: (4,) xyxy in its pixels.
        size: side of the square that comes out, in pixels.

    Returns:
        uint8 (3, size, size), and the object's box in it, float32 (4,) xyxy of whole pixels.
    """
    x1, y1, x2, y2 = (int(value) for value in box)
    tall = y2 - y1 > x2 - x1
    if tall:  # the transpose of the wide case
        image, (x1, y1, x2, y2) = image.transpose(1, 2), (y1, x1, y2, x2)
    height, width = image.shape[-2:]
    left, right = max(x1 - context, 0), min(x2 + context, width)
    side, middle = right - left, int((y1 + y2) / 2)
    top, bottom = int(middle - side / 2), min(int(middle + side / 2), height)
    shown = slice(max(top, 0), bottom)
    offset = int((side - (bottom - shown.start)) / 2)
    square = torch.zeros(3, side, side, dtype=torch.uint8)
    square[:, offset : offset + bottom - shown.start] = image[:, shown, left:right]
    above = math.ceil((side - (y2 - y1)) / 2) + min(top, 0) + offset
    corners = [x1 - left, above, x2 - left, above + y2 - y1]
    if tall:
        square, corners = square.transpose(1, 2), [corners[i] for i in (1, 0, 3, 2)]
    resized = F.resize(square.float(), [size, size], InterpolationMode.BILINEAR, antialias=False)
    pixels = (resized + 1e-3).to(torch.uint8)  # cut off as published, but not by a rounding error
    return pixels, torch.tensor([float(int(corner * (size / side))) for corner in corners])


class BoxedSupports(NamedTuple):
    """Supports with the box of their object; any number of leading dimensions."""

    images: Tensor  # uint8 (.., 3, S, S); float and normalised where a loader gives them
    boxes: Tensor  # float32 (.., 4), xyxy in their pixels
    labels: Tensor  # int64 (..)

    def normalised(self, normalisation: Normalisation) -> BoxedSupports:
        """With float images for the network."""
        return self._replace(images=normalisation(self.images))


def without_small(dataset: DetectionSet, area: float) -> DetectionSet:
    """The set without the pictures on which any object covers fewer than `area` square pixels."""
    records = []
    for record in dataset.records:
        sides = record.boxes[dataset.usable(record)]
        if ((sides[:, 2] - sides[:, 0]) * (sides[:, 3] - sides[:, 1]) >= area).all():
            records.append(record)
    return dataset.with_records(records)


class QueryAware:
    """Pictures to search and supports that know what is on them (Fan et al., 2020, section 4.3).

    Args:
        dataset: lends both.
        pipeline: of the pictures to search.
        ways: classes searched for: one that is there, the others not.
        shots: supports of each.
        size: side of the supports in pixels.
        context: pixels of a support's picture around its object.

    Raises:
        InputError: too few classes for so many ways, or naming a class without an object that may
            serve as support.
    """

    def __init__(
        self,
        dataset: DetectionSet,
        pipeline: Pipeline,
        *,
        ways: int,
        shots: int,
        size: int,
        context: int,
    ):
        self.dataset, self.pipeline, self.ways, self.shots = dataset, pipeline, ways, shots
        self.size, self.context = size, context
        if len(dataset.classes) < ways:
            raise InputError(
                f"{dataset.name}: {len(dataset.classes)} classes are too few to search for {ways} at a time"
            )
        self.labels = [record.labels[dataset.usable(record)] for record in dataset.records]
        self.entries = objects_by_class(dataset)  # (record, object) of each class
        for name, entries in zip(dataset.classes, self.entries):
            if not entries:
                raise InputError(
                    f"{dataset.name}: class {name} has no object that can serve as support; add pictures"
                )

    def loader(
        self, feed: Feed, normalisation: Normalisation, *, batch_size: int, group: bool = False
    ) -> Iterator[tuple[Batch, BoxedSupports]]:
        """This process's share of the feed's steps: b pictures, supports (b, ways, shots, ...),
        both normalised.

        A picture keeps the objects of the class that is searched for on it, which its first
        supports show. As in `pipeline.train_loader` sample i is a pure function of (seed, i),
        process `rank` of `world` takes every world-th, and `group` has batches of only wide or only
        tall pictures.

        Raises:
            InputError: `batch_size` is not a multiple of `world`, or a picture cannot be read.
        """
        feed.check(batch_size, "pictures")
        numbers = [feed.numbers(step, batch_size) for step in range(feed.start, feed.steps)]
        shuffle = Shuffle.of(self.dataset, batch_size, group)
        return stream(partial(self._step, feed.seed, shuffle), numbers, feed, normalisation)

    def describe(self) -> dict[str, int]:
        """What a saved model says of the supports that it takes."""
        return {"support_size": self.size, "context": self.context}

    def table(
        self, most: int | None, feed: Feed, normalisation: Normalisation, *, batch_size: int = 16
    ) -> Iterator[BoxedSupports]:
        """Every class's supports, or `most` drawn by the feed's seed, normalised: prototypes are
        means of them.
        """
        chosen = []
        for label, entries in enumerate(self.entries):
            order = range(len(entries))
            if most is not None and most < len(entries):
                order = sorted(
                    np.random.default_rng((Word.TABLE, feed.seed, label)).permutation(len(entries))[
                        :most
                    ]
                )
            chosen += [entries[i] for i in order]
        batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
        return stream(self.supports, batches, feed, normalisation)

    def supports(self, entries: Sequence[tuple[int, int]]) -> BoxedSupports:
        """The supports (n, ...) that show objects given as (record, object)."""
        images, boxes, labels = [], [], []
        for position, i in entries:
            record = self.dataset.records[position]
            image, box = support_crop(
                self.dataset.image(position), record.boxes[i], self.size, self.context
            )
            images.append(image)
            boxes.append(box)
            labels.append(int(record.labels[i]))
        return BoxedSupports(torch.stack(images), torch.stack(boxes), torch.tensor(labels))

    def draw(
        self, seed: int, number: int, shuffle: Shuffle | None = None
    ) -> tuple[int, int, list[list[tuple[int, int]]]]:
        """Picture, class searched for, and for it and each absent class its supports, as (record,
        object).
        """
        rng = np.random.default_rng((Word.QUERY, seed, number))
        index = (shuffle or Shuffle(len(self.dataset))).picture(seed, number)
        for _ in range(ATTEMPTS):
            # As published: objects are counted, not classes, so that crowded pictures are left out
            # too.
            if len(self.dataset.classes) - len(self.labels[index]) >= self.ways - 1:
                break
            index = int(rng.integers(len(self.dataset)))
        else:
            raise InputError(
                f"{self.dataset.name}: no picture found on which {self.ways - 1} classes are absent"
            )
        present = self.labels[index]
        # an object each, so that frequent classes are drawn more often
        query = int(rng.choice(present))
        absent = np.setdiff1d(np.arange(len(self.dataset.classes)), present)
        negative = rng.choice(absent, self.ways - 1, replace=False).tolist()
        return index, query, [self._shots(rng, label, index) for label in (query, *negative)]

    def _shots(self, rng: np.random.Generator, label: int, searched: int) -> list[tuple[int, int]]:
        """Supports of a class, from other pictures than the searched one where there are any.

        All different where there are enough, else in permutations one after the other.
        """
        others = [entry for entry in self.entries[label] if entry[0] != searched]
        pool, chosen = others or self.entries[label], []
        while len(chosen) < self.shots:
            chosen += [pool[i] for i in rng.permutation(len(pool)).tolist()]
        return chosen[: self.shots]

    def _step(self, seed: int, shuffle: Shuffle, numbers: range) -> tuple[Batch, BoxedSupports]:
        """A step's share, of the numbers of its samples."""
        samples, supports = [], []
        for number in numbers:
            index, query, ways = self.draw(seed, number, shuffle)
            augment = np.random.default_rng((Word.AUGMENT, seed, number))
            sample = self.pipeline.sample(self.dataset, index, augment)
            mine = sample.labels == query
            samples.append(replace(sample, boxes=sample.boxes[mine], labels=sample.labels[mine]))
            supports.append(self.supports([entry for way in ways for entry in way]))

        shape = (len(samples), self.ways, self.shots)
        columns = (torch.cat(column) for column in zip(*supports))
        each = BoxedSupports(*(column.unflatten(0, shape) for column in columns))
        return collate(samples, self.pipeline.multiple), each

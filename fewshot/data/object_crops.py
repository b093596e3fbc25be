"""Single objects cut out of their pictures at several sizes: what MPSR trains on beside whole
pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fewshot import InputError
from fewshot.data.detection import DetectionSet
from fewshot.data.stream import Feed, Word
from fewshot.data.transforms import Normalisation

CONTEXT = 1 / 7  # of an object's longer side, around it


def cut(image: Tensor, box: np.ndarray | Tensor) -> Tensor:
    """The square around an object, 8 / 7 of its longer side wide, black outside the picture.

    Args:
        image: uint8 (3, H, W).
        box: (4,) xyxy in its pixels.

    Returns:
        uint8 (3, side, side).
    """
    x1, y1, x2, y2 = (float(value) for value in box)
    height, width = image.shape[-2:]
    side = int(max(x2 - x1, y2 - y1) * (1 + CONTEXT))
    square = torch.zeros(3, side, side, dtype=torch.uint8)
    # rows and columns of the square, and those of the picture that they show
    inside, outside = [], []
    for low, high, limit in ((y1, y2, height), (x1, x2, width)):
        first = int((low + high - side) / 2)
        start, stop = max(-first, 0), min(int((low + high + side) / 2), limit, first + side) - first
        inside.append(slice(start, stop))
        outside.append(slice(first + start, first + stop))
    square[:, inside[0], inside[1]] = image[:, outside[0], outside[1]]
    return square


class CropBatch(NamedTuple):
    """n objects at several scales."""

    # for each scale s uint8 (n, 3, s, s); float and normalised where a loader gives them
    images: list[Tensor]
    labels: Tensor  # int64 (n,)

    def normalised(self, normalisation: Normalisation) -> CropBatch:
        """With float images for the network."""
        return self._replace(images=[normalisation(scale) for scale in self.images])


class ObjectCrops:
    """The pyramid of single objects (Wu et al., 2020, section 3.2).

    Args:
        dataset: whose objects, those that may be trained on, are cut out.
        scales: sides of the crops in pixels.
        number: objects of a step, over all processes.
        feed: whose process takes every world-th object of a step.
        flip: whether a crop is mirrored half the time.
        smallest: objects of a shorter side than this many pixels are left out.

    Raises:
        InputError: no object is large enough, or the number cannot be divided among the processes.
    """

    def __init__(
        self,
        dataset: DetectionSet,
        scales: Sequence[int],
        number: int,
        feed: Feed,
        *,
        flip: bool,
        smallest: int = 2,
    ):
        self.dataset, self.scales, self.number, self.flip = dataset, scales, number, flip
        self.feed = feed
        feed.check(number, "objects")
        self.entries = []  # (record, object)
        for position, record in enumerate(dataset.records):
            sides = record.boxes[:, 2:] - record.boxes[:, :2]
            large = dataset.usable(record) & (sides >= smallest).all(1)
            self.entries += [(position, i) for i in np.flatnonzero(large).tolist()]
        if not self.entries:
            raise InputError(
                f"{dataset.name}: no object of {smallest} pixels or more to cut out; add pictures"
            )

    def draw(self, seed: int, step: int) -> CropBatch:
        """This process's crops of a step: a pure function of (seed, step). Objects come in endless
        permutations.
        """
        crops, labels = [], []
        for number in self.feed.numbers(step, self.number):
            epoch, place = divmod(number, len(self.entries))
            order = np.random.default_rng((Word.CROPS, seed, epoch)).permutation(len(self.entries))
            position, i = self.entries[order[place]]
            record = self.dataset.records[position]
            rng = np.random.default_rng((Word.CROPS, seed, number, 1))
            crops.append(self._pyramid(cut(self.dataset.image(position), record.boxes[i]), rng))
            labels.append(int(record.labels[i]))
        return CropBatch([torch.stack(scale) for scale in zip(*crops)], torch.tensor(labels))

    def _pyramid(self, square: Tensor, rng: np.random.Generator) -> list[Tensor]:
        """The square at every scale, each crop of the scale's size with a place and a mirror of its
        own.
        """
        crops = []
        for scale in self.scales:
            side = int(scale * (1 + CONTEXT) + 0.5)
            resized = F.resize(square, [side, side], InterpolationMode.BILINEAR, antialias=False)
            top, left = rng.integers(side - scale + 1, size=2).tolist()
            crop = resized[:, top : top + scale, left : left + scale]
            crops.append(crop.flip(-1) if self.flip and rng.random() < 0.5 else crop)
        return crops

"""Support sets for detectors: for every class a few pictures, each with the box of the one object
that is meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fewshot import InputError
from fewshot.data.detection import DetectionSet
from fewshot.data.stream import Feed, Word, stream
from fewshot.data.transforms import Normalisation


def support_image(image: Tensor, box: np.ndarray | Tensor, size: int | None = 224) -> Tensor:
    """A whole picture squeezed to a square, and where its object is: Meta R-CNN's four-channel
    support.

    Args:
        image: uint8 RGB (3, H, W).
        box: (4,) xyxy in its pixels.
        size: side of the square in pixels; None leaves the picture as it is.

    Returns:
        uint8 (4, size, size): the picture without regard to its aspect ratio, and a mask, 1 inside
        the box.
    """
    height, width = image.shape[-2:]
    # Not antialiased, like the pictures to be searched (`detection.Pipeline`).
    new = [size, size] if size is not None else [height, width]
    squeezed = F.resize(image, new, InterpolationMode.BILINEAR, antialias=False)
    # float32, as what is truncated below depends on it
    factors = torch.tensor([new[1] / width, new[0] / height]).repeat(2)
    x1, y1, x2, y2 = (
        (torch.as_tensor(box, dtype=torch.float32) * factors).int().clamp(min=0).tolist()
    )
    mask = torch.zeros(1, *new, dtype=torch.uint8)
    mask[:, y1:y2, x1:x2] = 1
    return torch.cat([squeezed, mask])


class SupportBatch(NamedTuple):
    """n supports."""

    # uint8 (n, 4, S, S): RGB and the mask of the object; float and normalised where a loader gives
    # them
    images: Tensor
    labels: Tensor  # int64 (n,)

    def normalised(self, normalisation: Normalisation) -> SupportBatch:
        """With float images for the network: normalised colours, and the mask as it is."""
        colours = normalisation(self.images[:, :3])
        mask = self.images[:, 3:].float()
        return self._replace(images=torch.cat([colours, mask], 1))


class NWayKShot:
    """Supports of all classes of a set, for episodes of training and for the prototypes of testing.

    Args:
        dataset: whose objects serve as supports, except difficult ones.
        shots: supports per class in an episode.
        used: objects per class to draw from: the first so many.
        one_per_image: whether a picture lends at most one object.
        size: side of the supports in pixels.

    Raises:
        InputError: naming a class that has no object.
    """

    def __init__(
        self,
        dataset: DetectionSet,
        shots: int,
        *,
        used: int,
        one_per_image: bool = False,
        size: int = 224,
    ):
        self.dataset, self.shots, self.size = dataset, shots, size
        # (record, object) of each class
        self.entries: list[list[tuple[int, int]]] = [[] for _ in dataset.classes]
        for position, record in enumerate(dataset.records):
            for i in np.flatnonzero(~record.difficult).tolist():
                entries = self.entries[record.labels[i]]
                if len(entries) < used:
                    entries.append((position, i))
                    if one_per_image:
                        break
        for name, entries in zip(dataset.classes, self.entries):
            if not entries:
                raise InputError(
                    f"{dataset.name}: class {name} has no object that can serve as support; add pictures"
                )

    def draw(self, seed: int, step: int) -> SupportBatch:
        """The episode of a step: `shots` distinct supports of every class, classes in random order,
        (W * shots) in all.

        A pure function of (seed, step). A class with fewer objects than shots shows some of them
        more than once.
        """
        rng = np.random.default_rng((Word.SUPPORT, seed, step))
        chosen = []
        for label in rng.permutation(len(self.entries)).tolist():
            entries = self.entries[label]
            if len(entries) < self.shots:
                entries = entries * (self.shots // len(entries) + 1)
            chosen += [entries[i] for i in rng.choice(len(entries), self.shots, replace=False)]
        return self._make(chosen)

    def table(
        self, feed: Feed, normalisation: Normalisation, *, batch_size: int = 16
    ) -> Iterator[SupportBatch]:
        """Every support there is, in order of classes, in batches, normalised: what prototypes are
        averaged from.
        """
        every = [entry for entries in self.entries for entry in entries]
        batches = [every[i : i + batch_size] for i in range(0, len(every), batch_size)]
        return stream(self._make, batches, feed, normalisation)

    def describe(self) -> dict[str, int]:
        """What a saved model says of the supports that it takes."""
        return {"support_size": self.size}

    def _make(self, places: list[tuple[int, int]]) -> SupportBatch:
        images, labels = [], []
        for position, i in places:
            record = self.dataset.records[position]
            images.append(support_image(self.dataset.image(position), record.boxes[i], self.size))
            labels.append(int(record.labels[i]))
        return SupportBatch(torch.stack(images), torch.tensor(labels))

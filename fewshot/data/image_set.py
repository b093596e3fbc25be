"""An `ImageSet` is one split of a classification data set, wherever its pictures come from."""

import copy
import os
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewshot import InputError
from fewshot.data import transforms
from fewshot.data.cache import Decoder, Squares, squares

Split = Literal["train", "val", "test"]


class Source(Protocol):
    """Where pictures come from; picklable, so that loading processes can have it."""

    def __call__(self, index: int) -> Image.Image:
        """Picture `index`, RGB and upright."""

    def version(self) -> object:
        """Something whose repr changes when the pictures do, or None when they are in memory
        anyway.
        """


class ImageSet:
    """The pictures of one split of one data set, decoded one at a time when asked for.

    Args:
        classes: names in label order.
        labels: (n,) label of each picture.
        source: gives picture i.
        size: side in pixels of what networks see.
        stored: side S in pixels of the square that a picture is squashed to.
        augment: whether the augmentation of natural images suits these pictures.

    Further attributes: `by_class`, for each class the indices of its pictures, ascending; `origin`,
    what errors call the set.

    Raises InputError when a class has no picture.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        classes: list[str],
        labels: np.ndarray,
        source: Source,
        *,
        size: int,
        stored: int,
        normalisation: transforms.Normalisation = transforms.IMAGENET,
        augment: bool = True,
    ):
        self.name, self.split, self.classes, self.origin = name, split, classes, f"{name} {split}"
        self.source: Source | Squares = source
        self.size, self.stored, self.normalisation, self.augment = (
            size,
            stored,
            normalisation,
            augment,
        )
        self.labels = np.asarray(labels, np.int64)
        counts = np.bincount(self.labels, minlength=len(classes))
        if not counts.all():
            raise InputError(
                f"{self.origin}: class {classes[counts.argmin()]} has no picture; add some or remove it"
            )
        self.by_class = np.split(np.argsort(self.labels, kind="stable"), np.cumsum(counts)[:-1])
        self._aspects = np.full(len(self.labels), np.nan)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: int) -> Tensor:
        """Picture `index` squashed to a square: uint8 RGB (3, S, S). Raises InputError when it
        cannot be read.
        """
        if isinstance(self.source, Squares):
            return torch.from_numpy(self.source.pixels[index].copy())
        picture = self.source(index)
        self._aspects[index] = picture.width / picture.height
        if picture.size != (self.stored, self.stored):
            picture = picture.resize((self.stored, self.stored), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()

    def aspect(self, index: int) -> float:
        """Width / height of picture `index` before it was squashed; free once its pixels were read."""
        if isinstance(self.source, Squares):
            return float(self.source.aspects[index])
        if np.isnan(self._aspects[index]):
            self.pixels(index)
        return float(self._aspects[index])

    def _square(self, index: int) -> tuple[Tensor, float]:
        return self.pixels(index), self.aspect(index)

    def cached(self, folder: str | os.PathLike) -> "ImageSet":
        """The same set with its squares in a memory map, decoded into a file of `folder` unless
        they are there.

        Sets whose pictures are in memory anyway (Omniglot, CIFAR) are returned as they are. See
        `cache.squares` for what makes a file stale, for several processes, and for errors.
        """
        if isinstance(self.source, Squares) or (version := self.source.version()) is None:
            return self
        decoder = Decoder(f"{self.name}-{self.split}", len(self), self.stored, self._square)
        twin = copy.copy(self)
        twin.source = squares(decoder, Path(folder), version)
        return twin

    def describe(self) -> dict[str, Any]:
        """What a model trained on this should say of its data, for json: whatever it takes to feed
        it pictures.
        """
        return {
            "dataset": self.name,
            "classes": self.classes,
            "size": self.size,
            "stored": self.stored,
            "normalisation": self.normalisation.to_dict(),
            "augment": self.augment,
        }

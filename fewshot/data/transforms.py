"""Pictures to network inputs: a whole batch at once, on its device, each picture with its own crop,
flip and colours.

A data set hands out every picture squashed to one square of side S, with the aspect ratio (width /
height) that it had. Crops are laid out in the geometry of the original and resampled from the
square in one go.

A transform is a pure function of (pixels, aspect, uniforms): the random numbers come from outside,
`draws` uniform ones per picture, so that whoever loads pictures decides what they depend on.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torchvision.ops import roi_align


@dataclass(frozen=True)
class Normalisation:
    """(x - mean) / std per channel, of pixels on the 0..255 scale; both are written in RGB order,
    whatever `bgr`.

    With `bgr` the result's channels are in BGR order, as networks that come from caffe expect.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool = False

    def __call__(self, pixels: Tensor) -> Tensor:
        """RGB pixels (..., 3, H, W), uint8 or float 0..255 -> float32 of the same shape."""
        mean, std = (_per_channel(x, pixels.device) for x in (self.mean, self.std))
        normal = (pixels.float() - mean) / std
        return normal.flip(-3) if self.bgr else normal

    def pixels(self, normal: Tensor) -> Tensor:
        """What was normalised: RGB pixels, float 0..255, of the same shape."""
        mean, std = (_per_channel(x, normal.device) for x in (self.mean, self.std))
        return (normal.flip(-3) if self.bgr else normal) * std + mean

    def to_dict(self) -> dict[str, Any]:
        """What a saved model says of its inputs."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Normalisation:
        """The normalisation that `to_dict` wrote, also after a trip through json."""
        return cls(tuple(saved["mean"]), tuple(saved["std"]), saved["bgr"])


IMAGENET = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
CAFFE = Normalisation((123.675, 116.28, 103.53), (1.0, 1.0, 1.0), bgr=True)
CAFFE_MPSR = Normalisation((122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0), bgr=True)
HALF = Normalisation((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))

AREA = 0.08, 1.0  # of the original that a random crop covers
RATIO = 3 / 4, 4 / 3  # width / height of a random crop, log-uniform
ATTEMPTS = 10  # random crops tried before the centred one
JITTER = 0.4  # brightness, contrast and saturation change by up to this fraction
GREY = 0.2989, 0.587, 0.114  # of red, green and blue, as torchvision weighs them


class Transform(Protocol):
    """What the loaders ask of a transform."""

    size: int
    draws: int  # random numbers per picture

    def __call__(self, pixels: Tensor, aspect: Tensor, uniforms: Tensor) -> Tensor:
        """uint8 RGB (b, 3, S, S), (b,) and [0, 1) numbers (b, draws) -> normalised float32 (b, 3,
        size, size).
        """


class Pictures(Protocol):
    """What of a data set decides about its transforms."""

    size: int
    normalisation: Normalisation
    augment: bool


@dataclass(frozen=True)
class Whole:
    """The whole picture, squashed: for characters, whose colours and place say what they should.
    Nothing is random.
    """

    size: int
    normalisation: Normalisation
    draws: ClassVar[int] = 0

    def __call__(self, pixels: Tensor, aspect: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """uint8 RGB (b, 3, S, S) -> float32 (b, 3, size, size). The aspect ratios (b,) are of no
        account.
        """
        if pixels.shape[-1] == self.size:
            return self.normalisation(pixels)
        everything = torch.ones(len(pixels), device=pixels.device)
        return self.normalisation(_resample(pixels, _centred(everything, everything), self.size))


@dataclass(frozen=True)
class TestCrop:
    """Shorter side to int(ratio * size), then the central size x size: one box of the original.
    Nothing is random.
    """

    size: int
    normalisation: Normalisation
    ratio: float = 1.15
    draws: ClassVar[int] = 0

    def __call__(self, pixels: Tensor, aspect: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """uint8 RGB (b, 3, S, S) of pictures of aspect ratio (b,) -> float32 (b, 3, size, size)."""
        # of the crop, in shorter sides of the original
        side = self.size / int(self.ratio * self.size)
        boxes = _centred(side / aspect.clamp(min=1), side * aspect.clamp(max=1))
        return self.normalisation(_resample(pixels, boxes, self.size))


@dataclass(frozen=True)
class TrainAugment:
    """Random resized crop, horizontal flip and colour jitter, as torchvision's: mmfewshot's
    training pipeline.
    """

    size: int
    normalisation: Normalisation
    draws: ClassVar[int] = 2 * ATTEMPTS + 2 + 1 + 3 + 3

    def __call__(self, pixels: Tensor, aspect: Tensor, uniforms: Tensor) -> Tensor:
        """uint8 RGB (b, 3, S, S), aspect ratios (b,), uniforms (b, draws) -> float32 (b, 3, size,
        size).
        """
        shape, place, flip, strength, order = uniforms.split((2 * ATTEMPTS, 2, 1, 3, 3), dim=1)
        images = _resample(pixels, _random_boxes(aspect, shape, place), self.size)
        images = torch.where(flip[..., None, None] < 0.5, images.flip(-1), images)
        factors = 1 + JITTER * (2 * strength - 1)
        return self.normalisation(_colour_jitter(images, factors, order.argsort(1)))


def train_transform(dataset: Pictures) -> Transform:
    """What pictures of this data set go through for training: augmented if they are natural images."""
    return (TrainAugment if dataset.augment else Whole)(dataset.size, dataset.normalisation)


def test_transform(dataset: Pictures) -> Transform:
    """What pictures of this data set go through for validation and test: nothing random."""
    return (TestCrop if dataset.augment else Whole)(dataset.size, dataset.normalisation)


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Constants (3, 1, 1), brought to a device once: doing so at every step would make the step
    wait.
    """
    return torch.tensor(values, device=device)[:, None, None]


def _centred(width: Tensor, height: Tensor) -> Tensor:
    """Centred boxes xyxy (b, 4), in fractions of the picture."""
    sides = torch.stack([width, height], 1)  # (b, 2)
    return torch.cat([1 - sides, 1 + sides], 1) / 2


def _random_boxes(aspect: Tensor, shape: Tensor, place: Tensor) -> Tensor:
    """Random crops xyxy (b, 4) in fractions of pictures of aspect ratio (b,): area and ratio are
    the original's.

    The first of the attempts (b, 2 * ATTEMPTS) that fits is put anywhere by `place` (b, 2). If none
    does, it is the centred crop that is as large as a ratio within bounds allows.
    """
    area, ratio = shape.chunk(2, dim=1)  # (b, ATTEMPTS) each
    low, high = map(math.log, RATIO)
    area, ratio = AREA[0] + (AREA[1] - AREA[0]) * area, torch.exp(low + (high - low) * ratio)
    # with the original's height as unit: crop width² = aspect * area * ratio, height² = aspect *
    # area / ratio
    sides = torch.stack(
        [(area * ratio / aspect[:, None]).sqrt(), (area / ratio * aspect[:, None]).sqrt()], -1
    )
    fits = (sides <= 1).all(-1)  # (b, ATTEMPTS)
    first = fits.int().argmax(1)  # argmax takes the first of equals
    sides = sides[torch.arange(len(sides), device=sides.device), first]  # (b, 2)
    corner = place * (1 - sides)
    fallback = _centred((RATIO[1] / aspect).clamp(max=1), (aspect / RATIO[0]).clamp(max=1))
    return torch.where(fits.any(1)[:, None], torch.cat([corner, corner + sides], 1), fallback)


def _resample(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The box (b, 4) of each picture (b, 3, S, S), in fractions, as float (b, 3, size, size) on the
    0..255 scale.

    RoIAlign is bilinear where it enlarges, and averages as many bilinear samples as there are
    source pixels where it reduces: the result is as smooth as an antialiased resize of the crop,
    and costs one call for the whole batch.
    """
    number = torch.arange(len(pixels), device=pixels.device)[:, None]
    rois = torch.cat([number, boxes * pixels.shape[-1]], 1)  # (b, 5)
    return roi_align(pixels.float(), rois, size, aligned=True)


def _colour_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast and saturation of (b, 3, H, W), 0..255, by factors (b, 3), in any
    order (b, 3).

    Each of the three mixes an image with another: black, its mean grey, and its grey version.
    """
    weights = _per_channel(GREY, images.device)
    for which in order.T[..., None, None, None]:  # (b, 1, 1, 1), what is next for each image
        factor = factors[..., None, None].gather(1, which)
        grey = (images * weights).sum(1, keepdim=True)  # (b, 1, H, W)
        contrast = torch.where(which == 1, grey.mean((2, 3), keepdim=True), 0)
        images = torch.lerp(torch.where(which == 2, grey, contrast), images, factor).clamp_(0, 255)
    return images

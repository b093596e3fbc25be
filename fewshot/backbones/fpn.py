"""Feature pyramids for detection: images to maps of several strides, on the trunks of `trunks.c4`."""

import torch.nn.functional as F
from torch import Tensor, nn

from fewshot.backbones import trunks
from fewshot.backbones.trunks import C4, Trunk, c4


class FPN(Trunk):
    """A feature pyramid network (Lin et al., 2017, https://arxiv.org/abs/1612.03144, section 3).

    Each stage's map is projected to the same channels, the next coarser one is added to it,
    enlarged to its size, and a 3 x 3 convolution smooths the sum. Every second cell of the coarsest
    map makes one more level, for the RPN's largest anchors. RoIs are cut from one level of each
    stride.

    Args:
        trunk: whose parts this takes over.
        channels: of every level; by default the trunk's choice.

    Attributes:
        stages: the layers after the stem, of which each gives a map.
        strides: input pixels per cell of each level; one more than stages, if the coarsest map
            makes one more.
        roi_levels: how many of the levels, from the finest on, RoIs are cut from.
        out_channels: of every level.
        anchor_scales: sides of square anchors in units of a level's stride, for all levels or for
            each.
        architecture: `fpn(**architecture)` builds this network again, with fresh weights.
    """

    def __init__(self, trunk: C4, channels: int | None = None):
        super().__init__()
        widths, channels = trunk.pyramid.widths, channels or trunk.pyramid.channels
        self.conv1, self.bn1, self.pool = trunk.conv1, trunk.bn1, trunk.pool
        self.stages = nn.ModuleList(trunk.pyramid_stages())
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in widths)
        for layer in (*self.lateral, *self.output):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        self.roi_levels = len(set(trunk.pyramid.strides[: len(widths)]))
        self.strides, self.anchor_scales = trunk.pyramid.strides, trunk.pyramid.anchor_scales
        self.out_channels, self.normalisation = channels, trunk.normalisation
        self.architecture = {**trunk.architecture, "channels": channels}
        del self.architecture["meta"]  # supports have an entrance to trunks of one map alone

    def body(self, images: Tensor) -> list[Tensor]:
        """The stages' maps, finest first, of normalised images (b, 3, H, W)."""
        maps, x = [], self.pool(self.bn1(self.conv1(images)))
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (b, 3, H, W) -> maps (b, out_channels, H / stride, W / stride), finest
        first.
        """
        merged = [lateral(x) for lateral, x in zip(self.lateral, self.body(images), strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(
                merged[i], size=merged[i - 1].shape[-2:], mode="nearest"
            )
        maps = [output(x) for output, x in zip(self.output, merged, strict=True)]
        return (
            maps if len(maps) == len(self.strides) else [*maps, F.max_pool2d(maps[-1], 1, stride=2)]
        )


def begin(
    name: str, weights: str | None = None, *, style: str | None = None, channels: int | None = None
) -> FPN:
    """A feature pyramid to begin training with; see `trunks.begin` and `FPN` for the arguments."""
    return FPN(trunks.begin(name, weights, style=style), channels)


def fpn(name: str, *, channels: int | None = None, **more) -> FPN:
    """A feature pyramid on one of `trunks.TRUNKS`; see `FPN` for `channels` and `trunks.c4` for the
    others.
    """
    return FPN(c4(name, **more), channels)

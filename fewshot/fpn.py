"""Feature pyramids for detection: images to maps of several strides, on the trunks of `trunks.c4`."""

import torch.nn.functional as F
from torch import Tensor, nn

from fewshot import InputError
from fewshot.trunks import C4, c4


class FPN(nn.Module):
    """A feature pyramid network (Lin et al., 2017, https://arxiv.org/abs/1612.03144, section 3).

    Each stage's map is projected to the same channels, the next coarser one is added to it, enlarged to its size, and a
    3 x 3 convolution smooths the sum. Every second cell of the coarsest map makes one more level, for the RPN's largest
    anchors.

    Args:
        trunk: whose parts this takes over.
        channels: of every level.

    Attributes:
        strides: input pixels per cell of each level.
        roi_levels: how many of the levels, from the finest on, RoIs are cut from.
        out_channels: of every level.
        anchor_scales: sides of square anchors in units of a level's stride.
        normalisation: of the images.
        architecture: `fpn(**architecture)` builds this network again, with fresh weights.
    """

    def __init__(self, trunk: C4, channels: int = 256):
        super().__init__()
        self.small = trunk.architecture["name"] == "small"
        self.conv1, self.bn1, self.pool = trunk.conv1, trunk.bn1, trunk.pool
        if self.small:  # its layers 2 and 3 have one stride, and its stage 4 ends in a convolution over a whole RoI
            stages, widths = (trunk.layer1, nn.Sequential(trunk.layer2, trunk.layer3), trunk.stage4[0]), (32, 96, 128)
        elif trunk.architecture["name"] == "mobilenet_v2":
            stages, widths = (trunk.layer1, trunk.layer2, trunk.layer3, trunk.stage4), (24, 32, 96, 320)
        else:
            wide = trunk.stage4_channels
            stages = (trunk.layer1, trunk.layer2, trunk.layer3, trunk.stage4)
            widths = (wide // 8, wide // 4, wide // 2, wide)
        self.stages = nn.ModuleList(stages)
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in widths)
        for layer in (*self.lateral, *self.output):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        self.roi_levels = len(widths)
        # small pictures hold no object for the anchors of a further level
        self.strides = (4, 8, 16) if self.small else (4, 8, 16, 32, 64)
        self.anchor_scales = (6,) if self.small else (8,)
        self.out_channels, self.normalisation = channels, trunk.normalisation
        self.architecture = {k: trunk.architecture[k] for k in ("name", "style", "norm")} | {"channels": channels}

    def body(self, images: Tensor) -> list[Tensor]:
        """The stages' maps, finest first, of normalised images (b, 3, H, W)."""
        maps, x = [], self.pool(self.bn1(self.conv1(images)))
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (b, 3, H, W) -> maps (b, out_channels, H / stride, W / stride), finest first."""
        merged = [lateral(x) for lateral, x in zip(self.lateral, self.body(images), strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
        maps = [output(x) for output, x in zip(self.output, merged, strict=True)]
        return maps if self.small else [*maps, F.max_pool2d(maps[-1], 1, stride=2)]

    def freeze(self, stages: int) -> None:
        """Stop training the stem and the first `stages` stages.

        Raises:
            InputError: there are not so many.
        """
        if not 0 <= stages <= len(self.stages):
            raise InputError(
                f"this pyramid has {len(self.stages)} stages that can be frozen after its stem, not {stages}"
            )
        for part in (self.conv1, self.bn1, *self.stages[:stages]):
            part.requires_grad_(False)


def fpn(
    name: str,
    *,
    weights: str = "none",
    style: str | None = None,
    norm: str | None = None,
    channels: int | None = None,
) -> FPN:
    """A feature pyramid on one of `trunks.TRUNKS`; see `trunks.c4` for the arguments.

    Args:
        channels: of every level; by default 256, and 64 for `small`.
    """
    trunk = c4(name, weights=weights, style=style, norm=norm)
    return FPN(trunk, channels or (64 if name == "small" else 256))

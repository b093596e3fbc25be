"""Feature extractors for classification: images (n, 3, image_size, image_size) to vectors or maps.

Four are built here, to be trained from random weights; any other comes from torchvision or timm
(`pretrained`).

| name       | vector at 84 x 84 | map at 84 x 84 (pooled=False) | parameters |
|------------|-------------------|-------------------------------|------------|
| `conv4`    | 1600              | 64 x 19 x 19                  | 0.11 M     |
| `resnet12` | 640               | 640 x 5 x 5                   | 12.4 M     |
| `wrn28_10` | 640               | 640 x 21 x 21                 | 36.5 M     |
| `resnet18` | 512               | 512 x 11 x 11                 | 11.2 M     |

Each has three integers, `out_channels`, `map_size` and `out_features` = out_channels * map_size²,
and gives vectors (n, out_features) or maps (n, out_channels, map_size, map_size).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call

from fewshot import InputError, weights
from fewshot.backbones import pretrained


class Backbone(nn.Module):
    """What all have in common: the size of what they give, and that they may be frozen."""

    out_channels: int
    map_size: int
    out_features: int
    frozen = False

    def freeze(self) -> None:
        """No parameter learns any more, and norms and dropout stay as in tests, also in training."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Backbone:
        return super().train(mode and not self.frozen)

    def _set_size(self, image_size: int, side: int, pooled: bool = False) -> None:
        """Note the size of the result, given the side of the last map."""
        if side < 1:
            raise InputError(
                f"images of {image_size} pixels are too small for {type(self).__name__}: use larger ones"
            )
        self.map_size = 1 if pooled else side
        self.out_features = self.out_channels * self.map_size**2


class ConvNet(Backbone):
    """3 x 3 convolutions of 64 channels with batch norm and ReLU (Vinyals et al., 2016, section
    4.1).

    Args:
        image_size: side of the images in pixels.
        pool: indices of the blocks that end in a 2 x 2 max-pool.
        pad: indices of the blocks whose convolution keeps the map's size; the others take off a
            border of one.
        flatten: give vectors, else maps.

    Raises:
        InputError: the images are too small for the blocks.
    """

    def __init__(
        self,
        image_size: int,
        pool: Sequence[int] = (0, 1, 2, 3),
        pad: Sequence[int] = (0, 1, 2, 3),
        flatten: bool = True,
        depth: int = 4,
    ):
        super().__init__()
        self.flatten, self.out_channels = flatten, 64
        # on a CPU 1.5 times as fast, forward and backward; its rounding errors are larger, though,
        # and second
        # derivatives do not bear them: MAML turns it off
        self.channels_last = True
        blocks, side = [], image_size
        for i in range(depth):
            conv = nn.Conv2d(64 if i else 3, 64, 3, padding=int(i in pad))
            pooling = [nn.MaxPool2d(2)] if i in pool else []
            blocks.append(nn.Sequential(conv, nn.BatchNorm2d(64), nn.ReLU(inplace=True), *pooling))
            side -= 0 if i in pad else 2
            side //= 2 if i in pool else 1
        self.blocks = nn.Sequential(*blocks)
        self._set_size(image_size, side)
        init_convs(self)

    def forward(self, images: Tensor) -> Tensor:
        """Vectors (n, out_features), a map's values in the order (channel, row, column), or maps."""
        if images.device.type == "cpu" and self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        maps = self.blocks(images)
        return maps.flatten(1) if self.flatten else maps


def conv4(image_size: int, pooled: bool = True) -> ConvNet:
    """Conv4; `pooled=False` is the variant for Relation Networks, which pools after the first two
    blocks only.
    """
    if pooled:
        return ConvNet(image_size)
    return ConvNet(image_size, pool=(0, 1), pad=(2, 3), flatten=False)


class ResNet12(Backbone):
    """ResNet-12 of widths 64, 160, 320, 640 (Lee et al., 2019, https://arxiv.org/abs/1904.03758,
    section 4.1).

    Args:
        image_size: side of the images in pixels.
        pooled: give vectors, the mean over the last map; else the map.
        drop_rate: of dropout after stages 1 and 2 and of DropBlock after stages 3 and 4.
            DropBlock's rate rises from 0 over the first 40,000 batches that a block has seen in
            training.
        block_size: side of the squares that DropBlock drops.

    Raises:
        InputError: the images are too small for the four stages, or for DropBlock's squares.
    """

    def __init__(
        self, image_size: int, pooled: bool = True, drop_rate: float = 0.0, block_size: int = 5
    ):
        super().__init__()
        self.pooled, self.out_channels = pooled, 640
        if drop_rate and image_size // 16 < block_size:
            raise InputError(
                f"DropBlock of {block_size} x {block_size} does not fit on ResNet12's last map: use drop_rate 0 or "
                f"images of at least {16 * block_size} pixels, not {image_size}"
            )
        squares = (None, None, block_size, block_size)
        widths = (3, 64, 160, 320, 640)
        self.stages = nn.Sequential(
            *map(ResNet12Block, widths[:-1], widths[1:], [drop_rate] * 4, squares)
        )
        self._set_size(image_size, image_size // 16, pooled)
        init_convs(self)

    def forward(self, images: Tensor) -> Tensor:
        """Vectors (n, 640) or maps (n, 640, image_size // 16, image_size // 16)."""
        maps = self.stages(images)
        return maps.mean((2, 3)) if self.pooled else maps


class ResNet12Block(nn.Module):
    """Three convolutions and a projected shortcut, a 2 x 2 max-pool, then dropout or (given its
    size) DropBlock.
    """

    def __init__(self, in_channels: int, channels: int, drop_rate: float, block_size: int | None):
        super().__init__()
        self.drop_rate, self.block_size = drop_rate, block_size
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) -> (n, channels, h // 2, w // 2)."""
        seen = self.norm1.num_batches_tracked.clone()  # before the norm counts this batch
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.1)
        y = F.leaky_relu(self.norm2(self.conv2(y)), 0.1)
        y = F.leaky_relu(self.norm3(self.conv3(y)) + self.shortcut(x), 0.1)
        y = F.max_pool2d(y, 2)
        if not (self.training and self.drop_rate):
            return y
        if self.block_size is None:
            return F.dropout(y, self.drop_rate)
        return drop_block(y, self.drop_rate * (seen / 40_000).clamp(max=1), self.block_size)


def drop_block(x: Tensor, rate: Tensor | float, size: int) -> Tensor:
    """Zero squares of `size` x `size` in maps (n, c, h, w), and scale up the rest (Ghiasi et al.,
    2018, algorithm 1).

    A square's corner is drawn for each place where the square fits, with the probability (equation
    1) that drops a share `rate` of the values if squares do not overlap.
    """
    n, c, h, w = x.shape
    places = (h - size + 1) * (w - size + 1)
    probability = rate / size**2 * (h * w / places)
    corners = (torch.rand(n, c, h - size + 1, w - size + 1, device=x.device) < probability).float()
    dropped = F.max_pool2d(F.pad(corners, [size - 1] * 4), size, stride=1)  # (n, c, h, w)
    kept = 1 - dropped
    return x * (kept * (kept.numel() / kept.sum().clamp(min=1))).to(x.dtype)


class WideResNet(Backbone):
    """WRN-`depth`-`widen`, by default WRN-28-10 (Zagoruyko and Komodakis, 2016,
    https://arxiv.org/abs/1605.07146).

    Args:
        image_size: side of the images in pixels.
        pooled: give vectors, the mean over the last map; else the map.
        drop_rate: of dropout between the two convolutions of a block.
    """

    def __init__(
        self,
        image_size: int,
        pooled: bool = True,
        depth: int = 28,
        widen: int = 10,
        drop_rate: float = 0.5,
    ):
        super().__init__()
        self.pooled, self.out_channels = pooled, 64 * widen
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        stages, channels = [], 16
        for width, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            blocks = [WideBlock(channels, width, stride, drop_rate)]
            blocks += [WideBlock(width, width, 1, drop_rate) for _ in range((depth - 4) // 6 - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self._set_size(image_size, -(-image_size // 4), pooled)
        init_convs(self)

    def forward(self, images: Tensor) -> Tensor:
        """Vectors (n, 64 * widen) or maps (n, 64 * widen, image_size / 4, image_size / 4)."""
        maps = F.relu(self.norm(self.stages(self.stem(images))))
        return maps.mean((2, 3)) if self.pooled else maps


class WideBlock(nn.Module):
    """Norm, ReLU and convolution, twice, with dropout between them; the shortcut starts before the
    first norm.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, drop_rate: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.dropout = nn.Dropout(drop_rate)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) -> (n, channels, h / stride, w / stride)."""
        y = self.dropout(self.conv1(F.relu(self.norm1(x))))
        return self.conv2(F.relu(self.norm2(y))) + self.shortcut(x)


class ResNet18(Backbone):
    """ResNet-18 for small images: the first convolution is 3 x 3 of stride 1, and no max-pool
    follows it.

    Args:
        image_size: side of the images in pixels.
        pooled: give vectors, the mean over the last map; else the map.
    """

    def __init__(self, image_size: int, pooled: bool = True):
        super().__init__()
        self.pooled, self.out_channels = pooled, 512
        net = torchvision.models.resnet18()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = net.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            net.layer1,
            net.layer2,
            net.layer3,
            net.layer4,
        )
        self._set_size(image_size, -(-image_size // 8), pooled)
        init_convs(self)

    def forward(self, images: Tensor) -> Tensor:
        """Vectors (n, 512) or maps (n, 512, image_size / 8, image_size / 8)."""
        maps = F.relu(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return maps.mean((2, 3)) if self.pooled else maps


class Pretrained(Backbone):
    """A network of torchvision or timm: `pretrained.network`, whose arguments and errors it has."""

    def __init__(self, name: str, image_size: int, pooled: bool = True, source: str = "pretrained"):
        super().__init__()
        self.net = pretrained.network(name, image_size, pooled, source).eval()
        # on the meta device an image takes no memory, however large a model's file says it is
        tensors = [*self.net.named_parameters(), *self.net.named_buffers()]
        twin = {name: tensor.to("meta") for name, tensor in tensors}
        try:
            with torch.no_grad(), torch.device("meta"):
                image = torch.zeros(1, 3, image_size, image_size)
                shape = functional_call(self.net, twin, (image,)).shape
        except RuntimeError as error:
            raise InputError(
                f"{name} cannot take {image_size} pixels ({error}): give another --size"
            ) from None
        self.train()
        self.out_channels = shape[1]
        self._set_size(image_size, shape[-1], pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Vectors (n, out_features) or maps (n, out_channels, map_size, map_size)."""
        if images.device.type == "cpu":  # up to 3 times as fast
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images)


BACKBONES = {"conv4": conv4, "resnet12": ResNet12, "wrn28_10": WideResNet, "resnet18": ResNet18}


def build(
    name: str, image_size: int, pooled: bool = True, source: str = "none", **options: Any
) -> Backbone:
    """A classification backbone for images (n, 3, image_size, image_size).

    Args:
        name: one of `BACKBONES`, or "torchvision/..." or "timm/...".
        pooled: give one vector per image; else a map, as Relation Networks need.
        source: of the weights: "none" for random ones, "pretrained", or a file; for one of
            `BACKBONES` that is a model's file of this project, whose backbone is taken.
        options: further arguments of that backbone's class, for instance `drop_rate`.

    Raises:
        InputError: there is no such backbone, the images do not suit it, or there are no such
            weights for it.
    """
    if "/" in name:
        return Pretrained(name, image_size, pooled, source)
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, pretrained.torchvision_names(), 2)
        others = ", ".join(f"torchvision/{other}" for other in near) or "torchvision/NAME"
        raise InputError(
            f"no backbone is called {name!r}: choose {', '.join(BACKBONES)}, {others} or timm/NAME"
        )
    net = BACKBONES[name](image_size, pooled, **options)
    if source == "pretrained":
        raise InputError(
            f"{name} has no pretrained weights: give --weights a model's file, or leave it out"
        )
    if source != "none":
        weights.fill_part(net, source, "features.")
    return net


def of(args: Any, image_size: int, pooled: bool = True) -> Backbone:
    """The backbone that a recipe's `--backbone`, `--weights` and `--freeze` ask for. Raises
    InputError as `build` does.

    In `--test-only` its weights are left to the model's file.
    """
    source = (
        "none"
        if args.test_only
        else args.weights or ("pretrained" if "/" in args.backbone else "none")
    )
    net = build(args.backbone, image_size, pooled, source)
    if getattr(args, "freeze", False):  # MAML has no such flag: it adapts all of itself
        net.freeze()
    return net


def inputs(args: Any) -> dict[str, Any]:
    """What `open_splits` should know of the pictures that `--backbone` and `--size` ask for: size
    and normalisation.
    """
    if "/" not in args.backbone:
        return {"size": args.size}
    size, normalisation = pretrained.inputs(args.backbone)
    return {"size": args.size or size, "normalisation": normalisation}


def init_convs(net: nn.Module) -> None:
    """He et al.'s normal initialisation by fan-out; biases and norms keep PyTorch's."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")

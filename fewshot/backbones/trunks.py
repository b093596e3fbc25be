"""Trunks of detectors: convolutional networks cut before their last stage, which detectors apply to
RoIs.

`begin` makes them for training, `c4` as they say themselves that they were: `resnet18`, `resnet50`,
`resnet101`, `mobilenet_v2`, `mobilenet_v3_large`, and `small` for small pictures on a CPU. Feature
pyramids on them are in `fpn.py`.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision import ops
from torchvision.models.resnet import BasicBlock, Bottleneck

from fewshot import InputError
from fewshot.backbones.networks import init_convs
from fewshot.data.transforms import CAFFE, HALF, IMAGENET, Normalisation
from fewshot.weights import downloaded, fill, read_state

Name = Literal["small", "mobilenet_v2", "mobilenet_v3_large", "resnet18", "resnet50", "resnet101"]
Style = Literal["torchvision", "caffe"]  # of a ResNet
# name -> (styles, norms), the default first
TRUNKS: dict[str, tuple[tuple[str | None, ...], tuple[str, ...]]] = {
    "resnet18": (("torchvision", "caffe"), ("frozen", "group")),
    "resnet50": (("torchvision", "caffe"), ("frozen", "group")),
    "resnet101": (("torchvision", "caffe"), ("frozen", "group")),
    "mobilenet_v2": ((None,), ("frozen",)),
    "mobilenet_v3_large": ((None,), ("frozen",)),
    "small": ((None,), ("group",)),
}


class FrozenBatchNorm2d(ops.FrozenBatchNorm2d):
    """Torchvision's, but its result has the type of its input: constants of float32 would promote
    bfloat16 to it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> the same shape and type."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[:, None, None] + bias.to(x.dtype)[:, None, None]


class Pyramid(NamedTuple):
    """What a feature pyramid on a trunk is like.

    widths: channels of the stages' maps, finest first. channels: of every level. strides: input
    pixels per cell of each level; a stride more than stages adds a level. anchor_scales: sides of
    square anchors in units of a level's stride, for all levels or for each.
    """

    widths: tuple[int, ...]
    channels: int = 256
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    anchor_scales: tuple[float, ...] | tuple[tuple[float, ...], ...] = (8,)


class Trunk(nn.Module):
    """What trunks of one map, `C4`, and of several, `fpn.FPN`, have in common: a stem, then
    `stages`.

    Attributes:
        normalisation: of the images.
        architecture: arguments that build this trunk again, with fresh weights.
    """

    normalisation: Normalisation
    architecture: dict[str, Any]

    def freeze(self, stages: int) -> None:
        """Stop training the stem and the first `stages` stages; a `meta_conv` trains on.

        Raises:
            InputError: there are not so many.
        """
        if stages not in range(len(self.stages) + 1):
            raise InputError(
                f"this trunk can freeze 0 to {len(self.stages)} stages after its stem, not {stages}"
            )
        for part in (self.conv1, self.bn1, *self.stages[:stages]):
            part.requires_grad_(False)

    def freeze_pretrained(self, stages: int) -> None:
        """`freeze` where the trunk began with pretrained weights; else the stem alone, where random
        filters serve.
        """
        self.freeze(stages if self.architecture["pretrained"] else 0)

    def describe(self) -> dict[str, Any]:
        """What saved models say of their trunk, for json."""
        return {"architecture": self.architecture, "normalisation": self.normalisation.to_dict()}


class C4(Trunk):
    """A convolutional trunk cut before its last stage: images to one map, and `stage4` for RoIs cut
    from that map.

    Attributes:
        stages: the layers after the stem that give the map.
        stride: input pixels per cell of the map.
        out_channels: of the map.
        stage4: RoI features (n, out_channels, k, k) -> (n, stage4_channels, k / 2, k / 2); `small`:
            one vector.
        stage4_channels: of stage 4's result.
        roi_size: the k that RoIs are best aligned to.
        anchor_scales: sides of square anchors in units of the stride.
        pyramid: what a feature pyramid on this trunk is like.
        architecture: `c4(**architecture)` builds this trunk again, with fresh weights.
        least_side: cells that a map's side needs for stage 4.

    A meta trunk has a second first convolution, `meta_conv`, for supports with a box mask as fourth
    channel; all that follows is shared (Meta R-CNN, Yan et al., 2019, section 3.2).
    """

    least_side = 1

    def __init__(
        self,
        # convolution, norm, and activation with any pool
        stem: tuple[nn.Conv2d, nn.Module, nn.Module],
        layers: Sequence[nn.Module],
        stage4: nn.Module,
        *,
        stride: int,
        out_channels: int,
        stage4_channels: int,
        roi_size: int,
        anchor_scales: Sequence[float],
        pyramid: Pyramid,
        normalisation: Normalisation,
        architecture: dict[str, Any],
    ):
        super().__init__()
        self.conv1, self.bn1, self.pool = stem
        self.layer1, self.layer2, self.layer3 = layers
        self.stage4 = stage4
        if architecture["meta"]:
            like = self.conv1
            self.meta_conv = nn.Conv2d(
                4, like.out_channels, like.kernel_size, like.stride, like.padding, bias=False
            )
        self.stride, self.out_channels, self.stage4_channels = stride, out_channels, stage4_channels
        self.roi_size, self.anchor_scales, self.pyramid = roi_size, tuple(anchor_scales), pyramid
        self.normalisation, self.architecture = normalisation, architecture

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, self.layer2, self.layer3

    def pyramid_stages(self) -> tuple[nn.Module, ...]:
        """What gives each of a pyramid's maps, finest first, from the one before."""
        return *self.stages, self.stage4

    def keep_maps(self) -> None:
        """Leave out what shrinks a RoI's map to a vector in `stage4`, if anything does."""

    def forward(self, images: Tensor, support: bool = False) -> Tensor:
        """Normalised images (b, 3, H, W) -> maps (b, out_channels, H / stride, W / stride), rounded
        up.

        With `support`, a meta trunk takes (b, 4, S, S): a normalised image and the 0/1 mask of its
        object's box.
        """
        x = self.meta_conv(images) if support else self.conv1(images)
        x = self.pool(self.bn1(x))
        return self.layer3(self.layer2(self.layer1(x)))


class SmallC4(C4):
    """`small`: its layers 2 and 3 have one stride, and its stage 4 ends in a convolution over a
    whole RoI.
    """

    least_side = 5

    def pyramid_stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, nn.Sequential(self.layer2, self.layer3), self.stage4[0]

    def keep_maps(self) -> None:
        if self.stage4_channels != (width := self.pyramid.widths[-1]):
            self.stage4, self.stage4_channels = self.stage4[0], width


class MobileNetV3(C4):
    """`mobilenet_v3_large`: its pyramid is that of torchvision's detectors, two maps of stride 32."""

    def pyramid_stages(self) -> tuple[nn.Module, ...]:
        blocks = OrderedDict(
            item for stage in (*self.stages, self.stage4) for item in stage.named_children()
        )
        coarse = nn.Sequential(OrderedDict((name, blocks.pop(name)) for name in ("14", "15", "16")))
        return nn.Sequential(blocks), coarse


def begin(
    name: str, weights: str | None = None, *, style: str | None = None, meta: bool = False
) -> C4:
    """A trunk to begin training with.

    Args:
        name: one of `TRUNKS`.
        weights: see `c4`; by default "imagenet", but "none" for `small`. A ResNet without has group
            norm.
        style, meta: see `c4`.

    Raises:
        InputError: as `c4`.
    """
    weights = weights or ("none" if name == "small" else "imagenet")
    # frozen batch norm needs statistics to be frozen at
    norm = "group" if weights == "none" and name.startswith("resnet") else None
    return c4(
        name, weights=weights, meta=meta, style=style, norm=norm, pretrained=weights != "none"
    )


def c4(
    name: str,
    *,
    weights: str = "none",
    meta: bool = False,
    style: str | None = None,
    norm: str | None = None,
    pretrained: bool | None = None,
) -> C4:
    """A detection trunk; `begin` has the defaults for training one.

    Args:
        name: one of `TRUNKS`.
        weights: "none" for random ones, "imagenet" for torchvision's (downloaded once), or a path
            (`load_pretrained`).
        meta: add the entrance for supports with a box mask; it starts at random whatever the
            weights.
        style: of a ResNet. "torchvision" (the default) has a bottleneck's stride on its 3 x 3
            convolution and takes RGB images; "caffe", the style of the papers' weights, has it on
            the first 1 x 1, and takes BGR images.
        norm: of a ResNet. "frozen" batch norm (the default) has constants that come with pretrained
            weights. Without them it normalises nothing and trains poorly: from scratch, use "group"
            norm.
        pretrained: whether the trunk began with pretrained weights; older files do not say, but
            their norm does.

    Raises:
        InputError: the name, or a choice that this trunk does not have, or weights that do not fit.
    """
    if name not in TRUNKS:
        raise InputError(
            f"no detection trunk is called {name!r}: choose one of {', '.join(TRUNKS)}"
        )
    styles, norms = TRUNKS[name]
    style = style or styles[0]
    norm = norm or norms[0]
    for what, value, choices in (("style", style, styles), ("norm", norm, norms)):
        if value not in choices:
            allowed = " or ".join(choice or "left out" for choice in choices)
            raise InputError(f"trunk {name} has no {what} {value!r}: it must be {allowed}")
    pretrained = weights != "none" or norm != "group" if pretrained is None else pretrained
    architecture = {
        "name": name,
        "style": style,
        "norm": norm,
        "meta": meta,
        "pretrained": pretrained,
    }
    make = {"small": _small, "mobilenet_v2": _mobilenet_v2, "mobilenet_v3_large": _mobilenet_v3}
    trunk = make.get(name, _resnet)(architecture)
    if weights != "none":
        load_pretrained(trunk, weights)
    # a convolution with such weights gives maps of that format, and so on to the end: up to 1.4
    # times as fast on a CPU
    return trunk.to(memory_format=torch.channels_last)


def _resnet(architecture: dict) -> C4:
    caffe = architecture["style"] == "caffe"
    norm_layer = (
        FrozenBatchNorm2d if architecture["norm"] == "frozen" else partial(nn.GroupNorm, 32)
    )
    net = getattr(torchvision.models, architecture["name"])(norm_layer=norm_layer)
    if caffe:
        for layer in (net.layer2, net.layer3, net.layer4):
            if isinstance(layer[0], Bottleneck):
                layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    wide = net.fc.in_features
    return C4(
        (net.conv1, net.bn1, nn.Sequential(net.relu, net.maxpool)),
        (net.layer1, net.layer2, net.layer3),
        net.layer4,
        stride=16,
        out_channels=wide // 2,
        stage4_channels=wide,
        roi_size=14,
        anchor_scales=(2, 4, 8, 16, 32),
        pyramid=Pyramid((wide // 8, wide // 4, wide // 2, wide)),
        normalisation=CAFFE if caffe else IMAGENET,
        architecture=architecture,
    )


def _mobilenet_v2(architecture: dict) -> C4:
    """MobileNetV2 (Sandler et al., 2018) in torchvision's form; the blocks keep the numbers that
    they have there.
    """
    features = torchvision.models.mobilenet_v2(norm_layer=FrozenBatchNorm2d).features
    return C4(
        tuple(features[0]),
        (features[1:4], features[4:7], features[7:14]),
        features[14:18],
        stride=16,
        out_channels=96,
        stage4_channels=320,
        roi_size=8,
        anchor_scales=(2, 4, 8, 16, 32),
        pyramid=Pyramid((24, 32, 96, 320)),
        normalisation=IMAGENET,
        architecture=architecture,
    )


def _mobilenet_v3(architecture: dict) -> C4:
    """MobileNetV3-Large (Howard et al., 2019) in torchvision's form; blocks keep the numbers that
    they have there.
    """
    norm = partial(FrozenBatchNorm2d, eps=0.001)
    features = torchvision.models.mobilenet_v3_large(norm_layer=norm).features
    sizes = 1.0, 2.0, 4.0, 8.0, 16.0
    return MobileNetV3(
        tuple(features[0]),
        (features[1:4], features[4:7], features[7:13]),
        features[13:17],
        stride=16,
        out_channels=112,
        stage4_channels=960,
        roi_size=8,
        anchor_scales=(2, 4, 8, 16, 32),
        # anchors of 32 to 512 pixels on every level
        pyramid=Pyramid(
            (160, 960), 256, (32, 32, 64), (sizes, sizes, tuple(size / 2 for size in sizes))
        ),
        normalisation=IMAGENET,
        architecture=architecture,
    )


def _small(architecture: dict) -> C4:
    """A residual network for pictures of some 160 pixels: a step of eight takes about 0.1 s on two
    CPU cores.
    """
    trunk = SmallC4(
        (
            nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(8, 24),
            nn.ReLU(inplace=True),
        ),
        (
            _small_layer(24, 32, 2, blocks=1),
            _small_layer(32, 64, 2, blocks=2),
            _small_layer(64, 96, 1, blocks=2),
        ),
        nn.Sequential(
            _small_layer(96, 128, 2, blocks=1),
            # this sees a whole RoI: where strokes are tells a character, which a mean over the map
            # would lose
            nn.Conv2d(128, 256, 3, bias=False),
            nn.GroupNorm(8, 256),
            nn.ReLU(inplace=True),
        ),
        stride=8,
        out_channels=96,
        stage4_channels=256,
        roi_size=6,
        anchor_scales=(3, 5, 8),
        # small pictures hold no object for the anchors of a further level
        pyramid=Pyramid((32, 96, 128), channels=64, strides=(4, 8, 16), anchor_scales=(6,)),
        normalisation=HALF,
        architecture=architecture,
    )
    init_convs(trunk)
    return trunk


def _small_layer(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
    norm_layer = partial(nn.GroupNorm, 8)
    shortcut = nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm_layer(channels)
    )
    first = BasicBlock(in_channels, channels, stride, shortcut, norm_layer=norm_layer)
    return nn.Sequential(
        first, *(BasicBlock(channels, channels, norm_layer=norm_layer) for _ in range(blocks - 1))
    )


def load_pretrained(trunk: C4, weights: str | Path) -> None:
    """Fill a trunk with ImageNet weights; a `meta_conv` is left as it is.

    Args:
        weights: "imagenet" for torchvision's, or a .safetensors or PyTorch file with torchvision's
            names (for MobileNets those of their `features`). The classifier's tensors are not used.

    Raises:
        InputError: the file cannot be read, or a tensor is missing, left over, or of another shape.
    """
    name = trunk.architecture["name"]
    state = (
        _imagenet_state(trunk.architecture) if weights == "imagenet" else read_state(Path(weights))
    )
    own = {
        _own_name(name, key): tensor
        for key, tensor in state.items()
        if not key.endswith("num_batches_tracked")
    }
    own.pop(None, None)
    fill(trunk, own, weights, fresh=("meta_conv.",))


def _own_name(trunk: str, key: str) -> str | None:
    """The name that torchvision's tensor `key` has in our trunk; None if it belongs to the
    classifier.
    """
    if not trunk.startswith("mobilenet"):
        return None if key.startswith("fc.") else re.sub(r"^layer4\.", "stage4.", key)
    key = key.removeprefix("features.")
    block, _, rest = key.partition(".")
    last, third = (18, 14) if trunk == "mobilenet_v2" else (17, 13)
    if block in ("classifier", "18"):
        return None
    if block == "0":
        return re.sub(r"^0\.", "conv1.", re.sub(r"^1\.", "bn1.", rest))
    parts = (("layer1", 4), ("layer2", 7), ("layer3", third), ("stage4", last))
    return next(
        (f"{part}.{key}" for part, end in parts if block.isdigit() and int(block) < end), key
    )


def _imagenet_state(architecture: dict) -> dict[str, Tensor]:
    name, style, norm = architecture["name"], architecture["style"], architecture["norm"]
    if norm != "frozen" or style == "caffe":
        chosen = " ".join(filter(None, (style, norm)))
        raise InputError(
            f"there are no ImageNet weights for trunk {name} ({chosen}): use weights none, or a path"
        )
    return downloaded(
        torchvision.models.get_model_weights(name).IMAGENET1K_V1, name, "give a file's path"
    )

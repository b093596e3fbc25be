"""Trunks of detectors: convolutional networks cut before their last stage, which detectors apply to RoIs.

`c4` makes them: `resnet18`, `resnet50`, `resnet101`, `mobilenet_v2`, and `small` for small pictures on a CPU. Feature
pyramids on them are in `fpn.py`.
"""

import pickle
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from fewshot import InputError
from fewshot.backbones import init_convs
from fewshot.data.transforms import CAFFE, HALF, IMAGENET, Normalisation
from fewshot.weights import fill

# name -> (styles, norms), the default first
TRUNKS = {
    "resnet18": (("torchvision", "caffe"), ("frozen", "group")),
    "resnet50": (("torchvision", "caffe"), ("frozen", "group")),
    "resnet101": (("torchvision", "caffe"), ("frozen", "group")),
    "mobilenet_v2": ((None,), ("frozen",)),
    "small": ((None,), ("group",)),
}


class C4(nn.Module):
    """A convolutional trunk cut before its last stage: images to one map, and `stage4` for RoIs cut from that map.

    Attributes:
        stride: input pixels per cell of the map.
        out_channels: of the map.
        stage4: RoI features (n, out_channels, k, k) -> (n, stage4_channels, k / 2, k / 2); `small`: one vector.
        stage4_channels: of stage 4's result.
        roi_size: the k that RoIs are best aligned to.
        anchor_scales: sides of square anchors in units of the stride.
        normalisation: of the images.
        architecture: `c4(**architecture)` builds this trunk again, with fresh weights.

    A meta trunk has a second first convolution, `meta_conv`, for supports with a box mask as fourth channel; all that
    follows is shared (Meta R-CNN, Yan et al., 2019, section 3.2).
    """

    def __init__(
        self,
        stem: tuple[nn.Conv2d, nn.Module, nn.Module],  # convolution, norm, and activation with any pool
        layers: Sequence[nn.Module],
        stage4: nn.Module,
        *,
        stride: int,
        out_channels: int,
        stage4_channels: int,
        roi_size: int,
        anchor_scales: Sequence[float],
        normalisation: Normalisation,
        architecture: dict[str, str | bool | None],
    ):
        super().__init__()
        self.conv1, self.bn1, self.pool = stem
        self.layer1, self.layer2, self.layer3 = layers
        self.stage4 = stage4
        if architecture["meta"]:
            like = self.conv1
            self.meta_conv = nn.Conv2d(4, like.out_channels, like.kernel_size, like.stride, like.padding, bias=False)
        self.stride, self.out_channels, self.stage4_channels = stride, out_channels, stage4_channels
        self.roi_size, self.anchor_scales = roi_size, tuple(anchor_scales)
        self.normalisation, self.architecture = normalisation, architecture

    def forward(self, images: Tensor, support: bool = False) -> Tensor:
        """Normalised images (b, 3, H, W) -> maps (b, out_channels, H / stride, W / stride), rounded up.

        With `support`, a meta trunk takes (b, 4, S, S): a normalised image and the 0/1 mask of its object's box.
        """
        x = self.meta_conv(images) if support else self.conv1(images)
        x = self.pool(self.bn1(x))
        return self.layer3(self.layer2(self.layer1(x)))

    def freeze(self, stages: int) -> None:
        """Stop training the stem and `layer1` ... `layer{stages}`; `meta_conv` trains on.

        Raises:
            InputError: `stages` is not 0, 1, 2 or 3.
        """
        if stages not in range(4):
            raise InputError(f"a C4 trunk can freeze 0 to 3 stages after its stem, not {stages}")
        for part in (self.conv1, self.bn1, self.layer1, self.layer2, self.layer3)[: 2 + stages]:
            part.requires_grad_(False)


def c4(
    name: str, *, weights: str = "none", meta: bool = False, style: str | None = None, norm: str | None = None
) -> C4:
    """A detection trunk.

    Args:
        name: one of `TRUNKS`.
        weights: "none" for random ones, "imagenet" for torchvision's (downloaded once), or a path (`load_pretrained`).
        meta: add the entrance for supports with a box mask; it starts at random whatever the weights.
        style: of a ResNet. "torchvision" (the default) has a bottleneck's stride on its 3 x 3 convolution and takes
            RGB images; "caffe", the style of the papers' weights, has it on the first 1 x 1, and takes BGR images.
        norm: of a ResNet. "frozen" batch norm (the default) has constants that come with pretrained weights. Without
            them it normalises nothing and trains poorly: from scratch, use "group" norm.

    Raises:
        InputError: the name, or a choice that this trunk does not have, or weights that do not fit.
    """
    if name not in TRUNKS:
        raise InputError(f"no detection trunk is called {name!r}: choose one of {', '.join(TRUNKS)}")
    styles, norms = TRUNKS[name]
    style = style or styles[0]
    norm = norm or norms[0]
    for what, value, choices in (("style", style, styles), ("norm", norm, norms)):
        if value not in choices:
            allowed = " or ".join(choice or "left out" for choice in choices)
            raise InputError(f"trunk {name} has no {what} {value!r}: it must be {allowed}")
    architecture = {"name": name, "style": style, "norm": norm, "meta": meta}
    trunk = {"small": _small, "mobilenet_v2": _mobilenet_v2}.get(name, _resnet)(architecture)
    if weights != "none":
        load_pretrained(trunk, weights)
    # a convolution with such weights gives maps of that format, and so on to the end: up to 1.4 times as fast on a CPU
    return trunk.to(memory_format=torch.channels_last)


def _resnet(architecture: dict) -> C4:
    caffe = architecture["style"] == "caffe"
    norm_layer = FrozenBatchNorm2d if architecture["norm"] == "frozen" else partial(nn.GroupNorm, 32)
    net = getattr(torchvision.models, architecture["name"])(norm_layer=norm_layer)
    if caffe:
        for layer in (net.layer2, net.layer3, net.layer4):
            if isinstance(layer[0], Bottleneck):
                layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    return C4(
        (net.conv1, net.bn1, nn.Sequential(net.relu, net.maxpool)),
        (net.layer1, net.layer2, net.layer3),
        net.layer4,
        stride=16,
        out_channels=net.fc.in_features // 2,
        stage4_channels=net.fc.in_features,
        roi_size=14,
        anchor_scales=(2, 4, 8, 16, 32),
        normalisation=CAFFE if caffe else IMAGENET,
        architecture=architecture,
    )


def _mobilenet_v2(architecture: dict) -> C4:
    """MobileNetV2 (Sandler et al., 2018) in torchvision's form; the blocks keep the numbers that they have there."""
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
        normalisation=IMAGENET,
        architecture=architecture,
    )


def _small(architecture: dict) -> C4:
    """A residual network for pictures of some 160 pixels: a step of eight takes about 0.1 s on two CPU cores."""
    trunk = C4(
        (nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False), nn.GroupNorm(8, 24), nn.ReLU(inplace=True)),
        (_small_layer(24, 32, 2, blocks=1), _small_layer(32, 64, 2, blocks=2), _small_layer(64, 96, 1, blocks=2)),
        nn.Sequential(
            _small_layer(96, 128, 2, blocks=1),
            # this sees a whole RoI: where strokes are tells a character, which a mean over the map would lose
            nn.Conv2d(128, 256, 3, bias=False),
            nn.GroupNorm(8, 256),
            nn.ReLU(inplace=True),
        ),
        stride=8,
        out_channels=96,
        stage4_channels=256,
        roi_size=6,
        anchor_scales=(3, 5, 8),
        normalisation=HALF,
        architecture=architecture,
    )
    init_convs(trunk)
    return trunk


def _small_layer(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
    norm_layer = partial(nn.GroupNorm, 8)
    shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm_layer(channels))
    first = BasicBlock(in_channels, channels, stride, shortcut, norm_layer=norm_layer)
    return nn.Sequential(first, *(BasicBlock(channels, channels, norm_layer=norm_layer) for _ in range(blocks - 1)))


def load_pretrained(trunk: C4, weights: str | Path) -> None:
    """Fill a trunk with ImageNet weights; a `meta_conv` is left as it is.

    Args:
        weights: "imagenet" for torchvision's, or a .safetensors or PyTorch file with torchvision's names (for
            `mobilenet_v2` those of its `features`). The classifier's tensors are not used.

    Raises:
        InputError: the file cannot be read, or a tensor is missing, left over, or of another shape.
    """
    name = trunk.architecture["name"]
    state = _imagenet_state(trunk.architecture) if weights == "imagenet" else _file_state(Path(weights))
    own = {_own_name(name, key): tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    own.pop(None, None)
    fill(trunk, own, weights, fresh=("meta_conv.",))


def _own_name(trunk: str, key: str) -> str | None:
    """The name that torchvision's tensor `key` has in our trunk; None if it belongs to the classifier."""
    if trunk != "mobilenet_v2":
        return None if key.startswith("fc.") else re.sub(r"^layer4\.", "stage4.", key)
    key = key.removeprefix("features.")
    block, _, rest = key.partition(".")
    if block in ("classifier", "18"):
        return None
    if block == "0":
        return re.sub(r"^0\.", "conv1.", re.sub(r"^1\.", "bn1.", rest))
    parts = (("layer1", 4), ("layer2", 7), ("layer3", 14), ("stage4", 18))
    return next((f"{part}.{key}" for part, end in parts if block.isdigit() and int(block) < end), key)


def _imagenet_state(architecture: dict) -> dict[str, Tensor]:
    name, style, norm = architecture["name"], architecture["style"], architecture["norm"]
    if norm != "frozen" or style == "caffe":
        chosen = " ".join(filter(None, (style, norm)))
        raise InputError(f"there are no ImageNet weights for trunk {name} ({chosen}): use weights none, or a path")
    try:
        return torchvision.models.get_model_weights(name).IMAGENET1K_V1.get_state_dict(check_hash=True)
    except OSError as error:
        raise InputError(f"{name}'s ImageNet weights cannot be downloaded ({error}): give a file's path") from error


def _file_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state.get("state_dict", state)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} cannot be read as weights ({reason}): give a .safetensors or .pth file") from error

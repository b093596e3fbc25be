"""Networks of torchvision and timm as backbones: `torchvision/resnet50`,
`timm/vit_small_patch14_dinov2.lvd142m`, ...

A network comes without its classifier. Its vector is what its last linear layer would get
(torchvision), or what its authors pool (timm, where for instance DINOv2 has the class token). Its
map, for methods that compare places, is the last one of torchvision's convolutional networks, and
the last stage's or the patches' of timm's.

timm is an extra: `pip install timm`. Its weights come from the Hugging Face hub, torchvision's from
its server.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from fewshot import InputError, weights
from fewshot.data.transforms import Normalisation

# the layers whose output is a torchvision network's last map, as they are called in the several
# families
LAST_MAPS = "permute", "features", "layer4", "trunk_output", "conv5", "layers"
# in training they also give what auxiliary classifiers say
SEVERAL_OUTPUTS = "googlenet", "inception_v3"


class Inputs(NamedTuple):
    """The pictures that a network was trained on: their side in pixels, and how they were
    normalised.
    """

    size: int
    normalisation: Normalisation


def network(
    name: str, image_size: int | None, pooled: bool = True, source: str = "pretrained"
) -> nn.Module:
    """A network from images (n, 3, image_size, image_size) to vectors (n, D) or maps (n, C, h, h).

    Args:
        name: "torchvision/..." or "timm/...".
        image_size: any side that the network can take, whatever it was trained on: ViTs' position
            embeddings are resampled. None: images of any size and shape; those that a ViT's patches
            do not fill up are padded with zeros at the bottom and on the right.
        pooled: give vectors, else maps.
        source: of the weights: "pretrained", a file of them (.safetensors or PyTorch's), or "none",
            random ones.

    Raises:
        InputError: there is no such network, timm is not installed, the size does not suit, the
            weights cannot be downloaded or do not fit, or the network has no map.
    """
    check(name)
    library, _, short = name.partition("/")
    build = _of_torchvision if library == "torchvision" else _of_timm
    return build(short, image_size, pooled, source)


def check(name: str) -> None:
    """Raises InputError, with the nearest names, unless torchvision or timm has this network."""
    library, _, short = name.partition("/")
    if library == "torchvision":
        known = torchvision_names()
    elif library == "timm":
        timm = _timm()
        known = {*timm.list_models(), *timm.list_pretrained()}
    else:
        raise InputError(
            f"backbone {name!r}: write torchvision/NAME or timm/NAME, or leave out the /"
        )
    if short not in known:
        near = ", ".join(difflib.get_close_matches(short, known, 4, 0.4))
        advice = f": did you mean {near}?" if near else ""
        raise InputError(f"{library} has no network {short!r}{advice}")


def torchvision_names() -> set[str]:
    """Of the classification networks that can be a backbone."""
    return set(tv.list_models(module=tv)) - set(SEVERAL_OUTPUTS)


def inputs(name: str) -> Inputs:
    """The pictures that this network is published for. Raises InputError as `check` does."""
    check(name)
    library, _, short = name.partition("/")
    if library == "torchvision":
        published = tv.get_model_weights(short).DEFAULT.transforms()
        size, mean, std = published.crop_size[0], published.mean, published.std
    else:
        published = _timm().get_pretrained_cfg(short)
        size, mean, std = published.input_size[1], published.mean, published.std
    return Inputs(size, normalisation(mean, std))


def normalisation(mean: Sequence[float], std: Sequence[float]) -> Normalisation:
    """Of pixels 0..255, given what torchvision and timm give for 0..1."""
    return Normalisation(*(tuple(round(255 * x, 6) for x in values) for values in (mean, std)))


def _of_torchvision(name: str, image_size: int | None, pooled: bool, source: str) -> nn.Module:
    vit = name.startswith("vit_") and image_size is not None
    options = {"image_size": _divisible(name, image_size)} if vit else {}
    net = tv.get_model(name, weights=None, **options)
    maps, _ = cut_at_map(net)
    if not (pooled or maps):
        raise InputError(
            f"torchvision/{name} gives no map: choose a convolutional network, or a ViT of timm's"
        )
    linear = [key for key, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(f"torchvision/{name} ends without a linear layer: choose another network")

    if source == "pretrained":
        published, advice = tv.get_model_weights(name).DEFAULT, "give --weights FILE, or none"
        state = weights.downloaded(published, name, advice)
    elif source != "none":
        state = weights.read_state(Path(source))
    if source != "none":
        if vit:
            try:
                state = interpolate_embeddings(image_size, net.patch_size, state)
            except (KeyError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"{source} has no position embeddings of torchvision/{name} ({error}): "
                    "give weights of this ViT"
                ) from error
        weights.fill(net, state, source, fresh=(f"{linear[-1]}.",))

    net.set_submodule(linear[-1], nn.Identity())
    return net if pooled else nn.Sequential(maps)


def cut_at_map(net: nn.Module) -> tuple[OrderedDict, OrderedDict]:
    """The layers of a network of torchvision up to its last map, and those after it; without a map
    all are after it.
    """
    layers = list(net.named_children())
    names = [name for name, _ in layers]
    end = next((names.index(name) + 1 for name in LAST_MAPS if name in names), 0)
    return OrderedDict(layers[:end]), OrderedDict(layers[end:])


def _divisible(name: str, image_size: int) -> int:
    patch = int(name.rpartition("_")[2])
    if image_size % patch:
        raise InputError(
            f"--size {image_size}: {name} needs a multiple of its patches' {patch} pixels"
        )
    return image_size


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError:
        raise InputError("backbones timm/NAME need an extra package: pip install timm") from None
    return timm


def _of_timm(name: str, image_size: int | None, pooled: bool, source: str) -> nn.Module:
    timm = _timm()
    published = timm.get_pretrained_cfg(name)
    # with the weights' classifier at first: without, timm does not look whether they fit, and
    # leaves the rest random
    options = {"pretrained": source != "none", "num_classes": published.num_classes}
    if source not in ("none", "pretrained"):
        weights.read_state(Path(source))  # errors of files have one wording
        options["pretrained_cfg_overlay"] = {"file": source}
    if published.fixed_input_size:
        free = {"dynamic_img_size": True, "dynamic_img_pad": True}
        options |= free if image_size is None else {"img_size": image_size}
    try:
        net: nn.Module = timm.create_model(name, **options)
    except TypeError:  # it has no such options
        raise InputError(
            f"timm/{name} takes images of one size alone: choose a convolutional network or a ViT"
        ) from None
    except (OSError, RuntimeError, KeyError) as error:  # the hub's errors are OSErrors
        reason = " ".join(str(error).split())[:200]
        advice = "does the file fit the network?"
        if source == "pretrained":
            advice = "give --weights FILE, or none"
        raise InputError(
            f"timm/{name} cannot be had with weights {source} ({reason}): {advice}"
        ) from error
    net.reset_classifier(0)
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", (1, 1))
    if image_size is not None and image_size % patch[0]:
        raise InputError(
            f"--size {image_size}: timm/{name} needs a multiple of its patches' {patch[0]} pixels"
        )
    if not (pooled or hasattr(net, "forward_intermediates")):
        raise InputError(f"timm/{name} gives no map: choose a convolutional network or a ViT")
    return net if pooled else _Maps(net)


class _Maps(nn.Module):
    """The last map of one of timm's networks, or what the patches of a ViT became."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        options = {"indices": 1, "intermediates_only": True, "norm": True, "output_fmt": "NCHW"}
        return self.net.forward_intermediates(images, **options)[-1]

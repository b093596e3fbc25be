"""Detectors made anew from what their files say, and with batch norms folded, for tests."""

import copy
import math
from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from fewshot import InputError, weights
from fewshot.backbones.fpn import fpn
from fewshot.backbones.trunks import c4
from fewshot.data.transforms import Normalisation

# arguments that are not taken from a file: two that a caller gives, and what names a file or a
# download
NOT_FROM_FILES = ("trunk", "classes", "weights", "source")
# a detector has at most so many times the numbers of the file that describes it; it has more than
# the file where it is for more classes, or extends the class that the file is of
LARGEST = 10


def rebuilt(
    detector: type[nn.Module], about: Mapping[str, Any], classes: int | None = None, **changes
) -> nn.Module:
    """The detector that its `describe` described, with fresh weights.

    The metadata's sizes, and its other fields that are called as an argument of the class, are its
    arguments. What they lack has the class's defaults.

    Args:
        detector: its class, or another that takes the same trunk and sizes.
        about: what `describe` gave, or the metadata of a saved model.
        classes: how many the new one is for; by default as many as the metadata name.
        changes: arguments of `detector` that are to differ; those that are None are as described.

    Raises:
        InputError: naming the file, whose metadata the detector or its trunk cannot be made of, or
            describe far more than the file has.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    make = partial(described, detector, about, classes, **changes)

    if isinstance(about, weights.Metadata):
        model = weights.on_meta(about, make)
        size = sum(tensor.numel() for tensor in model.state_dict().values())
        given = sum(math.prod(shape) for shape in about.shapes.values())
        if size > LARGEST * given:
            raise InputError(
                f"{about.source} describes a model of {size} numbers, and has {given}: "
                "was it made with another backbone or recipe?"
            )
    return make()


def described(
    detector: type[nn.Module], about: Mapping[str, Any], classes: int | None = None, **changes
) -> nn.Module:
    """As `rebuilt`, without the comparison with the file."""
    build = fpn if "channels" in about["architecture"] else c4
    trunk = build(**_from_file(about["architecture"]))
    trunk.normalisation = Normalisation.from_dict(about["normalisation"])

    # a subclass that passes on what it does not know itself also takes its parents' arguments
    taken = {
        name
        for kind in detector.__mro__
        for name, parameter in signature(kind.__init__).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    arguments = {key: value for key, value in about.items() if key in taken} | about["sizes"]
    classes = len(about["classes"]) if classes is None else classes
    return detector(trunk, classes, **_from_file(arguments) | changes)


def _from_file(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in NOT_FROM_FILES}


def folded(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every frozen batch norm after a convolution is part of it: the
    same function, faster.

    The norm is y = (x - mean) / sqrt(var + eps) * weight + bias with constants, so that W x becomes
    (s W) x + b. Norms are found by the names that torchvision's blocks give them (conv1 and bn1,
    ...; meta_conv shares bn1) and by their place in a Sequential. The copy is for testing: nothing
    in it remembers the norms.

    Raises:
        RuntimeError: a frozen norm stands where this does not look for it.
    """
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        children = dict(module.named_children())
        for name, norm in children.items():
            if isinstance(norm, FrozenBatchNorm2d):
                convolutions = _before(module, name, children)
                if not convolutions:
                    raise RuntimeError(
                        f"no convolution found before {name} of {type(module).__name__}"
                    )
                for convolution in convolutions:
                    _fold(convolution, norm)
                setattr(module, name, nn.Identity())
    return model


def _before(module: nn.Module, name: str, children: dict[str, nn.Module]) -> list[nn.Conv2d]:
    """The convolutions whose output the norm called `name` takes."""
    if isinstance(module, nn.Sequential):
        names = list(children)
        candidates = names[max(names.index(name) - 1, 0) : names.index(name)]
    else:
        candidates = [name.replace("bn", "conv")] + (["meta_conv"] if name == "bn1" else [])
    return [children[c] for c in candidates if isinstance(children.get(c), nn.Conv2d)]


def _fold(convolution: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    bias: Tensor | None = convolution.bias
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )

"""Detectors made anew from what their files say, and with batch norms folded, for tests."""

import copy
from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from fewshot.backbones.fpn import fpn
from fewshot.backbones.trunks import c4
from fewshot.data.transforms import Normalisation
from fewshot.described import NESTED, check_known


def rebuilt(
    detector: type[nn.Module], about: Mapping[str, Any], classes: int | None = None, **changes
) -> nn.Module:
    """The detector that its `describe` described, with fresh weights.

    Args:
        detector: its class, or another that takes the same trunk and sizes.
        about: what `describe` gave, or the metadata of a saved model; sizes that it lacks are the
            class's defaults.
        classes: how many the new one is for; by default as many as the metadata name.
        changes: arguments of `detector` that are to differ; those that are None are as described.

    Raises:
        InputError: a file's metadata have arguments that trunk or detector have not, or should not
            take from a file.
    """
    taken = {name for kind in detector.__mro__ for name in signature(kind.__init__).parameters}
    check_known(about, "sizes", taken)
    # weights would be a file or a download
    check_known(about, "architecture", NESTED["architecture"])
    build = fpn if "channels" in about["architecture"] else c4
    trunk = build(**{"name": about["architecture"]["name"], **about["architecture"]})
    trunk.normalisation = Normalisation.from_dict(about["normalisation"])
    options = {key: about[key] for key in getattr(detector, "OPTIONS", ()) if key in about}
    options |= {key: value for key, value in changes.items() if value is not None}
    return detector(
        trunk,
        len(about["classes"]) if classes is None else classes,
        **{**about["sizes"], **options},
    )


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

"""Networks for testing, with their frozen batch norms folded into the convolutions before them."""

import copy

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d


def folded(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every frozen batch norm after a convolution is part of it: the same function, faster.

    The norm is y = (x - mean) / sqrt(var + eps) * weight + bias with constants, so that W x becomes (s W) x + b. Norms
    are found by the names that torchvision's blocks give them (conv1 and bn1, ...; meta_conv shares bn1) and by their
    place in a Sequential. The copy is for testing: nothing in it remembers the norms.

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
                    raise RuntimeError(f"no convolution found before {name} of {type(module).__name__}")
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
        convolution.weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )

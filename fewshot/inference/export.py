"""Adapted models as plain modules for `torch.export`: their supports are folded into buffers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot import InputError
from fewshot.detectors.meta_rcnn import MetaRCNN


class PrototypeNetwork(nn.Module):
    """A classifier of `fewshot.methods` with the means (classes, ...) of its supports' features,
    for `torch.export`.
    """

    def __init__(self, network: nn.Module, means: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("means", means.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (n, 3, size, size) -> logits (n, classes)."""
        return self.network.classify(
            self.means[None], self.network.features(images)[None], len(self.means)
        )[0]


class RoIHead(nn.Module):
    """Meta R-CNN's last layers with the prototypes folded in, for `torch.export`.

    Raises:
        InputError: it is another detector, or aggregates or classifies in its own way, which may
            not be affine.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        cls, own = type(network), ("aggregate", "classify", "classify_folded")
        if any(getattr(cls, name, None) is not getattr(MetaRCNN, name) for name in own):
            what = "has no box head that prototypes fold into: only MetaRCNN's own aggregate and classify export"
            raise InputError(f"{cls.__name__} {what}")
        vectors = torch.eye(network.prototypes.shape[1], device=network.prototypes.device)
        with torch.no_grad():  # both layers are affine, and so are they folded
            zero = [part[0] for part in network.classify(torch.zeros_like(vectors[:1]))]
            logits, deltas = network.classify(vectors)
        self.register_buffer("cls_weight", (logits - zero[0]).mT.contiguous())
        self.register_buffer("cls_bias", zero[0])
        self.register_buffer("reg_weight", (deltas - zero[1]).flatten(1).mT.contiguous())
        self.register_buffer("reg_bias", zero[1].flatten())

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """RoI vectors (n, D) -> logits (n, classes + 1), background last, and deltas (n, classes,
        4).
        """
        logits = F.linear(queries, self.cls_weight, self.cls_bias)
        return logits, F.linear(queries, self.reg_weight, self.reg_bias).unflatten(1, (-1, 4))

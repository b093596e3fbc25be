"""Adapted models as plain modules for `torch.export`: their supports are folded into buffers."""

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
        InputError: the network's prototypes do not fold.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        if not isinstance(network, MetaRCNN):
            raise InputError(
                f"{type(network).__name__} has no box head that prototypes fold into: "
                "only MetaRCNN and what derives from it export"
            )
        cls_weight, cls_bias, reg_weight, reg_bias = network.folded()
        self.register_buffer("cls_weight", cls_weight.detach())
        self.register_buffer("cls_bias", cls_bias.detach())
        self.register_buffer("reg_weight", reg_weight.detach())
        self.register_buffer("reg_bias", reg_bias.detach())

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """RoI vectors (n, D) -> logits (n, classes + 1), background last, and deltas (n, classes,
        4).
        """
        logits = F.linear(queries, self.cls_weight, self.cls_bias)
        return logits, F.linear(queries, self.reg_weight, self.reg_bias).unflatten(1, (-1, 4))

"""Adapted models as plain modules for `torch.export`: their supports are folded into buffers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot import heads
from fewshot.detectors.meta_rcnn import MetaRCNN


class PrototypeNetwork(nn.Module):
    """A backbone with the classes' prototypes folded in, for `torch.export`."""

    def __init__(self, features: nn.Module, prototypes: Tensor, distance: str | None, scale: Tensor | None):
        super().__init__()
        self.features, self.distance = features, distance
        self.register_buffer("prototypes", prototypes.clone())
        self.register_buffer("scale", None if scale is None else scale.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (n, 3, size, size) -> logits (n, classes)."""
        query = self.features(images)
        if self.scale is not None:
            return self.scale * heads.cosines(query, self.prototypes)
        return heads.prototype(self.prototypes[None], query[None], len(self.prototypes), self.distance)[0]


class RoIHead(nn.Module):
    """Meta R-CNN's last layers with the prototypes folded in, for `torch.export`."""

    def __init__(self, network: MetaRCNN):
        super().__init__()
        vectors = torch.eye(network.prototypes.shape[1], device=network.prototypes.device)
        with torch.no_grad():  # both layers are affine, and so are they folded
            zero = [part[0] for part in network.classify(torch.zeros_like(vectors[:1]))]
            logits, deltas = network.classify(vectors)
        self.register_buffer("cls_weight", (logits - zero[0]).mT.contiguous())
        self.register_buffer("cls_bias", zero[0])
        self.register_buffer("reg_weight", (deltas - zero[1]).flatten(1).mT.contiguous())
        self.register_buffer("reg_bias", zero[1].flatten())

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """RoI vectors (n, D) -> logits (n, classes + 1), background last, and deltas (n, classes, 4)."""
        logits = F.linear(queries, self.cls_weight, self.cls_bias)
        return logits, F.linear(queries, self.reg_weight, self.reg_bias).unflatten(1, (-1, 4))

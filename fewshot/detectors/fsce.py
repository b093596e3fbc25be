"""FSCE, contrastive proposal encoding (Sun et al., 2021, https://arxiv.org/abs/2103.05950)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot.backbones.fpn import FPN
from fewshot.detectors.faster_rcnn import RoIs
from fewshot.detectors.tfa import TFA

TEMPERATURE = 0.2  # by which similarities are divided


@torch.compiler.disable
def contrastive_loss(
    features: Tensor,
    labels: Tensor,
    overlaps: Tensor,
    *,
    above: float = 0.7,
    weighting: Literal["none", "linear", "exp"] = "none",
) -> Tensor:
    """Supervised contrastive loss of RoIs: those of one label attract each other, all others repel
    (equations 3 to 5).

    The mean is over the RoIs that cover their object well. As in the published models the
    background is a label like any other, and a RoI counts among those of its label by which its own
    sum is divided.

    Args:
        features: unit vectors (n, d).
        labels: (n,).
        overlaps: (n,), each RoI's IoU with its object, 0 for background.
        above: only RoIs of at least this overlap are anchors of the loss.
        weighting: of these by their overlap u: 1 as published, u, or exp(u) - 1.
    """
    keep = (overlaps >= above).nonzero()[:, 0]
    if not len(keep):
        return features.sum() * 0

    # divided by a temperature, bfloat16 would not do
    with torch.autocast(features.device.type, enabled=False):
        similarity = features.float() @ features.float().mT / TEMPERATURE  # (n, n)
    similarity = similarity - similarity.max(1, keepdim=True).values.detach()
    others = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    log_share = similarity - (similarity.exp() * others).sum(1, keepdim=True).log()
    same = labels[:, None] == labels
    loss = -(log_share * (same & others)).sum(1) / same.sum(1)  # (n,)
    if weighting == "linear":
        loss = loss * overlaps
    elif weighting == "exp":
        loss = loss * (overlaps.exp() - 1)
    return loss[keep].mean()


class FSCE(TFA):
    """TFA's detector with a branch that encodes RoIs for the contrastive loss; it has no part in
    testing.

    Args:
        dimensions: of the branch's unit vectors; 0 leaves the branch out.
        above: see `contrastive_loss`.
        more: of `TFA`.

    Attributes:
        strength: factor of the contrastive loss, which recipes let decay.
    """

    def __init__(
        self,
        trunk: FPN,
        classes: int,
        *,
        dimensions: int = 128,
        above: float = 0.7,
        **more,
    ):
        super().__init__(trunk, classes, **more)
        self.above, self.strength = above, 1.0
        self.contrast = None
        if dimensions:
            width = self.fc2.out_features
            self.contrast = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dimensions)
            )
            for layer in self.contrast[::2]:
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)

    def describe(self) -> dict[str, Any]:
        """As `TFA`; `above` is of training alone."""
        dimensions = self.contrast[-1].out_features if self.contrast else 0
        return {**super().describe(), "dimensions": dimensions}

    def encode(self, vectors: Tensor) -> Tensor:
        """Unit vectors (n, dimensions) of RoI vectors (n, width), in float32 also under autocast."""
        return F.normalize(self.contrast(vectors).float(), dim=1)

    def head_losses(self, vectors: Tensor, rois: Sequence[RoIs]) -> dict[str, Tensor]:
        """TFA's, and with the branch `contrast`, over the RoIs of all images together."""
        losses = super().head_losses(vectors, rois)
        if self.contrast is None:
            return losses

        labels = torch.cat([r.labels for r in rois])
        # that of background is 0
        padded = [F.pad(r.overlaps, (0, len(r.labels) - len(r.overlaps))) for r in rois]
        loss = contrastive_loss(self.encode(vectors), labels, torch.cat(padded), above=self.above)
        return losses | {"contrast": self.strength * loss}

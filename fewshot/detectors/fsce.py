"""FSCE, contrastive proposal encoding (Sun et al., 2021, https://arxiv.org/abs/2103.05950)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot.backbones.fpn import FPN
from fewshot.detectors.faster_rcnn import RoIs
from fewshot.detectors.tfa import TFA


@torch.compiler.disable
def contrastive_loss(
    features: Tensor,
    labels: Tensor,
    overlaps: Tensor,
    *,
    temperature: float = 0.2,
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
        weighting: of these by their overlap u: 1, u, or exp(u) - 1.
    """
    keep = (overlaps >= above).nonzero()[:, 0]
    if not len(keep):
        return features.sum() * 0
    others = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    # divided by a temperature, bfloat16 would not do
    with torch.autocast(features.device.type, enabled=False):
        similarity = features.float() @ features.float().mT / temperature  # (n, n)
    similarity = similarity - similarity.max(1, keepdim=True).values.detach()
    log_share = similarity - (similarity.exp() * others).sum(1, keepdim=True).log()
    same = labels[:, None] == labels
    loss = -(log_share * (same & others)).sum(1) / same.sum(1)  # (n,)
    weight = {"none": torch.ones_like(overlaps), "linear": overlaps, "exp": overlaps.exp() - 1}[
        weighting
    ]
    return (loss * weight)[keep].mean()


class FSCE(TFA):
    """TFA's detector with a branch that encodes RoIs for the contrastive loss; it has no part in
    testing.

    Args:
        dimensions: of the branch's unit vectors; 0 leaves the branch out.
        above: see `contrastive_loss`.
        temperature, weighting: see there; recipes have the defaults, only tests against the
            reference others.
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
        temperature: float = 0.2,
        weighting: Literal["none", "linear", "exp"] = "none",
        **more,
    ):
        super().__init__(trunk, classes, **more)
        self.above, self.temperature, self.weighting, self.strength = (
            above,
            temperature,
            weighting,
            1.0,
        )
        width = self.fc2.out_features
        self.contrast = None
        if dimensions:
            self.contrast = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dimensions)
            )
            for layer in self.contrast[::2]:
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)

    def describe(self) -> dict[str, Any]:
        """As `TFA`; `above`, `temperature` and `weighting` are of training alone."""
        return {
            **super().describe(),
            "dimensions": self.contrast[-1].out_features if self.contrast else 0,
        }

    def encode(self, vectors: Tensor) -> Tensor:
        """Unit vectors (n, dimensions) of RoI vectors (n, width), in float32 also under autocast."""
        return F.normalize(self.contrast(vectors).float(), dim=1)

    def head_losses(self, vectors: Tensor, rois: Sequence[RoIs]) -> dict[str, Tensor]:
        """TFA's, and with the branch `contrast`, over the RoIs of all images together."""
        losses = super().head_losses(vectors, rois)
        if self.contrast is None:
            return losses
        overlaps = torch.cat(
            [F.pad(r.overlaps, (0, len(r.labels) - len(r.overlaps))) for r in rois]
        )
        loss = contrastive_loss(
            self.encode(vectors),
            torch.cat([r.labels for r in rois]),
            overlaps,
            temperature=self.temperature,
            above=self.above,
            weighting=self.weighting,
        )
        return losses | {"contrast": self.strength * loss}

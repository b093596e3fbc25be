"""DeFRCN, decoupled Faster R-CNN (Qiao et al., 2021, https://arxiv.org/abs/2108.09017)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot.backbones.trunks import C4
from fewshot.data.detection import Detections
from fewshot.detectors import faster_rcnn, tfa
from fewshot.detectors.faster_rcnn import RPN, Convention, RoIs

CONVENTION: Convention = "detectron2"  # in which the published models were trained


class DecoupledAffine(nn.Module):
    """Gradient decoupling layer (section 4.2): a trained affine map forwards, backwards the
    gradient times `scale`.

    With `scale` 0 nothing of what follows trains what comes before.
    """

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, channels, h, w) -> the same shape."""
        return torch.lerp(x.detach(), x, self.scale) * self.weight + self.bias


class DeFRCN(nn.Module):
    """A C4 Faster R-CNN whose trunk sees only a part of the gradients of RPN and RoI head.

    Args:
        trunk: convolutional trunk with `stage4`.
        classes: number of classes; background is index `classes`.
        rois: sampled per training image.
        roi_size: cells per side of the map that is cut out for a RoI.
        train_proposals, test_proposals: (kept before NMS, kept after).
        rpn_scale, roi_scale: how much of the gradient of the RPN and of the RoI head reaches the
            trunk.
        dropout: share of a RoI vector's channels that the classifier does not see in training; its
            boxes see all.
    """

    def __init__(
        self,
        trunk: C4,
        classes: int,
        *,
        rois: int = 512,
        roi_size: int = 7,
        rpn_channels: int = 1024,
        train_proposals: tuple[int, int] = (12000, 2000),
        test_proposals: tuple[int, int] = (6000, 1000),
        rpn_scale: float = 0.0,
        roi_scale: float = 0.75,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.trunk, self.classes = trunk, classes
        self.rois, self.roi_size, self.dropout = rois, roi_size, dropout
        self.affine_rpn = DecoupledAffine(trunk.out_channels, rpn_scale)
        self.affine_rcnn = DecoupledAffine(trunk.out_channels, roi_scale)
        self.rpn = RPN(
            trunk.out_channels,
            rpn_channels,
            strides=(trunk.stride,),
            scales=trunk.anchor_scales,
            train_proposals=train_proposals,
            test_proposals=test_proposals,
            convention=CONVENTION,
        )
        self.cls = nn.Linear(trunk.stage4_channels, classes + 1)
        self.reg = nn.Linear(trunk.stage4_channels, classes * 4)
        faster_rcnn.init_normal(0.01, self.cls)
        faster_rcnn.init_normal(0.001, self.reg)

    def describe(self) -> dict[str, Any]:
        """What `build.rebuilt` makes this detector anew from, for json; scales and dropout are of
        training alone.
        """
        return {
            **self.trunk.describe(),
            "sizes": {"rois": self.rois, "roi_size": self.roi_size, **self.rpn.sizes()},
        }

    def roi_vectors(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Vectors (RoIs of all images, D) of boxes on the trunk's features: affine, RoIAlign, stage
        4, mean.
        """
        aligned = faster_rcnn.roi_align(
            self.affine_rcnn(features), boxes, self.roi_size, self.trunk.stride
        )
        return self.trunk.stage4(aligned).float().mean((2, 3))

    def head(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes + 1) and deltas (n, classes, 4) of RoI vectors (n, D)."""
        seen = F.dropout(vectors, self.dropout, self.training)
        return self.cls(seen), self.reg(vectors).view(-1, self.classes, 4)

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Training losses of normalised images (b, 3, H, W) with their boxes and labels."""
        features = self.trunk(images)
        outputs = self.rpn.outputs(self.rpn.maps([self.affine_rpn(features)]))
        losses = self.rpn.losses(*outputs, sizes, boxes)
        rois = faster_rcnn.sample_rois(
            self.rpn.proposals(*outputs, sizes),
            boxes,
            labels,
            classes=self.classes,
            number=self.rois,
            convention=CONVENTION,
        )
        return losses | self.head_losses(self.roi_vectors(features, [r.boxes for r in rois]), rois)

    def head_losses(self, vectors: Tensor, rois: Sequence[RoIs]) -> dict[str, Tensor]:
        """Cross-entropy and L1 of the RoI vectors (RoIs of all images, D), averaged over all RoIs."""
        logits, deltas = self.head(vectors)
        return faster_rcnn.roi_losses(logits, deltas, rois, beta=0.0)

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Boxes and scores (n, 5), best first, of what may be an object of any class, for every
        normalised image.
        """
        return self.rpn.propose([self.affine_rpn(self.trunk(images))], sizes)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Detections of every normalised image (b, 3, H, W), in pixels of that input."""
        features = self.trunk(images)
        proposals = self.rpn.propose([self.affine_rpn(features)], sizes)
        vectors = self.roi_vectors(features, proposals).split([len(p) for p in proposals])
        return [
            faster_rcnn.detections(*self.head(vector), proposal, size, convention=CONVENTION)
            for vector, proposal, size in zip(vectors, proposals, sizes, strict=True)
        ]


def grow(
    state: Mapping[str, Tensor], base: Sequence[str], classes: Sequence[str]
) -> dict[str, Tensor]:
    """The weights of a base model with a box head for all classes: `tfa.grow`, with a bias, 0 for
    novel classes.
    """
    rows = torch.tensor([*(list(classes).index(name) for name in base), len(classes)])
    kept = torch.cat([state["cls.bias"][: len(base)], state["cls.bias"][-1:]])
    return tfa.grow(state, base, classes) | {
        "cls.bias": torch.zeros(len(classes) + 1).index_copy(0, rows, kept)
    }

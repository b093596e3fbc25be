"""TFA, the two-stage fine-tuning approach (Wang et al., 2020, https://arxiv.org/abs/2003.06957)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot.backbones.fpn import FPN
from fewshot.data.detection import Detections
from fewshot.detectors import faster_rcnn
from fewshot.detectors.faster_rcnn import RPN, Convention, RoIs

ROI_SIZE = 7  # cells per side of a RoI's features


class CosineClassifier(nn.Module):
    """Logits from cosines of features and class weights (section 3.3).

    The rows of the weight are set to length 1 before every use, outside of autograd, as the
    published models were trained: the gradient is that of a free weight, and momentum and weight
    decay act on the normalised one.
    """

    SCALE = 20.0
    EPS = 1e-5  # added to norms
    bias = None  # which a linear classifier has

    def __init__(self, in_features: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, in_features))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, in_features) -> logits (n, classes) in [-20, 20], in float32 also under
        autocast.
        """
        with torch.no_grad():
            self.weight.div_(self.weight.norm(dim=1, keepdim=True) + self.EPS)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            return self.SCALE * F.linear(x / (x.norm(dim=1, keepdim=True) + self.EPS), self.weight)


class TFA(nn.Module):
    """Faster R-CNN with a feature pyramid, whose classifier is linear in base training and cosine
    in fine-tuning.

    Args:
        trunk: a feature pyramid.
        classes: number of classes; background is index `classes`.
        cosine: whether the classifier compares directions.
        width: of the two hidden layers of the box head.
        rois: sampled per training image, of overlap `threshold` or more with a box if positive.
        train_proposals, test_proposals: (kept before NMS per level, kept after).
        proposal_score: the least that proposals have.
        convention: of boxes and RoIs, see `faster_rcnn.CONVENTIONS`.
    """

    def __init__(
        self,
        trunk: FPN,
        classes: int,
        *,
        cosine: bool = False,
        width: int = 1024,
        rois: int = 512,
        threshold: float = 0.5,
        rpn_channels: int = 256,
        train_proposals: tuple[int, int] = (2000, 1000),
        test_proposals: tuple[int, int] = (1000, 1000),
        proposal_score: float = 0.0,
        convention: Convention = "mmdet",
    ):
        super().__init__()
        self.trunk, self.classes, self.rois, self.threshold = trunk, classes, rois, threshold
        self.convention = convention
        self.rpn = RPN(
            trunk.out_channels,
            rpn_channels,
            strides=trunk.strides,
            scales=trunk.anchor_scales,
            train_proposals=train_proposals,
            test_proposals=test_proposals,
            score_above=proposal_score,
            convention=convention,
        )
        self.fc1 = nn.Linear(trunk.out_channels * ROI_SIZE**2, width)
        self.fc2 = nn.Linear(width, width)
        self.cls = CosineClassifier(width, classes + 1) if cosine else nn.Linear(width, classes + 1)
        self.reg = nn.Linear(width, classes * 4)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        faster_rcnn.init_normal(0.01, self.cls)
        faster_rcnn.init_normal(0.001, self.reg)

    def describe(self) -> dict[str, Any]:
        """What `build.rebuilt` makes this detector anew from, for json."""
        sizes = {
            "rois": self.rois,
            "width": self.fc2.out_features,
            "threshold": self.threshold,
            **self.rpn.sizes(),
            "proposal_score": self.rpn.score_above,
            "convention": self.convention,
        }
        cosine = isinstance(self.cls, CosineClassifier)
        return {**self.trunk.describe(), "sizes": sizes, "cosine": cosine}

    def roi_features(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Maps (RoIs of all images, channels, 7, 7) of boxes, each from the level that fits its
        size.
        """
        levels, rules = self.trunk.roi_levels, self.rpn.conventions
        return faster_rcnn.pyramid_align(
            features[:levels],
            boxes,
            ROI_SIZE,
            self.trunk.strides[:levels],
            sampling=rules.sampling,
            aligned=rules.aligned,
        )

    def roi_vectors(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Vectors (RoIs of all images, width) of boxes: RoIAlign and two hidden layers."""
        return F.relu(self.fc2(F.relu(self.fc1(self.roi_features(features, boxes).flatten(1)))))

    def head(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes + 1) and deltas (n, classes, 4) of RoI vectors (n, width)."""
        return self.cls(vectors), self.reg(vectors).view(-1, self.classes, 4)

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Training losses of normalised images (b, 3, H, W) with their boxes and labels."""
        features = self.trunk(images)
        outputs = self.rpn.outputs(self.rpn.maps(features))
        losses = self.rpn.losses(*outputs, sizes, boxes)
        rois = faster_rcnn.sample_rois(
            self.rpn.proposals(*outputs, sizes),
            boxes,
            labels,
            classes=self.classes,
            number=self.rois,
            threshold=self.threshold,
        )
        return losses | self.head_losses(self.roi_vectors(features, [r.boxes for r in rois]), rois)

    def head_losses(self, vectors: Tensor, rois: Sequence[RoIs]) -> dict[str, Tensor]:
        """Cross-entropy and L1 of the RoI vectors (RoIs of all images, width), averaged over all
        RoIs.
        """
        logits, deltas = self.head(vectors)
        return faster_rcnn.roi_losses(logits, deltas, rois, beta=0.0)

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Boxes and scores (n, 5), best first, of what may be an object of any class, for every
        normalised image.
        """
        return self.rpn.propose(self.trunk(images), sizes)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Detections of every normalised image (b, 3, H, W), in pixels of that input."""
        features = self.trunk(images)
        proposals = self.rpn.propose(features, sizes)
        vectors = self.roi_vectors(features, proposals).split([len(p) for p in proposals])
        return [
            faster_rcnn.detections(*self.head(vector), proposal, size, convention=self.convention)
            for vector, proposal, size in zip(vectors, proposals, sizes, strict=True)
        ]


def grow(
    state: Mapping[str, Tensor],
    base: Sequence[str],
    classes: Sequence[str],
    novel_state: Mapping[str, Tensor] | None = None,
    novel: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The weights of a base model with a box head for all classes and a cosine classifier (section
    3.3).

    Rows of base classes and of the background are the base model's; those of novel classes come
    from `novel_state`, a model of the `novel` classes alone, or are drawn from N(0, 0.01) with
    deltas' biases 0. A cosine classifier has no bias, so the base model's is dropped.
    """
    width = state["cls.weight"].shape[1]
    cls = torch.randn(len(classes) + 1, width) * 0.01
    reg = torch.randn(len(classes), 4, width) * 0.01
    bias = torch.zeros(len(classes), 4)

    known = [(state, base)]
    if novel_state is not None:
        known.append((novel_state, novel))
    for source, names in known:
        rows = [list(classes).index(name) for name in names]
        cls[rows] = source["cls.weight"][: len(names)]
        reg[rows] = source["reg.weight"].view(-1, 4, width)[: len(names)]
        bias[rows] = source["reg.bias"].view(-1, 4)[: len(names)]
    cls[-1] = state["cls.weight"][-1]

    grown = {name: tensor for name, tensor in state.items() if name != "cls.bias"}
    return grown | {"cls.weight": cls, "reg.weight": reg.flatten(0, 1), "reg.bias": bias.flatten()}

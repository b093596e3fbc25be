"""MPSR, multi-scale positive sample refinement (Wu et al., 2020, https://arxiv.org/abs/2007.09384)."""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot import InputError
from fewshot.backbones.fpn import FPN
from fewshot.data.detection import Detections
from fewshot.detectors import faster_rcnn, tfa
from fewshot.detectors.faster_rcnn import RPN, Convention, RoIs

ROI_SIZE = 8  # cells per side of a RoI's features
CLASS_CHANNELS = 64  # by which the RPN scores an anchor
CROP_WEIGHT = 0.1  # of the crops' classification loss


class CropLevels(NamedTuple):
    """Where in the pyramid crops of single objects are looked at, scale by scale (section 3.3).

    scales: sides of the crops in pixels. rpn: the level whose anchors have that size. roi: the
    level that RoIs of that size are cut from. border: cells that the RPN leaves out on each side,
    so that its anchors are about the crop. last_border: cells that the largest scale, for which
    there is no level of its own, leaves out before.
    """

    scales: tuple[int, ...]
    rpn: tuple[int, ...]
    roi: tuple[int, ...]
    border: int
    last_border: int


PUBLISHED = CropLevels((32, 64, 128, 256, 512, 800), (0, 1, 2, 3, 4, 4), (0, 0, 0, 1, 2, 3), 3, 2)
# of pyramids for small pictures: maps of 6 x 6 cells
SMALL = CropLevels((24, 48, 96), (0, 1, 2), (0, 0, 0), 2, 0)
CROP_LEVELS = {(4, 8, 16, 32, 64): PUBLISHED, (4, 8, 16): SMALL}  # by the pyramid's strides


class TwoBranchRPN(RPN):
    """An RPN that scores each anchor by channels of its own, which crops of objects train too.

    Args:
        per_batch: proposals kept in training over all images of a batch together.
        more: of `RPN`; the proposals kept after NMS in training are `per_batch` alone.
    """

    def __init__(self, in_channels: int, channels: int, *, per_batch: int, **more):
        super().__init__(in_channels, channels, border=True, reg_beta=1 / 9, nms_offset=1, **more)
        self.per_batch, self.per_cell = per_batch, self.cls.out_channels
        self.cls_conv = nn.Conv2d(channels, self.per_cell * CLASS_CHANNELS, 1)
        self.cls = nn.Conv2d(CLASS_CHANNELS, 1, 1)
        faster_rcnn.init_normal(0.01, self.cls_conv, self.cls)

    def sizes(self) -> dict[str, Any]:
        return {**super().sizes(), "train_proposals": (self.train_proposals[0], self.per_batch)}

    def score(self, hidden: Tensor) -> Tensor:
        """Logits (b, anchors, h, w) of maps (b, channels, h, w)."""
        x = self.cls_conv(hidden)
        logits = self.cls(x.reshape(-1, CLASS_CHANNELS, *x.shape[2:]))
        return logits.view(len(hidden), self.per_cell, *x.shape[2:])

    def maps(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The raw (class map, delta map), each (images, channels, height, width), of every level."""
        hidden = [F.relu(self.conv(level)) for level in features]
        return [(self.score(h), self.reg(h)) for h in hidden]

    def crop_scores(self, features: Sequence[Tensor], border: int) -> list[Tensor]:
        """Logits (n, anchors, h, w) of crops' maps, without `border` cells on each side, where
        their edges show.
        """
        hidden = [F.relu(self.conv(level)) for level in features]
        return [self.score(h[..., border:-border, border:-border]) for h in hidden]

    @torch.compiler.disable
    @torch.no_grad()
    def proposals(self, logits, deltas, anchors, sizes) -> list[Tensor]:
        """As `RPN.proposals`; in training the best of all images together."""
        found = super().proposals(logits, deltas, anchors, sizes)
        if not self.training:
            return found

        scores = torch.cat([boxes[:, 4] for boxes in found])
        best = scores.sort(descending=True, stable=True).indices[: self.per_batch]
        kept = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True)
        of_images = kept.split([len(boxes) for boxes in found])
        counts = torch.stack([mine.sum() for mine in of_images]).tolist()
        return list(torch.cat(found)[best.sort().values].split(counts))


class MPSR(nn.Module):
    """Faster R-CNN with a feature pyramid, whose RPN and classifier also train on crops of single
    objects.

    Args:
        trunk: a feature pyramid.
        classes: number of classes; background is index `classes`.
        width: of the hidden layers of the box head's two branches.
        rois: sampled per training image.
        aligned: whether RoIs are cut half a pixel off, as they should be; the published models
            fine-tuned on VOC were made from others that did not.
        roi_size: cells per side of a RoI's features; no recipe has others, but models `from_tfa`.
        train_proposals, test_proposals: (kept before NMS per level, kept after: in training over a
            whole batch).
        convention: of boxes, see `faster_rcnn.CONVENTIONS`.

    Raises:
        InputError: the pyramid has levels for which the crops' scales are not known.
    """

    def __init__(
        self,
        trunk: FPN,
        classes: int,
        *,
        width: int = 1024,
        rois: int = 512,
        aligned: bool = True,
        roi_size: int = ROI_SIZE,
        rpn_channels: int = 256,
        train_proposals: tuple[int, int] = (2000, 2000),
        test_proposals: tuple[int, int] = (1000, 1000),
        convention: Convention = "mmdet",
    ):
        super().__init__()
        if trunk.strides not in CROP_LEVELS:
            known = " or ".join(map(str, CROP_LEVELS))
            raise InputError(
                f"MPSR needs a pyramid of strides {known}, not {trunk.strides}: take another backbone"
            )
        self.trunk, self.classes, self.rois, self.aligned = trunk, classes, rois, aligned
        self.roi_size, self.convention = roi_size, convention
        self.levels = CROP_LEVELS[trunk.strides]

        before, per_batch = train_proposals
        self.rpn = TwoBranchRPN(
            trunk.out_channels,
            rpn_channels,
            strides=trunk.strides,
            scales=trunk.anchor_scales,
            per_batch=per_batch,
            train_proposals=(before, None),
            test_proposals=test_proposals,
            convention=convention,
        )

        inside = trunk.out_channels * roi_size**2
        self.cls_fc1, self.cls_fc2 = nn.Linear(inside, width), nn.Linear(width, width)
        self.reg_fc1, self.reg_fc2 = nn.Linear(inside, width), nn.Linear(width, width)
        self.cls, self.reg = nn.Linear(width, classes + 1), nn.Linear(width, 4)
        faster_rcnn.init_normal(0.01, self.cls)
        faster_rcnn.init_normal(0.001, self.reg)

    def describe(self) -> dict[str, Any]:
        """What `build.rebuilt` makes this detector anew from, for json."""
        sizes = {
            "rois": self.rois,
            "width": self.cls_fc2.out_features,
            "aligned": self.aligned,
            **self.rpn.sizes(),
            "roi_size": self.roi_size,
            "convention": self.convention,
        }
        return {**self.trunk.describe(), "sizes": sizes}

    def roi_features(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Maps (RoIs of all images, channels, s, s) of boxes, s = roi_size, each from the level
        that fits its size.
        """
        n = self.trunk.roi_levels
        strides = self.trunk.strides[:n]
        return faster_rcnn.pyramid_align(
            features[:n], boxes, self.roi_size, strides, sampling=2, aligned=self.aligned
        )

    def classify(self, maps: Tensor) -> Tensor:
        """Logits (n, classes + 1) of RoI maps (n, channels, s, s)."""
        # no ReLU after the second, as published
        return self.cls(self.cls_fc2(F.relu(self.cls_fc1(maps.flatten(1)))))

    def regress(self, maps: Tensor) -> Tensor:
        """Deltas (n, classes, 4) of RoI maps (n, channels, s, s): the same for all classes."""
        deltas = self.reg(F.relu(self.reg_fc2(F.relu(self.reg_fc1(maps.flatten(1))))))
        return deltas[:, None].expand(-1, self.classes, -1)

    def crop_features(self, crops: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps for the RPN and for the classifier of crops (n, 3, s, s) of every scale."""
        rpn, roi = [], []
        for i, crop in enumerate(crops):
            maps = self.trunk(crop)
            rpn.append(maps[self.levels.rpn[i]])
            roi.append(maps[self.levels.roi[i]])
        border = self.levels.last_border
        if border:
            rpn[-1] = rpn[-1][..., border:-border, border:-border]
        return rpn, roi

    def classify_crops(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (scales * n, classes + 1) of crops' maps (n, channels, h, w), scale by scale."""
        pooled = [F.adaptive_avg_pool2d(level.float(), self.roi_size) for level in maps]
        return self.classify(torch.cat(pooled))

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        crops: Sequence[Tensor],
        crop_labels: Tensor,
    ) -> dict[str, Tensor]:
        """Training losses of normalised images (b, 3, H, W), and of crops (n, 3, s, s) of every
        scale with labels (n,).

        All anchors at the centre of a crop are to be found, and count in the number by which both
        scores' losses are divided (equation 2).
        """
        features = self.trunk(images)
        rpn_maps, roi_maps = self.crop_features(crops)
        outputs = self.rpn.outputs(self.rpn.maps(features))
        cls, reg, number = self.rpn.loss_sums(*outputs, sizes, boxes)
        scores = self.rpn.crop_scores(rpn_maps, self.levels.border)
        refined = torch.cat([score.flatten() for score in scores]).float()
        losses = {
            "rpn_cls": cls / (number + len(refined)),
            "rpn_crops": F.softplus(-refined).sum() / (number + len(refined)),
            "rpn_box": reg / number,
        }

        rois = faster_rcnn.sample_rois(
            self.rpn.proposals(*outputs, sizes),
            boxes,
            labels,
            classes=self.classes,
            number=self.rois,
        )
        return losses | self.head_losses(features, rois, roi_maps, crop_labels)

    def head_losses(
        self,
        features: Sequence[Tensor],
        rois: Sequence[RoIs],
        crop_maps: Sequence[Tensor],
        crop_labels: Tensor,
    ) -> dict[str, Tensor]:
        """`cls` and `box` of the RoIs of all images, and `crops`, the classification of the crops
        (equation 3).
        """
        maps = self.roi_features(features, [r.boxes for r in rois])
        losses = faster_rcnn.roi_losses(self.classify(maps), self.regress(maps), rois, beta=1.0)
        logits = self.classify_crops(crop_maps).float()
        crops = F.cross_entropy(logits, crop_labels.repeat(len(crop_maps)))
        return losses | {"crops": CROP_WEIGHT * crops}

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
        maps = self.roi_features(features, proposals).split([len(p) for p in proposals])
        find = partial(faster_rcnn.detections, nms_offset=1, convention=self.convention)
        return [
            find(self.classify(m), self.regress(m), proposal, size)
            for m, proposal, size in zip(maps, proposals, sizes, strict=True)
        ]


def from_tfa(
    state: Mapping[str, Tensor], about: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A base model of TFA, or one that torchvision trained, as MPSR's: its weights, and what
    describes them.

    Trunk and RPN compute what they did: an anchor's score is a sum over channels of its own, here
    of equal ones. Both branches of the box head begin with TFA's hidden layers, and the one
    regression with the mean of all classes'. The classifier is random, as every fine-tuning begins.
    """
    sizes = dict(about["sizes"])
    sizes.pop("threshold", None)
    sizes.pop("proposal_score", None)
    conventions = faster_rcnn.CONVENTIONS[sizes.get("convention", "mmdet")]
    sizes |= {"aligned": conventions.aligned, "roi_size": tfa.ROI_SIZE}

    ours = {name: tensor for name, tensor in state.items() if name.startswith(("trunk.", "rpn."))}
    part = CLASS_CHANNELS**-0.5
    for kind in ("weight", "bias"):
        repeated = state[f"rpn.cls.{kind}"].repeat_interleave(CLASS_CHANNELS, 0)
        ours[f"rpn.cls_conv.{kind}"] = repeated * part
        for layer in ("fc1", "fc2"):
            ours[f"cls_{layer}.{kind}"] = state[f"{layer}.{kind}"]
            ours[f"reg_{layer}.{kind}"] = state[f"{layer}.{kind}"]
        ours[f"reg.{kind}"] = state[f"reg.{kind}"].unflatten(0, (-1, 4)).mean(0)
    ours["rpn.cls.weight"] = torch.full((1, CLASS_CHANNELS, 1, 1), part)
    ours["rpn.cls.bias"] = torch.zeros(1)

    classes, width = len(about["classes"]), state["fc2.weight"].shape[0]
    ours["cls.weight"] = torch.randn(classes + 1, width) * 0.01
    ours["cls.bias"] = torch.zeros(classes + 1)
    about = copy(about)  # of the same file, if it is of one
    about.update(method="mpsr", sizes=sizes)
    return ours, about

"""Attention-RPN (Fan et al., 2020, https://arxiv.org/abs/1908.01998)."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot.backbones.trunks import C4
from fewshot.data.detection import Detections
from fewshot.detectors import faster_rcnn
from fewshot.detectors.faster_rcnn import RPN, RoIs

# in testing: more need more memory, and a CPU more time to fetch it
CLASSES_AT_ONCE = {"cpu": 2, "cuda": 5}
WHOLE = 7  # cells per side of the RoI maps for which the patch relation was made
PUBLISHED = 2048  # channels of the published trunks' RoI maps
MATCH, BACKGROUND, ABSENT = 0, 1, 2  # the last: background of a pair in which the class is not


class Parts(NamedTuple):
    """What a RoI, or a class's supports, bring into the three relations, before the two meet; n of
    either.

    patch: (n, hidden, s, s). local: (n, channels, s, s). whole: (n, channels).
    """

    patch: Tensor
    local: Tensor
    whole: Tensor

    def take(self, index: Tensor | slice) -> "Parts":
        return Parts(*(part[index] for part in self))


class MultiRelation(nn.Module):
    """Whether a RoI shows what a support shows, by three relations whose logits add up (section
    4.2.2).

    Args:
        channels: of the maps of RoIs and supports. side: of these maps.
        hidden: channels of the patch relation.

    The first layers of the patch and of the global relation are linear in the two maps that they
    see side by side, so each map goes through its half of the weights alone, and once, however many
    others it is compared with.

    Maps of fewer than `WHOLE` cells, those of small trunks, are not pooled before the patch
    relation's convolution, which would leave nothing of where in the RoI things are; and narrow
    layers begin with larger weights than the published ones, which would take thousands of steps to
    be heard.
    """

    def __init__(self, channels: int, side: int, hidden: int):
        super().__init__()
        self.channels, self.pool = channels, 3 if side >= WHOLE else 1
        self.patch = nn.ModuleList(
            [
                nn.Conv2d(2 * channels, hidden, 1, bias=False),
                nn.Conv2d(hidden, hidden, 3, bias=False),
                nn.Conv2d(hidden, channels, 1, bias=False),
            ]
        )
        self.local = nn.Conv2d(channels, channels, 1, bias=False)
        self.whole = nn.ModuleList(
            [nn.Linear(2 * channels, channels), nn.Linear(channels, channels)]
        )
        self.patch_cls, self.local_cls, self.whole_cls = (nn.Linear(channels, 2) for _ in range(3))
        self.reg = nn.Linear(channels, 4)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                faster_rcnn.init_normal(0.001 if layer is self.reg else 0.01, layer)
        if (narrow := PUBLISHED / channels) > 1:
            for layer in [*self.patch, *self.whole]:
                nn.init.kaiming_normal_(layer.weight)
            for layer in (self.patch_cls, self.local_cls, self.whole_cls, self.reg):
                layer.weight.data *= narrow**0.5
            self.local.weight.data *= narrow**0.25  # of which the relation takes a square

    def query_parts(self, maps: Tensor) -> Parts:
        """Of RoI maps (n, channels, s, s)."""
        first, whole = (
            self.patch[0].weight[:, : self.channels],
            self.whole[0].weight[:, : self.channels],
        )
        return Parts(F.conv2d(maps, first), self.local(maps), F.linear(maps.mean((2, 3)), whole))

    def support_parts(self, maps: Tensor) -> Parts:
        """Of the supports' maps (n, channels, s, s)."""
        first, whole = (
            self.patch[0].weight[:, self.channels :],
            self.whole[0].weight[:, self.channels :],
        )
        return Parts(
            F.conv2d(maps, first),
            self.local(maps),
            F.linear(maps.mean((2, 3)), whole, self.whole[0].bias),
        )

    def forward(self, query: Parts, support: Parts) -> tuple[Tensor, Tensor]:
        """Logits (n, 2), match and background, and deltas (n, 4) of n RoIs, each beside its support
        (or beside one).
        """
        x = F.relu(query.patch + support.patch)
        x = F.avg_pool2d(x, self.pool, stride=1)
        x = F.relu(self.patch[2](F.relu(self.patch[1](x)))).mean((2, 3))
        # depth-wise correlation of equal maps: one number
        near = F.relu((query.local * support.local).sum((2, 3)))
        far = F.relu(self.whole[1](F.relu(query.whole + support.whole)))
        return self.patch_cls(x) + self.local_cls(near) + self.whole_cls(far), self.reg(x)


class AttentionRPN(nn.Module):
    """A C4 Faster R-CNN that looks for what some supports show: in its RPN, and in the relations of
    its head.

    Args:
        trunk: convolutional trunk with `stage4`.
        classes: number of classes whose prototypes the model keeps; no layer depends on it.
        relation_channels: hidden channels of the patch relation.
        rois: sampled per pair of image and class in training.
        train_proposals, test_proposals: (kept before NMS, kept after) for each class.
        shared_proposals: kept of all classes' together by `detect(share=True)`.

    Buffers: `kernels` (classes, C) and `maps` (classes, D, s, s), means over each class's supports
    (where `known`), so that the saved model detects without any support image.
    """

    def __init__(
        self,
        trunk: C4,
        classes: int,
        *,
        rois: int = 128,
        rpn_channels: int = 1024,
        relation_channels: int = 512,
        train_proposals: tuple[int, int] = (12000, 2000),
        test_proposals: tuple[int, int] = (6000, 100),
        shared_proposals: int = 100,
    ):
        super().__init__()
        self.trunk, self.classes = trunk, classes
        self.rois, self.shared_proposals = rois, shared_proposals
        trunk.keep_maps()
        self.rpn = RPN(
            trunk.out_channels,
            rpn_channels,
            strides=(trunk.stride,),
            scales=trunk.anchor_scales,
            train_proposals=train_proposals,
            test_proposals=test_proposals,
        )
        channels, side = trunk.stage4_channels, trunk.roi_size // 2
        self.relation = MultiRelation(channels, side, relation_channels)
        self.register_buffer("kernels", torch.zeros(classes, trunk.out_channels))
        self.register_buffer("maps", torch.zeros(classes, channels, side, side))
        self.register_buffer("known", torch.zeros(classes, dtype=torch.bool))

    def describe(self) -> dict[str, Any]:
        """What `build.rebuilt` makes this detector anew from, for json."""
        sizes = {
            "rois": self.rois,
            "relation_channels": self.relation.patch[0].out_channels,
            **self.rpn.sizes(),
            "shared_proposals": self.shared_proposals,
        }
        return {**self.trunk.describe(), "sizes": sizes}

    def roi_maps(self, features: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """RoI maps of boxes on the trunk's features, before stage 4 (n, C, r, r) and after it (n,
        D, s, s).
        """
        aligned = faster_rcnn.roi_align(features, boxes, self.trunk.roi_size, self.trunk.stride)
        return aligned, self.trunk.stage4(aligned)

    def support_features(self, supports: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels (n, C) and maps (n, D, s, s) of supports (n, 3, S, S) with one box each (n, 4),
        xyxy in pixels.
        """
        aligned, maps = self.roi_maps(self.trunk(supports), list(boxes[:, None]))
        return aligned.mean((2, 3)), maps.float()

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        boxes: Sequence[Tensor],
        supports: Tensor,
        support_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """Training losses of normalised images (b, 3, H, W), each with the boxes of one class
        (section 4.3).

        Args:
            supports: (b, ways, shots, 3, S, S): for every image some of its class, then of classes
                that it lacks.
            support_boxes: (b, ways, shots, 4).

        Every image is searched for every way, which makes pairs: those of the classes that are
            there come first.
        """
        features = self.trunk(images)
        b, ways, shots = supports.shape[:3]
        parts = self.support_features(supports.flatten(0, 2), support_boxes.flatten(0, 2))
        means = [part.unflatten(0, (b, ways, shots)).mean(2) for part in parts]
        # (pairs, ..)
        kernels, maps = (torch.cat([mean[:, 0], mean[:, 1:].flatten(0, 1)]) for mean in means)
        image = [*range(b), *(i for i in range(b) for _ in range(ways - 1))]  # of every pair
        negative = [pair >= b for pair in range(len(image))]
        sizes, truth = [sizes[i] for i in image], [boxes[i] for i in image]
        first = torch.arange(b, device=features.device)
        # `image` on the device: a list would be copied
        row = torch.cat([first, first.repeat_interleave(ways - 1)])

        outputs = self.rpn.outputs(self.attended(features[row], kernels))
        losses = self.rpn.losses(*outputs, sizes, truth, negative)
        rois = faster_rcnn.sample_rois(
            self.rpn.proposals(*outputs, sizes),
            truth,
            [torch.full((len(box),), MATCH, device=box.device) for box in truth],
            classes=BACKGROUND,
            number=self.rois,
            fraction=0.5,
        )
        _, queries = self.roi_maps(features[row], [roi.boxes for roi in rois])
        return losses | self.head_losses(queries, maps, rois, negative)

    def attended(self, features: Tensor, kernels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The RPN's raw maps of features (n or 1, C, h, w), each channel scaled by a kernel (n, C)
        (equation 1).
        """
        return self.rpn.maps([features * kernels[:, :, None, None]])

    def head_losses(
        self, queries: Tensor, maps: Tensor, rois: Sequence[RoIs], negative: Sequence[bool]
    ) -> dict[str, Tensor]:
        """Losses of the second stage: maps of all pairs' RoIs (n, D, s, s) and of their supports
        (pairs, D, s, s).

        Of the background only as much counts as there are matches twice, that which most looks like
        a match, in pairs where the class is there, and as much as once in pairs where it is not
        (section 4.3, 1 : 2 : 1).
        """
        pair = torch.cat([torch.full_like(roi.labels, i) for i, roi in enumerate(rois)])
        logits, deltas = self.relation(
            self.relation.query_parts(queries), self.relation.support_parts(maps).take(pair)
        )
        return self.relation_losses(logits, deltas, rois, negative)

    @torch.compiler.disable
    def relation_losses(
        self, logits: Tensor, deltas: Tensor, rois: Sequence[RoIs], negative: Sequence[bool]
    ) -> dict[str, Tensor]:
        """`head_losses` of all pairs' RoIs: logits (n, 2) and deltas (n, 4).

        How many there are of each kind the RoIs' shapes tell, so that nothing waits for the device.
        """
        pairs = list(zip(rois, negative, strict=True))
        targets = torch.cat([roi.deltas for roi, away in pairs if not away])
        kind = torch.cat(
            [torch.full_like(roi.labels, ABSENT) if away else roi.labels for roi, away in pairs]
        )
        matches, absent = len(targets), sum(len(roi.labels) for roi, away in pairs if away)
        present = len(kind) - matches - absent
        of_present = max(1, min(2 * matches, len(kind) // 4))
        of_absent = max(1, min(matches, of_present))
        match = kind.sort(stable=True).indices[:matches]
        hardest = logits[:, MATCH].detach().sort(descending=True, stable=True).indices
        hardest = hardest[kind[hardest].sort(stable=True).indices]  # kind by kind
        _, here, elsewhere = hardest.split([matches, present, absent])
        chosen = torch.cat([match, here[:of_present], elsewhere[:of_absent]])
        return {
            "cls": F.cross_entropy(logits[chosen].float(), kind[chosen].clamp(max=BACKGROUND)),
            "box": F.l1_loss(deltas[match].float(), targets, reduction="sum") / len(kind),
        }

    def forget(self, classes: int) -> None:
        """Make room for the prototypes of so many other classes, of which none is known yet."""
        self.classes = classes
        for name in ("kernels", "maps", "known"):
            old = getattr(self, name)
            setattr(self, name, old.new_zeros(classes, *old.shape[1:]))

    @torch.no_grad()
    def set_prototypes(self, supports: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Make each class's kernel and map the means over its supports; classes without any become
        unknown.

        `supports`: batches of kernels (n, C), maps (n, D, s, s) and labels (n,).
        """
        self.kernels.zero_()
        self.maps.zero_()
        number = torch.zeros(self.classes, device=self.known.device)
        for kernels, maps, labels in supports:
            self.kernels.index_add_(0, labels, kernels)
            self.maps.index_add_(0, labels, maps)
            number.index_add_(0, labels, torch.ones_like(labels, dtype=number.dtype))
        self.known.copy_(number > 0)
        self.kernels /= number.clamp(min=1)[:, None]
        self.maps /= number.clamp(min=1)[:, None, None, None]

    def exchange_supports(self) -> None:
        """Give every known class the next one's supports, the last the first's: a control of what
        supports do.
        """
        known = self.known.nonzero()[:, 0]
        for prototypes in (self.kernels, self.maps):
            prototypes[known] = prototypes[known.roll(-1)]

    @torch.no_grad()
    def detect(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], share: bool = False
    ) -> list[Detections]:
        """Detections of every normalised image (b, 3, H, W), in pixels of that input. Needs
        `set_prototypes`.

        Every class is searched for by itself and keeps up to a hundred boxes. With `share`, all
        classes are looked for
        in one set of RoIs, the best proposals of any, so that stage 4 runs once: quicker, and not
            quite the same.
        """
        known = self.known.nonzero()[:, 0]
        if not len(known):
            raise RuntimeError(
                "no class has a prototype yet: call set_prototypes with the features of some supports"
            )
        supports = self.relation.support_parts(self.maps[known])
        find = self._detect_shared if share else self._detect_each
        found = []
        for feature, size in zip(self.trunk(images).split(1), sizes, strict=True):
            per_class = find(feature, size, known, supports)
            boxes, scores = (
                torch.cat([d.boxes for d in per_class]),
                torch.cat([d.scores for d in per_class]),
            )
            labels = torch.cat(
                [label.expand(len(d.scores)) for label, d in zip(known, per_class, strict=True)]
            )
            order = scores.sort(descending=True, stable=True).indices
            found.append(Detections(boxes[order], scores[order], labels[order]))
        return found

    def proposals(self, feature: Tensor, size: tuple[int, int], classes: Tensor) -> list[Tensor]:
        """Proposals (n, 5) for each of `classes` on one image, whose map is `feature` (1, C, h, w)."""
        outputs = self.rpn.outputs(self.attended(feature, self.kernels[classes]))
        return self.rpn.proposals(*outputs, [size] * len(classes))

    def _union(self, feature: Tensor, size: tuple[int, int], classes: Tensor) -> Tensor:
        """Proposals (n, 5) for any of `classes` on one image, best first, of which none overlaps a
        better one much.
        """
        parts = [self.proposals(feature, size, part) for part in classes.split(self._at_once())]
        union = torch.cat([proposal for part in parts for proposal in part])
        alike = torch.zeros(len(union), dtype=torch.int64, device=union.device)
        return union[faster_rcnn.nms_by_class(union[:, :4], union[:, 4], alike, 0.7)]

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Boxes and scores (n, 5), best first, of what may be an object of any known class, for
        every image.
        """
        features, known = self.trunk(images).split(1), self.known.nonzero()[:, 0]
        return [
            self._union(feature, size, known) for feature, size in zip(features, sizes, strict=True)
        ]

    def _at_once(self) -> int:
        return CLASSES_AT_ONCE.get(self.known.device.type, 2)

    def _detect_each(
        self, feature: Tensor, size: tuple[int, int], known: Tensor, supports: Parts
    ) -> list[Detections]:
        found, many = [], self._at_once()
        for i in range(0, len(known), many):
            proposals = self.proposals(feature, size, known[i : i + many])
            counts = [len(proposal) for proposal in proposals]
            _, maps = self.roi_maps(feature, [torch.cat(proposals)])
            queries, start = self.relation.query_parts(maps), 0
            for j, proposal in enumerate(proposals):
                query = queries.take(slice(start, start + counts[j]))
                logits, deltas = self.relation(query, supports.take(slice(i + j, i + j + 1)))
                found.append(faster_rcnn.detections(logits, deltas[:, None], proposal, size))
                start += counts[j]
        return found

    def _detect_shared(
        self, feature: Tensor, size: tuple[int, int], known: Tensor, supports: Parts
    ) -> list[Detections]:
        union = self._union(feature, size, known)[: self.shared_proposals]
        queries = self.relation.query_parts(self.roi_maps(feature, [union])[1])
        found = []
        for i in range(len(known)):
            logits, deltas = self.relation(queries, supports.take(slice(i, i + 1)))
            found.append(faster_rcnn.detections(logits, deltas[:, None], union, size))
        return found

"""Meta R-CNN (Yan et al., 2019, https://arxiv.org/abs/1909.13032)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot import InputError
from fewshot.backbones.trunks import C4
from fewshot.data.detection import Detections
from fewshot.detectors import faster_rcnn
from fewshot.detectors.faster_rcnn import RPN


class MetaDetector(nn.Module):
    """A C4 Faster R-CNN that sees RoI vectors in the light of a class's support vector.

    How, a subclass says by `aggregate`. It is tested class by class; `MetaRCNN` and others, whose
    aggregation allows it, test all classes at once.

    Args:
        trunk: convolutional trunk with `stage4` and a 4-channel entrance for supports (image and
            box mask).
        classes: number of classes; background is index `classes`.
        rois: sampled per training image.
        train_proposals, test_proposals: (kept before NMS, kept after).
        head_channels: of what `aggregate` gives the last layers; by default a RoI vector's.

    Buffers: `prototypes` (classes, D), the mean support vector of each class that has supports
    (`known`), so that the saved model detects without any support image.
    """

    rpn_trains_trunk = True  # whether gradients of the RPN's losses reach the trunk

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        parent = cls.__base__
        if "aggregate" in vars(cls) and parent.classify is not MetaDetector.classify:
            raise TypeError(
                f"{cls.__name__} aggregates in its own way, and {parent.__name__} tests all classes "
                "at once by its own: derive from MetaDetector"
            )

    def __init__(
        self,
        trunk: C4,
        classes: int,
        *,
        rois: int = 128,
        rpn_channels: int = 512,
        train_proposals: tuple[int, int] = (12000, 2000),
        test_proposals: tuple[int, int] = (6000, 300),
        head_channels: int | None = None,
    ):
        super().__init__()
        self.trunk, self.classes, self.rois = trunk, classes, rois

        self.rpn = RPN(
            trunk.out_channels,
            rpn_channels,
            strides=(trunk.stride,),
            scales=trunk.anchor_scales,
            softmax=True,
            border=True,
            train_proposals=train_proposals,
            test_proposals=test_proposals,
        )

        head_channels = head_channels or trunk.stage4_channels
        self.cls = nn.Linear(head_channels, classes + 1)
        self.reg = nn.Linear(head_channels, classes * 4)
        self.meta = nn.Linear(trunk.stage4_channels, classes)
        faster_rcnn.init_normal(0.01, self.cls)
        faster_rcnn.init_normal(0.001, self.reg)

        self.register_buffer("prototypes", torch.zeros(classes, trunk.stage4_channels))
        self.register_buffer("known", torch.zeros(classes, dtype=torch.bool))

    def describe(self) -> dict[str, Any]:
        """What `build.rebuilt` makes this detector anew from, for json."""
        return {**self.trunk.describe(), "sizes": {"rois": self.rois, **self.rpn.sizes()}}

    def support_vectors(self, supports: Tensor) -> Tensor:
        """Vectors (n, D) of supports (n, 4, S, S), normalised image and 0/1 mask: sigmoid, then
        mean over the map.

        Raises InputError for supports too small for the trunk.
        """
        (side, stride), least = (supports.shape[-1], self.trunk.stride), self.trunk.least_side
        if -(-side // stride) // 2 < least:
            advice = f"--support-size {2 * stride * least} is enough"
            raise InputError(f"supports of {side} pixels are too small for this trunk: {advice}")
        features = F.max_pool2d(self.trunk(supports, support=True), 2)
        return self.trunk.stage4(features).float().sigmoid().mean((2, 3))

    def roi_vectors(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Vectors (RoIs, D) of boxes on the trunk's features: RoIAlign, stage 4, mean over the map."""
        aligned = faster_rcnn.roi_align(features, boxes, self.trunk.roi_size, self.trunk.stride)
        return self.trunk.stage4(aligned).float().mean((2, 3))

    def aggregate(self, queries: Tensor, vector: Tensor) -> Tensor:
        """RoI vectors (n, D) in the light of a class's support vector (D,): what the last layers
        see (n, head_channels).
        """
        raise NotImplementedError(f"{type(self).__name__} has no aggregate")

    def outputs(self, queries: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes + 1) and deltas (n, classes, 4), by what `aggregate` makes of its
        arguments.
        """
        aggregated = self.aggregate(queries, vector)
        return self.cls(aggregated), self.reg(aggregated).view(-1, self.classes, 4)

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        supports: Tensor,
        support_labels: Tensor,
    ) -> dict[str, Tensor]:
        """Training losses of normalised images (b, 3, H, W) and one or more supports of every
        class.

        Each image is re-weighted by the vector of one class, drawn from its boxes (an object each,
        so that frequent classes are drawn more often), while the losses see the labels of all its
        RoIs (section 3.2).
        """
        features = self.trunk(images)
        seen_by_rpn = features if self.rpn_trains_trunk else features.detach()
        outputs = self.rpn.outputs(self.rpn.maps([seen_by_rpn]))
        losses = self.rpn.losses(*outputs, sizes, boxes)

        rois = faster_rcnn.sample_rois(
            self.rpn.proposals(*outputs, sizes),
            boxes,
            labels,
            classes=self.classes,
            number=self.rois,
        )
        counts = [len(r.boxes) for r in rois]
        queries = self.roi_vectors(features, [r.boxes for r in rois]).split(counts)

        vectors = self.support_vectors(supports)
        drawn = self.drawn(labels, support_labels)
        return losses | self.head_losses(queries, rois, drawn, vectors, support_labels)

    @torch.compiler.disable
    def drawn(self, labels: Sequence[Tensor], support_labels: Tensor) -> Tensor:
        """The class by which each image is re-weighted (images,): of its own labels one, whichever
        the supports have.

        Drawn on the CPU, so that a seed means the same on every device.
        """
        return torch.stack([label[torch.randint(len(label), ()).item()] for label in labels])

    @torch.compiler.disable
    def head_losses(
        self,
        queries: Sequence[Tensor],
        rois: Sequence[faster_rcnn.RoIs],
        drawn: Tensor,
        vectors: Tensor,
        support_labels: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of the second stage: RoI vectors (n, D) and drawn class of each image, supports'
        vectors (m, D).
        """
        meta = self.meta_loss(vectors, support_labels)
        return self.conditioned_losses(queries, rois, drawn, vectors, support_labels) | {
            "meta": meta
        }

    def conditioned_losses(
        self,
        queries: Sequence[Tensor],
        rois: Sequence[faster_rcnn.RoIs],
        drawn: Tensor,
        vectors: Tensor,
        support_labels: Tensor,
    ) -> dict[str, Tensor]:
        """`cls` and `box` of `head_losses`: of each image in the light of the drawn class, averaged
        over the images.
        """
        total = {"cls": 0.0, "box": 0.0}
        alike = (drawn[:, None] == support_labels).tolist()  # (images, m)

        for image, row in enumerate(alike):
            for support in range(len(row)):
                if not row[support]:
                    continue
                logits, deltas = self.outputs(queries[image], vectors[support])
                for name, loss in faster_rcnn.roi_losses(logits, deltas, [rois[image]]).items():
                    total[name] = total[name] + loss / len(queries)
        return total

    def meta_loss(self, vectors: Tensor, support_labels: Tensor) -> Tensor:
        """Cross-entropy of support vectors (m, D) by their own classifier.

        It is divided by the number of supports a second time, as the published models were trained.
        """
        return F.cross_entropy(self.meta(vectors).float(), support_labels) / len(vectors)

    @torch.no_grad()
    def set_prototypes(self, vectors: Tensor, labels: Tensor) -> None:
        """Make each class's prototype the mean of its support vectors (n, D); classes without any
        become unknown.
        """
        for c in range(self.classes):
            mine = vectors[labels == c]
            self.known[c] = len(mine) > 0
            self.prototypes[c] = mine.mean(0) if len(mine) else 0.0

    def known_classes(self) -> Tensor:
        """The classes (k,) that have a prototype."""
        known = self.known.nonzero()[:, 0]
        if not len(known):
            raise RuntimeError(
                "no class has a prototype yet: call set_prototypes with the vectors of some supports"
            )
        return known

    @torch.compiler.disable
    def classify(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes + 1) and deltas (n, classes, 4) of RoI vectors (n, D) in the light of
        every prototype.

        Class k's logit and deltas come from the query aggregated with prototype k, the background's
        logit is the mean over the classes. A class without prototype has logit 0 and deltas 0.
        """
        known = self.known_classes()
        logits = queries.new_zeros(len(queries), self.classes + 1)
        deltas = queries.new_zeros(len(queries), self.classes, 4)

        for k in known.tolist():
            scores, boxes = self.outputs(queries, self.prototypes[k])
            logits[:, k] = scores[:, k].float()
            logits[:, -1] += scores[:, -1].float() / len(known)
            deltas[:, k] = boxes[:, k]
        return logits, deltas

    def exchange_supports(self) -> None:
        """Give every known class the next one's prototype, the last the first's: a control of what
        prototypes do.
        """
        known = self.known.nonzero()[:, 0]
        self.prototypes[known] = self.prototypes[known.roll(-1)]

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Boxes and scores (n, 5), best first, of what may be an object of any class, for every
        normalised image.
        """
        return self.rpn.propose([self.trunk(images)], sizes)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Detections of every normalised image (b, 3, H, W), in pixels of that input. Needs
        `set_prototypes`.
        """
        features = self.trunk(images)
        proposals = self.rpn.propose([features], sizes)
        queries = self.roi_vectors(features, proposals).split([len(p) for p in proposals])
        return [
            faster_rcnn.detections(*self.classify(query), proposal, size, nms=0.3)
            for query, proposal, size in zip(queries, proposals, sizes, strict=True)
        ]


class MetaRCNN(MetaDetector):
    """A detector whose RoI vectors are re-weighted, channel by channel, by a class's support vector.

    See `MetaDetector` for the arguments.
    """

    def aggregate(self, queries: Tensor, vector: Tensor) -> Tensor:
        """RoI vectors (n, D) times a class's support vector (D,)."""
        return queries * vector

    @torch.compiler.disable
    def classify(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """As `MetaDetector.classify`, in one matmul for all classes."""
        cls_weight, cls_bias, reg_weight, reg_bias = self.folded()
        deltas = F.linear(queries, reg_weight, reg_bias)
        return F.linear(queries, cls_weight, cls_bias), deltas.unflatten(1, (-1, 4))

    def folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the last layers, `cls` and `reg`, with the prototypes folded in.

        W (q * s) = (W * s) q. The background's row has the mean prototype, those of classes without
        prototype are 0.
        """
        mean = self.prototypes[self.known_classes()].mean(0, keepdim=True)
        known = self.known[:, None]  # (classes, 1)
        prototypes = self.prototypes * known

        cls = torch.cat([self.cls.weight[:-1] * prototypes, self.cls.weight[-1:] * mean])
        cls_bias = torch.cat([self.cls.bias[:-1] * self.known, self.cls.bias[-1:]])
        reg = self.reg.weight.view(self.classes, 4, -1) * prototypes[:, None]
        reg_bias = self.reg.bias.view(self.classes, 4) * known
        return cls, cls_bias, reg.flatten(0, 1), reg_bias.flatten()

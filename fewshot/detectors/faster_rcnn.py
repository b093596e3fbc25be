"""The two-stage detector that all six methods share: anchors, proposals, RoIs, their targets,
losses and boxes.

The numbers follow mmdet 2.25, on which the published models were trained, where torchvision's own
detection classes differ: anchors are not rounded and sit on the cell corner, C4 anchors run scale
by scale, the size deltas are clamped on both sides, a low-quality match overwrites, ground truth
comes before the proposals, background is the last class. Models that torchvision or detectron2
trained keep their `CONVENTIONS`. Boxes are xyxy in pixels of the network's input; a width is x2 -
x1.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops

from fewshot.data.detection import Detections

RPN_STD = (1.0, 1.0, 1.0, 1.0)
ROI_STD = (0.1, 0.1, 0.2, 0.2)
# a box grows or shrinks by at most this much from its anchor
MAX_LOG_SIZE = abs(math.log(16 / 1000))
NEGATIVE, UNUSED = -1, -2
# detections of an image: their least score and their number
SCORE_ABOVE = 0.05
MOST = 100


class RoIs(NamedTuple):
    """The sampled RoIs of one image, positives first, with their targets.

    boxes (n, 4); labels (n,) with background = number of classes; deltas (positives, 4); matched
    (positives,), the index of each positive's ground-truth box; overlaps (positives,), its IoU with
    that box.
    """

    boxes: Tensor
    labels: Tensor
    deltas: Tensor
    matched: Tensor
    overlaps: Tensor


class Conventions(NamedTuple):
    """What a network's boxes, RoIs and targets are like, which its weights were trained for and do
    not tell.

    rounded: anchors have whole pixels, and those of a level of every second cell are as far apart
    as these cells are on
        average, which is less than its stride where the level before has an odd number of them.
    sampling, aligned: of RoIAlign in a pyramid, points per bin and side (-1 for as many as there
    are pixels), and
        whether boxes are cut half a pixel off, as they should be.
    shrink: log of the ratio by which a box may at most be smaller than its anchor.
    proposal_side, box_side: proposals of at most that width or height, and detections of less, are
    dropped; in pixels. low_quality, reassign: the least overlap with which a box's best anchors are
    positive in any case, and whether they
        then stand for that box even where they overlap another more.
    divide_by_all: RPN losses are divided by the anchors that could be sampled, not by those that
    were. truth_first: RoIs are sampled from the boxes followed by the proposals, not the other way
    round.
    """

    rounded: bool
    sampling: int
    aligned: bool
    shrink: float
    proposal_side: float
    box_side: float
    low_quality: float = 0.3
    reassign: bool = True
    divide_by_all: bool = False
    truth_first: bool = True


Convention = Literal["mmdet", "torchvision", "detectron2"]
CONVENTIONS: dict[Convention, Conventions] = {
    "mmdet": Conventions(False, -1, True, MAX_LOG_SIZE, 0.0, 0.0),
    "torchvision": Conventions(True, 2, False, math.inf, 1e-3, 1e-2),
    "detectron2": Conventions(False, -1, True, math.inf, 0.0, 1e-9, 0.0, False, True, False),
}


# -------------------------------------------------------------------------------------------------
# boxes and targets
@lru_cache(maxsize=32)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A float32 vector that is kept on its device, so that no step waits for a copy; not to be
    written to.
    """
    return torch.tensor(values, dtype=torch.float32, device=device)


def encode(boxes: Tensor, anchors: Tensor, std: tuple[float, ...]) -> Tensor:
    """Deltas (n, 4) that take `anchors` to `boxes`: centre shift in anchor sizes, log size ratio,
    divided by `std`.
    """
    size, target = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = ((boxes[:, :2] + boxes[:, 2:]) - (anchors[:, :2] + anchors[:, 2:])) / 2 / size
    return torch.cat([shift, (target / size).log()], 1) / constant(std, anchors.device)


def decode(
    deltas: Tensor,
    anchors: Tensor,
    std: tuple[float, ...],
    size: tuple[int, int],
    shrink: float = MAX_LOG_SIZE,
) -> Tensor:
    """Boxes of `deltas` (n, ..., 4) relative to `anchors` (n, 4), clipped to an image of `size`
    (height, width).

    `shrink`: see `Conventions`.
    """
    deltas = deltas.float() * constant(std, deltas.device)
    anchors = anchors.view(len(anchors), *[1] * (deltas.dim() - 2), 4)
    extent = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2 + deltas[..., :2] * extent
    half = extent * deltas[..., 2:].clamp(-shrink, MAX_LOG_SIZE).exp() / 2
    boxes = torch.cat([centre - half, centre + half], -1)
    return ops.clip_boxes_to_image(boxes, size)


@lru_cache(maxsize=64)
def anchor_grid(
    shape: tuple[int, int],
    stride: int,
    scales: tuple[float, ...],
    ratios: tuple[float, ...],
    device: torch.device | str = "cpu",
    *,
    rounded: bool = False,
    apart: tuple[int, int] | None = None,
) -> Tensor:
    """Anchors (height * width * len(scales) * len(ratios), 4) of a map of `shape` (height, width).

    They are kept, so not to be written to: computed on the CPU, a step would wait for their copy.
    A base anchor of scale s and ratio r = h / w is stride * s / sqrt(r) wide and stride * s *
    sqrt(r) high, centred on the cell's corner. Order: row, column, scale, ratio. `rounded`: to
    whole pixels. `apart`: pixels between rows and between columns, by default the stride.
    """
    scale = stride * torch.tensor(scales, dtype=torch.float64)[:, None]
    ratio = torch.tensor(ratios, dtype=torch.float64).sqrt()
    width, height = (scale / ratio).flatten(), (scale * ratio).flatten()
    base = torch.stack([-width, -height, width, height], 1) / 2
    base = base.round() if rounded else base

    down, right = apart or (stride, stride)
    rows = torch.arange(shape[0], dtype=torch.float64) * down
    columns = torch.arange(shape[1], dtype=torch.float64) * right
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    corner = torch.stack([x, y, x, y], -1)[:, :, None]
    return (corner + base).view(-1, 4).float().to(device)


def assign(
    candidates: Tensor,
    truth: Tensor,
    positive: float,
    negative: float,
    low_quality: float | None = None,
    reassign: bool = True,
) -> tuple[Tensor, Tensor]:
    """Which ground-truth box each candidate stands for: (assignment (n,) int64, its IoU (n,)).

    A candidate belongs to its best box from IoU `positive` on, is NEGATIVE below `negative`, UNUSED
    between. With `low_quality`, every candidate that a box overlaps best (at least by that much) is
    also its own; later boxes win. Without `reassign` such a candidate belongs to its own best box
    instead.
    """
    if not len(truth):
        nothing = candidates.new_zeros(len(candidates))
        return torch.full_like(nothing, NEGATIVE, dtype=torch.int64), nothing

    overlap = ops.box_iou(truth, candidates)  # (boxes, candidates)
    best, index = overlap.max(0)
    unmatched = torch.where(best < negative, NEGATIVE, UNUSED)
    assignment = torch.where(best >= positive, index, unmatched)
    if low_quality is not None:
        best_of_box = overlap.max(1, keepdim=True).values
        mine = (overlap == best_of_box) & (best_of_box >= low_quality)  # (boxes, candidates)
        order = torch.arange(1, len(truth) + 1, device=mine.device)[:, None]
        last = (mine * order).max(0).values  # 0 where no box claims the candidate
        assignment = torch.where(last > 0, last - 1 if reassign else index, assignment)
    return assignment, best


def sample(assignment: Tensor, number: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of at most `number` * `fraction` positives and of negatives that fill up to `number`,
    each ascending.

    Random only where there are too many; drawn on the CPU, so that a seed means the same on every
    device.
    """
    chosen = []
    room = int(number * fraction)
    for mask in (assignment >= 0, assignment == NEGATIVE):
        index = mask.nonzero()[:, 0]
        if len(index) > room:
            index = index[torch.randperm(len(index))[:room].to(index.device)].sort().values
        chosen.append(index)
        room = number - len(index)
    return chosen[0], chosen[1]


def init_normal(std: float, *layers: nn.Module) -> None:
    """Weights drawn from a normal distribution, biases 0."""
    for layer in layers:
        nn.init.normal_(layer.weight, std=std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------------------------------------------------- stage one
class RPN(nn.Module):
    """Region proposal network (Ren et al., 2015) over one or more feature levels.

    Args:
        in_channels: of every level. channels: of the hidden 3x3 convolution.
        strides: input pixels per cell of each level. scales: of anchors, in units of the stride,
            for all levels or for each.
        softmax: two channels (object, background) per anchor, as Meta R-CNN has them, instead of
            one. The logit used is their difference, for which the sigmoid and its loss equal the
            two-way softmax and its cross-entropy.
        border: train only on anchors inside the image.
        train_proposals, test_proposals: (kept before NMS per level, kept after).
        reg_beta: of the smooth-L1 box loss; 0 makes it L1.
        nms_offset: pixels that count to a box's width and height in NMS; 1 is the convention of
            old.
        score_above: proposals have at least this score.
        convention: which of `CONVENTIONS` its anchors and boxes follow.
    """

    ratios = (0.5, 1.0, 2.0)  # of anchors' height to their width
    number = 256  # anchors sampled per image, half of them positive

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        strides: Sequence[int] = (16,),
        scales: Sequence[float] | Sequence[Sequence[float]] = (2, 4, 8, 16, 32),
        softmax: bool = False,
        border: bool = False,
        train_proposals: tuple[int, int] = (2000, 1000),
        test_proposals: tuple[int, int] = (1000, 1000),
        reg_beta: float = 0.0,
        nms_offset: int = 0,
        score_above: float = 0.0,
        convention: Convention = "mmdet",
    ):
        super().__init__()
        of_levels = scales if isinstance(scales[0], Sequence) else [scales] * len(strides)
        self.scales = [tuple(level) for level in of_levels]
        self.strides = tuple(strides)
        self.softmax, self.border = softmax, border
        self.train_proposals, self.test_proposals = train_proposals, test_proposals
        self.reg_beta, self.nms_offset, self.score_above = reg_beta, nms_offset, score_above
        self.conventions = CONVENTIONS[convention]

        anchors = len(self.scales[0]) * len(self.ratios)
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.cls = nn.Conv2d(channels, anchors * (2 if softmax else 1), 1)
        self.reg = nn.Conv2d(channels, anchors * 4, 1)
        init_normal(0.01, self.conv, self.cls, self.reg)

    def sizes(self) -> dict[str, Any]:
        """The arguments of detectors that say how large their RPN is."""
        proposals = {"train_proposals": self.train_proposals, "test_proposals": self.test_proposals}
        return {"rpn_channels": self.conv.out_channels, **proposals}

    def maps(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The raw (class map, delta map), each (images, channels, height, width), of every level."""
        hidden = [F.relu(self.conv(level)) for level in features]
        return [(self.cls(h), self.reg(h)) for h in hidden]

    def outputs(
        self, maps: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: objectness logits (images, n), deltas (images, n, 4), anchors (n, 4), n =
        height * width * A.
        """
        logits, deltas = [], []
        for cls, reg in maps:
            flat = cls.permute(0, 2, 3, 1).flatten(1).float()
            if self.softmax:
                flat = flat.view(len(flat), -1, 2)
                flat = flat[..., 0] - flat[..., 1]
            logits.append(flat)
            deltas.append(reg.permute(0, 2, 3, 1).reshape(len(reg), -1, 4).float())

        shapes = [tuple(cls.shape[-2:]) for cls, _ in maps]
        return logits, deltas, self.anchors(shapes, maps[0][0].device)

    @torch.compiler.disable
    def anchors(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
        """Anchors (n, 4) of every level, whose maps have `shapes` (height, width)."""
        rounded = self.conventions.rounded
        apart: list[tuple[int, int] | None] = [None] * len(shapes)
        if rounded:
            (height, width), (rows, columns) = shapes[-2:]
            apart[-1] = (self.strides[-2] * height // rows, self.strides[-2] * width // columns)

        levels = zip(shapes, self.strides, self.scales, apart, strict=True)
        return [
            anchor_grid(shape, stride, scales, self.ratios, device, rounded=rounded, apart=steps)
            for shape, stride, scales, steps in levels
        ]

    def propose(self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """`proposals` of feature levels (images, in_channels, height, width)."""
        return self.proposals(*self.outputs(self.maps(features)), sizes)

    @torch.compiler.disable
    @torch.no_grad()
    def proposals(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Boxes and scores (n, 5) of each image, best first, without gradient. `sizes`: (height,
        width), un-padded.
        """
        before, after = self.train_proposals if self.training else self.test_proposals
        rules = self.conventions
        found = []
        for i, size in enumerate(sizes):
            boxes, scores, levels = [], [], []
            per_level = zip(logits, deltas, anchors, strict=True)
            for level, (logit, delta, anchor) in enumerate(per_level):
                score, order = logit[i].sigmoid().sort(descending=True, stable=True)
                order = order[:before]
                boxes.append(decode(delta[i, order], anchor[order], RPN_STD, size, rules.shrink))
                scores.append(score[:before])
                levels.append(torch.full_like(order, level))

            box, score, level = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
            large = (box[:, 2:] - box[:, :2] > rules.proposal_side).all(1)
            keep = (large & (score >= self.score_above)).nonzero()[:, 0]
            box, score, level = box[keep], score[keep], level[keep]
            keep = nms_by_class(box, score, level, 0.7, self.nms_offset)[:after]
            found.append(torch.cat([box[keep], score[keep, None]], 1))
        return found

    def losses(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        truth: Sequence[Tensor],
        negative_pairs: Sequence[bool] | None = None,
    ) -> dict[str, Tensor]:
        """`rpn_cls` and `rpn_box`: cross-entropy and (smooth) L1 over the sampled anchors, divided
        by their number.

        Or, if the convention says so, by the number that could have been sampled.
        """
        cls, reg, total = self.loss_sums(logits, deltas, anchors, sizes, truth, negative_pairs)
        return {"rpn_cls": cls / total, "rpn_box": reg / total}

    @torch.compiler.disable
    def loss_sums(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        truth: Sequence[Tensor],
        negative_pairs: Sequence[bool] | None = None,
    ) -> tuple[Tensor, Tensor, int]:
        """Cross-entropy and box loss, summed over the sampled anchors of all images, and what to
        divide them by.

        Where `negative_pairs` says so, an image is one in which the boxes are not to be found:
        anchors are sampled as ever, but the positives among them count as background, without a box
        (Attention-RPN).
        """
        logit, delta, anchor = torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors)
        cls = reg = logit.sum() * 0
        total = 0
        for i, ((height, width), boxes) in enumerate(zip(sizes, truth, strict=True)):
            inside = torch.arange(len(anchor), device=anchor.device)
            if self.border:
                left, top, right, bottom = anchor.unbind(1)
                within = (left >= 0) & (top >= 0) & (right < width) & (bottom < height)
                inside = within.nonzero()[:, 0]

            rules = self.conventions
            candidates = anchor[inside]
            assignment, _ = assign(candidates, boxes, 0.7, 0.3, rules.low_quality, rules.reassign)
            positive, negative = sample(assignment, self.number, 0.5)
            sampled = max(len(positive), 1) + max(len(negative), 1)
            total += self.number if rules.divide_by_all else sampled
            if negative_pairs is not None and negative_pairs[i]:
                positive, negative = positive[:0], torch.cat([positive, negative])

            target = encode(boxes[assignment[positive]], candidates[positive], RPN_STD)
            positive, negative = inside[positive], inside[negative]
            cls = cls + F.softplus(-logit[i, positive]).sum() + F.softplus(logit[i, negative]).sum()
            found = delta[i, positive]
            reg = reg + F.smooth_l1_loss(found, target, reduction="sum", beta=self.reg_beta)
        return cls, reg, total


# ---------------------------------------------------------------------------------------------------------- stage two
@torch.compiler.disable
@torch.no_grad()
def sample_rois(
    proposals: Sequence[Tensor],
    truth: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    classes: int,
    number: int,
    fraction: float = 0.25,
    threshold: float = 0.5,
    convention: Convention = "mmdet",
) -> list[RoIs]:
    """Sample `number` RoIs per image from proposals (n, 4 or more) and the ground truth, put in
    front or behind.
    """
    sampled, first = [], CONVENTIONS[convention].truth_first
    for proposal, box, label in zip(proposals, truth, labels, strict=True):
        candidates = torch.cat([box, proposal[:, :4]] if first else [proposal[:, :4], box])
        assignment, overlap = assign(candidates, box, threshold, threshold)
        if first:
            # a box is a positive of itself
            assignment[: len(box)] = torch.arange(len(box), device=box.device)
        positive, negative = sample(assignment, number, fraction)
        matched = assignment[positive]
        background = label.new_full((len(negative),), classes)
        names = torch.cat([label[matched], background])
        deltas = encode(box[matched], candidates[positive], ROI_STD)
        chosen = candidates[torch.cat([positive, negative])]
        sampled.append(RoIs(chosen, names, deltas, matched, overlap[positive]))
    return sampled


@torch.compiler.disable
def roi_align(features: Tensor, boxes: Sequence[Tensor], size: int, stride: int) -> Tensor:
    """RoI features (RoIs of all images, channels, size, size) of one level; half-pixel aligned,
    adaptive sampling.
    """
    rois = [b[:, :4] for b in boxes]
    return ops.roi_align(features.float(), rois, size, 1 / stride, sampling_ratio=-1, aligned=True)


@torch.compiler.disable
def pyramid_align(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    size: int,
    strides: Sequence[int],
    *,
    sampling: int = -1,
    aligned: bool = True,
) -> Tensor:
    """RoI features (RoIs of all images, channels, size, size), each RoI's from the level that fits
    its size.

    A box of side s belongs to level floor(log2(s / 14 strides of the finest)), so that finer levels
    get smaller boxes (Lin et al., 2017, equation 1). `sampling`: points per bin and side, -1 for as
    many as there are pixels.
    """
    image = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
    rois = torch.cat([image, torch.cat([b[:, :4] for b in boxes])], 1)  # (RoIs, 5)
    side = (rois[:, 3:] - rois[:, 1:3]).clamp(min=0).prod(1).sqrt()
    level = (side / (14 * strides[0]) + 1e-6).log2().floor().clamp(0, len(strides) - 1)
    numbers = torch.arange(len(strides), device=level.device)[:, None]
    counts = (level == numbers).sum(1).tolist()  # one wait for the device, not one for each level
    result = features[0].new_zeros(len(rois), features[0].shape[1], size, size, dtype=torch.float32)
    of_levels = level.sort(stable=True).indices.split(counts)
    for feature, stride, mine in zip(features, strides, of_levels):
        cut = ops.roi_align(
            feature.float(), rois[mine], size, 1 / stride, sampling_ratio=sampling, aligned=aligned
        )
        result.index_copy_(0, mine, cut)
    return result


def nms_by_class(
    boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, offset: int = 0
) -> Tensor:
    """Indices of boxes (n, 4) that stay, best first: none overlaps a better one of its class by
    more than `threshold`.

    `offset` pixels count to each width and height.
    """
    larger = boxes + constant((0, 0, offset, offset), boxes.device)
    return ops.batched_nms(larger, scores, classes, threshold)


@torch.compiler.disable
def roi_losses(
    logits: Tensor, deltas: Tensor, rois: Sequence[RoIs], beta: float = 1.0
) -> dict[str, Tensor]:
    """`cls` and `box` of the RoIs of one or several images together.

    logits (n, classes + 1), background last; deltas (n, classes, 4). Cross-entropy is averaged over
    the n RoIs; the smooth-L1 (L1 with `beta` 0) of the positives' own class is summed and divided
    by n as well.
    """
    labels, targets = torch.cat([r.labels for r in rois]), torch.cat([r.deltas for r in rois])
    n = max(len(labels), 1)

    # nothing waits for the device: positives come first in every image
    positive, start = [], 0
    for roi in rois:
        positive.append(torch.arange(start, start + len(roi.deltas), device=labels.device))
        start += len(roi.labels)
    positive = torch.cat(positive)
    own = deltas[positive, labels[positive]]
    return {
        "cls": F.cross_entropy(logits.float(), labels, reduction="sum") / n,
        "box": F.smooth_l1_loss(own.float(), targets, reduction="sum", beta=beta) / n,
    }


@torch.compiler.disable
@torch.no_grad()
def detections(
    logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    size: tuple[int, int],
    *,
    nms: float = 0.5,
    nms_offset: int = 0,
    convention: Convention = "mmdet",
) -> Detections:
    """Softmax, decode, threshold, NMS class by class, and the best of one image.

    logits (n, classes + 1), deltas (n, classes, 4) relative to `proposals` (n, 4 or more), `size`
    (height, width).
    """
    conventions = CONVENTIONS[convention]
    scores = logits.float().softmax(1)[:, :-1]  # (n, classes)
    boxes = decode(deltas, proposals[:, :4], ROI_STD, size, conventions.shrink)
    large = (boxes[..., 2:] - boxes[..., :2] >= conventions.box_side).all(-1)  # (n, classes)
    row, label = ((scores > SCORE_ABOVE) & large).nonzero(as_tuple=True)
    box, score = boxes[row, label], scores[row, label]
    keep = nms_by_class(box, score, label, nms, nms_offset)[:MOST]
    return Detections(box[keep], score[keep], label[keep])

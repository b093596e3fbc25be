"""A detector that learns nothing at all from new classes: it compares regions with the mean of a
class's supports.

The scheme that DE-ViT (Zhang et al., 2023, https://arxiv.org/abs/2309.12969) and "No time to
train!" (Espinosa et al., 2025, https://arxiv.org/abs/2507.02798) share, for boxes: the first stage
of any detector proposes regions, a network that is not trained describes them, and cosines to
prototypes of classes and of the background name them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops

from fewshot import InputError
from fewshot.backbones import pretrained
from fewshot.backbones.fpn import FPN
from fewshot.backbones.trunks import C4, Trunk
from fewshot.data.detection import Detections
from fewshot.data.pipeline import Pipeline
from fewshot.detectors import faster_rcnn
from fewshot.detectors.faster_rcnn import RPN

FIRST_STAGE = ("trunk", "rpn", "affine_rpn")  # parts of detectors that propose
PROBE = 224  # pixels: a multiple of what maps' cells usually cover
CELLS = 100  # of a map of a support's picture that are taken for background
ROUNDS = 20  # of k-means, which hardly moves after so many
MOST = 100  # detections of a picture
LIMITS = {"roi_size": (1, 100), "clusters": (0, 10_000), "temperature": (0.001, 1000)}
LIMITS |= {"objectness": (0, 1), "nms": (0, 1), "decay": (0, 100)}


class FrozenMaps(nn.Module):
    """A network of torchvision or timm that gives maps of pictures of any size, and is not trained.

    Args:
        name: "torchvision/..." or "timm/...".
        source: of the weights, as in `pretrained.network`.

    Attributes:
        name: as given. out_channels: of the maps. stride: input pixels per cell. normalisation: of
            the images.

    Raises:
        InputError: as `pretrained.network` does, or cells do not lie side by side on the picture.
    """

    def __init__(self, name: str, source: str = "pretrained"):
        super().__init__()
        self.name, self.normalisation = name, pretrained.inputs(name).normalisation
        self.net = (
            pretrained.network(name, None, pooled=False, source=source).eval().requires_grad_(False)
        )
        with torch.no_grad():
            _, self.out_channels, cells, _ = self.net(torch.zeros(1, 3, PROBE, PROBE)).shape
        if PROBE % cells:
            raise InputError(
                f"{name} gives a map of {cells} cells of {PROBE} pixels, which do not fit: choose another"
            )
        self.stride = PROBE // cells

    def train(self, mode: bool = True) -> "FrozenMaps":
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (b, 3, H, W) -> maps (b, out_channels, H / stride, W / stride)."""
        if images.device.type == "cpu":  # up to 3 times as fast
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images)


class PrototypeDetector(nn.Module):
    """Names the regions that another detector proposes by cosines to prototypes; they keep their
    boxes.

    Args:
        base: a detector, with its weights; its trunk and RPN are taken over, the rest is left
            behind.
        about: what its file says of it.
        classes: number of classes whose prototypes there is room for.
        backbone: gives the maps that regions are cut from; by default the base's trunk does.
        roi_size: cells per side of a region's vector: 1 is the mean over the region, more tell
            where in it what is.
        clusters: prototypes of the background, 0 for none.
        temperature: cosines are divided by it before the softmax over classes and background.
        objectness: the share w in the score p^(1 - w) o^w of the first stage's score o; p is the
            softmax.
        nms: overlap from which of two regions of a class only the better stays.
        decay: the exponent e of the factor (1 - s)^e for a region that lies by s in a better,
            similar one (`decayed`).

    Raises:
        InputError: naming a number that cannot be.

    Images are those of the backbone, normalised as for the base, which sees them in its own size.

    Buffers: `prototypes` (classes, D), means over the vectors of `shots` (classes,) supports;
    `background` (clusters, C), centres of `cells` (clusters,) cells. A class without shots and a
    cluster without cells are not there yet. So the saved model detects without any support.
    """

    def __init__(
        self,
        base: nn.Module,
        about: Mapping[str, Any],
        classes: int,
        backbone: FrozenMaps | None = None,
        *,
        roi_size: int = 7,
        clusters: int = 10,
        temperature: float = 0.1,
        objectness: float = 0.25,
        nms: float = 0.5,
        decay: float = 0.5,
    ):
        super().__init__()
        self.numbers = {"roi_size": roi_size, "clusters": clusters, "temperature": temperature}
        self.numbers |= {"objectness": objectness, "nms": nms, "decay": decay}
        for name, (low, high) in LIMITS.items():
            value = self.numbers[name]
            if not low <= value <= high:
                raise InputError(
                    f"{name.replace('_', '-')} is {value}: must be from {low} to {high}"
                )
        self.pictures = Pipeline(**about.get("pictures", {}))
        self.first_stage = {
            "method": about["method"],
            "classes": about["classes"],
            **base.describe(),
        }
        self.first_stage["pictures"] = self.pictures.describe()
        self.base, self.backbone = _first_stage(base), backbone
        self.roi_size, self.temperature, self.objectness = roi_size, temperature, objectness
        self.nms, self.decay = nms, decay
        self.requires_grad_(False)
        source = self.trunk if backbone is None else backbone
        self.strides = (
            source.strides[: source.roi_levels] if isinstance(source, FPN) else (source.stride,)
        )
        self.register_buffer("prototypes", torch.zeros(classes, source.out_channels * roi_size**2))
        self.register_buffer("shots", torch.zeros(classes))
        self.register_buffer("background", torch.zeros(clusters, source.out_channels))
        self.register_buffer("cells", torch.zeros(clusters))

    def describe(self) -> dict[str, Any]:
        """What `rebuilt` makes this detector anew from, for json."""
        names = {
            "first_stage": self.first_stage,
            "frozen_backbone": self.backbone and self.backbone.name,
        }
        return {**self.trunk.describe(), **names, "sizes": self.numbers}

    @property
    def trunk(self) -> Trunk:
        return self.base.trunk

    @property
    def rpn(self) -> RPN:
        return self.base.rpn

    @property
    def known(self) -> Tensor:
        """Which classes (classes,) have a prototype."""
        return self.shots > 0

    # ---------------------------------------------------------------------------------------------------- the pictures
    @torch.no_grad()
    def propose(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Boxes and scores (n, 5), best first, of what may be an object of any class, for every
        normalised image.
        """
        small, small_sizes = self._as_base_sees(images, sizes)
        found = self.base.propose(small, small_sizes)
        for proposals, (height, width), (h, w) in zip(found, sizes, small_sizes, strict=True):
            proposals[:, :4] *= faster_rcnn.constant((width / w, height / h) * 2, proposals.device)
        return found

    def _as_base_sees(
        self, images: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Sequence[tuple[int, int]]]:
        """Images as large as those that the base model was tested on, and their (height, width)
        without padding.
        """
        resized = [self.pictures.resized(*size) for size in sizes]
        if resized == [tuple(size) for size in sizes]:
            return images, sizes
        multiple = self.pictures.multiple
        height, width = (
            -(-max(size[d] for size in resized) // multiple) * multiple for d in (0, 1)
        )
        small = images.new_zeros(len(images), 3, height, width)
        for place, image, (old_h, old_w), (h, w) in zip(small, images, sizes, resized, strict=True):
            inner = image[None, :, :old_h, :old_w]
            place[:, :h, :w] = F.interpolate(inner, (h, w), mode="bilinear", align_corners=False)[0]
        return small, resized

    def maps(self, images: Tensor) -> Sequence[Tensor]:
        """Maps (b, C, h, w) of normalised images, of which a cell covers `strides` pixels: several
        of a pyramid.
        """
        if self.backbone is not None:
            return [
                self.backbone(
                    self.backbone.normalisation(self.trunk.normalisation.pixels(images))
                ).float()
            ]
        maps = self.trunk(images)
        return [maps] if isinstance(maps, Tensor) else maps[: len(self.strides)]

    def vectors(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Vectors (boxes of all images, C * roi_size²) of boxes, channel by channel: RoIAlign.

        In a pyramid each is cut from the level that fits its size.
        """
        return faster_rcnn.pyramid_align(maps, boxes, self.roi_size, self.strides).flatten(1)

    # ---------------------------------------------------------------------------------------------------- the supports
    @torch.no_grad()
    def support_features(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], boxes: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Vectors of all boxes (n, D) on normalised images, and cells of the maps (m, C) that no
        box covers.
        """
        maps, free = self.maps(images), []
        for level, stride in zip(maps, self.strides, strict=True):
            free += [
                uncovered(*own, stride) for own in zip(level.float(), sizes, boxes, strict=True)
            ]
        return self.vectors(maps, boxes), torch.cat(free)

    def make_room(self, classes: int, keep: bool = False) -> None:
        """Have room for the prototypes of so many classes; `keep` those that there are, which come
        first.
        """
        for name in ("prototypes", "shots"):
            old = getattr(self, name)
            new = old.new_zeros(classes, *old.shape[1:])
            if keep:
                new[: len(old)] = old
            setattr(self, name, new)

    @torch.no_grad()
    def add_supports(self, supports: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Learn from batches of vectors (n, D), background (m, C) and labels (n,), beside what is
        known.

        A class's prototype is the mean over all its supports so far. Those of the background are
        the centres of clusters of all that the supports' pictures show beside them. They stay what
        they were where this is nothing,
        and are forgotten where it is not and no class is known: a model's first supports, or those
            of other classes.
        """
        vectors, free, labels = (torch.cat(parts) for parts in zip(*supports, strict=True))
        weights = torch.cat([self.cells * self.known.any(), self.cells.new_ones(len(free))])
        sums = (self.prototypes * self.shots[:, None]).index_add_(0, labels, vectors)
        self.shots.index_add_(0, labels, torch.ones_like(labels, dtype=self.shots.dtype))
        self.prototypes.copy_(sums / self.shots.clamp(min=1)[:, None])
        points = torch.cat([self.background, F.normalize(free)])
        if len(self.cells) and len(free):
            centres, cells = k_means(points[weights > 0], weights[weights > 0], len(self.cells))
            self.background.zero_()[: len(centres)] = centres
            self.cells.zero_()[: len(cells)] = cells

    def exchange_supports(self) -> None:
        """Give every known class the next one's prototype, the last the first's: a control of what
        supports do.
        """
        known = self.known.nonzero()[:, 0]
        self.prototypes[known] = self.prototypes[known.roll(-1)]

    # --------------------------------------------------------------------------------------------------- the detections
    def scores(self, vectors: Tensor, objectness: Tensor) -> Tensor:
        """Scores (n, known classes) of regions by their vectors (n, D) and the first stage's scores
        (n,).
        """
        vectors = F.normalize(vectors)
        cosines = vectors @ F.normalize(self.prototypes[self.known]).T
        background = self.background[self.cells > 0]
        if len(background):  # a region that shows one cell throughout
            everywhere = F.normalize(background.repeat_interleave(self.roi_size**2, 1))
            cosines = torch.cat([cosines, (vectors @ everywhere.T).amax(1, keepdim=True)], 1)
        likely = (cosines / self.temperature).softmax(1)[:, : int(self.known.sum())]
        return likely ** (1 - self.objectness) * objectness[:, None] ** self.objectness

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Detections of every normalised image (b, 3, H, W), in pixels of that input; needs
        `add_supports`.

        A region has one name, its likeliest class, and the best hundred of an image are kept,
        whatever their scores.
        """
        if not self.known.any():
            raise RuntimeError(
                "no class has a prototype yet: call add_supports with the features of some supports"
            )
        proposals = self.propose(images, sizes)
        vectors = self.vectors(self.maps(images), proposals).split([len(p) for p in proposals])
        with torch.autocast(images.device.type, enabled=False):
            return [self.named(*columns) for columns in zip(proposals, vectors, strict=True)]

    def named(self, proposals: Tensor, vectors: Tensor) -> Detections:
        """Detections among one image's proposals (n, 5), whose vectors are (n, D)."""
        score, label = self.scores(vectors, proposals[:, 4]).max(1)
        label = self.known.nonzero()[:, 0][label]
        keep = faster_rcnn.nms_by_class(proposals[:, :4], score, label, self.nms)
        boxes, score, label = proposals[keep, :4], score[keep], label[keep]
        score = decayed(boxes, vectors[keep], score, label, self.decay)
        order = score.sort(descending=True, stable=True).indices[:MOST]
        return Detections(boxes[order], score[order], label[order])


def rebuilt(base: nn.Module, about: Mapping[str, Any]) -> PrototypeDetector:
    """The detector that its `describe` described, with fresh weights, on the detector of its
    `first_stage`.
    """
    backbone = about["frozen_backbone"] and FrozenMaps(about["frozen_backbone"], "none")
    return PrototypeDetector(
        base, about["first_stage"], len(about["classes"]), backbone, **about["sizes"]
    )


def _first_stage(detector: nn.Module) -> nn.Module:
    """The same detector without the parts that proposing regions does not need."""
    for name in [name for name, _ in detector.named_children() if name not in FIRST_STAGE]:
        delattr(detector, name)
    if isinstance(detector.trunk, C4):
        detector.trunk.stage4 = nn.Identity()
    return detector


def uncovered(map: Tensor, size: tuple[int, int], boxes: Tensor, stride: int) -> Tensor:
    """Cells (m, C) of a map (C, h, w) that lie in the picture of `size` (height, width) and overlap
    no box (n, 4).

    At most `CELLS`, from all over the picture. `stride`: pixels per cell.
    """
    y, x = torch.meshgrid(
        *(torch.arange(n, device=map.device) * stride for n in map.shape[1:]), indexing="ij"
    )
    squares = torch.stack([x, y, x + stride, y + stride], -1).flatten(0, 1)
    inside = (squares[:, 2] <= size[1]) & (squares[:, 3] <= size[0])
    free = (inside & ~(ops.box_iou(squares.float(), boxes) > 0).any(1)).nonzero()[:, 0]
    chosen = (
        torch.linspace(0, max(len(free) - 1, 0), min(len(free), CELLS), device=map.device)
        .round()
        .long()
    )
    return map.flatten(1).T[free[chosen]]


def k_means(points: Tensor, weights: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Centres (k, C) of at most `clusters` clusters by cosine, of length 1, and the weights (k,) of
    what is in them.

    Args:
        points: (n, C), of length 1, in some order, of which evenly spaced ones are the first
            centres. weights: (n,).
    """
    first = (
        torch.linspace(0, len(points) - 1, min(clusters, len(points)), device=points.device)
        .round()
        .long()
    )
    centres = points[first]
    for _ in range(ROUNDS):
        nearest = (points @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points * weights[:, None])
        total = weights.new_zeros(len(centres)).index_add_(0, nearest, weights)
        centres = F.normalize(sums[total > 0])
    return centres, total[total > 0]


def decayed(
    boxes: Tensor, vectors: Tensor, scores: Tensor, labels: Tensor, exponent: float
) -> Tensor:
    """Scores (n,) of regions, best first, times (1 - s)^exponent, where s tells a part of something
    already found.

    s_i is the largest of |B_i ∩ B_j| / |B_i| * max(0, cos(f_i, f_j)) over the better regions j of
    the same class ("No time to train!", intersection over self, with boxes B for masks).

    Args:
        boxes: (n, 4). vectors: (n, D). labels: (n,).
    """
    if not len(boxes):
        return scores
    corner, other = (torch.maximum, boxes[:, :2]), (torch.minimum, boxes[:, 2:])
    (low, high) = (meet(part[:, None], part[None]) for meet, part in (corner, other))
    # (n, n)
    share = (high - low).clamp(min=0).prod(2) / (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None]
    unit = F.normalize(vectors)
    better = (
        (labels[:, None] == labels) & torch.ones_like(share, dtype=torch.bool).tril(-1)
    ).float()
    inside = (share * (unit @ unit.T).clamp(min=0) * better).amax(1)
    return scores * (1 - inside).clamp(min=0) ** exponent

"""Pictures for people: training curves, detections on images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, make_grid

from fewshot.data.detection import DetectionSet
from fewshot.evaluate import Detections


def curves(log: Path, out: Path) -> None:
    """Plot every column of a log.jsonl against the step, one panel each, to `out` (png)."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    names = sorted({name for line in lines for name in line} - {"step", "seconds"})
    if not names:
        return
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")  # without pyplot: needs no display
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), linewidth=1, marker="." if len(points) < 30 else None)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.savefig(out, dpi=110)


def detections(
    dataset: DetectionSet,
    found: Mapping[str, Detections],
    *,
    pictures: int = 12,
    score_above: float = 0.3,
    side: int = 320,
) -> Image.Image:
    """A sheet of the first `pictures` of `dataset`, each about `side` pixels high, with what was found on them.

    Boxes of base classes are blue, of novel ones orange, each with its class and score.
    """
    images = []
    for index, record in enumerate(dataset.records[:pictures]):
        boxes, scores, labels = (torch.as_tensor(column) for column in found[record.id])
        shown = scores >= score_above
        names = [dataset.classes[label] for label in labels[shown]]
        captions = [f"{name} {score:.2f}" for name, score in zip(names, scores[shown])]
        colors = ["orange" if name in dataset.novel else "dodgerblue" for name in names]
        images.append(boxes_on(dataset.image(index), boxes[shown], captions, colors, side))
    return sheet(images)


def boxes_on(image: Tensor, boxes: Tensor, names: Sequence[str], colors: Sequence[str], side: int) -> Tensor:
    """`image` uint8 (3, H, W), resized to be `side` pixels high, with xyxy `boxes` (n, 4) in its own pixels, named."""
    scale = side / image.shape[-2]
    image = F.resize(image, [side, round(image.shape[-1] * scale)])
    if not len(boxes):
        return image
    return draw_bounding_boxes(image, boxes.float() * scale, list(names), list(colors), width=2)


def sheet(images: Sequence[Tensor], columns: int = 4) -> Image.Image:
    """A grid of uint8 (3, H, W) images, padded to the largest of them."""
    height, width = (max(image.shape[d] for image in images) for d in (-2, -1))
    padded = [F.pad(i, [0, 0, width - i.shape[-1], height - i.shape[-2]], fill=255) for i in images]
    return F.to_pil_image(make_grid(torch.stack(padded), columns, padding=4, pad_value=255))

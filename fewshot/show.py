"""Pictures for people: training curves, detections on images."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, make_grid


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


def boxes_on(
    image: torch.Tensor, boxes: torch.Tensor, names: Sequence[str], colors: Sequence[str], scale: int = 1
) -> torch.Tensor:
    """`image` uint8 (3, H, W), enlarged by `scale`, with xyxy `boxes` (n, 4) in its own pixels and their names."""
    image = F.resize(image, [image.shape[-2] * scale, image.shape[-1] * scale]) if scale > 1 else image
    if not len(boxes):
        return image
    return draw_bounding_boxes(image, boxes.float() * scale, list(names), list(colors), width=2)


def sheet(images: Sequence[torch.Tensor], columns: int = 4) -> Image.Image:
    """A grid of uint8 (3, H, W) images, padded to the largest of them."""
    height, width = (max(image.shape[d] for image in images) for d in (-2, -1))
    padded = [F.pad(i, [0, 0, width - i.shape[-1], height - i.shape[-2]], fill=255) for i in images]
    return F.to_pil_image(make_grid(torch.stack(padded), columns, padding=4, pad_value=255))

"""Pictures for people: training curves, detections on images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
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
        text, ink = captions(names, scores[shown]), colors(names, dataset.novel)
        images.append(boxes_on(dataset.image(index), boxes[shown], text, ink, side))
    return sheet(images)


def shots(dataset: DetectionSet, *, most: int = 10, side: int = 128) -> Image.Image:
    """The objects of a set as a sheet: a row per class with its first `most`, in squares of `side` pixels.

    An object is shown in its surroundings, a quarter of its longer side on both ends of that; those of novel classes
    have orange boxes.
    """
    rows = []
    for label, name in enumerate(dataset.classes):
        mine = [(i, box) for i, r in enumerate(dataset.records) for box in torch.as_tensor(r.boxes[r.labels == label])]
        rows.append([])
        for index, box in mine[:most]:
            image = dataset.image(index)
            half = 0.75 * (box[2:] - box[:2]).max()
            left, top = ((box[:2] + box[2:]) / 2 - half).int().tolist()
            window = F.crop(image, top, left, int(2 * half), int(2 * half))  # black outside the picture
            inside = box - torch.tensor([left, top, left, top])
            rows[-1].append(boxes_on(window, inside[None], [name], colors([name], dataset.novel), side))
    columns = max(map(len, rows))
    empty = torch.full((3, side, side), 255, dtype=torch.uint8)
    return sheet([cell for row in rows for cell in row + [empty] * (columns - len(row))], columns)


def guesses(images: Sequence[Tensor], probabilities: Sequence[Mapping[str, float]], most: int = 5) -> Figure:
    """A figure of pictures, uint8 (3, H, W), each beside bars of its likeliest classes' probabilities."""
    figure = Figure(figsize=(5, 2 * len(images)), layout="constrained")
    for (picture, bars), image, table in zip(figure.subplots(len(images), 2, squeeze=False), images, probabilities):
        picture.imshow(image.permute(1, 2, 0))
        picture.axis("off")
        best = sorted(table.items(), key=lambda item: -item[1])[:most][::-1]
        bars.barh([name for name, _ in best], [100 * value for _, value in best])
        bars.set_xlim(0, 100)
        bars.tick_params(labelsize=8)
    bars.set_xlabel("%", fontsize=8)
    return figure


def found(
    images: Sequence[Tensor], found: Sequence[tuple[Tensor, Tensor, list[str]]], novel: Sequence[str], side: int = 480
) -> Figure:
    """A figure of pictures, uint8 (3, H, W), with (boxes, scores, names) of each; novel classes are orange."""
    columns = min(3, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(4 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, image, (boxes, scores, names) in zip(axes, images, found):
        drawn = boxes_on(image, boxes, captions(names, scores), colors(names, novel), side)
        axis.imshow(drawn.permute(1, 2, 0))
    for axis in figure.axes:
        axis.axis("off")
    return figure


def captioned(images: Sequence[Tensor], text: Sequence[str], side: int = 128) -> Image.Image:
    """A sheet of pictures, uint8 (3, H, W), about `side` pixels high, each with a line under it."""
    framed = []
    for image, line in zip(images, text, strict=True):
        image = F.resize(image, [side, max(1, round(image.shape[-1] * side / image.shape[-2]))])
        room = max(side, image.shape[-1])
        frame = F.to_pil_image(F.pad(image, [0, 0, room - image.shape[-1], 18], fill=255))
        ImageDraw.Draw(frame).text((2, side + 2), line, fill="black", font=ImageFont.load_default(12))
        framed.append(F.pil_to_tensor(frame))
    return sheet(framed, columns=6)


def captions(names: Sequence[str], scores: Tensor) -> list[str]:
    """What stands at boxes."""
    return [f"{name} {score:.2f}" for name, score in zip(names, scores)]


def colors(names: Sequence[str], novel: Sequence[str]) -> list[str]:
    """Of boxes: orange for novel classes, blue for the others."""
    return ["orange" if name in novel else "dodgerblue" for name in names]


def boxes_on(image: Tensor, boxes: Tensor, names: Sequence[str], colors: Sequence[str], side: int) -> Tensor:
    """`image` uint8 (3, H, W), resized to be `side` pixels high, with xyxy `boxes` (n, 4) in its own pixels, named."""
    scale = side / image.shape[-2]
    image = F.resize(image, [side, round(image.shape[-1] * scale)])
    if not len(boxes):
        return image
    font = findfont("DejaVu Sans")  # matplotlib brings it along
    return draw_bounding_boxes(
        image, boxes.float() * scale, list(names), list(colors), width=2, font=font, font_size=max(10, side // 24)
    )


def sheet(images: Sequence[Tensor], columns: int = 4) -> Image.Image:
    """A grid of uint8 (3, H, W) images, padded to the largest of them."""
    height, width = (max(image.shape[d] for image in images) for d in (-2, -1))
    padded = [F.pad(i, [0, 0, width - i.shape[-1], height - i.shape[-2]], fill=255) for i in images]
    return F.to_pil_image(make_grid(torch.stack(padded), columns, padding=4, pad_value=255))

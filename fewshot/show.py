"""Pictures for people: what was detected beside what is there, shots, guesses, training curves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

from fewshot.data.detection import Detections, DetectionSet

if TYPE_CHECKING:
    # elsewhere only where something is drawn: it takes long to import
    from matplotlib.figure import Figure

BASE, NOVEL = "royalblue", "orange"  # told apart by the colour-blind too


def detections(
    dataset: DetectionSet,
    found: Mapping[str, Detections],
    *,
    pictures: int = 12,
    score_above: float = 0.3,
    side: int = 320,
) -> Image.Image:
    """A sheet of `pictures` of `dataset`, each about `side` pixels high: left the truth, right what
    was found on it.

    Pictures with objects of novel classes come first, one of each class in turn; without any, those
    of the set's order. What was found has its score, and objects that do not count in tests are in
    brackets.
    """
    pairs = []
    for index in islice(_novel_first(dataset), pictures):
        record, image = dataset.records[index], dataset.image(index)
        truth = [dataset.classes[label] for label in record.labels]
        text = [
            f"({name})" if difficult else name for name, difficult in zip(truth, record.difficult)
        ]
        ink = colors(truth, dataset.novel)
        left = boxes_on(image, torch.from_numpy(record.boxes), text, ink, side)

        boxes, scores, labels = (torch.as_tensor(column) for column in found[record.id])
        sure = torch.argsort(scores, stable=True)  # the best on top
        sure = sure[scores[sure] >= score_above]
        names = [dataset.classes[label] for label in labels[sure]]
        ink = colors(names, dataset.novel)
        right = boxes_on(image, boxes[sure], captions(names, scores[sure]), ink, side)

        both = torch.cat([left, F.pad(right, [3, 0, 0, 0], fill=255)], 2)
        pairs.append(F.pad(both, [0, 0, 12, 8], fill=255))
    heading = (
        f"left: truth (in brackets: does not count)    right: found, score at least {score_above:g}"
    )
    return _with_legend(sheet(pairs, columns=2), heading)


def _novel_first(dataset: DetectionSet) -> Iterator[int]:
    """Positions of all pictures: of each novel class one in turn until none is left, then the
    others in order.
    """
    holding = []
    for name in dataset.novel:
        label = dataset.classes.index(name)
        counting = [record.labels[~record.difficult] for record in dataset.records]
        holding.append([i for i, labels in enumerate(counting) if label in labels])
    turns = [i for turn in zip_longest(*holding) for i in turn if i is not None]
    yield from dict.fromkeys([*turns, *range(len(dataset))])


def _with_legend(picture: Image.Image, text: str) -> Image.Image:
    """The picture under a line of `text` and the colours of base and novel classes."""
    font = _font(14)
    whole = Image.new("RGB", (max(picture.width, 800), picture.height + 28), "white")
    whole.paste(picture, (0, 28))

    draw, x = ImageDraw.Draw(whole), 8
    for name, color in ((text, "white"), ("base class", BASE), ("novel class", NOVEL)):
        right = x + _width(name, font)
        _write(draw, (x, 6, right, 24), name, color, font)
        x = right + 20
    return whole


def shots(dataset: DetectionSet, *, most: int = 10, side: int = 128) -> Image.Image:
    """The objects of a set as a sheet: of each class the first `most`, in squares of `side` pixels
    under its name.

    An object is shown in its surroundings, a quarter of its longer side on both ends of that.
    Classes with few objects stand side by side. Names and boxes of novel classes are orange.
    """
    objects = [[] for _ in dataset.classes]
    for i, record in enumerate(dataset.records):
        for box, label in zip(torch.as_tensor(record.boxes), record.labels):
            objects[label].append((i, box))
    columns = max(1, *(len(mine[:most]) for mine in objects))

    blank = torch.full((3, side, side), 255, dtype=torch.uint8)
    blocks = []
    for name, color, mine in zip(dataset.classes, colors(dataset.classes, dataset.novel), objects):
        cells = [_in_surroundings(dataset.image(i), box, color, side) for i, box in mine[:most]]
        row = F.pil_to_tensor(sheet(cells + [blank] * (columns - len(cells)), columns))
        number = f"{len(mine)}" if len(mine) <= most else f"{most} of {len(mine)}"
        blocks.append(torch.cat([_heading(f"{name}: {number}", color, row.shape[-1]), row], 1))
    return sheet(blocks, columns=max(1, 12 // columns))


def _in_surroundings(image: Tensor, box: Tensor, color: str, side: int) -> Tensor:
    """A square of `side` pixels around an object, grey outside the picture."""
    half = 0.75 * (box[2:] - box[:2]).max().clamp(min=2)
    width = int(2 * half)
    left, top = ((box[:2] + box[2:]) / 2 - half).int().tolist()
    right, bottom = left + width - image.shape[-1], top + width - image.shape[-2]
    margins = [max(-left, 0), max(-top, 0), max(right, 0), max(bottom, 0)]
    padded = F.pad(image, margins, fill=225)

    window = F.crop(padded, top + margins[1], left + margins[0], width, width)
    inside = box - torch.tensor([left, top, left, top])
    return boxes_on(window, inside[None], [], [color], side)


def _heading(text: str, color: str, width: int) -> Tensor:
    """A line of text on its colour, uint8 (3, 22, width)."""
    line, font = Image.new("RGB", (width, 22), "white"), _font(13)
    text = _fitting(text, font, width - 14)
    _write(ImageDraw.Draw(line), (4, 3, 4 + _width(text, font), 22), text, color, font)
    return F.pil_to_tensor(line)


def confusion(matrix: np.ndarray, classes: Sequence[str], novel: Sequence[str]) -> Image.Image:
    """`evaluate.confusion` as a picture: rows what is there, columns what it is found as, colours
    shares of a row.

    `matrix`: counts (classes + 1, classes + 1). Names are on the colours of base and novel classes,
    and with at most 25 classes the counts can be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(classes)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    cell, size = (0.44, 8) if n <= 25 else (0.2, 7)  # inches and points
    side = cell * (n + 1) + 2.6
    figure = Figure(figsize=(side + 0.6, side), dpi=100, layout="constrained")
    axis = figure.subplots()
    # the root, so that rare mistakes are seen
    drawn = axis.imshow(np.sqrt(shares), cmap="Greys", vmin=0, vmax=1)

    rows = [f"{name} ({total})" for name, total in zip([*classes, "nothing"], matrix.sum(1))]
    axis.set_yticks(range(n + 1), rows, fontsize=size)
    axis.set_xticks(range(n + 1), [*classes, "missed"], fontsize=size, rotation=90)
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        for label, color in zip(labels, colors(classes, novel)):
            label.set_color(_readable_on(color))
            label.set_bbox({"facecolor": color, "edgecolor": "none", "pad": 1.5})
    axis.tick_params(length=0, pad=4)
    axis.set_ylabel("what is there (number)")
    axis.set_xlabel("what it is found as")

    axis.set_xticks(np.arange(n) + 0.5, minor=True)
    axis.set_yticks(np.arange(n) + 0.5, minor=True)
    axis.grid(which="minor", color="gainsboro", linewidth=0.5)
    axis.tick_params(which="minor", length=0)
    axis.axhline(n - 0.5, color="black", linewidth=1)
    axis.axvline(n - 0.5, color="black", linewidth=1)

    for row, column in np.argwhere(matrix) if n <= 25 else ():
        color = "black" if shares[row, column] < 0.3 else "white"
        middle = {"ha": "center", "va": "center"}
        axis.text(column, row, matrix[row, column], color=color, fontsize=size, **middle)

    bar = figure.colorbar(drawn, ax=axis, shrink=0.5, pad=0.02)
    percent = [0, 1, 10, 25, 50, 100]
    bar.set_ticks(np.sqrt(np.divide(percent, 100)), labels=map(str, percent))
    bar.set_label("% of the row", fontsize=size)
    bar.ax.tick_params(labelsize=size)

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def guesses(
    images: Sequence[Tensor], probabilities: Sequence[Mapping[str, float]], most: int = 5
) -> Figure:
    """A figure of pictures, uint8 (3, H, W), each beside bars of its likeliest classes'
    probabilities.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 2, squeeze=False)
    for (picture, bars), image, table in zip(axes, images, probabilities):
        picture.imshow(image.permute(1, 2, 0))
        picture.axis("off")
        best = sorted(table.items(), key=lambda item: -item[1])[:most][::-1]
        bars.barh([name for name, _ in best], [100 * value for _, value in best])
        bars.set_xlim(0, 100)
        bars.tick_params(labelsize=8)
    bars.set_xlabel("%", fontsize=8)
    return figure


def found(
    images: Sequence[Tensor],
    found: Sequence[tuple[Tensor, Tensor, list[str]]],
    novel: Sequence[str],
    side: int = 480,
) -> Figure:
    """A figure of pictures, uint8 (3, H, W), with (boxes, scores, names) of each; novel classes are
    orange.
    """
    from matplotlib.figure import Figure

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
        ImageDraw.Draw(frame).text((2, side + 2), line, fill="black", font=_font(12))
        framed.append(F.pil_to_tensor(frame))
    return sheet(framed, columns=6)


def captions(names: Sequence[str], scores: Tensor) -> list[str]:
    """What stands at boxes."""
    return [f"{name} {score:.2f}" for name, score in zip(names, scores)]


def colors(names: Sequence[str], novel: Sequence[str]) -> list[str]:
    """Of boxes: orange for novel classes, blue for the others."""
    return [NOVEL if name in novel else BASE for name in names]


def boxes_on(
    image: Tensor, boxes: Tensor, names: Sequence[str], colors: Sequence[str], side: int
) -> Tensor:
    """`image` uint8 (3, H, W), resized to be `side` pixels high, with xyxy `boxes` (n, 4) in its
    own pixels, named.

    Names stand inside the picture, on their box's colour, and if there is room not on each other:
    torchvision's `draw_bounding_boxes` would let them leave the picture and cover each other.
    """
    scale = side / image.shape[-2]
    width = max(1, round(image.shape[-1] * scale))
    picture = F.to_pil_image(F.resize(image, [side, width]))
    draw, font = ImageDraw.Draw(picture), _font(max(10, side // 24))

    ends = torch.tensor([width - 1, side - 1]).repeat(2)
    rows = torch.minimum((boxes.float() * scale).clamp(min=0), ends).tolist()
    for box, color in zip(rows, colors):
        draw.rectangle(box, outline=color, width=2)

    height, taken = round(font.size * 1.25), torch.zeros(0, 4)
    # the last is the most important, so it chooses its place first
    for (x1, y1, _, y2), name, color in reversed(list(zip(rows, names, colors))):
        name = _fitting(name, font, width - 4)
        right = min(x1 + _width(name, font), width)
        bottoms = [min(max(y, height), side) for y in (y1, y1 + height, y2 + height, y2)]
        left = right - _width(name, font)
        places = torch.tensor([[left, y - height, right, y] for y in bottoms]).float()
        free = (box_iou(places, taken) == 0).all(1)
        place = places[free.int().argmax()]  # the first place if none is free
        taken = torch.cat([taken, place[None]])
        _write(draw, place.tolist(), name, color, font)
    return F.pil_to_tensor(picture)


def _write(
    draw: ImageDraw.ImageDraw,
    place: Sequence[float],
    text: str,
    color: str,
    font: ImageFont.FreeTypeFont,
) -> None:
    """Text on its colour, which fills a place xyxy."""
    left, top, right, bottom = place
    draw.rectangle((left, top, right - 1, bottom - 1), fill=color)
    middle = (left + 2, (top + bottom) / 2)
    draw.text(middle, text, fill=_readable_on(color), font=font, anchor="lm")


def _width(text: str, font: ImageFont.FreeTypeFont) -> int:
    """Of the place that a text needs."""
    return round(font.getlength(text)) + 4


def _readable_on(color: str) -> str:
    """Black or white."""
    return "black" if np.dot(ImageColor.getrgb(color), (0.299, 0.587, 0.114)) > 128 else "white"


def _fitting(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of the name's beginning as `width` pixels hold."""
    short = name
    while len(short) > 1 and font.getlength(short) > width:
        short = short[:-2] + "…"
    return short


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)  # matplotlib brings it along


def sheet(images: Sequence[Tensor], columns: int = 4) -> Image.Image:
    """A grid of uint8 (3, H, W) images, padded to the largest of them."""
    height, width = (max(image.shape[d] for image in images) for d in (-2, -1))
    padded = [F.pad(i, [0, 0, width - i.shape[-1], height - i.shape[-2]], fill=255) for i in images]
    return F.to_pil_image(make_grid(torch.stack(padded), columns, padding=4, pad_value=255))


def curves(log: Path, out: Path) -> None:
    """Plot every number of a log.jsonl against the step, one panel each, to `out` (png), unless
    there are none.
    """
    from matplotlib.figure import Figure  # here, so that a recipe's --help does not wait for it

    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    names = sorted({name for line in lines for name in line} - {"step", "seconds"})
    if not names:
        return
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    # without pyplot: needs no display
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
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

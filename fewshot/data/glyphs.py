"""The embedded default data: characters of alphabets that nobody writes, for classification and for
detection.

A class is a program of two to four pen strokes, drawn at random from the class id alone; a picture
is one jittered execution of it. The idea is that of Lake et al., "Human-level concept learning
through probabilistic program induction" (Science 2015), without the data. There are as many classes
as integers, nothing is downloaded, and every drawing is a pure function of its arguments, so that
any process can make any picture at any time (only the pixels at the borders of strokes could depend
on the version of PIL).

Coordinates are in pixels, x before y; pixel i covers [i, i + 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from fewshot import InputError

# The first word of every seed, so that no two kinds of randomness share a stream.
PROGRAM, GLYPH, LAYOUT, DRAWING = range(4)

# Every stroke is one cubic Bézier curve. A kind is its four control points in the frame of the
# stroke, where (0, 0) is the start, (1, 0) the anchor it heads for, and the second coordinate is
# across; it is mirrored and bent at random.
KINDS = np.array(
    [
        [[0, 0], [0.33, 0.0], [0.67, 0.0], [1, 0]],  # line
        [[0, 0], [0.33, 0.0], [0.67, 0.0], [1, 0]],  # line again: scripts are mostly lines
        [[0, 0], [0.05, 0.8], [0.95, 0.8], [1, 0]],  # bow
        [[0, 0], [0.35, 1.1], [0.65, -1.1], [1, 0]],  # wave
        [[0, 0], [1.00, 0.0], [1.50, 0.2], [0.8, 0.6]],  # hook
        [[0, 0], [1.30, 1.0], [1.30, -1.0], [0, 0]],  # loop
    ]
)
GRID = 3  # anchors per side of the unit square on which programs are written
# points per stroke: sides of the drawn polyline are then at most some 8 pixels long in a scene
SAMPLES = 16

_t = np.linspace(0, 1, SAMPLES)[:, None]
# (SAMPLES, 4)
BERNSTEIN = np.hstack([(1 - _t) ** 3, 3 * _t * (1 - _t) ** 2, 3 * _t**2 * (1 - _t), _t**3])

MAX_GLYPHS = 6  # in a scene
# range of a glyph's longer side in a scene, as a fraction of the scene's
SIDES = 28 / 160, 80 / 160
# of two boxes in one scene, as a fraction of the smaller: an IoU of 0.053 at most
MAX_OVERLAP = 0.1
TRIES = 20  # places tried for a glyph before the scene goes without it
CONTRAST = 100  # grey levels between an ink and what it is drawn on


@lru_cache(maxsize=4096)
def _program(class_id: int) -> np.ndarray:
    """The strokes of a class: control points (strokes, 4, 2) on the unit square, more or less."""
    rng = np.random.default_rng((PROGRAM, class_id))
    while True:
        control = _random_strokes(rng, count=rng.choice([2, 3, 3, 4]))
        points = BERNSTEIN @ control  # (strokes, SAMPLES, 2)
        extent = np.ptp(points.reshape(-1, 2), axis=0)
        length = np.linalg.norm(np.diff(points, axis=1), axis=-1).sum() / extent.max()
        # Slivers, ticks, tangles, and strokes that lie upon each other could not be told apart once
        # they are small.
        if extent.min() > 0.5 * extent.max() and 2 < length < 4.3 and _closest(points) > 0.18:
            return control


def _random_strokes(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` strokes, each mostly starting on an earlier one, as control points (count, 4, 2)."""
    anchors = np.stack(np.meshgrid(range(GRID), range(GRID)), -1).reshape(-1, 2) / (GRID - 1)
    anchors = anchors + rng.uniform(-0.1, 0.1, anchors.shape)  # (GRID * GRID, 2)
    strokes: list[np.ndarray] = []
    while len(strokes) < count:
        start = anchors[rng.integers(len(anchors))]
        if strokes and rng.random() < 0.85:
            earlier = strokes[rng.integers(len(strokes))]
            start = (
                np.array([1, 0, 0, 0] if rng.random() < 0.5 else [0.125, 0.375, 0.375, 0.125])
                @ earlier
            )
        along = anchors[rng.integers(len(anchors))] - start
        if np.hypot(*along) > 0.4:
            across = rng.choice([-1, 1]) * rng.uniform(0.7, 1.2) * along[::-1] * [-1, 1]
            kind = KINDS[rng.integers(len(KINDS))]
            strokes.append(start + kind @ np.stack([along, across]))
    return np.stack(strokes)


def _closest(points: np.ndarray) -> float:
    """How far strokes (strokes, SAMPLES, 2) keep from each other: the least mean distance of one to
    another.
    """
    gaps = (
        np.linalg.norm(points[:, None, :, None] - points[None, :, None, :], axis=-1)
        .min(-1)
        .mean(-1)
    )
    return gaps[~np.eye(len(points), dtype=bool)].min()  # gaps: (strokes, strokes)


def _drawings(
    class_ids: Sequence[int], sides: np.ndarray, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """One jittered execution of the program of each class, all at once: a layout must cost next to
    nothing.

    `sides` (n,) is how long the longer side of each shall be in pixels, pen included. Returns a
    list of n stroke arrays (strokes, SAMPLES, 2), the extents (n, 2) and the pen widths (n,); the
    ink of each starts at the origin.
    """
    programs = [_program(class_id) for class_id in class_ids]
    counts = [len(program) for program in programs]
    starts = np.cumsum([0, *counts[:-1]])  # (n,) first stroke of each drawing
    n, total = len(counts), sum(counts)
    owner = np.repeat(np.arange(n), counts)  # (total,) drawing that each stroke belongs to

    jitter = rng.uniform(-1, 1, (4, n))
    angle, shear, stretch = jitter[0] * 0.3, jitter[1] * 0.25, 1.2 ** jitter[2]
    widths = sides * (0.085 + 0.025 * jitter[3])
    cos, sin = np.cos(angle), np.sin(angle)
    affine = np.empty((n, 2, 2))
    affine[:, 0, 0], affine[:, 0, 1] = stretch * cos, stretch * sin
    affine[:, 1, 0], affine[:, 1, 1] = shear * cos - sin, shear * sin + cos
    control = np.concatenate(programs) + rng.normal(0, 0.03, (total, 4, 2))
    points = BERNSTEIN @ control @ affine[owner]  # (total, SAMPLES, 2)

    low = np.minimum.reduceat(points.min(1), starts)  # (n, 2)
    extents = np.maximum.reduceat(points.max(1), starts) - low
    scale = (sides - widths) / extents.max(1)
    points = (points - low[owner, None]) * scale[owner, None, None] + widths[owner, None, None] / 2
    return (
        [points[i : i + k] for i, k in zip(starts.tolist(), counts)],
        extents * scale[:, None] + widths[:, None],
        widths,
    )


def _paper(rng: np.random.Generator) -> np.ndarray:
    """A colour (3,) of any brightness, but not a gaudy one."""
    return rng.uniform(30, 225) + rng.uniform(-30, 30, 3)


def _background(
    rng: np.random.Generator, paper: np.ndarray, size: int, cells: int, relief: float
) -> Image.Image:
    """Soft clouds: cells x cells colours, at most `relief` grey levels around `paper` (3,), spread
    over the picture.
    """
    colours = paper + rng.uniform(-relief, relief, (cells, cells, 3))
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8)).resize(
        (size, size), Image.Resampling.BILINEAR
    )


def _ink(uniform: np.ndarray, paper: float) -> tuple[int, ...]:
    """The colour (3,) uniform numbers give, CONTRAST or more grey levels away from `paper`, on the
    roomier side.
    """
    ink = uniform * (paper - CONTRAST) if paper > 127 else 255 - uniform * (155 - paper)
    return tuple(ink.astype(int).tolist())


def _paint(canvas: Image.Image, strokes: np.ndarray, width: float, ink: tuple[int, ...]) -> None:
    """Draw strokes (strokes, SAMPLES, 2) with a round pen, smoothed by drawing at twice the size."""
    flat = strokes.reshape(-1, 2)
    left, top = np.floor(flat.min(0) - width / 2).astype(int).tolist()
    right, bottom = np.ceil(flat.max(0) + width / 2).astype(int).tolist()
    mask = Image.new("L", (2 * (right - left), 2 * (bottom - top)))
    pen = ImageDraw.Draw(mask)
    # PIL's integers are centres of pixels, ours are their edges: hence the half. Round joints take
    # three times as long, and the nicks that they fill are invisible where the pen is thin.
    for xy in (2 * (strokes - (left, top)) - 0.5).reshape(len(strokes), -1).tolist():
        pen.line(
            xy, fill=255, width=max(1, round(2 * width)), joint="curve" if width > 3.5 else None
        )
        for x, y in (xy[:2], xy[-2:]):
            pen.ellipse((x - width, y - width, x + width, y + width), fill=255)
    canvas.paste(ink, (left, top), mask.reduce(2))


def _grain(canvas: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """The canvas (size, size, 3) uint8 with the noise of a cheap camera: uniform, some grey levels
    strong.
    """
    pixels = np.asarray(canvas)
    noise = np.frombuffer(rng.bytes(pixels.size), np.int8).reshape(pixels.shape) // int(
        rng.integers(8, 32)
    )
    return (pixels + noise.astype(np.int16)).clip(0, 255).astype(np.uint8)


def glyph(class_id: int, seed: int, index: int, size: int = 32) -> np.ndarray:
    """Picture `index` of a class: uint8 RGB (size, size, 3), one character in random ink on random
    paper.

    A pure function of its arguments; another `seed` gives other pictures of the same classes.
    InputError unless the first three are 0 or more and `size` is 16 pixels or more.
    """
    _check([class_id], seed, index, size)
    rng = np.random.default_rng((GLYPH, seed, class_id, index))
    sides = size * rng.uniform(0.62, 0.9, 1)
    [strokes], [extent], [width] = _drawings([class_id], sides, rng)
    margin = (size - extent) / 2
    corner = margin + rng.uniform(-1, 1, 2) * np.minimum(margin, 0.1 * size)

    paper = _paper(rng)
    canvas = _background(rng, paper, size, cells=3, relief=20)
    _paint(canvas, strokes + corner, width, _ink(rng.random(3), paper.mean()))
    return _grain(canvas, rng)


@dataclass(frozen=True, eq=False)
class Scene:
    """Where the glyphs of one detection picture are; `draw` makes the picture, which costs far more
    than the layout.
    """

    size: int  # of the picture's side, in pixels
    boxes: np.ndarray  # (n, 4) float32 xyxy in pixels, tight around the ink and inside the picture
    labels: np.ndarray  # (n,) int64 positions in the class ids that the scene was asked for
    strokes: list[np.ndarray]  # n times (strokes, SAMPLES, 2), in pixels
    widths: np.ndarray  # (n,) of the pens, in pixels
    seed: int
    index: int

    def draw(self) -> np.ndarray:
        """The picture: uint8 RGB (size, size, 3), the glyphs over clouds, patches and stray strokes
        of no class.
        """
        rng = np.random.default_rng((DRAWING, self.seed, self.index))
        inks = rng.random((MAX_GLYPHS, 3))
        paper = _paper(rng)
        canvas = _background(rng, paper, self.size, cells=4, relief=25)
        _clutter(rng, canvas, paper)
        # Every ink is chosen before any glyph is there, so that no glyph changes another.
        pixels = np.asarray(canvas)
        under = [
            pixels[y1 : y2 + 1, x1 : x2 + 1].mean()
            for x1, y1, x2, y2 in self.boxes.astype(int).tolist()
        ]
        for strokes, width, ink, local in zip(self.strokes, self.widths.tolist(), inks, under):
            _paint(canvas, strokes, width, _ink(ink, local))
        return _grain(canvas, rng)


def scene(class_ids: Sequence[int], seed: int, index: int, size: int = 160) -> Scene:
    """The layout of picture `index`: one to six glyphs of classes drawn uniformly from `class_ids`,
    hardly overlapping.

    Their longer sides are log-uniform from 28 to 80 pixels in a picture of 160 x 160, in proportion
    otherwise. A pure function of its arguments; nothing is drawn before `Scene.draw`. InputError as
    for `glyph`, and for no class ids.
    """
    _check(class_ids, seed, index, size)
    rng = np.random.default_rng((LAYOUT, seed, index))
    n = rng.integers(1, MAX_GLYPHS + 1)
    labels = rng.integers(len(class_ids), size=n)
    sides = size * np.exp(rng.uniform(*np.log(SIDES), n))
    strokes, extents, widths = _drawings(
        [class_ids[label] for label in labels.tolist()], sides, rng
    )
    corners = rng.random((TRIES, n, 2)) * (size - extents)  # (TRIES, n, 2)
    candidates = np.concatenate([corners, corners + extents], -1)  # (TRIES, n, 4)

    placed: dict[int, list[float]] = {}
    for i, tries in enumerate(candidates.transpose(1, 0, 2).tolist()):
        for box in tries:
            if all(_overlap(box, other) <= MAX_OVERLAP for other in placed.values()):
                placed[i] = box
                break
    kept, boxes = list(placed), np.array(list(placed.values()))
    return Scene(
        size=size,
        boxes=boxes.astype(np.float32),
        labels=labels[kept],
        strokes=[strokes[i] + box[:2] for i, box in zip(kept, boxes)],
        widths=widths[kept],
        seed=seed,
        index=index,
    )


def _overlap(a: list[float], b: list[float]) -> float:
    """The part of the smaller of two xyxy boxes that the other one covers."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _clutter(rng: np.random.Generator, canvas: Image.Image, paper: np.ndarray) -> None:
    """Flat patches hardly different from the paper, and stray strokes, each by itself and so of no
    class.
    """
    size = canvas.width
    brush = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(2, 7)):
        colour = tuple((paper + rng.uniform(-30, 30, 3)).clip(0, 255).astype(int).tolist())
        centre, radius = rng.uniform(0, size, 2), rng.uniform(0.08, 0.3) * size
        if rng.random() < 0.4:
            brush.ellipse((*(centre - radius).tolist(), *(centre + radius).tolist()), fill=colour)
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 6)))
            corners = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
            brush.polygon(corners.ravel().tolist(), fill=colour)
    for _ in range(rng.integers(1, 6)):
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.4) * size
        along = length * np.array([np.cos(angle), np.sin(angle)])
        kind = KINDS[rng.integers(len(KINDS) - 1)]  # no loops: they pass for characters
        control = rng.uniform(0, size, 2) + kind @ np.stack([along, along[::-1] * [-1, 1]])
        ink = (paper + rng.uniform(-CONTRAST, CONTRAST, 3)).clip(0, 255).astype(int)
        _paint(
            canvas, (BERNSTEIN @ control)[None], size * rng.uniform(0.01, 0.04), tuple(ink.tolist())
        )


def _check(class_ids: Sequence[int], seed: int, index: int, size: int) -> None:
    if len(class_ids) == 0:
        raise InputError("glyphs: class_ids is empty; give at least one class id")
    if min(seed, index, *class_ids) < 0:
        raise InputError(f"glyphs: seed {seed}, index {index} and class ids must be 0 or more")
    if size < 16:
        raise InputError(
            f"glyphs: size {size} is too small to tell characters apart; make it 16 pixels or more"
        )


def picture() -> Image.Image:
    """What the data look like, 1000 x 420: eleven pictures of each of eight classes, and four
    scenes of these classes.

    The colour of a box is that of its class's row.
    """
    classes, tile, side = range(8), 48, 198
    sheet = Image.new("RGB", (1000, 420), "white")
    pen = ImageDraw.Draw(sheet)
    colours = [
        "#e6194b",
        "#3cb44b",
        "#4363d8",
        "#f58231",
        "#911eb4",
        "#00a5a5",
        "#f032e6",
        "#9a6324",
    ]
    for class_id in classes:
        y = 10 + class_id * (400 - tile) // 7
        pen.rectangle((10, y, 16, y + tile - 1), fill=colours[class_id])
        for index in range(11):
            sheet.paste(Image.fromarray(glyph(class_id, 0, index, tile)), (21 + index * 50, y))
    for index in range(4):
        layout = scene(classes, 0, index, side)
        x, y = 590 + index % 2 * (side + 4), 10 + index // 2 * (side + 4)
        sheet.paste(Image.fromarray(layout.draw()), (x, y))
        for box, label in zip(layout.boxes.tolist(), layout.labels.tolist()):
            pen.rectangle(
                [a + b for a, b in zip(box, (x, y, x, y))], outline=colours[label], width=2
            )
    return sheet

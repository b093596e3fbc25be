"""Detection data: pictures with boxes, base and novel classes, K shots of each class, and streams of batches.

`open_detection` gives a `DetectionSet`, `k_shot` cuts it to K objects per class, `Pipeline` makes samples of its
pictures, and `train_loader` and `test_loader` stream them in batches. Whatever is drawn is a pure function of
(seed, position), so that a run that was resumed, or has other processes, sees the same data.

Boxes are xyxy in pixels throughout.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fewshot import InputError
from fewshot.data import annotations, glyphs
from fewshot.data.annotations import Part, Record

T = TypeVar("T")

# The first word of every seed, so that no two kinds of randomness share a stream.
SHOTS, ORDER, AUGMENT, SUPPORT = range(10, 14)

# Novel classes of each split, as VOC's: classes list the base ones first.
GLYPH_NOVEL = {1: range(15, 20), 2: range(10, 15), 3: range(5, 10)}
GLYPH_CLASSES = 20
GLYPH_SCENES = {"train": range(3000), "test": range(3000, 3500)}
GLYPH_SIZE = 160  # pixels

MIN_SIDE = 32  # pixels; smaller pictures are not trained on


@dataclass
class DetectionSet:
    """Pictures, their objects, and which of the classes are base and which novel."""

    name: str
    part: Part
    classes: list[str]  # a label is a position in this list
    novel: list[str]
    records: list[Record]
    metric: Literal["voc", "coco"]  # how results on it are published
    offset: tuple[float, ...] = (0, 0, 0, 0)  # taken off predictions to compare them with the boxes of the test part
    train_difficult: bool = False  # difficult objects are objects like others in training
    skipped: frozenset[str] = frozenset()  # ids of pictures not trained on: too small, or nothing usable on them
    notes: list[str] = field(default_factory=list)  # what the user should hear about, such as a missing year

    @property
    def base(self) -> list[str]:
        return [name for name in self.classes if name not in self.novel]

    @property
    def inclusive_pixels(self) -> bool:
        """Whether a box from pixel 7 to pixel 7 is one pixel wide when results are compared: only for VOC."""
        return self.name == "voc"

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> Tensor:
        """Picture `index`, decoded or drawn: uint8 RGB (3, H, W). `InputError` when it cannot be read."""
        record = self.records[index]
        if record.scene is not None:
            return torch.from_numpy(_scene(record.scene).draw()).permute(2, 0, 1).contiguous()
        try:
            return decode_image(record.path, ImageReadMode.RGB)
        except RuntimeError as error:
            raise InputError(f"{record.path}: not a readable picture; replace it or drop it from the lists") from error

    def usable(self, record: Record) -> np.ndarray:
        """Which of the record's objects (n,) may be trained on."""
        return np.full(len(record.labels), True) if self.train_difficult else ~record.difficult

    def with_records(self, records: list[Record]) -> "DetectionSet":
        return replace(self, records=records)

    def restrict(self, classes: Sequence[str]) -> "DetectionSet":
        """The set with these classes alone, labelled in their order.

        Objects of other classes go; in the training part so do pictures that keep none. Testing keeps every picture,
        since whatever is detected on an empty one is wrong.
        """
        for name in classes:
            if name not in self.classes:
                raise InputError(f"{self.name} has no class {name!r}; it has {', '.join(self.classes)}")
        to_new = np.array([classes.index(name) if name in classes else -1 for name in self.classes], np.int64)
        records = []
        for record in self.records:
            labels = to_new[record.labels]
            records.append(replace(record, labels=labels).select(labels >= 0))
        novel = [name for name in classes if name in self.novel]
        restricted = replace(self, classes=list(classes), novel=novel, records=records)
        if self.part == "test":
            return restricted
        kept = [r for r in records if min(r.width, r.height) >= MIN_SIDE and self.usable(r).any()]
        skipped = self.skipped | ({r.id for r in records} - {r.id for r in kept})
        return replace(restricted, records=kept, skipped=skipped)


def open_detection(
    name: str,
    root: str | Path,
    *,
    part: Part,
    split: int = 1,
    difficult: Literal["keep", "drop"] = "drop",
    novel: Sequence[str] = (),
    offset: tuple[float, ...] | None = None,
) -> DetectionSet:
    """The training or test part of a set, with all its classes.

    Args:
        name: "glyphs" (drawn, needs no files), "voc" (07+12 trainval, 07 test), "coco", or one's own data in COCO's
            format: a folder with train.json and test.json, or one json file, found in `root` or by itself.
        root: folder that holds the data, e.g. the one that holds VOCdevkit/ or coco/.
        split: 1, 2 or 3: which five of the twenty classes of voc and glyphs are novel.
        difficult: whether to train on VOC's difficult objects. No other set marks any (crowds in COCO's sense are never
            trained on), and tests always ignore them.
        novel: the novel classes of one's own data, by name.
        offset: for voc alone, instead of `annotations.VOC_OFFSET`.

    Raises:
        InputError: naming the folder, file, picture, box or class that is missing or wrong.
    """
    if part not in ("train", "test") or difficult not in ("keep", "drop"):
        raise ValueError(f"part is train or test, difficult is keep or drop; got {part!r}, {difficult!r}")
    _check_choice(name, split, novel, offset)
    root, label, metric, notes = Path(root), name, "coco", []
    if name == "glyphs":
        metric, novel = "voc", [f"glyph-{i:02d}" for i in GLYPH_NOVEL[split]]
        classes, records = [f"glyph-{i:02d}" for i in range(GLYPH_CLASSES)], _glyph_records(part)
    elif name == "voc":
        metric, novel, offset = "voc", annotations.VOC_NOVEL[split].split(), offset or annotations.VOC_OFFSET
        classes, (records, notes) = annotations.VOC_CLASSES, annotations.read_voc(root, part, offset)
    elif name == "coco":
        novel, (classes, records) = annotations.COCO_NOVEL, annotations.read_coco(root, part)
    else:
        place = next((p for p in (root / name, Path(name)) if p.exists()), None)
        if place is None:
            raise InputError(f"no data set {name!r}: not glyphs, voc or coco, nor a folder or json here or in {root}")
        label, (classes, records, notes) = place.stem, annotations.read_own(place, part)
    for wanted in novel:
        if wanted not in classes:
            raise InputError(f"{label} in {root} has no category {wanted!r} to be novel; it has {', '.join(classes)}")
    opened = DetectionSet(label, part, list(classes), list(novel), records, metric, offset or (0, 0, 0, 0))
    opened = replace(opened, train_difficult=name == "voc" and difficult == "keep", notes=notes)
    # COCO alone is published with base and novel classes interleaved.
    return opened.restrict(classes if name == "coco" else [*opened.base, *novel])


def _check_choice(name: str, split: int, novel: Sequence[str], offset: tuple[float, ...] | None) -> None:
    splits = (1, 2, 3) if name in ("glyphs", "voc") else (1,)
    if split not in splits:
        raise InputError(f"{name} has no split {split}; choose from {', '.join(map(str, splits))}")
    if novel and name in ("glyphs", "voc", "coco"):
        raise InputError(f"the novel classes of {name} are fixed; name novel classes only for your own data")
    if offset is not None and name != "voc":
        raise InputError(f"only voc counts pixels from 1; leave out the offset for {name}")


def _scene(number: int) -> glyphs.Scene:
    # Of all twenty classes whatever the split: the pictures are the same, only labels move.
    return glyphs.scene(range(GLYPH_CLASSES), 0, number, GLYPH_SIZE)


def _glyph_records(part: Part) -> list[Record]:
    records = []
    for number in GLYPH_SCENES[part]:
        scene = _scene(number)
        objects = [(box, label, False) for box, label in zip(scene.boxes, scene.labels)]
        record = annotations.make_record(f"glyphs/{number:04d}", "", GLYPH_SIZE, GLYPH_SIZE, objects)
        records.append(replace(record, scene=number))
    return records


def objects_by_class(dataset: DetectionSet) -> list[list[tuple[int, int]]]:
    """For each class the positions (record, object) of all its objects that are not difficult, in order of records."""
    found: list[list[tuple[int, int]]] = [[] for _ in dataset.classes]
    for position, record in enumerate(dataset.records):
        for i, label in enumerate(record.labels.tolist()):
            if not record.difficult[i]:
                found[label].append((position, i))
    return found


@dataclass
class Sample:
    """One picture as the network gets it, but for normalisation and padding."""

    id: str
    image: Tensor  # uint8 (3, h, w)
    boxes: Tensor  # float32 (n, 4), in the pixels of `image`
    labels: Tensor  # int64 (n,)
    scale: Tensor  # float32 (2,): x and y factors from the original picture to `image`
    original: tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Pipeline:
    """How pictures become samples: resized with their aspect ratio kept, and mirrored half the time if `flip`.

    The factor is the largest for which the shorter side is at most `short` and the longer one at most `long` pixels;
    without either, sizes stay. Of several `short` training draws one per sample. Batches are padded to a multiple of
    `multiple`. Testing neither flips nor draws: it takes the largest `short`, as all published settings do.
    """

    short: int | tuple[int, ...] | None = None
    long: int | None = None
    flip: bool = False
    multiple: int = 1

    def describe(self) -> dict[str, int | None]:
        """What a saved model says of the pictures that it is tested on: `Pipeline(**this)` makes such again."""
        short = max(self.short) if isinstance(self.short, tuple) else self.short
        return {"short": short, "long": self.long, "multiple": self.multiple}

    def resize(self, image: Tensor, short: int | None) -> tuple[Tensor, Tensor]:
        """uint8 (3, h, w) resized, and the factors (2,) of x and y by which it was."""
        old = image.shape[-2:]
        factors = [limit / side for limit, side in ((self.long, max(old)), (short, min(old))) if limit is not None]
        height, width = (int(side * min(factors, default=1) + 0.5) for side in old)
        if (height, width) != old:
            # Not antialiased, because OpenCV's is not, with which published weights were trained.
            image = F.resize(image, [height, width], InterpolationMode.BILINEAR, antialias=False)
        return image, torch.tensor([width / old[1], height / old[0]])

    def sample(self, dataset: DetectionSet, index: int, rng: np.random.Generator | None = None) -> Sample:
        """Picture `index` with the objects that may be trained on; `rng` is what training draws from."""
        record, image = dataset.records[index], dataset.image(index)
        usable = dataset.usable(record)
        boxes, labels = torch.from_numpy(record.boxes[usable]), torch.from_numpy(record.labels[usable])
        old = image.shape[-2:]
        shorts = self.short if isinstance(self.short, tuple) else (self.short,)
        short = max(shorts) if rng is None or len(shorts) == 1 else shorts[rng.integers(len(shorts))]
        image, scale = self.resize(image, short)
        height, width = image.shape[-2:]
        boxes = boxes * scale.repeat(2)
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        if self.flip and rng is not None and rng.random() < 0.5:
            image = image.flip(-1)
            boxes[:, 0::2] = width - boxes[:, [2, 0]]
        return Sample(record.id, image, boxes, labels, scale, tuple(old))


@dataclass
class Batch:
    """b samples, padded at the bottom and on the right to one size."""

    images: Tensor  # uint8 (b, 3, H, W), zero where padded
    sizes: Tensor  # int64 (b, 2): height and width without padding; stays on the CPU, where it is read
    scales: Tensor  # float32 (b, 2): x and y factors from the original pictures
    boxes: list[Tensor]  # b times float32 (n, 4), in the pixels of `images`
    labels: list[Tensor]  # b times int64 (n,)
    ids: list[str]
    originals: Tensor  # int64 (b, 2): height and width of the original pictures; stays on the CPU

    def to(self, device: torch.device | str) -> "Batch":
        return self._each(partial(Tensor.to, device=device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        images, scales = change(self.images), change(self.scales)
        return replace(
            self, images=images, scales=scales, boxes=[*map(change, self.boxes)], labels=[*map(change, self.labels)]
        )

    def normalised(self, normalisation: Callable[[Tensor], Tensor]) -> Tensor:
        """Float images (b, 3, H, W) for the network: zero where padded, whatever zero grey would have become."""
        images = normalisation(self.images)
        for image, (height, width) in zip(images, self.sizes.tolist()):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images


def collate(samples: Sequence[Sample], multiple: int = 1) -> Batch:
    """Pad samples to the largest height and width among them, rounded up to a multiple of `multiple`."""
    return Batch(
        images=collate_images([s.image for s in samples], multiple),
        sizes=torch.tensor([s.image.shape[-2:] for s in samples]),
        scales=torch.stack([s.scale for s in samples]),
        boxes=[s.boxes for s in samples],
        labels=[s.labels for s in samples],
        ids=[s.id for s in samples],
        originals=torch.tensor([s.original for s in samples]),
    )


def collate_images(images: Sequence[Tensor], multiple: int = 1) -> Tensor:
    """uint8 (b, 3, H, W) of images (3, h, w), padded with zeros to a multiple of `multiple`."""
    height, width = (-(-max(i.shape[d] for i in images) // multiple) * multiple for d in (1, 2))
    padded = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for place, image in zip(padded, images):
        place[:, : image.shape[1], : image.shape[2]] = image
    return padded


@dataclass(frozen=True)
class Shuffle:
    """Which picture sample i is: pictures come in an endless row of permutations.

    Args:
        n: number of pictures.
        wide: for each, whether it is, as bytes: the pictures of a batch are all wide or all tall, so that little is
            padded; a last batch of either kind is filled up with its first pictures. Empty: batches are mixed.
        batch_size: of such batches.
    """

    n: int
    wide: bytes = b""
    batch_size: int = 1

    @classmethod
    def of(cls, dataset: DetectionSet, batch_size: int, group: bool) -> "Shuffle":
        """Of the pictures of a set, with batches of one kind if `group`."""
        wide = bytes(record.width >= record.height for record in dataset.records)
        return cls(len(dataset), wide, batch_size) if group else cls(len(dataset))

    def picture(self, seed: int, number: int) -> int:
        """Position of sample `number`'s picture: a pure function of (seed, number)."""
        kinds = [self.wide.count(kind) for kind in (0, 1)]
        samples = sum(-(-count // self.batch_size) for count in kinds) * self.batch_size if self.wide else self.n
        epoch, position = divmod(number, samples)
        return int(_order(self, seed, epoch)[position])


@lru_cache(maxsize=2)
def _order(shuffle: Shuffle, seed: int, epoch: int) -> np.ndarray:
    rng = np.random.default_rng((ORDER, seed, epoch))
    order = rng.permutation(shuffle.n)
    if not shuffle.wide:
        return order
    wide, batches = np.frombuffer(shuffle.wide, bool)[order], []
    for kind in (order[wide], order[~wide]):
        if len(kind):
            full = -(-len(kind) // shuffle.batch_size) * shuffle.batch_size
            batches.append(np.resize(kind, full).reshape(-1, shuffle.batch_size))
    return rng.permutation(np.concatenate(batches)).ravel()


def train_loader(
    dataset: DetectionSet,
    pipeline: Pipeline,
    *,
    batch_size: int,
    seed: int,
    start: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    workers: int = 0,
    extra: Callable[[int, int], Any] | None = None,
    group: bool = False,
) -> Iterator[Any]:
    """This process's share of the batches of steps `start` to `steps` - 1, on `device`.

    Samples are numbered through an endless row of permutations of the pictures; step t trains on the `batch_size`
    samples from t * batch_size on, of which process `rank` of `world` takes every world-th. Sample i is a pure function
    of (seed, i). With `group` a batch's pictures are all wide or all tall. With `extra`, items are
    (batch, extra(seed, step)): made by the same worker, the same on all processes, and with the methods `to` and
    `pin_memory`.

    Raises:
        InputError: `batch_size` is not a multiple of `world`, or a picture cannot be read.
    """
    if batch_size % world:
        raise InputError(f"batch size {batch_size} cannot be divided among {world} processes; use a multiple")
    if not len(dataset):
        raise InputError(f"{dataset.name}: no picture to train on")
    shuffle = Shuffle.of(dataset, batch_size, group)
    make = partial(_train_item, dataset, pipeline, shuffle, batch_size, seed, rank, world, extra)
    return stream(make, range(start, steps), device, workers)


def _train_item(
    dataset: DetectionSet,
    pipeline: Pipeline,
    shuffle: Shuffle,
    batch_size: int,
    seed: int,
    rank: int,
    world: int,
    extra: Callable[[int, int], Any] | None,
    step: int,
) -> Any:
    samples = []
    for number in range(step * batch_size + rank, (step + 1) * batch_size, world):
        index = shuffle.picture(seed, number)
        samples.append(pipeline.sample(dataset, index, np.random.default_rng((AUGMENT, seed, number))))
    batch = collate(samples, pipeline.multiple)
    return (batch, extra(seed, step)) if extra is not None else batch


def test_loader(
    dataset: DetectionSet,
    pipeline: Pipeline,
    *,
    batch_size: int = 1,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Iterator[Batch]:
    """Every picture of process `rank`, which has those at rank, rank + world, ..., in order and without augmentation.

    Padding depends on what else is in a batch, and so, a little, do detections: pictures of several sizes are best
    tested one at a time.
    """
    mine = range(rank, len(dataset), world)
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return stream(partial(_test_item, dataset, pipeline), batches, device, workers)


def _test_item(dataset: DetectionSet, pipeline: Pipeline, indices: range) -> Batch:
    return collate([pipeline.sample(dataset, index) for index in indices], pipeline.multiple)


class _Made(Dataset):
    def __init__(self, make: Callable[[Any], Any]):
        self.make = make

    def __getitem__(self, order: Any) -> Any:
        try:
            return self.make(order)
        except InputError as error:  # raised in a worker, its one line would be buried under tracebacks
            return error


def stream(make: Callable[[Any], Any], orders: Sequence, device: torch.device | str, workers: int) -> Iterator[Any]:
    """make(order) of every order, in turn, on `device`, made by `workers` processes ahead of time (0: right here).

    `make` gives something with the methods `to` and `pin_memory`, or a tuple of such.
    """
    device = torch.device(device)
    # A generator of its own: making an iterator must not draw from the global stream, or resumed runs would differ.
    loader = DataLoader(
        _Made(make),
        batch_size=None,
        sampler=orders,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )
    for item in loader:
        if isinstance(item, InputError):
            raise item
        # DataLoader makes lists of tuples.
        yield tuple(part.to(device) for part in item) if isinstance(item, (tuple, list)) else item.to(device)

"""Detection data: pictures with boxes, and which of their classes are base and novel.

`open_split` gives the training and the test part as `DetectionSet`s, `k_shot` cuts one to K objects
per class, and `pipeline` makes batches of them.

Boxes are xyxy in pixels throughout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewshot import InputError
from fewshot.data import annotations, cd_fsod, glyphs, layouts, pictures
from fewshot.data.annotations import Fault, Part, Record, refuse

# Novel classes of each split, as VOC's: classes list the base ones first.
GLYPH_NOVEL = {1: range(15, 20), 2: range(10, 15), 3: range(5, 10)}
GLYPH_CLASSES = 20
GLYPH_SCENES = {"train": range(3000), "test": range(3000, 3500)}
GLYPH_SIZE = 160  # pixels

PUBLISHED = ("glyphs", "voc", "coco")  # other names are of one's own data
PUBLISHED_SPLITS = ("glyphs", "voc")  # sets with three divisions into base and novel classes
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
    # taken off predictions to compare them with the boxes of the test part
    offset: tuple[float, ...] = (0, 0, 0, 0)
    train_difficult: bool = False  # difficult objects are objects like others in training
    # ids of pictures not trained on: too small, or nothing usable on them
    skipped: frozenset[str] = frozenset()
    cut_to_shots: bool = False  # whether `k_shot` left only K objects of each class
    # what the user should hear about, such as a missing year
    notes: list[str] = field(default_factory=list)
    # of each class in the json, for COCO's format
    category_ids: dict[str, int] = field(default_factory=dict)
    target: Path | None = None  # the folder of a `cd_fsod` target, whose files fix the shots

    @property
    def base(self) -> list[str]:
        return [name for name in self.classes if name not in self.novel]

    @property
    def inclusive_pixels(self) -> bool:
        """Whether a box from pixel 7 to pixel 7 is one pixel wide when results are compared: only
        for VOC.
        """
        return self.name == "voc"

    def describe(self) -> dict[str, list[str]]:
        """What a model trained on this says of its classes."""
        return {"classes": self.classes, "base": self.base, "novel": self.novel}

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> Tensor:
        """Picture `index`, decoded or drawn: uint8 RGB (3, H, W).

        Raises:
            InputError: it cannot be read, or has another size than its annotation says.
        """
        record = self.records[index]
        if record.scene is not None:
            return torch.from_numpy(_scene(record.scene).draw()).permute(2, 0, 1).contiguous()
        image = pictures.tensor(record.path)
        if image.shape[1:] != (record.height, record.width):
            with Image.open(record.path) as file:
                turned = file.size == (record.width, record.height)
            reason = (
                "as it is before its EXIF turns it: save it upright without EXIF, and see that the boxes fit"
                if turned
                else "so its boxes are of another picture: correct the annotation or the picture"
            )
            says = (
                f"{record.annotated_in} says"
                if record.annotated_in
                else "when the data set was opened it was"
            )
            raise InputError(
                f"{record.path} is {image.shape[2]} x {image.shape[1]} pixels, {says} {record.width} x "
                f"{record.height}, {reason}"
            )
        return image

    def usable(self, record: Record) -> np.ndarray:
        """Which of the record's objects (n,) may be trained on."""
        return np.full(len(record.labels), True) if self.train_difficult else ~record.difficult

    def with_records(self, records: list[Record]) -> "DetectionSet":
        return replace(self, records=records)

    def restrict(self, classes: Sequence[str]) -> "DetectionSet":
        """The set with these classes alone, labelled in their order.

        Objects of other classes go; in the training part so do pictures that keep none. Testing
        keeps every picture, since whatever is detected on an empty one is wrong.
        """
        if not classes:
            raise InputError(
                f"{self.name} has no base classes, all are novel: give --base a model of other data"
            )
        for name in classes:
            if name not in self.classes:
                raise InputError(
                    f"{self.name} has no class {name!r}; it has {', '.join(self.classes)}"
                )
        to_new = np.array(
            [classes.index(name) if name in classes else -1 for name in self.classes], np.int64
        )
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

    def with_novel(self, names: Sequence[str]) -> "DetectionSet":
        """The same set with these as its novel classes, after the base ones."""
        for name in names:
            if name not in self.classes:
                has = ", ".join(self.classes)
                raise InputError(
                    f"{self.name} has no object of a class {name!r} to be novel; its classes are {has}"
                )
        novel = list(dict.fromkeys(names))
        return replace(self, novel=novel).restrict(
            [*(c for c in self.classes if c not in novel), *novel]
        )


class DetectionSplit(NamedTuple):
    """A data set's two parts, with all classes, and which of these are base and which novel."""

    train: DetectionSet
    test: DetectionSet
    base: list[str]
    novel: list[str]


def open_split(
    name: str,
    root: str | Path,
    split: int = 1,
    novel: Sequence[str] = (),
    *,
    difficult: Literal["keep", "drop"] = "drop",
    offset: tuple[float, ...] | None = None,
    test_images: int | None = None,
    layout: layouts.Kind | None = None,
    fault: Fault = refuse,
) -> DetectionSplit:
    """Both parts of a set: `open_detection` has the arguments and errors.

    Of the test part only `test_images` pictures are taken: the first ones, but of one's own data,
    which are sorted by name, every so-manieth. None of them having a novel object is an error.
    """
    train, test = _open(
        name, root, ("train", "test"), split, difficult, novel, offset, layout, fault
    ).values()
    records = test.records[:test_images]
    if name not in PUBLISHED and test_images is not None:
        every = np.linspace(0, len(test), min(test_images, len(test)), endpoint=False)
        records = [test.records[int(i)] for i in every]
    test = test.with_records(records)
    wanted = [test.classes.index(c) for c in novel]
    if wanted and not any(np.isin(r.labels[~r.difficult], wanted).any() for r in test.records):
        fault(
            f"{test.name}: none of the {len(test)} test pictures has a novel object; add some (or --test-images)"
        )
    return DetectionSplit(train, test, train.base, train.novel)


def open_detection(
    name: str,
    root: str | Path,
    *,
    part: Part,
    split: int = 1,
    difficult: Literal["keep", "drop"] = "drop",
    novel: Sequence[str] = (),
    offset: tuple[float, ...] | None = None,
    layout: layouts.Kind | None = None,
) -> DetectionSet:
    """The training or test part of a set, with all its classes.

    Args:
        name: "glyphs" (drawn, needs no files), "voc" (07+12 trainval, 07 test), "coco", a target of
            `cd_fsod`, whose classes are all novel, or one's own data in one of the `layouts`: a
            folder, or one json file in COCO's format, found in `root` or by itself.
        root: folder that holds the data, e.g. the one that holds VOCdevkit/ or coco/.
        split: 1, 2 or 3: which five of the twenty classes of voc and glyphs are novel.
        difficult: whether to train on VOC's difficult objects, which its tests ignore; those of
            one's own data are like others. Crowds in COCO's sense are never trained on, and ignored
            in tests.
        novel: the novel classes of one's own data, by name.
        offset: for voc alone, instead of `annotations.VOC_OFFSET`.
        layout: of one's own data, coco, voc or yolo, if the folder is laid out as two of them.

    Raises:
        InputError: naming the folder, file, picture, box or class that is missing or wrong.
    """
    return _open(name, root, (part,), split, difficult, novel, offset, layout, refuse)[part]


def _open(
    name: str,
    root: str | Path,
    parts: tuple[Part, ...],
    split: int,
    difficult: Literal["keep", "drop"],
    novel: Sequence[str],
    offset: tuple[float, ...] | None,
    layout: layouts.Kind | None,
    fault: Fault,
) -> dict[Part, DetectionSet]:
    if not set(parts) <= {"train", "test"} or difficult not in ("keep", "drop"):
        raise ValueError(
            f"part is train or test, difficult is keep or drop; got {parts!r}, {difficult!r}"
        )
    root = Path(root)
    target = cd_fsod.find(name, root)
    published = name in PUBLISHED or target is not None
    _check_choice(name, split, novel, offset, layout, published)

    if name == "coco":
        return {part: _coco(root, part, fault) for part in parts}
    if name == "glyphs":
        opened = {part: _glyphs(part) for part in parts}
        novel = [opened[parts[0]].classes[i] for i in GLYPH_NOVEL[split]]
    elif name == "voc":
        offset = offset or annotations.VOC_OFFSET
        opened = {part: _voc(root, part, offset, difficult == "keep", fault) for part in parts}
        novel = annotations.VOC_NOVEL[split].split()
    elif target:
        opened = _cd_fsod(name, target, parts, novel, fault)
        novel = opened[parts[0]].classes
    else:
        opened = _own(name, root, parts, layout, fault)
    return {part: dataset.with_novel(novel) for part, dataset in opened.items()}


def _glyphs(part: Part) -> DetectionSet:
    classes = [f"glyph-{i:02d}" for i in range(GLYPH_CLASSES)]
    return DetectionSet("glyphs", part, classes, [], list(_glyph_records(part)), "voc")


def _voc(
    root: Path, part: Part, offset: tuple[float, ...], train_difficult: bool, fault: Fault
) -> DetectionSet:
    records, notes = annotations.read_voc(root, part, offset, fault)
    return DetectionSet(
        "voc",
        part,
        annotations.VOC_CLASSES,
        [],
        records,
        "voc",
        offset,
        train_difficult=train_difficult,
        notes=notes,
    )


def _coco(root: Path, part: Part, fault: Fault) -> DetectionSet:
    found = annotations.read_coco(root, part, fault)
    missing = [name for name in annotations.COCO_NOVEL if name not in found.category_ids]
    if missing:
        has = ", ".join(found.category_ids)
        raise InputError(f"coco in {root} has no category {missing[0]!r} to be novel; it has {has}")

    coco = replace(_annotated("coco", part, found), novel=annotations.COCO_NOVEL)
    # Published with base and novel classes interleaved, so these are not sorted.
    return coco.restrict(coco.classes)


def _cd_fsod(
    name: str, target: Path, parts: tuple[Part, ...], novel: Sequence[str], fault: Fault
) -> dict[Part, DetectionSet]:
    read = cd_fsod.read(target, parts, fault)
    classes = read[parts[0]].category_ids
    if novel and set(novel) != set(classes):
        raise InputError(
            f"all {len(classes)} classes of {name} are novel: leave out --novel-classes"
        )
    return {
        part: replace(_annotated(name, part, found), target=target) for part, found in read.items()
    }


def _own(
    name: str, root: Path, parts: tuple[Part, ...], layout: layouts.Kind | None, fault: Fault
) -> dict[Part, DetectionSet]:
    place = next((p for p in (root / name, Path(name)) if p.exists()), None)
    if place is None:
        raise InputError(
            f"no data set {name!r}: not glyphs, voc or coco, nor a folder or json here or in {root}"
        )
    read, opened = layouts.read_all(place, layout=layout, fault=fault), {}

    for part in parts:
        if part not in read:
            raise InputError(f"{place} has no {part} part, only {next(iter(read))}; add one")
        found = read[part]
        small = sum(min(r.width, r.height) < MIN_SIDE for r in found.records)
        if part == "train" and small:
            note = f"pictures with a side below {MIN_SIDE} pixels, not trained on: {small}"
            found = found._replace(notes=[*found.notes, note])
        opened[part] = _annotated(place.stem or place.resolve().stem, part, found)
    return opened


def _annotated(name: str, part: Part, found: annotations.Annotated) -> DetectionSet:
    """With categories as in COCO's format, none of them novel yet."""
    ids, records, notes = found
    return DetectionSet(name, part, list(ids), [], records, "coco", notes=notes, category_ids=ids)


def _check_choice(
    name: str,
    split: int,
    novel: Sequence[str],
    offset: tuple[float, ...] | None,
    layout: str | None,
    published: bool,
) -> None:
    splits = (1, 2, 3) if name in PUBLISHED_SPLITS else (1,)
    if split not in splits:
        raise InputError(f"{name} has no split {split}; choose from {', '.join(map(str, splits))}")
    if layout and published:
        raise InputError(
            f"the layout of {name} is fixed; leave out --layout, which is for your own data"
        )
    if novel and name in PUBLISHED:
        raise InputError(
            f"the novel classes of {name} are fixed; name novel classes only for your own data"
        )
    if offset is not None and name != "voc":
        raise InputError(f"only voc counts pixels from 1; leave out the offset for {name}")


def _scene(number: int) -> glyphs.Scene:
    # Of all twenty classes whatever the split: the pictures are the same, only labels move.
    return glyphs.scene(range(GLYPH_CLASSES), 0, number, GLYPH_SIZE)


@lru_cache
def _glyph_records(part: Part) -> tuple[Record, ...]:
    records = []
    for number in GLYPH_SCENES[part]:
        scene = _scene(number)
        objects = [(box, label, False) for box, label in zip(scene.boxes, scene.labels)]
        record = annotations.make_record(
            f"glyphs/{number:04d}", "", GLYPH_SIZE, GLYPH_SIZE, objects
        )
        records.append(replace(record, scene=number))
    return tuple(records)


def objects_by_class(dataset: DetectionSet) -> list[list[tuple[int, int]]]:
    """For each class the positions (record, object) of all its objects that are not difficult, in
    order of records.
    """
    found: list[list[tuple[int, int]]] = [[] for _ in dataset.classes]
    for position, record in enumerate(dataset.records):
        for i, label in enumerate(record.labels.tolist()):
            if not record.difficult[i]:
                found[label].append((position, i))
    return found


class Detections(NamedTuple):
    """What was found on one image: boxes (n, 4) xyxy, scores (n,), labels (n,).

    A detector gives tensors, best first, in pixels of its input; evaluation takes arrays, in those
    of the picture.
    """

    boxes: Tensor | np.ndarray
    scores: Tensor | np.ndarray
    labels: Tensor | np.ndarray

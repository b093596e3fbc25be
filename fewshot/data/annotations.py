"""Annotation files: VOC's xml, COCO's json and YOLO's txt, and the published sets, read into one
`Record` per picture.

Mistakes in a file are found while it is read, and named: the file, the picture, the box. Pictures
are not opened here, but that all of them are there is checked at once. `layouts` reads one's own
data with it.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np

from fewshot import InputError

Part = Literal["train", "test"]
# told of each flaw of a file; if it returns, what is flawed is left out
Fault = Callable[[str], None]
Dropped = dict[str, list[str]]  # why boxes were left out -> the picture of each

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow "
    "diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"
).split()
# The novel classes of the published splits; the other classes are base.
VOC_NOVEL = {
    1: "bird bus cow motorbike sofa",
    2: "aeroplane bottle cow horse sofa",
    3: "boat cat motorbike sheep sofa",
}
# VOC counts pixels from 1: added for training, and taken off predictions to be tested
VOC_OFFSET = (-1, -1, 0, 0)
VOC_LISTS = {
    "train": (("VOC2007", "trainval"), ("VOC2012", "trainval")),
    "test": (("VOC2007", "test"),),
}

COCO_NOVEL = (
    "person,bicycle,car,motorcycle,airplane,bus,train,boat,bird,cat,dog,horse,sheep,cow,bottle,chair,couch,"
    "potted plant,dining table,tv"
).split(",")
# Few-shot work keeps 5,000 validation pictures for testing and trains on the rest ("train" and
# "val", or "trainvalno5k" and "5k"); COCO's own splits follow. Files of different rows overlap, so
# they are never mixed.
COCO_FILES = (
    ("train.json", "val.json"),
    ("trainvalno5k.json", "5k.json"),
    ("instances_train2017.json", "instances_val2017.json"),
    ("instances_train2014.json", "instances_val2014.json"),
)
COCO_FOLDERS = (
    "annotations",
    "coco/annotations",
    "few_shot_ann/coco/annotations",
    "cocosplit/datasplit",
)


@dataclass
class Record:
    """One picture and its n objects, in the picture's own pixels."""

    id: str  # unique in a set: "VOC2007/000012", COCO's image id, "glyphs/0012"
    path: str  # "" when the picture is drawn
    width: int
    height: int
    boxes: np.ndarray  # float32 (n, 4), xyxy
    labels: np.ndarray  # int64 (n,), positions in the set's classes
    # bool (n,): VOC's difficult objects, COCO's crowds; evaluation ignores them
    difficult: np.ndarray
    # float32 (n,), of COCO's masks, for its size classes; None: the boxes' areas
    areas: np.ndarray | None = None
    scene: int | None = None  # number of the glyph scene to draw
    image_id: int | str | None = None  # as the json has it, for COCO's format
    annotated_in: str = ""  # the file that says its size; "" where the picture alone does

    def select(self, which: np.ndarray | Sequence[int]) -> "Record":
        """The same picture with only the objects `which`: a mask, or positions in the order wanted."""
        areas = None if self.areas is None else self.areas[which]
        return replace(
            self,
            boxes=self.boxes[which],
            labels=self.labels[which],
            difficult=self.difficult[which],
            areas=areas,
        )


class Annotated(NamedTuple):
    """Records, the ids of their classes in order of labels, and what the user should hear."""

    category_ids: dict[str, int]
    records: list[Record]
    notes: list[str]


def refuse(message: str) -> None:
    """The usual `Fault`: reading ends."""
    raise InputError(message)


def make_record(
    id: str, path: str | Path, width: int, height: int, objects: Sequence[tuple]
) -> Record:
    """A record of objects (box, label, difficult), or (box, label, difficult, area)."""
    columns = list(zip(*objects)) or [(), (), ()]
    return Record(
        *(id, str(path), width, height),
        boxes=np.array(columns[0], np.float32).reshape(-1, 4),
        labels=np.array(columns[1], np.int64),
        difficult=np.array(columns[2], bool),
        areas=np.array(columns[3], np.float32) if len(columns) > 3 else None,
    )


def read_voc(
    root: Path, part: Part, offset: Sequence[float], fault: Fault = refuse
) -> tuple[list[Record], list[str]]:
    """Records of VOC 07+12 trainval or 07 test, labelled by `VOC_CLASSES`, and what the user should
    hear.

    `root` holds VOC2007 and VOC2012, or VOCdevkit with them. Ids are "VOC2007/000012". Boxes are
    the annotated integers, plus `offset` in the training part.
    """
    lists = VOC_LISTS[part]
    devkit = next(
        (d for d in (root / "VOCdevkit", root) if any((d / year).is_dir() for year, _ in lists)),
        None,
    )
    if devkit is None:
        raise InputError(
            f"{root}: no {' or '.join(y for y, _ in lists)} in it or in its VOCdevkit; {_missing_in(root)}"
        )
    records, notes = [], []
    for year, name in lists:
        folder, ids = devkit / year, devkit / year / "ImageSets" / "Main" / f"{name}.txt"
        if not folder.is_dir():
            notes.append(f"{folder} is not there: doing without it")
        elif not ids.is_file():
            raise InputError(f"{ids} is missing: unpack {year} {name} there")
        else:
            names = [
                inside(line.split()[0], ids) for line in read_text(ids).splitlines() if line.strip()
            ]
            records += filter(None, (_voc_record(folder, name, ids, fault) for name in names))
    if part == "train":
        for record in records:
            record.boxes += np.float32(offset)
        notes += _beyond(devkit, records)
    return with_pictures(records, devkit, fault), notes


def _voc_record(folder: Path, name: str, ids: Path, fault: Fault) -> Record | None:
    path = folder / "Annotations" / f"{name}.xml"
    if not path.is_file():
        fault(
            f"{path}: missing though listed in ImageSets/Main/{ids.name}; unpack {folder.name} again"
        )
    elif found := read_xml(path, published=True, fault=fault):
        width, height, objects = found
        picture = folder / "JPEGImages" / f"{name}.jpg"
        labelled = [(box, VOC_CLASSES.index(label), difficult) for box, label, difficult in objects]
        record = make_record(f"{folder.name}/{name}", picture, width, height, labelled)
        return replace(record, annotated_in=str(path))
    return None


def read_xml(
    path: Path, *, published: bool = False, fault: Fault = refuse
) -> tuple[int, int, list[tuple[list[float], str, bool]]] | None:
    """The annotated picture's width and height, and its objects: xyxy box, class, difficult. None
    if it has no size.

    `published` is for VOC's own files: only their classes, without fractions, and both ends of a
    box are inside, so that one from 7 to 7 is one pixel wide.
    """
    try:
        tree = ElementTree.parse(path).getroot()
        width, height = (int(tree.findtext(f"size/{side}", "")) for side in ("width", "height"))
        if not (_finite(width, height) and min(width, height) > 0):
            raise ValueError(f"{width} x {height} pixels")
    # LookupError: of an encoding
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        fault(f"{path}: not a VOC annotation with a size ({error}); unpack or correct it")
        return None
    objects = []
    for item in tree.iterfind("object"):
        name = item.findtext("name", "").strip()
        if published and name not in VOC_CLASSES:
            continue
        try:
            box = [
                float(item.findtext(f"bndbox/{end}", ""))
                for end in ("xmin", "ymin", "xmax", "ymax")
            ]
            whole = [int(end) for end in box]
        except (ValueError, OverflowError):  # also of NaN and infinity
            fault(f"{path}: a {name!r} without a whole bndbox; correct it or take it out")
            continue
        box = whole if published else box
        shortest = min(box[2] - box[0], box[3] - box[1])
        if not _finite(*box):
            fault(f"{path}: {name!r} box {box} is too large; correct it or take it out")
        elif shortest < 0 or (shortest == 0 and not published):
            fault(f"{path}: {name!r} box {box} has no area; correct it or take it out")
        elif not name:
            fault(f"{path}: box {box} has no class name; give it one or take it out")
        else:
            objects.append((box, name, item.findtext("difficult", "0").strip() == "1"))
    return width, height, objects


def read_yolo(
    path: Path, names: Mapping[int, str], fault: Fault = refuse
) -> tuple[list[tuple[tuple[float, ...], str]], int]:
    """The objects of a YOLO txt, xyxy box in fractions of the picture and class, and how many of
    them were polygons.
    """
    objects, polygons = [], 0
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not (words := line.split()):
            continue
        what = f"{path}: line {number}"
        try:
            category, *values = map(float, words)
        except ValueError:
            values = []
        if not (
            _finite(*values) and (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0))
        ):
            fault(
                f"{what} is neither 'class x y width height' nor a polygon: {line!r:.60}; correct it or take it out"
            )
            continue
        if category not in names:
            fault(
                f"{what}: class {words[0]} is not in data.yaml, whose last is {max(names)}; correct one of the two"
            )
            continue
        if len(values) > 4:
            polygons += 1
            box = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
        else:
            x, y, w, h = values
            box = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        if box[2] <= box[0] or box[3] <= box[1]:
            fault(f"{what}: box {line!r:.60} has no area; correct it or take it out")
            continue
        objects.append((box, names[int(category)]))
    return objects, polygons


def read_coco(root: Path, part: Part, fault: Fault = refuse) -> Annotated:
    """COCO, its classes in COCO's order. `root` holds annotations/ and train2017/ etc., or coco/."""
    places = [root / folder for folder in COCO_FOLDERS]
    pairs = [(place / train, place / test) for train, test in COCO_FILES for place in places]
    pair = next((p for p in pairs if p[0].is_file() or p[1].is_file()), None)
    if pair is None:
        raise InputError(
            f"{root}: no annotations/instances_train2017.json or such in it or its coco; {_missing_in(root)}"
        )
    path = pair[part == "test"]
    # COCO holds some boxes of next to no area: training skips them, COCO's own evaluation does not.
    coco = read_json_annotations(path, "skip" if part == "train" else "take", fault)
    pictures = root / "coco" if (root / "coco").is_dir() else root
    for record in coco.records:
        year = re.search(r"(train|val)20\d\d", record.path) or re.search(
            r"(train|val)20\d\d", path.name
        )
        record.path = str(pictures / (year[0] if year else "") / Path(record.path).name)
    return coco._replace(records=with_pictures(coco.records, path, fault))


def read_coco_json(
    path: Path, flawed: Literal["skip", "take", "refuse"]
) -> tuple[list[str], list[Record]]:
    """Class names in order of category id, and records whose paths are file names as the json has
    them.

    `flawed` says what becomes of boxes without area (`InputError` if refused), and of those outside
    their picture, smaller than a pixel or marked "ignore" (skipped unless taken).
    """
    category_ids, records, _ = read_json_annotations(path, flawed)
    return list(category_ids), records


def read_json_annotations(
    path: Path, flawed: Literal["skip", "take", "refuse"], fault: Fault = refuse
) -> Annotated:
    """What a json in COCO's format holds: as `read_coco_json`, and with ids and notes."""
    categories, images, annotations = _coco_lists(path, fault)
    _check_unique(path, categories, images if flawed == "refuse" else [], fault)
    # the same unless a fault was passed
    categories = {category["name"]: category for category in categories}.values()
    categories = sorted(categories, key=lambda category: category["id"])
    label = {category["id"]: i for i, category in enumerate(categories)}
    by_id = {image["id"]: image for image in images}
    objects: dict[Any, list[tuple]] = {id: [] for id in by_id}
    dropped: Dropped = {}
    for item in annotations:
        if flaw := _annotation_flaw(item, by_id, label, flawed == "refuse"):
            fault(
                f"{path}: annotation {item.get('id')!r:.60} of image {item.get('image_id')!r:.60}: {flaw}"
            )
            continue
        x, y, w, h = item["bbox"]
        area = w * h if item.get("area") is None else item["area"]
        image = by_id[item["image_id"]]
        flaw = "marked ignore" if item.get("ignore") else "without area" if area <= 0 else None
        # YOLO's six digits may make 0.9999 pixels of one, so own data have some leave; COCO's own
        # are as published.
        flaw = flaw or box_flaw(
            x, y, w, h, image["width"], image["height"], 0.99 if flawed == "refuse" else 1
        )
        if flawed != "take" and flaw:
            dropped.setdefault(flaw, []).append(image["file_name"])
            continue
        found = (x, y, x + w, y + h), label[item["category_id"]], bool(item.get("iscrowd")), area
        objects[item["image_id"]].append(found)
    records = []
    for id, image in by_id.items():
        size = int(image["width"]), int(image["height"])
        record = make_record(str(id), image["file_name"], *size, objects[id])
        records.append(replace(record, image_id=id, annotated_in=str(path)))
    notes = [] if flawed == "take" else box_notes(path, records, dropped)
    if flawed == "refuse":
        check_unit(path, records, dropped, "pixels, [x, y, width, height]", fault)
    return Annotated({category["name"]: category["id"] for category in categories}, records, notes)


def box_flaw(
    x: float, y: float, w: float, h: float, width: int, height: int, least: float
) -> str | None:
    """Why a box on a picture of this size is of no use, if it is; `least` is how long its sides
    must be, in pixels.
    """
    if w <= 0 or h <= 0:
        return "without area"
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        return "outside their picture"
    return "smaller than a pixel" if w < least or h < least else None


def check_unit(
    source: Any, records: list[Record], dropped: Dropped, unit: str, fault: Fault
) -> None:
    """One box may be odd. That not a single one reaches past the first pixel of its picture is
    another unit.
    """
    strange = sum(
        len(dropped.get(flaw, ())) for flaw in ("outside their picture", "smaller than a pixel")
    )
    n = strange + sum(len(record.boxes) for record in records)
    if n and not any((record.boxes > 1).any() for record in records):
        fault(
            f"{source}: all of its {n} boxes are outside their picture or within one pixel, such as on "
            f"{next((r.path for r in records if len(r.boxes)), None) or next(iter(dropped.values()))[0]}; "
            f"this layout has boxes in {unit}: convert them"
        )


def box_notes(source: Any, records: list[Record], dropped: Dropped) -> list[str]:
    """What was left out and why, and what will be cut off."""
    left_out = [
        f"{source}: boxes {why}, left out: {len(on)} (first: {on[0]})"
        for why, on in dropped.items()
    ]
    return left_out + _beyond(source, records)


def _beyond(source: Any, records: list[Record]) -> list[str]:
    """A note on boxes that reach beyond their picture, if some do by more than rounding."""
    on = []
    for record in records:
        limits = np.float32([record.width, record.height] * 2) + 0.5
        on += [record.path] * int(((record.boxes < -0.5) | (record.boxes > limits)).any(1).sum())
    text = f"{source}: boxes that reach beyond their picture, cut off there in training: {len(on)}"
    return [f"{text} (first: {on[0]})"] if on else []


def _finite(*values: Any) -> bool:
    """Whether all are numbers, and as small as those of pixels are: NaN and infinity are not."""
    return all(isinstance(value, (int, float)) and abs(value) < 1e9 for value in values)


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _check_unique(path: Path, categories: list[dict], images: list[dict], fault: Fault) -> None:
    for field, values in (
        ("category id", [category["id"] for category in categories]),
        ("category", [category["name"] for category in categories]),
        ("image id", [str(image["id"]) for image in images]),
        ("picture", [image["file_name"] for image in images]),
    ):
        value, count = max(Counter(values).items(), key=lambda item: item[1], default=("", 0))
        if count > 1:
            fault(f"{path}: {field} {value!r:.200} is listed {count} times; list it once")


def _coco_lists(path: Path, fault: Fault) -> tuple[list[dict], list[dict], list[dict]]:
    """The categories, images and annotations of a json file, each known to have the fields that
    everything needs.
    """
    content = read_json(path)
    lists: dict[str, list[dict]] = {"categories": [], "images": [], "annotations": []}
    for (key, sound), check in zip(lists.items(), (_category_flaw, _image_flaw, None)):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(
                f"{path}: no list {key!r}; COCO's format has categories, images and annotations"
            )
        for number, item in enumerate(content[key]):
            what = f"{path}: entry {number} of {key!r}"
            if not isinstance(item, dict):
                fault(f"{what} is no object: {item!r:.60}; correct it or take it out")
            elif check and (flaw := check(item)):
                fault(f"{what} {flaw}: {item!r:.200}; correct it")
            else:
                sound.append(item)
    return tuple(lists.values())


def _annotation_flaw(
    item: dict, images: Mapping[Any, dict], labels: Mapping[int, int], empty: bool
) -> str | None:
    """What makes an annotation useless; a box without area only if asked about `empty` ones."""
    picture, category, bbox, area = (
        item.get(key) for key in ("image_id", "category_id", "bbox", "area")
    )
    if not (_is_id(picture) and _is_id(category) and picture in images and category in labels):
        return f"its image or category {category!r:.60} is not listed; correct the file"
    if not (isinstance(bbox, list) and len(bbox) == 4 and _finite(*bbox)):
        return (
            f"bbox {bbox!r:.60} is not [x, y, width, height] in pixels; correct it or take it out"
        )
    if empty and min(bbox[2:]) <= 0:
        return f"box {bbox} has no area; correct it or take it out"
    return (
        None
        if area is None or _finite(area)
        else f"area {area!r:.60} is no number; correct it or take it out"
    )


def _category_flaw(item: dict) -> str | None:
    if not isinstance(item.get("id"), int):
        return "has no whole number 'id'"
    return None if is_text(item.get("name")) else "has no text 'name'"


def _image_flaw(item: dict) -> str | None:
    if not _is_id(item.get("id")):
        return "has no number or text 'id'"
    if not isinstance(item.get("file_name"), str):
        return "has no text 'file_name'"
    if ".." in re.split(r"[/\\]", item["file_name"]):
        return "has a 'file_name' that leads out of the data's folder"
    if not _names_file(item["file_name"]):
        return "has a 'file_name' that no file can have"
    for side in ("width", "height"):
        if not (_finite(item.get(side)) and item[side] > 0 and item[side] == int(item[side])):
            return f"has no positive whole number {side!r}"
    return None


def read_json(path: str | Path) -> Any:
    """The content of a json file; `InputError` naming it when it is missing or broken."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not json ({error}); make or unpack it again") from None


def read_text(path: str | Path) -> str:
    """The content of a file in UTF-8, with or without a byte order mark; `InputError` naming it
    when it is not that.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError:
        raise InputError(f"{path} cannot be read: is it there?") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text in UTF-8 ({error}); save it as that") from None


def inside(name: str, source: str | Path) -> str:
    """The name of a picture in the list `source`; `InputError` if it would lead out of the folder
    of the data.
    """
    if os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
        raise InputError(
            f"{source}: {name!r:.200} leads out of the data's folder; give its path in there"
        )
    if not _names_file(name):
        raise InputError(f"{source}: no file can be called {name!r:.200}; correct it")
    return name


def _names_file(name: str) -> bool:
    """Whether files can be called so: systems end in an error of their own over a NUL, and over
    names too long.
    """
    return (
        is_text(name)
        and len(name) < 1000
        and all(len(part.encode()) < 256 for part in name.split("/"))
    )


def is_text(value: Any) -> bool:
    """Whether it is text that can be written down: json's may hold a NUL, or halves of characters
    (surrogates).
    """
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def holds(folder: Path, most: int = 5) -> str:
    """What is in a folder, in a few words."""
    names = sorted(os.listdir(folder))
    return f"it holds {', '.join(names[:most]) or 'nothing'}{', ...' if len(names) > most else ''}"


def _missing_in(root: Path) -> str:
    if not root.is_dir():
        return "there is no such folder; give the right one (--data-root)"
    return f"{holds(root)}; give --data-root"


def _files(folder: str) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def with_pictures(records: list[Record], source: str | Path, fault: Fault = refuse) -> list[Record]:
    """Find out now, not after hours, that pictures are missing: one listing per folder instead of a
    look at each.

    `source` is what annotates them, for messages.
    """
    folders = {os.path.dirname(record.path) for record in records}
    there = {folder: _files(folder) if os.path.isdir(folder) else set() for folder in folders}
    found = [r for r in records if os.path.basename(r.path) in there[os.path.dirname(r.path)]]
    if len(found) < len(records):
        kept = {id(record) for record in found}
        for record in records:
            if id(record) not in kept:
                advice = f"put it there, or take its annotation out of {source}"
                missing = f"{len(records) - len(found)} of {len(records)} pictures are"
                fault(f"{record.path}: annotated, but missing ({missing}); {advice}")
    return found

"""Annotated pictures on disk: VOC's folders of xml and COCO's json files, read into one `Record` per picture.

Mistakes in a file are found while it is read, and named: the file, the picture, the box. Pictures are not opened here,
but that all of them are there is checked at once.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np

from fewshot import InputError

Part = Literal["train", "test"]

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow "
    "diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"
).split()
# The novel classes of the published splits; the other classes are base.
VOC_NOVEL = {1: "bird bus cow motorbike sofa", 2: "aeroplane bottle cow horse sofa", 3: "boat cat motorbike sheep sofa"}
VOC_OFFSET = (-1, -1, 0, 0)  # VOC counts pixels from 1: added for training, and taken off predictions to be tested
VOC_LISTS = {"train": (("VOC2007", "trainval"), ("VOC2012", "trainval")), "test": (("VOC2007", "test"),)}

COCO_NOVEL = (
    "person,bicycle,car,motorcycle,airplane,bus,train,boat,bird,cat,dog,horse,sheep,cow,bottle,chair,couch,"
    "potted plant,dining table,tv"
).split(",")
# Few-shot work keeps 5,000 validation pictures for testing and trains on the rest ("train" and "val", or
# "trainvalno5k" and "5k"); COCO's own splits follow. Files of different rows overlap, so they are never mixed.
COCO_FILES = (
    ("train.json", "val.json"),
    ("trainvalno5k.json", "5k.json"),
    ("instances_train2017.json", "instances_val2017.json"),
    ("instances_train2014.json", "instances_val2014.json"),
)
COCO_FOLDERS = ("annotations", "coco/annotations", "few_shot_ann/coco/annotations", "cocosplit/datasplit")


@dataclass
class Record:
    """One picture and its n objects, in the picture's own pixels."""

    id: str  # unique in a set: "VOC2007/000012", COCO's image id, "glyphs/0012"
    path: str  # "" when the picture is drawn
    width: int
    height: int
    boxes: np.ndarray  # float32 (n, 4), xyxy
    labels: np.ndarray  # int64 (n,), positions in the set's classes
    difficult: np.ndarray  # bool (n,): VOC's difficult objects, COCO's crowds; evaluation ignores them
    areas: np.ndarray | None = None  # float32 (n,), of COCO's masks, for its size classes; None: the boxes' areas
    scene: int | None = None  # number of the glyph scene to draw
    image_id: int | str | None = None  # as the json has it, for COCO's format

    def select(self, which: np.ndarray | Sequence[int]) -> "Record":
        """The same picture with only the objects `which`: a mask, or positions in the order wanted."""
        areas = None if self.areas is None else self.areas[which]
        return replace(
            self, boxes=self.boxes[which], labels=self.labels[which], difficult=self.difficult[which], areas=areas
        )


class Coco(NamedTuple):
    """What a json file in COCO's format holds: the ids of its classes in label order, and what the user should hear."""

    category_ids: dict[str, int]
    records: list[Record]
    notes: list[str]


def make_record(id: str, path: str | Path, width: int, height: int, objects: Sequence[tuple]) -> Record:
    """A record of objects (box, label, difficult), or (box, label, difficult, area)."""
    columns = list(zip(*objects)) or [(), (), ()]
    return Record(
        *(id, str(path), width, height),
        boxes=np.array(columns[0], np.float32).reshape(-1, 4),
        labels=np.array(columns[1], np.int64),
        difficult=np.array(columns[2], bool),
        areas=np.array(columns[3], np.float32) if len(columns) > 3 else None,
    )


def read_voc(root: Path, part: Part, offset: Sequence[float]) -> tuple[list[Record], list[str]]:
    """Records of VOC 07+12 trainval or 07 test, labelled by `VOC_CLASSES`, and what the user should hear.

    `root` holds VOC2007 and VOC2012, or VOCdevkit with them. Ids are "VOC2007/000012". Boxes are the annotated
    integers, plus `offset` in the training part.
    """
    lists = VOC_LISTS[part]
    devkit = next((d for d in (root / "VOCdevkit", root) if any((d / year).is_dir() for year, _ in lists)), None)
    if devkit is None:
        raise InputError(f"{root}: no {' or '.join(y for y, _ in lists)} in it or in its VOCdevkit; {_holds(root)}")
    records, notes = [], []
    for year, name in lists:
        folder, ids = devkit / year, devkit / year / "ImageSets" / "Main" / f"{name}.txt"
        if not folder.is_dir():
            notes.append(f"{folder} is not there: doing without it")
        elif not ids.is_file():
            raise InputError(f"{ids} is missing: unpack {year} {name} there")
        else:
            lines = read_text(ids).splitlines()
            records += [_voc_record(folder, inside(line.split()[0], ids)) for line in lines if line.strip()]
    if part == "train":
        for record in records:
            record.boxes += np.float32(offset)
        notes += _beyond(devkit, records)
    _check_pictures(records)
    return records, notes


def _voc_record(folder: Path, name: str) -> Record:
    path = folder / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
        width, height = (int(tree.findtext(f"size/{side}", "")) for side in ("width", "height"))
        if not (_finite(width, height) and min(width, height) > 0):
            raise ValueError(f"{width} x {height} pixels")
    except FileNotFoundError:
        raise InputError(f"{path} is missing though listed in ImageSets/Main: unpack {folder.name} again") from None
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:  # LookupError: of an encoding
        raise InputError(f"{path}: not a VOC annotation with a size ({error}); unpack or correct it") from None
    objects = []
    for item in tree.iterfind("object"):
        label = item.findtext("name", "").strip()
        if label not in VOC_CLASSES:
            continue
        try:
            box = [int(float(item.findtext(f"bndbox/{k}", ""))) for k in ("xmin", "ymin", "xmax", "ymax")]
        except (ValueError, OverflowError):  # also of NaN and infinity
            raise InputError(f"{path}: a {label} without a whole bndbox; correct it or take it out") from None
        if not _finite(*box):
            raise InputError(f"{path}: {label} box {box} is too large; correct it or take it out")
        if box[2] < box[0] or box[3] < box[1]:  # both ends are inside: a box from 7 to 7 is one pixel wide
            raise InputError(f"{path}: {label} box {box} has no area; correct it or take it out")
        objects.append((box, VOC_CLASSES.index(label), item.findtext("difficult", "0").strip() == "1"))
    return make_record(f"{folder.name}/{name}", folder / "JPEGImages" / f"{name}.jpg", width, height, objects)


def read_coco(root: Path, part: Part) -> Coco:
    """COCO, its classes in COCO's order. `root` holds annotations/ and train2017/ etc., or coco/."""
    places = [root / folder for folder in COCO_FOLDERS]
    pairs = [(place / train, place / test) for train, test in COCO_FILES for place in places]
    pair = next((p for p in pairs if p[0].is_file() or p[1].is_file()), None)
    if pair is None:
        raise InputError(f"{root}: no annotations/instances_train2017.json or such in it or its coco; {_holds(root)}")
    path = pair[part == "test"]
    # COCO holds some boxes of next to no area: training skips them, COCO's own evaluation does not.
    coco = _read_coco(path, "skip" if part == "train" else "take")
    pictures = root / "coco" if (root / "coco").is_dir() else root
    for record in coco.records:
        year = re.search(r"(train|val)20\d\d", record.path) or re.search(r"(train|val)20\d\d", path.name)
        record.path = str(pictures / (year[0] if year else "") / Path(record.path).name)
    _check_pictures(coco.records)
    return coco


def read_own(place: Path, part: Part) -> Coco:
    """One's own data in COCO's format, its classes in alphabetical order.

    `place` is a folder with train.json and test.json, whose categories must agree, or one json file. Pictures are where
    the json's file names say, from images/ beside it, the json's folder, train/ or test/ beside it, or ../images.
    """
    path, notes = place / f"{part}.json", []
    if not place.is_dir():
        path, notes = place, [f"{place} is one file: test a model on other pictures than it was trained on"]
    ids, records, flaws = _read_coco(path, "refuse")
    if place.is_dir():
        other = place / ("test.json" if part == "train" else "train.json")
        if other.is_file() and (differ := {c["name"] for c in _coco_lists(other)[0]} ^ set(ids)):
            raise InputError(f"{other} and {path.name} differ in category {min(differ)!r}; make them agree")
    folders = [path.parent / "images", path.parent, path.parent / path.stem, path.parent.parent / "images"]
    if not records:
        raise InputError(f"{path} lists no images; add some")
    folder = next((f for f in folders if (f / records[0].path).is_file()), None)
    if folder is None:
        where = ", ".join(map(str, folders))
        raise InputError(f"{path}: picture {records[0].path!r} is in none of {where}; put the pictures in the first")
    # By name: two files may number the same categories differently.
    classes = sorted(ids)
    to_new = np.array([classes.index(name) for name in ids], np.int64)
    for record in records:
        record.path, record.labels = str(folder / record.path), to_new[record.labels]
    _check_pictures(records)
    return Coco({name: ids[name] for name in classes}, records, notes + flaws)


def read_coco_json(path: Path, flawed: Literal["skip", "take", "refuse"]) -> tuple[list[str], list[Record]]:
    """Class names in order of category id, and records whose paths are file names as the json has them.

    `flawed` says what becomes of boxes without area (`InputError` if refused), and of those outside their picture,
    smaller than a pixel or marked "ignore" (skipped unless taken).
    """
    category_ids, records, _ = _read_coco(path, flawed)
    return list(category_ids), records


def _read_coco(path: Path, flawed: Literal["skip", "take", "refuse"]) -> Coco:
    categories, images, annotations = _coco_lists(path)
    if flawed == "refuse":
        _check_unique(path, categories, images)
    categories = sorted(categories, key=lambda category: category["id"])
    label = {category["id"]: i for i, category in enumerate(categories)}
    sizes = {image["id"]: (int(image["width"]), int(image["height"])) for image in images}
    objects: dict[Any, list[tuple]] = {image["id"]: [] for image in images}
    dropped: Counter[str] = Counter()
    for item in annotations:
        picture, category, bbox = item.get("image_id"), item.get("category_id"), item.get("bbox")
        what = f"{path}: annotation {item.get('id')!r} of image {picture!r}"
        if not (_is_id(picture) and _is_id(category) and picture in objects and category in label):
            raise InputError(f"{what}: its image or category {category!r} is not listed; correct the file")
        if not (isinstance(bbox, list) and len(bbox) == 4 and _finite(*bbox)):
            raise InputError(
                f"{what}: bbox {bbox!r:.60} is not [x, y, width, height] in pixels; correct it or take it out"
            )
        x, y, w, h = bbox
        if flawed == "refuse" and (w <= 0 or h <= 0):
            raise InputError(f"{what}: box {bbox} has no area; correct it or take it out")
        area = w * h if item.get("area") is None else item["area"]
        if not _finite(area):
            raise InputError(f"{what}: area {area!r} is no number; correct it or take it out")
        width, height = sizes[picture]
        flaws = {
            "marked ignore": item.get("ignore"),
            "without area": area <= 0 or w <= 0 or h <= 0,
            "outside their picture": min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0),
            "smaller than a pixel": w < 1 or h < 1,
        }
        if flawed != "take" and (flaw := next((kind for kind, found in flaws.items() if found), None)):
            dropped[flaw] += 1
            continue
        objects[picture].append(((x, y, x + w, y + h), label[category], bool(item.get("iscrowd")), area))
    records = []
    for image in images:
        id = image["id"]
        records.append(make_record(str(id), image["file_name"], *sizes[id], objects[id]))
        records[-1].image_id = id
    notes = [f"{path}: boxes {flaw}, left out: {n}" for flaw, n in dropped.items()]
    if flawed != "take":
        notes += _beyond(path, records)
    return Coco({category["name"]: category["id"] for category in categories}, records, notes)


def _beyond(where: Path, records: list[Record]) -> list[str]:
    """A note on boxes that reach beyond their picture, if some do by more than rounding."""
    n = 0
    for record in records:
        limits = np.float32([record.width, record.height] * 2) + 0.5
        n += int(((record.boxes < -0.5) | (record.boxes > limits)).any(1).sum())
    return [f"{where}: boxes that reach beyond their picture, cut off there in training: {n}"] if n else []


def _finite(*values: Any) -> bool:
    """Whether all are numbers, and as small as those of pixels are: NaN and infinity are not."""
    return all(isinstance(value, (int, float)) and abs(value) < 1e9 for value in values)


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _check_unique(path: Path, categories: list[dict], images: list[dict]) -> None:
    for kind, values in (
        ("category id", [category["id"] for category in categories]),
        ("category", [category["name"] for category in categories]),
        ("image id", [str(image["id"]) for image in images]),
    ):
        value, count = max(Counter(values).items(), key=lambda item: item[1], default=("", 0))
        if count > 1:
            raise InputError(f"{path}: {kind} {value!r} is listed {count} times; list it once")


def _coco_lists(path: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """The categories, images and annotations of a json file, each known to have the fields that everything needs."""
    content = read_json(path)
    lists = []
    for key, check in (("categories", _category_flaw), ("images", _image_flaw), ("annotations", None)):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"{path}: no list {key!r}; COCO's format has categories, images and annotations")
        for number, item in enumerate(content[key]):
            what = f"{path}: entry {number} of {key!r}"
            if not isinstance(item, dict):
                raise InputError(f"{what} is no object: {item!r:.60}; correct it or take it out")
            if check and (flaw := check(item)):
                raise InputError(f"{what} {flaw}: {item!r:.200}; correct it")
            if key == "images":
                inside(item["file_name"], what)
        lists.append(content[key])
    return tuple(lists)


def _category_flaw(item: dict) -> str | None:
    if not isinstance(item.get("id"), int):
        return "has no whole number 'id'"
    return None if isinstance(item.get("name"), str) else "has no text 'name'"


def _image_flaw(item: dict) -> str | None:
    if not _is_id(item.get("id")):
        return "has no number or text 'id'"
    if not isinstance(item.get("file_name"), str):
        return "has no text 'file_name'"
    for side in ("width", "height"):
        if not (_finite(item.get(side)) and item[side] > 0 and item[side] == int(item[side])):
            return f"has no positive whole number {side!r}"
    return None


def read_shot_list(
    folder: Path, name: str, label: int, shots: int, by_id: dict[str, Record], skipped: frozenset[str]
) -> list[Record]:
    """Records of the pictures that a published list of K shots of class `name` has, with only objects of that class.

    `by_id` has the records to choose from, where the class is `label`; pictures among `skipped` are passed over. VOC's
    lists name pictures, COCO's are json files of their own. Difficult objects are left out.
    """
    names = (f"box_{shots}shot_{name}_train.txt", f"full_box_{shots}shot_{name}_trainval.json")
    path = next((p for n in names for s in ("", f"benchmark_{shots}shot") if (p := folder / s / n).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: no list {names[0]} or {names[1]}; give the folder that holds the lists")
    if path.suffix == ".txt":
        lines = [inside(line.strip(), path) for line in read_text(path).splitlines() if line.strip()]
        listed = [(_voc_id(line), line, None) for line in lines]
    else:
        classes, records = read_coco_json(path, "skip")
        ours = np.array([label if c == name else -1 for c in classes], np.int64)
        listed = [(r.id, r.path, replace(r, labels=ours[r.labels])) for r in records]
    found = []
    for id, picture, record in listed:
        if id in skipped:
            continue
        if id not in by_id:
            raise InputError(f"{path}: picture {picture} is not in the training data; unpack it or correct the list")
        record = by_id[id] if record is None else replace(record, path=by_id[id].path)
        if not (record.labels == label).any():
            raise InputError(f"{path}: no {name} on picture {picture}; correct the list")
        found.append(record.select((record.labels == label) & ~record.difficult))
    if not any(len(record.labels) for record in found):
        raise InputError(f"{path}: its pictures hold no {name} that is not difficult; correct the list")
    return found


def _voc_id(line: str) -> str:
    """Id of the picture that a line such as datasets/VOC2012/JPEGImages/2008_000123.jpg names."""
    stem = Path(line).stem
    return f"{'VOC2012' if 'VOC2012' in line or ('VOC2007' not in line and '_' in stem) else 'VOC2007'}/{stem}"


def read_json(path: str | Path) -> Any:
    """The content of a json file; `InputError` naming it when it is missing or broken."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not json ({error}); make or unpack it again") from None


def read_text(path: str | Path) -> str:
    """The content of a file in UTF-8, with or without a byte order mark; `InputError` naming it when it is not that."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError:
        raise InputError(f"{path} cannot be read: is it there?") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text in UTF-8 ({error}); save it as that") from None


def inside(name: str, where: str | Path) -> str:
    """The name of a picture in the list `where`; `InputError` if it would lead out of the folder of the data."""
    if os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
        raise InputError(f"{where}: {name!r} leads out of the data's folder; give its path in there")
    return name


def _holds(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder; give the right one (--data-root)"
    names = sorted(os.listdir(folder))
    return f"it holds {', '.join(names[:5]) or 'nothing'}{', ...' if len(names) > 5 else ''}; give --data-root"


def _check_pictures(records: list[Record]) -> None:
    """Find out now, not after hours, that pictures are missing: one listing per folder instead of a look at each."""
    folders = {os.path.dirname(record.path) for record in records}
    there = {folder: set(os.listdir(folder)) if os.path.isdir(folder) else set() for folder in folders}
    missing = [r.path for r in records if os.path.basename(r.path) not in there[os.path.dirname(r.path)]]
    if missing:
        raise InputError(f"{missing[0]} is missing ({len(missing)} of {len(records)} pictures are): unpack them again")

"""One's own data in whichever layout the annotation tool left them: recognised, divided into parts,
and read.

COCO: train.json, test.json, or annotations/*train*.json, or train/_annotations.coco.json, or the
one json there is. VOC: JPEGImages, Annotations, and lists in ImageSets/Main if there are any. YOLO:
data.yaml (or classes.txt), and txt files in labels/ as pictures are in images/.

The same data give the same records from each: sorted by picture, their ids the pictures' places in
the folder that holds all of a part, classes in alphabetical order. Boxes are taken as they are
written: none is moved by a pixel.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml
from PIL import Image

from fewshot import InputError
from fewshot.data import annotations, pictures
from fewshot.data.annotations import Annotated, Fault, Part, Record, refuse

Kind = Literal["coco", "voc", "yolo"]
# what one part is read from: a json; a list of names or a folder of xml; folders of pictures
Source = tuple[Path, ...]
KNOWN = (
    "COCO (train.json, annotations/*train*.json or train/_annotations.coco.json), VOC (JPEGImages and Annotations) or "
    "YOLO (data.yaml, images and labels)"
)
SPELLINGS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
YAMLS = ("data.yaml", "data.yml", "dataset.yaml")
HELD_OUT = 5  # one picture in so many is tested on where there is no test part
ORIENTATION = 0x0112  # EXIF's tag; from 5 on the picture lies on its side


class Item(NamedTuple):
    """A picture and what is annotated on it."""

    path: Path
    objects: list[tuple]  # (box, class)
    size: tuple[int, int] | None = None  # width and height if that is annotated
    annotated_in: str = ""  # the file that says so


@dataclass
class Layout:
    """How a folder (or one json file) is laid out, and which files are its parts."""

    kind: Kind
    place: Path
    parts: dict[Part, Source]
    notes: list[str]


def recognise(place: Path, layout: Kind | None = None) -> Layout:
    """The layout of a folder, or of one json in COCO's format; `layout` chooses where there are
    two.

    Raises:
        InputError: it is none of those known, or two at once, or not the one asked for.
    """
    if place.is_file():
        if layout not in (None, "coco"):
            raise InputError(
                f"{place} is one file, which only COCO's layout has: leave out --layout {layout}"
            )
        notes = [f"{place} is one file: test a model on other pictures than it was trained on"]
        return Layout("coco", place, {"train": (place,), "test": (place,)}, notes)
    looks = {"coco": _coco_files(place), "voc": _voc_lists(place), "yolo": _yolo_names_file(place)}
    jsons = [
        path for folder in (place, place / "annotations") for path in sorted(folder.glob("*.json"))
    ]
    if len(jsons) == 1 and layout in (None, "coco") and not any(looks.values()):
        looks["coco"] = {"train": (jsons[0],)}
    found = [kind for kind, files in looks.items() if files]
    if not found:
        raise InputError(
            f"{place}: not a layout known here, {KNOWN}; {annotations.holds(place, 8)}"
        )
    if layout is None and len(found) > 1:
        raise InputError(
            f"{place} is laid out as {' and as '.join(found)} at once; choose by --layout {found[0]}"
        )
    if layout is not None and layout not in found:
        raise InputError(
            f"{place} is not laid out as {layout} but as {' and '.join(found)}; choose by --layout"
        )
    kind = layout or found[0]
    sources, notes = _yolo_folders(place) if kind == "yolo" else (looks[kind], [])
    parts, more = _divide(sources)
    return Layout(kind, place, parts, notes + more)


def _divide(sources: dict[str, Source]) -> tuple[dict[Part, Source], list[str]]:
    """Train and test of train, val and test; notes."""
    parts, notes = {key: files for key, files in sources.items() if key != "val"}, []
    if val := sources.get("val"):
        if val == sources.get("train"):
            notes.append(f"{_listed(val)}: val is train once more, so not used")
        elif "test" in parts:
            notes.append(f"{_listed(val)}: not used, since there is a test part besides this val")
        else:
            parts["test"] = val
            notes.append(f"no test part: tested on val, {_listed(val)}")
    if parts.get("test") == parts.get("train"):
        del parts["test"]
        notes.append("the test part is train once more, so not used")
    return {part: parts[part] for part in ("train", "test") if part in parts}, notes


def read_own(
    place: Path, part: Part, *, layout: Kind | None = None, fault: Fault = refuse
) -> Annotated:
    """One part of `read_all`."""
    read = read_all(place, layout=layout, fault=fault)
    if part not in read:
        raise InputError(f"{place} has no {part} part, only {next(iter(read))}; add one")
    return read[part]


def read_all(
    place: Path, *, layout: Kind | None = None, fault: Fault = refuse
) -> dict[Part, Annotated]:
    """Both parts, or what there is of them. Classes that have no object are left out if both are
    there.

    Where there is no test part, a fifth of the pictures is one, chosen by their names alone.

    Raises:
        InputError: as `recognise`, and naming the file, picture, box or class that is missing or
            wrong, unless `fault` takes it.
    """
    found = recognise(place, layout)
    reader = {"coco": _read_coco, "voc": _read_voc, "yolo": _read_yolo}[found.kind]
    read = {part: _named(reader(place, source, fault)) for part, source in found.parts.items()}
    notes = list(found.notes)
    for part, (_, records, flaws) in read.items():
        notes += flaws
        if not any(len(record.labels) for record in records):
            fault(
                f"{_listed(found.parts[part])}: not one object on its {len(records)} pictures; annotate some"
            )
    if set(read) == {"train"}:
        if len(read["train"].records) < 2:
            fault(
                f"{place}: one picture alone cannot be divided for training and testing; add some"
            )
        read |= _hold_out(read["train"])
        count = len(read["test"].records)
        notes.append(
            f"no test part: a fifth of the pictures, {count}, is held out for it, always the same ones"
        )
    by_number = [{name: n for n, name in enumerate(r.category_ids)} for r in read.values()]
    if (
        found.kind == "coco"
        and len(by_number) == 2
        and (differ := set(by_number[0]) ^ set(by_number[1]))
    ):
        files = " and ".join(str(path) for (path,) in found.parts.values())
        fault(f"{files} differ in category {min(differ)!r}; make them agree")
    counts = {part: _counts(annotated) for part, annotated in read.items()}
    classes = sorted(set().union(*by_number))
    _check_spelling(place, classes, fault)
    if place.is_dir() and "train" in read:
        used = set().union(*counts.values())
        if unused := [name for name in classes if name not in used]:
            notes.append(f"classes without any object, left out: {', '.join(unused)}")
            classes = [name for name in classes if name in used]
    notes[:0] = _summary(found, read, classes, counts)
    return {
        part: _ordered(annotated, classes, found.kind)._replace(notes=notes)
        for part, annotated in read.items()
    }


def _named(read: Annotated) -> Annotated:
    """Ids from the pictures' places, by which they are then sorted."""
    if not read.records:
        return read
    folder = os.path.commonpath([os.path.dirname(record.path) for record in read.records])
    records = []
    for record in read.records:
        id = Path(record.path).relative_to(folder).as_posix()
        records.append(
            replace(record, id=id, image_id=id if record.image_id is None else record.image_id)
        )
    return read._replace(records=sorted(records, key=lambda record: record.id))


def _hold_out(whole: Annotated) -> dict[Part, Annotated]:
    def lot(record: Record) -> bytes:
        return hashlib.sha256(record.id.encode()).digest()

    drawn = sorted(whole.records, key=lot)
    test = {record.id for record in drawn[: max(1, round(len(drawn) / HELD_OUT))]}
    return {
        "train": whole._replace(
            records=[record for record in whole.records if record.id not in test]
        ),
        "test": whole._replace(records=[record for record in whole.records if record.id in test]),
    }


def _counts(read: Annotated) -> Counter[str]:
    """Objects of each class, but for crowds."""
    names = list(read.category_ids)
    return Counter(
        names[label] for record in read.records for label in record.labels[~record.difficult]
    )


def _ordered(read: Annotated, classes: list[str], kind: Kind) -> Annotated:
    """With these classes, by name: two files may number the same classes differently, and VOC's
    have no numbers.
    """
    ids = {name: number for number, name in enumerate(classes, 1)} | (
        read.category_ids if kind != "voc" else {}
    )
    to_new = np.array(
        [classes.index(name) if name in classes else -1 for name in read.category_ids], np.int64
    )
    records = [replace(record, labels=to_new[record.labels]) for record in read.records]
    return read._replace(category_ids={name: ids[name] for name in classes}, records=records)


def _check_spelling(place: Path, classes: Iterable[str], fault: Fault) -> None:
    spelt: dict[str, str] = {}
    for name in classes:
        other = spelt.setdefault("".join(name.casefold().split()), name)
        if other != name:
            fault(
                f"{place}: classes {other!r} and {name!r} differ only in case or blanks; spell them alike"
            )


def _summary(
    found: Layout, read: dict[Part, Annotated], classes: list[str], counts: dict[Part, Counter[str]]
) -> list[str]:
    """What was recognised, in words."""
    aims = {"train": "to train on", "test": "to test on"}
    numbers = [f"{len(read[part].records)} {aims[part]}" for part in read]
    sources = [_listed(source, found.place) for source in dict.fromkeys(found.parts.values())]
    objects = ", ".join(
        f"{name} {' + '.join(str(counts[part][name]) for part in read)}" for name in classes
    )
    notes = [
        f"{found.place}: laid out as {found.kind.upper()} ({'; '.join(sources)}), pictures: {', '.join(numbers)}",
        f"objects {' + '.join(aims[part] for part in read)}: {objects}",
    ]
    empty = {part: sum(not len(record.labels) for record in read[part].records) for part in read}
    if any(empty.values()):
        kept = {
            "train": "passed over in training",
            "test": "kept, since whatever is found there is wrong",
        }
        where = ", ".join(f"{n} {aims[part]} ({kept[part]})" for part, n in empty.items() if n)
        notes.append(f"pictures without objects, background: {where}")
    if crowds := sum(
        int(record.difficult.sum()) for annotated in read.values() for record in annotated.records
    ):
        notes.append(f"crowds, neither trained on nor counted in tests: {crowds}")
    return notes


def _listed(source: Source, place: Path = Path()) -> str:
    return ", ".join(
        str(path.relative_to(place)) if path.is_relative_to(place) else str(path) for path in source
    )


# COCO


def _coco_files(place: Path) -> dict[str, Source]:
    """Json files by part: those beside each other, those in annotations/, or those of annotation
    services.
    """
    for patterns in ("{}.json", "{}/_annotations.coco.json"):
        names = {
            part: [place / patterns.format(s) for s in spelt] for part, spelt in SPELLINGS.items()
        }
        if found := {
            part: (path,) for part, paths in names.items() for path in paths if path.is_file()
        }:
            return found
    found: dict[str, Source] = {}
    for path in sorted((place / "annotations").glob("*.json")):
        # trainval is to be trained on
        if part := next((p for p in ("train", "test", "val") if p in path.stem.lower()), None):
            found[part] = (*found.get(part, ()), path)
    # COCO's own captions and keypoints lie beside its instances.
    return {
        part: tuple(p for p in files if p.name.startswith("instances")) or files
        for part, files in found.items()
    }


def _read_coco(place: Path, source: Source, fault: Fault) -> Annotated:
    if len(source) > 1:
        raise InputError(f"{_listed(source)}: more than one file for one part; leave one there")
    (path,) = source
    read = annotations.read_json_annotations(path, "refuse", fault)
    if not read.records:
        raise InputError(f"{path} lists no images; add some")
    beside, above, name = path.parent, path.parent.parent, path.stem.removeprefix("instances_")
    folders = [beside / "images", beside, beside / name, beside / "images" / name, above / "images"]
    if beside.name == "annotations":
        folders += [above / name, above / "images" / name, above]
    places = ((folder, record) for record in read.records for folder in folders)
    folder = next((folder for folder, record in places if (folder / record.path).is_file()), None)
    if folder is None:
        sought = ", ".join(map(str, folders))
        raise InputError(
            f"{path}: picture {read.records[0].path!r} is in none of {sought}; put the pictures in the first"
        )
    paths = [folder / record.path for record in read.records]
    if any(os.path.isabs(record.path) for record in read.records):  # perhaps not all of them
        paths = [path.absolute() for path in paths]
    records = [replace(record, path=str(path)) for record, path in zip(read.records, paths)]
    return read._replace(records=annotations.with_pictures(records, path, fault))


# VOC


def _voc_folders(place: Path) -> tuple[Path, Path] | None:
    """Of the pictures and of their xml, by VOC's names for them or the usual ones."""
    for folder, xmls in (("JPEGImages", "Annotations"), ("images", "annotations")):
        if (place / folder).is_dir() and next((place / xmls).glob("*.xml"), None):
            return place / folder, place / xmls
    return None


def _voc_lists(place: Path) -> dict[str, Source]:
    """Lists of names by part; or the folder of all xml; or folders where pictures have their xml
    beside them.
    """
    if folders := _voc_folders(place):
        paths = {
            name: place / "ImageSets" / "Main" / f"{name}.txt"
            for name in ("train", "val", "trainval", "test")
        }
        found = {name: (path,) for name, path in paths.items() if path.is_file()}
        trainval = found.pop("trainval", None)
        if trainval and ("test" in found or "train" not in found):
            found.pop("val", None)  # it is in trainval
            found["train"] = trainval
        return found or {"train": (folders[1],)}
    beside = {part: [place / name for name in spelt] for part, spelt in SPELLINGS.items()}
    found = {
        part: tuple(f for f in folders if next(f.glob("*.xml"), None))
        for part, folders in beside.items()
    }
    whole = {"train": (place,)} if next(place.glob("*.xml"), None) else {}
    return {part: folders[:1] for part, folders in found.items() if folders} or whole


def _read_voc(place: Path, source: Source, fault: Fault) -> Annotated:
    (listed,) = source
    folders = _voc_folders(place)
    folder, xml_folder = folders or (listed, listed)
    files, xmls = _by_stem(folder, pictures.SUFFIXES, fault), _by_stem(xml_folder, {".xml"}, fault)
    names = [*files, *(name for name in xmls if name not in files)]
    if listed.suffix == ".txt":
        names = []
        for line in filter(None, map(str.strip, annotations.read_text(listed).splitlines())):
            # in lists of one class 1 or -1 follows; but a name may have blanks
            first = line.split()[0]
            spelt = (line, os.path.splitext(line)[0], first, os.path.splitext(first)[0])
            names.append(next((name for name in spelt if name in files or name in xmls), line))
    items: list[Item] = []
    difficult = 0
    for name in dict.fromkeys(names):
        if name not in files:
            fault(
                f"{xmls.get(name, listed)}: no picture {name!r} in {folder}; put it there or take its name out"
            )
        elif name not in xmls:
            items.append(Item(files[name], []))
        elif content := annotations.read_xml(xmls[name], fault=fault):
            width, height, objects = content
            labelled = [(box, label) for box, label, _ in objects]
            items.append(Item(files[name], labelled, (width, height), str(xmls[name])))
            difficult += sum(marked for _, _, marked in objects)
    classes = sorted({name for item in items for _, name in item.objects})
    read = _annotated(
        listed, items, {name: number for number, name in enumerate(classes, 1)}, "pixels", fault
    )
    # A rule of that benchmark: other layouts cannot say it, and would give other numbers.
    as_others = (
        [f"{listed}: objects marked difficult, taken like others: {difficult}"] if difficult else []
    )
    return read._replace(notes=as_others + read.notes)


# YOLO


def _yolo_names_file(place: Path) -> Path | None:
    paths = [place / name for name in YAMLS] + [place / "classes.txt"] * (place / "labels").is_dir()
    return next((path for path in paths if path.is_file()), None)


class _Loader(yaml.SafeLoader):
    """Without aliases: of ten that stand for lists of the ones before, a message would be gigabytes
    long.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias, *{self.peek_event().anchor}, is not read here")
        return super().compose_node(parent, index)


def _yolo_names(place: Path) -> tuple[dict[int, str], dict[str, Any]]:
    """Class names by number, and all that data.yaml says."""
    path = _yolo_names_file(place)
    text = annotations.read_text(path)
    if path.suffix == ".txt":
        return dict(enumerate(filter(None, map(str.strip, text.splitlines())))), {}
    try:
        content = yaml.load(text, _Loader)
    # of what a tag or a look asks for yaml makes a date, say, without a look at whether it is one
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        RecursionError,
    ) as error:
        raise InputError(
            f"{path}: not yaml ({' '.join(str(error).split()):.300}); correct it"
        ) from None
    names = content.get("names") if isinstance(content, dict) else None
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not (isinstance(names, dict) and names and all(isinstance(number, int) for number in names)):
        raise InputError(f"{path}: no 'names' of classes, as a list or by number; add them")
    for name in names.values():
        if not annotations.is_text(name):  # such as no, which yaml takes for False
            raise InputError(f"{path}: name {name!r:.60} is no text; put it in quotes")
    if len(set(names.values())) < len(names):
        twice = Counter(names.values()).most_common(1)[0][0]
        raise InputError(f"{path}: class {twice!r} is named twice; name it once")
    if content.get("nc", len(names)) != len(names):
        raise InputError(
            f"{path}: nc says {content['nc']!r:.60} classes, names has {len(names)}; correct one of the two"
        )
    return dict(sorted(names.items())), content


def _yolo_folders(place: Path) -> tuple[dict[str, Source], list[str]]:
    """Folders of pictures, or lists of pictures, by part: those of data.yaml, or those that there
    are; notes.
    """
    path, (_, content) = _yolo_names_file(place), _yolo_names(place)
    found: dict[str, Source] = {}
    notes = []
    for part, spelt in SPELLINGS.items():
        given = next((content[name] for name in spelt if content.get(name)), None)
        values = given if isinstance(given, list) else [given] if given else []
        if not all(isinstance(value, str) for value in values):
            raise InputError(
                f"{path}: its {part} {values!r:.60} is no path, nor a list of paths; correct it"
            )
        places = [_yolo_place(place, content.get("path"), value, path) for value in values]
        if missing := [str(p) for p in places if not p.exists()]:
            if part == "train":
                raise InputError(f"{path}: its {part} {missing[0]} is not there; correct the path")
            notes.append(f"{path}: its {part} {missing[0]} is not there: doing without it")
        elif places:
            found[part] = tuple(places)
    for part, spelt in SPELLINGS.items() if not found else ():
        folders = [
            folder
            for name in spelt
            for folder in (place / "images" / name, place / name / "images")
        ]
        if there := tuple(folder for folder in folders if folder.is_dir()):
            found[part] = there
    if not found and not (place / "images").is_dir():
        raise InputError(
            f"{path}: no folder images or train/images beside it; {annotations.holds(place)}: put it there"
        )
    return found or {"train": (place / "images",)}, notes


def _yolo_place(place: Path, root: str | None, value: str, path: Path) -> Path:
    """The place that a path in data.yaml or in a list means: services write ../train/images for
    train/images.
    """
    if os.path.isabs(value):
        if Path(value).is_relative_to(place.resolve()):
            return place / Path(value).relative_to(place.resolve())
        if not Path(value).exists():
            raise InputError(
                f"{path}: {value!r} is not there; correct it, or give its path in {place}"
            )
        return Path(value)
    value = annotations.inside(re.sub(r"^(\.{1,2}/)+", "", value), path)
    bases = (
        [place / root]
        if isinstance(root, str) and not os.path.isabs(root) and ".." not in root
        else []
    )
    return next((base / value for base in bases if (base / value).exists()), place / value)


def _read_yolo(place: Path, source: Source, fault: Fault) -> Annotated:
    names, _ = _yolo_names(place)
    by = f", which {file.name} names" if (file := _yolo_names_file(place)).suffix != ".txt" else ""
    found: dict[Path, Path] = {}  # picture -> the folder or list that has it
    for entry in source:
        if entry.is_dir():
            files = _by_stem(entry, pictures.SUFFIXES, fault)
            found |= dict.fromkeys(files.values(), entry)
            labels = _by_stem(_label_place(place, entry), {".txt"}, fault)
            for stem in labels.keys() - files.keys() - {"classes"}:
                fault(
                    f"{labels[stem]}: no picture {stem!r} in {entry}{by}; put it there or take the file out"
                )
        else:
            lines = filter(None, map(str.strip, annotations.read_text(entry).splitlines()))
            inside = entry.is_relative_to(place)
            beside = str(entry.parent.relative_to(place)) if inside else None
            listed = (_yolo_place(place, beside, line, entry) for line in lines)
            found |= dict.fromkeys(listed, entry)
    if any(picture.is_absolute() for picture in found):  # perhaps not all of them
        found = {picture.absolute(): entry for picture, entry in found.items()}
    items: list[Item] = []
    polygons = 0
    for picture, entry in found.items():
        label, objects = _label_place(place, picture).with_suffix(".txt"), []
        if not picture.is_file():
            fault(f"{picture}: listed, but missing; put it there or take it out of {entry}")
            continue
        if label.is_file():
            objects, more = annotations.read_yolo(label, names, fault)
            polygons += more
        items.append(Item(picture, objects))
    read = _annotated(
        _listed(source),
        items,
        {name: number for number, name in names.items()},
        "fractions of the picture's size, from 0 to 1",
        fault,
    )
    taken = [f"{_listed(source)}: polygons, whose boxes are taken: {polygons}"] if polygons else []
    return read._replace(notes=taken + read.notes)


def _label_place(place: Path, picture: Path) -> Path:
    """Where the txt of a picture, or those of a folder of pictures, are: in labels, as the picture
    is in images.
    """
    root = place if picture.is_relative_to(place) else Path(picture.anchor)
    parts = list(picture.relative_to(root).parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return root.joinpath(*parts)


# VOC and YOLO


def _by_stem(folder: Path, suffixes: set[str], fault: Fault) -> dict[str, Path]:
    """Files below a folder by their place in it without the suffix, in order; hidden ones are none
    of ours.
    """
    found: dict[str, Path] = {}
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        below = "" if Path(base) == folder else Path(base).relative_to(folder).as_posix() + "/"
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if name[0] != "." and suffix.lower() in suffixes:
                other = found.setdefault(below + stem, path := Path(base, name))
                if other != path:
                    fault(
                        f"{path}: {other.name!r} beside it would share its annotation; rename or remove one"
                    )
    return found


def _annotated(
    source: Any, items: list[Item], ids: dict[str, int], unit: str, fault: Fault
) -> Annotated:
    """Records of pictures and their objects, without the boxes that are of no use; sizes not known
    are looked up.
    """
    unsized = [item.path for item in items if item.size is None]
    with ThreadPoolExecutor() as pool:
        sizes = dict(zip(unsized, pool.map(lambda path: _size(path, fault), unsized)))
    labels, dropped, records = {name: label for label, name in enumerate(ids)}, {}, []
    for path, objects, size, annotated_in in items:
        size = size or sizes[path]
        if size is None:  # not readable
            continue
        kept = []
        for box, name in objects:
            x1, y1, x2, y2 = box if unit == "pixels" else np.array(box) * (*size, *size)
            if flaw := annotations.box_flaw(x1, y1, x2 - x1, y2 - y1, *size, least=0.99):
                dropped.setdefault(flaw, []).append(str(path))
            else:
                kept.append(((x1, y1, x2, y2), labels[name], False))
        records.append(
            replace(annotations.make_record("", path, *size, kept), annotated_in=annotated_in)
        )
    annotations.check_unit(source, records, dropped, unit, fault)
    return Annotated(ids, records, annotations.box_notes(source, records, dropped))


def _size(path: Path, fault: Fault) -> tuple[int, int] | None:
    """Width and height of an upright picture, from the file's header."""
    try:
        with Image.open(path, formats=pictures.FORMATS) as file:
            lies = file.getexif().get(ORIENTATION, 1) > 4
            return file.size[::-1] if lies else file.size
    except Exception as error:  # damage makes PIL stumble anywhere
        fault(
            f"{path}: not readable as a picture ({' '.join(str(error).split())}); replace or remove it"
        )
        return None

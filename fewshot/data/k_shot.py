"""K shots of every class: drawn by a seed, read from published lists, written down and read again."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np

from fewshot import InputError
from fewshot.data import annotations, cd_fsod
from fewshot.data.annotations import Record
from fewshot.data.detection import DetectionSet, objects_by_class
from fewshot.data.stream import Word

T = TypeVar("T")
Shots = int | Literal["all"]  # "all": every object that may be trained on


def choose_shots(
    dataset: DetectionSet, shots: Shots, seed: int, given: str | Path | None = None
) -> DetectionSet:
    """The K shots that a recipe trains on: `select_shots`, or those of the set's own file or of
    what is `given`.

    Args:
        dataset: training part, which knows the classes.
        shots: of each class, at least 1; a class that has fewer keeps these, and a note says so.
        seed: of what is drawn; a target of CD-FSOD has fixed shots (`target_shots`), of which none
            is drawn.
        given: a folder of published lists (`read_shot_lists`), or a shots.json of a run or of
            scripts/make_shots.py.

    Raises:
        InputError: as these functions do, for less than one shot, and for a file with another
            number of shots.
    """
    check_choice(shots, given)
    if given is None:
        return (
            target_shots(dataset, shots) if dataset.target else select_shots(dataset, shots, seed)
        )
    if Path(given).is_dir():
        return read_shot_lists(dataset, given, shots, seed)
    chosen = load_shots(given, dataset)
    found, there = counts(chosen), [len(objects) for objects in objects_by_class(dataset)]
    most = max(found)
    # Fewer than K are right where the data have no more.
    if shots != "all" and most != shots and (most > shots or found != there):
        raise InputError(
            f"{given} has {most} shots of a class, not {shots}; say --shots {most} or give another file"
        )
    return _noted(chosen, shots)


def check_choice(shots: Shots, given: str | Path | None) -> None:
    """What can be said of these arguments of `choose_shots` without data, raising as it does."""
    if shots != "all" and shots < 1:
        raise InputError(f"--shots {shots}: give a whole number of at least 1, or all")
    if given is not None and not Path(given).exists():
        raise InputError(
            f"{given}: is it there? --shot-lists takes a shots.json or a folder of published lists"
        )


def select_shots(dataset: DetectionSet, shots: Shots, seed: int) -> DetectionSet:
    """`shots` objects of every class, drawn at random; nothing else on the pictures stays
    annotated.

    The draw of a class is a pure function of the seed, its name and its objects, so it does not
    depend on which other classes there are, and the draws of 1, 2, 3, ... shots contain each other.
    Difficult objects are never drawn. A class with fewer objects keeps these, and a note says so.
    "all" draws nothing: it is whatever may be trained on.

    Raises:
        InputError: naming a class that has no object.
    """
    if shots == "all":
        usable = [record.select(dataset.usable(record)) for record in dataset.records]
        chosen = replace(
            dataset, records=[record for record in usable if len(record.labels)], cut_to_shots=True
        )
    else:
        picks = []
        for name, candidates in zip(dataset.classes, objects_by_class(dataset)):
            order = np.random.default_rng(
                (Word.SHOTS, seed, zlib.crc32(name.encode()))
            ).permutation(len(candidates))
            picks += [candidates[i] for i in order[:shots]]
        chosen = _merged(dataset, [(dataset.records[position], i) for position, i in sorted(picks)])
    if 0 in (found := counts(chosen)):
        name = dataset.classes[found.index(0)]
        raise InputError(
            f"{dataset.name}: class {name} has no object in the {dataset.part} part to draw shots from; "
            "annotate some, or take the class out of the data"
        )
    return _noted(chosen, shots)


def target_shots(dataset: DetectionSet, shots: Shots) -> DetectionSet:
    """The shots of a CD-FSOD target's own file, the same for every seed; nothing else on the
    pictures is annotated.

    A class with fewer objects keeps these, and a note says so: of clipart1k's 10 shots there are 7
    motorbikes.

    Raises:
        InputError: naming the file, if it is missing, is of other classes, or has another number of
            shots.
    """
    path, (ids, records, notes) = cd_fsod.read_shots(dataset.target, shots)
    if missing := [name for name in dataset.classes if name not in ids]:
        raise InputError(
            f"{path} has no category {missing[0]!r}, which train.json has; unpack it again"
        )
    notes = [*dataset.notes, f"shots of {path}, whatever --seed: it draws none here", *notes]
    chosen = replace(dataset, classes=list(ids), records=records, cut_to_shots=True, notes=notes)
    chosen = chosen.restrict(dataset.classes)
    found = counts(chosen)
    if max(found) != shots:
        raise InputError(f"{path} has {max(found)} shots of a class, not {shots}; unpack it again")
    if 0 in found:
        raise InputError(
            f"{path} has no shot of class {chosen.classes[found.index(0)]}; unpack it again"
        )
    return _noted(chosen, shots)


def counts(dataset: DetectionSet) -> list[int]:
    """How many objects of each class a set has."""
    labels = [record.labels for record in dataset.records]
    return np.bincount(
        np.concatenate([np.zeros(0, np.int64), *labels]), minlength=len(dataset.classes)
    ).tolist()


def _noted(chosen: DetectionSet, shots: Shots) -> DetectionSet:
    """The same set with a note on each class that has fewer than `shots` objects."""
    found = zip(chosen.classes, counts(chosen))
    short = [
        f"class {name} has only {n} of {shots} shots"
        for name, n in found
        if shots != "all" and n < shots
    ]
    return replace(chosen, notes=[*chosen.notes, *short])


def read_shot_lists(
    dataset: DetectionSet, folder: str | Path, shots: Shots, seed: int = 42
) -> DetectionSet:
    """The shots of lists as they are published, one file per class, in `folder` or its
    benchmark_{shots}shot.

    VOC's `box_{K}shot_{class}_train.txt` name pictures, which may hold more than K objects of the
    class; then K are drawn as mmfewshot does, whose seed is 42. COCO's
    `full_box_{K}shot_{class}_trainval.json` name the objects. A class with fewer than K objects
    that are not difficult keeps these, and a note says so.

    Raises:
        InputError: naming a file that is missing or has no object of its class, or a picture the
            data set lacks.
    """
    by_id = {record.id: record for record in dataset.records}
    candidates = []
    for label, name in enumerate(dataset.classes):
        records = _read_list(Path(folder), name, label, shots, by_id, dataset.skipped)
        candidates.append([(record, i) for record in records for i in range(len(record.labels))])
    return _noted(_merged(dataset, _draw_like_reference(dataset, candidates, shots, seed)), shots)


def _read_list(
    folder: Path,
    name: str,
    label: int,
    shots: Shots,
    by_id: dict[str, Record],
    skipped: frozenset[str],
) -> list[Record]:
    """The listed pictures of class `name`, which is `label`, with its objects alone; `skipped` ones
    are passed over.
    """
    names = _list_names(name, shots)
    paths = [
        p for s in ("", f"benchmark_{shots}shot") for n in names if (p := folder / s / n).is_file()
    ]
    if len({p.suffix for p in paths}) != 1:
        raise InputError(
            f"{folder}: {'both lists' if paths else 'no list'} {names[0]} {'and' if paths else 'or'} {names[1]}; "
            "give --shot-lists a folder with lists of one kind, and their number to --shots"
        )
    path = paths[0]
    if path.suffix == ".txt":
        lines = [
            annotations.inside(line.strip(), path)
            for line in annotations.read_text(path).splitlines()
        ]
        listed = [(_ids_of_line(line), line, None) for line in lines if line]
    else:
        classes, records = annotations.read_coco_json(path, "skip")
        ours = np.array([label if c == name else -1 for c in classes], np.int64)
        listed = [
            ([*_endings(r.path), r.id], r.path, replace(r, labels=ours[r.labels])) for r in records
        ]
    found = []
    for ids, picture, record in listed:
        id = next((id for id in ids if id in by_id or id in skipped), None)
        if id is None:
            raise InputError(
                f"{path}: picture {picture} is not in the training data; unpack it or correct the list"
            )
        if id in skipped:
            continue
        if record is not None:
            if wrong := [box for box in record.boxes.tolist() if not _is_box(box, by_id[id])]:
                raise InputError(
                    f"{path}: box {wrong[0]} is not on picture {picture}; correct the list"
                )
            columns = {k: getattr(record, k) for k in ("boxes", "labels", "difficult", "areas")}
        record = by_id[id] if record is None else replace(by_id[id], **columns)
        if not (record.labels == label).any():
            raise InputError(f"{path}: no {name} on picture {picture}; correct the list")
        found.append(record.select((record.labels == label) & ~record.difficult))
    if not any(len(record.labels) for record in found):
        raise InputError(
            f"{path}: its pictures hold no {name} that is not difficult; correct the list"
        )
    return found


def _list_names(name: str, shots: Shots) -> tuple[str, str]:
    """The published names of a class's list of pictures and of its list of objects."""
    if re.search(r"[/\\\0]", name):
        raise InputError(
            f"class {name!r} cannot be part of a file's name; keep shots as json, not as published lists"
        )
    return f"box_{shots}shot_{name}_train.txt", f"full_box_{shots}shot_{name}_trainval.json"


def _endings(path: str) -> list[str]:
    """a/b/c.jpg, b/c.jpg, c.jpg: one's own pictures are known by their path in their folder."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return ["/".join(parts[i:]) for i in range(len(parts))]


def _ids_of_line(line: str) -> list[str]:
    """What ids the picture of a list's line has in one's own data, in VOC and in COCO."""
    stem = PurePosixPath(line).stem
    year = "VOC2012" if "VOC2012" in line or ("VOC2007" not in line and "_" in stem) else "VOC2007"
    number = stem.split("_")[-1].lstrip("0")  # of COCO_train2014_000000000139.jpg: 139
    return [*_endings(line), f"{year}/{stem}", number]


def _draw_like_reference(
    dataset: DetectionSet, candidates: list[list[T]], shots: Shots, seed: int
) -> list[T]:
    """`shots` candidates of each class, class after class, by numpy's legacy generator, novel
    classes first.
    """
    generator, drawn = np.random.RandomState(seed), list(candidates)
    for name in [*dataset.novel, *dataset.base]:
        label = dataset.classes.index(name)
        if shots != "all" and len(candidates[label]) > shots:
            order = sorted(generator.choice(len(candidates[label]), shots, replace=False))
            drawn[label] = [candidates[label][i] for i in order]
    return [pick for picks in drawn for pick in picks]


def _merged(dataset: DetectionSet, picks: Iterable[tuple[Record, int]]) -> DetectionSet:
    """The picked (record, object) pairs alone: one record per picture, pictures and objects in
    order of picking.
    """
    pictures: dict[str, list[Record]] = {}
    for record, i in picks:
        pictures.setdefault(record.id, []).append(record.select([i]))
    records = []
    for parts in pictures.values():
        columns = {
            k: np.concatenate([getattr(p, k) for p in parts])
            for k in ("boxes", "labels", "difficult")
        }
        records.append(replace(parts[0], **columns, areas=None))
    return replace(dataset, records=records, cut_to_shots=True)


def files(dataset: DetectionSet) -> dict[str, Any]:
    """What a run keeps of its shots: {"shots.json": `shots_of`}, or nothing for a set that was not
    cut to shots.
    """
    return {"shots.json": shots_of(dataset)} if dataset.cut_to_shots else {}


def lists_of(dataset: DetectionSet, shots: Shots, layout: Literal["txt", "coco"]) -> dict[str, str]:
    """A set's objects as published lists, {file name: content} for each class, which
    `read_shot_lists` reads.

    "txt" is the layout of TFA's lists for VOC, which name pictures alone: where these hold more
    than K objects of their class, K are drawn again by who reads them. "coco" is that of its lists
    for COCO, which name objects.

    Raises:
        InputError: for a class whose name no file can have.
    """
    ids = dataset.category_ids or {name: i for i, name in enumerate(dataset.classes, 1)}
    lists = {}
    for label, name in enumerate(dataset.classes):
        records = [
            r.select(r.labels == label) for r in dataset.records if (r.labels == label).any()
        ]
        pictures, objects = _list_names(name, shots)
        if layout == "txt":
            lists[pictures] = "".join(f"{_published_path(record)}\n" for record in records)
        else:
            lists[objects] = json.dumps(
                _coco_list(records, ids[name], [{"id": ids[n], "name": n} for n in ids])
            )
    return lists


def _coco_list(
    records: list[Record], category: int, categories: list[dict[str, Any]]
) -> dict[str, Any]:
    images, objects = [], []
    for r in records:
        id = r.id if r.image_id is None else r.image_id
        name = r.id if _named_by_path(r) else Path(r.path).name
        images.append({"id": id, "file_name": name, "width": r.width, "height": r.height})
        for x1, y1, x2, y2 in r.boxes.tolist():
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            objects.append({"id": len(objects) + 1, "image_id": id, "category_id": category, **box})
    return {"images": images, "annotations": objects, "categories": categories}


def _named_by_path(record: Record) -> bool:
    """Whether the id tells where the picture is: of one's own data; drawn scenes have nothing but
    their id.
    """
    return not record.path or Path(record.path).as_posix().endswith(f"/{record.id}")


def _published_path(record: Record) -> str:
    """datasets/VOC2012/JPEGImages/2008_000123.jpg, datasets/coco/train2014/...: as TFA keeps
    published data.
    """
    return (
        record.id
        if _named_by_path(record)
        else "/".join(["datasets", *Path(record.path).parts[-3:]])
    )


def shots_of(dataset: DetectionSet) -> dict[str, Any]:
    """Which objects a set has (pictures by id, xyxy boxes in pixels, class names), for json and
    `load_shots`.
    """
    names = dataset.classes
    pictures = [
        {"id": r.id, "boxes": r.boxes.tolist(), "classes": [names[i] for i in r.labels]}
        for r in dataset.records
    ]
    return {"dataset": dataset.name, "classes": names, "pictures": pictures}


def load_shots(path: str | Path, dataset: DetectionSet) -> DetectionSet:
    """The set with only the objects that `shots_of` gave; its classes may come in another order.

    Pictures and classes count, not the name or the layout of the data: a note says if the name is
    another.

    Raises:
        InputError: the file is no such file, is of other classes, or has pictures that `dataset`
            lacks.
    """
    content, another = annotations.read_json(path), "give another file, or draw the shots again"
    fields = content if isinstance(content, dict) else {}
    made_of, classes, listed = (fields.get(key) for key in ("dataset", "classes", "pictures"))
    if not (isinstance(made_of, str) and isinstance(listed, list) and _are_texts(classes)):
        raise InputError(f"{path}: not a file of shots; give the shots.json of a run")
    if differ := set(classes) ^ set(dataset.classes):
        raise InputError(
            f"{path} holds shots of {made_of:.60}, which differs from {dataset.name} in class {min(differ)!r:.60}; "
            "give shots of the same classes"
        )
    by_id = {record.id: record for record in dataset.records}
    records: dict[str, Record] = {}
    for number, picture in enumerate(listed):
        fields, what = (
            picture if isinstance(picture, dict) else {},
            f"{path}: entry {number} of 'pictures'",
        )
        id, boxes, names = (fields.get(key) for key in ("id", "boxes", "classes"))
        if not (isinstance(id, str) and isinstance(boxes, list) and _are_texts(names)):
            raise InputError(f"{what} has no id, boxes and classes: {picture!r:.60}; {another}")
        if id not in by_id:
            raise InputError(
                f"{path}: picture {id:.200} is not in the {dataset.part} part of {dataset.name}; {another}"
            )
        if id in records or not len(boxes) == len(names) > 0:
            raise InputError(
                f"{what}: picture {id} comes twice, or has not a class for each box; {another}"
            )
        for name, box in zip(names, boxes):
            if name not in dataset.classes:
                raise InputError(f"{what}: {name!r:.60} is none of the file's classes; {another}")
            if not _is_box(box, by_id[id]):
                raise InputError(
                    f"{what}: {box!r:.60} is no box [x1, y1, x2, y2] on picture {id}; {another}"
                )
        labels, no = (
            np.array([dataset.classes.index(name) for name in names], np.int64),
            np.zeros(len(names), bool),
        )
        records[id] = replace(
            by_id[id], boxes=np.float32(boxes), labels=labels, difficult=no, areas=None
        )
    notes = (
        []
        if made_of == dataset.name
        else [f"{path} was made of {made_of}, and is used for {dataset.name}"]
    )
    chosen = replace(
        dataset, records=[*records.values()], cut_to_shots=True, notes=[*dataset.notes, *notes]
    )
    if 0 in (found := counts(chosen)):
        raise InputError(
            f"{path} has no shot of class {dataset.classes[found.index(0)]}; {another}"
        )
    return chosen


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _is_box(box: Any, record: Record) -> bool:
    """Whether it is a list of four numbers that has an area on the record's picture."""
    if not (
        isinstance(box, list)
        and len(box) == 4
        and all(type(v) in (int, float) and abs(v) < 1e9 for v in box)
    ):
        return False
    x1, y1, x2, y2 = box
    return min(x2, record.width) > max(x1, 0) and min(y2, record.height) > max(y1, 0)

"""K shots of every class: drawn by a seed, read from published lists, written down and read again."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fewshot import InputError
from fewshot.data import annotations
from fewshot.data.annotations import Record
from fewshot.data.detection import DetectionSet, objects_by_class
from fewshot.data.stream import Word

T = TypeVar("T")


def choose_shots(dataset: DetectionSet, shots: int, seed: int, given: str | Path | None = None) -> DetectionSet:
    """The K shots that a recipe trains on: `select_shots` or, if `given`, those of lists or of a file.

    Args:
        dataset: training part, which knows the classes.
        shots: of each class.
        seed: of what is drawn.
        given: a folder of published lists (`read_shot_lists`), or a shots.json of a run or of scripts/make_shots.py.

    Raises:
        InputError: as these functions do, or the file has another number of shots.
    """
    if given is None:
        return select_shots(dataset, shots, seed)
    if Path(given).is_dir():
        return read_shot_lists(dataset, given, shots, seed)
    chosen = load_shots(given, dataset)
    most = max(map(len, objects_by_class(chosen)))
    if most != shots:
        raise InputError(f"{given} has {most} shots of a class, not {shots}; say --shots {most} or give another file")
    return chosen


def select_shots(dataset: DetectionSet, shots: int, seed: int) -> DetectionSet:
    """Exactly `shots` objects of every class, drawn at random; nothing else on the pictures stays annotated.

    The draw of a class is a pure function of the seed, its name and its objects, so it does not depend on which other
    classes there are, and the draws of 1, 2, 3, ... shots contain each other. Difficult objects are never drawn.

    Raises:
        InputError: naming a class that has fewer objects.
    """
    picks = []
    for name, candidates in zip(dataset.classes, objects_by_class(dataset)):
        if len(candidates) < shots:
            raise InputError(f"{dataset.name}: class {name} has {len(candidates)} objects to draw {shots} shots from")
        order = np.random.default_rng((Word.SHOTS, seed, zlib.crc32(name.encode()))).permutation(len(candidates))
        picks += [candidates[i] for i in order[:shots]]
    return _merged(dataset, [(dataset.records[position], i) for position, i in sorted(picks)])


def reference_shots(dataset: DetectionSet, shots: int, seed: int = 42) -> DetectionSet:
    """The shots that mmfewshot draws from the whole training part, `seed` being its global one (42 in its configs)."""
    picks, notes = _draw_like_reference(dataset, objects_by_class(dataset), shots, seed)
    chosen = _merged(dataset, [(dataset.records[position], i) for position, i in sorted(picks)])
    return replace(chosen, notes=notes)


def read_shot_lists(dataset: DetectionSet, folder: str | Path, shots: int, seed: int = 42) -> DetectionSet:
    """The shots of published few-shot lists, one file per class, in `folder` or its benchmark_{shots}shot.

    VOC's `box_{K}shot_{class}_train.txt` name pictures, which may hold more than K objects of the class; then K are
    drawn as mmfewshot does, whose seed is 42. COCO's `full_box_{K}shot_{class}_trainval.json` name the objects. A class
    with fewer than K objects that are not difficult keeps these, and a note says so.

    Raises:
        InputError: naming a file that is missing or has no object of its class, or a picture the data set lacks.
    """
    by_id = {record.id: record for record in dataset.records}
    candidates = []
    for label, name in enumerate(dataset.classes):
        records = annotations.read_shot_list(Path(folder), name, label, shots, by_id, dataset.skipped)
        candidates.append([(record, i) for record in records for i in range(len(record.labels))])
    picks, notes = _draw_like_reference(dataset, candidates, shots, seed)
    return replace(_merged(dataset, picks), notes=notes)


def _draw_like_reference(
    dataset: DetectionSet, candidates: list[list[T]], shots: int, seed: int
) -> tuple[list[T], list[str]]:
    """`shots` candidates of each class, class after class, by numpy's legacy generator, novel classes first; notes."""
    generator, drawn, notes = np.random.RandomState(seed), list(candidates), list(dataset.notes)
    for name in [*dataset.novel, *dataset.base]:
        label = dataset.classes.index(name)
        count = len(candidates[label])
        if count > shots:
            order = sorted(generator.choice(count, shots, replace=False))
            drawn[label] = [candidates[label][i] for i in order]
        elif count < shots:
            notes.append(f"class {name} has only {count} of {shots} shots")
    return [pick for picks in drawn for pick in picks], notes


def _merged(dataset: DetectionSet, picks: Iterable[tuple[Record, int]]) -> DetectionSet:
    """The picked (record, object) pairs alone: one record per picture, pictures and objects in order of picking."""
    pictures: dict[str, list[Record]] = {}
    for record, i in picks:
        pictures.setdefault(record.id, []).append(record.select([i]))
    records = []
    for parts in pictures.values():
        columns = {k: np.concatenate([getattr(p, k) for p in parts]) for k in ("boxes", "labels", "difficult")}
        records.append(replace(parts[0], **columns, areas=None))
    return replace(dataset, records=records, cut_to_shots=True)


def files(dataset: DetectionSet) -> dict[str, Any]:
    """What a run keeps of its shots: {"shots.json": `shots_of`}, or nothing for a set that was not cut to shots."""
    return {"shots.json": shots_of(dataset)} if dataset.cut_to_shots else {}


def shots_of(dataset: DetectionSet) -> dict[str, Any]:
    """Which objects a set has (pictures by id, xyxy boxes in pixels, class names), for json and `load_shots`."""
    names = dataset.classes
    pictures = [
        {"id": r.id, "boxes": r.boxes.tolist(), "classes": [names[i] for i in r.labels]} for r in dataset.records
    ]
    return {"dataset": dataset.name, "classes": names, "pictures": pictures}


def load_shots(path: str | Path, dataset: DetectionSet) -> DetectionSet:
    """The set with only the objects that `shots_of` gave; its classes may come in another order.

    Raises:
        InputError: the file is of another data set, of other classes, or has pictures that `dataset` lacks.
    """
    content = annotations.read_json(path)
    if not isinstance(content, dict) or not {"dataset", "classes", "pictures"} <= set(content):
        raise InputError(f"{path}: not a file of shots; give the shots.json of a run")
    if content["dataset"] != dataset.name:
        raise InputError(f"{path} holds shots of {content['dataset']}, not of {dataset.name}; give another file")
    if differ := set(content["classes"]) ^ set(dataset.classes):
        raise InputError(f"{path} and {dataset.name} differ in class {min(differ)!r}; give shots of the same classes")
    by_id = {record.id: record for record in dataset.records}
    records = []
    for picture in content["pictures"]:
        if picture["id"] not in by_id:
            raise InputError(f"{path}: picture {picture['id']} is not in the {dataset.part} part of {dataset.name}")
        labels = np.array([dataset.classes.index(name) for name in picture["classes"]], np.int64)
        boxes, no = np.array(picture["boxes"], np.float32).reshape(-1, 4), np.zeros(len(labels), bool)
        records.append(replace(by_id[picture["id"]], boxes=boxes, labels=labels, difficult=no, areas=None))
    return replace(dataset, records=records, cut_to_shots=True)

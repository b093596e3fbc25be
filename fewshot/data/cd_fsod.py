"""CD-FSOD, the six cross-domain detection targets of Fu et al., ECCV 2024
(https://arxiv.org/abs/2402.03094).

A model of other data is fine-tuned on a fixed file of K shots of all target classes, without base
classes, and tested on the whole test.json by COCO's mAP. The published layout of each:

    {folder}/annotations/train.json, test.json, 1_shot.json, 5_shot.json, 10_shot.json
    {folder}/train/, test/ with the pictures; DIOR has them in train/new_train/ and test/new_test/
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fewshot import InputError
from fewshot.data import annotations
from fewshot.data.annotations import Annotated, Fault, Part, refuse

NAME = "CD-FSOD"
# names of `--dataset`, in the order of published tables, and folders; NEU-DET has two in the
# benchmark's own code
FOLDERS = {
    "artaxor": ("ArTaxOr",),
    "clipart1k": ("clipart1k",),
    "dior": ("DIOR",),
    "deepfish": ("FISH",),
    "neu_det": ("NEU-DET", "NEUDET"),
    "uodd": ("UODD",),
}


class Shots(NamedTuple):
    """A K-shot file, and what it holds."""

    path: Path
    annotated: Annotated


def find(name: str, root: Path) -> Path | None:
    """The folder of target `name` in `root`, known by the json files in its annotations.

    None for other names, and where there is only a folder of this very name: one's own data, as of
    any other name.

    Raises:
        InputError: there is neither.
    """
    places = [root / folder for folder in FOLDERS.get(name, ())]
    found = next(
        (place for place in places if next((place / "annotations").glob("*.json"), None)), None
    )
    if places and found is None and not any(path.exists() for path in (root / name, Path(name))):
        raise InputError(
            f"no {' or '.join(f'{place}/annotations' for place in places)} with train.json, test.json and 1_shot.json "
            f"etc.: unpack {NAME}'s {name} there, or give --data-root the folder that holds it"
        )
    return found


def read(folder: Path, parts: Sequence[Part], fault: Fault = refuse) -> dict[Part, Annotated]:
    """These parts of a target: classes in order of their category ids, records whose ids are their
    file names.

    Raises:
        InputError: naming the file, picture, box or class that is missing or wrong, unless `fault`
            takes it.
    """
    found = {part: _read(folder, part, part, fault) for part in parts}
    names = [set(annotated.category_ids) for annotated in found.values()]
    if differ := set.union(*names) - set.intersection(*names):
        fault(
            f"{folder}/annotations: train.json and test.json differ in category {min(differ)!r}; make them agree"
        )
    numbers = ", ".join(
        f"{len(found[part].records)} to {'train' if part == 'train' else 'test'} on"
        for part in found
    )
    notes = [f"{folder}: laid out as {NAME}, pictures: {numbers}"]
    notes += [note for annotated in found.values() for note in annotated.notes]
    return {part: annotated._replace(notes=notes) for part, annotated in found.items()}


def read_shots(folder: Path, shots: int | str) -> Shots:
    """The K-shot file for these shots.

    Raises:
        InputError: naming the file that is not there and those that are, or what is wrong in it.
    """
    path = folder / "annotations" / f"{shots}_shot.json"
    if not path.is_file():
        there = sorted(
            (p.name for p in path.parent.glob("*_shot.json")), key=lambda name: (len(name), name)
        )
        raise InputError(
            f"{path} is missing: the shots are fixed by such files, and there {'are' if there else 'is'} "
            f"{', '.join(there) or 'none'}; unpack it, or give another --shots"
        )
    return Shots(path, _read(folder, path.stem, "train", refuse))


def _read(folder: Path, stem: str, part: Part, fault: Fault) -> Annotated:
    """annotations/`stem`.json, of pictures of this part; in tests flawed boxes count, as for COCO's
    own evaluation.
    """
    path, pictures = folder / "annotations" / f"{stem}.json", folder / part
    read = annotations.read_json_annotations(path, "skip" if part == "train" else "take", fault)
    if (pictures / f"new_{part}").is_dir():
        pictures /= f"new_{part}"
    # Image ids may differ from file to file, file names may not.
    records = [
        replace(record, id=record.path, path=str(pictures / record.path)) for record in read.records
    ]
    if len({record.id for record in records}) < len(records):
        fault(f"{path}: two of its images have one 'file_name'; list each once")
    return read._replace(records=annotations.with_pictures(records, path, fault))

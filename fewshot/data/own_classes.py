"""Own data for classification: a folder of class folders, and which of its classes train, validate
and test.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from fewshot import InputError
from fewshot.data.annotations import read_text
from fewshot.data.image_set import Split

# of the classes, where nobody divided them
SHARES = {"train": (0, 0.64), "val": (0.64, 0.8), "test": (0.8, 1)}


def class_folders(root: Path, split: Split, novel: Path | None, seed: int) -> list[Path]:
    """The class folders of one split, sorted by name.

    `root` has folders train, val and test with class folders in them; or class folders, which the
    file `novel` divides (see `listed`), or else `seed`, 64 : 16 : 20.

    Raises InputError naming what is missing, a class that would be tested although it is trained
    on, two that are spelt alike, or what `novel` has wrong.
    """
    parts = [part for part in get_args(Split) if (root / part).is_dir()]
    if not parts:
        folders = {folder.name: folder for folder in subfolders(root)}
        _spellings(list(folders.values()))
        names = (
            listed(novel, list(folders), seed)[split]
            if novel
            else _drawn(root, list(folders), split, seed)
        )
        return [folders[name] for name in sorted(names)]
    if novel:
        raise InputError(
            f"{novel}: {root} is divided already, into {', '.join(parts)}: leave --novel out"
        )
    tested = _spellings(_folders(root / "test"))
    for part in set(parts) - {"test"}:
        if shared := sorted(tested.keys() & _spellings(_folders(root / part)).keys()):
            raise InputError(
                f"{tested[shared[0]]}: this class is also in {part}/, but few-shot tests are on classes not seen "
                "before; put all class folders into one folder, which --novel or chance divides"
            )
    return subfolders(root / split)


def _spellings(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by name without case and blanks."""
    found: dict[str, Path] = {}
    for folder in folders:
        twin = found.setdefault("".join(folder.name.split()).casefold(), folder)
        if twin != folder:
            raise InputError(
                f"{folder}: differs from class {twin.name!r} only in case or blanks; make them one folder"
            )
    return found


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name; InputError if there is none."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; expected one folder of pictures per class in it"
        )
    found = _folders(folder)
    if not found:
        raise InputError(
            f"{folder}: has no sub-folders; expected one folder of pictures per class in it"
        )
    return found


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def listed(path: Path, classes: Sequence[str], seed: int) -> dict[Split, list[str]]:
    """The classes of each split by a file of one's own.

    A .json file has "train", "val" and "test", each a list of class names; a class that none has is
    not used. Another file is text with the name of a novel class, to test on, in every line; `seed`
    divides the rest into a fifth to validate on and four to train on.

    Raises InputError naming the file, and the class that is not there, or listed twice; or when a
    split has none.
    """
    text = read_text(path)
    if path.suffix == ".json":
        division = _parsed(path, text)
    else:
        division = {"test": [line.strip() for line in text.splitlines() if line.strip()]}
    names = [name for part in division.values() for name in part]
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, 1)
            hint = (
                f"write {near[0]!r}, if that is meant"
                if near
                else f"the classes are {', '.join(classes)}"
            )
            raise InputError(f"{path}: there is no class folder {name!r:.200}; {hint}")
        if names.count(name) > 1:
            raise InputError(
                f"{path}: class {name!r} is listed twice; a class is in one split, once"
            )
    if empty := [part for part, some in division.items() if not some]:
        raise InputError(f"{path}: names no class for {empty[0]}; list one or more")
    if len(division) == 1:
        rest = (
            np.random.default_rng(seed)
            .permutation([name for name in classes if name not in names])
            .tolist()
        )
        if len(rest) < 2:
            left = f"class {rest[0]!r}" if rest else "none"
            raise InputError(
                f"{path}: leaves {left} of {len(classes)} to train and to validate on; list fewer classes"
            )
        validated = max(1, round(len(rest) / 5))
        division |= {"val": rest[:validated], "train": rest[validated:]}
    return division


def _parsed(path: Path, text: str) -> dict[Split, list[str]]:
    try:
        division = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not json ({error}); correct it, or give a .txt with a novel class in every line"
        ) from None
    lists = (
        isinstance(division, dict)
        and set(division) == set(get_args(Split))
        and list(division.values())
    )
    if not lists or not all(
        isinstance(x, list) and all(isinstance(name, str) for name in x) for x in lists
    ):
        raise InputError(
            f"{path}: must be an object of train, val and test, each a list of class names, and no more"
        )
    return division


def _drawn(root: Path, classes: Sequence[str], split: Split, seed: int) -> list[str]:
    low, high = (round(share * len(classes)) for share in SHARES[split])
    if low == high:
        raise InputError(
            f"{root}: {len(classes)} class folders are too few to set some aside for {split}; add classes"
        )
    return [classes[i] for i in np.random.default_rng(seed).permutation(len(classes))[low:high]]

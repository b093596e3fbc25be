"""A data set looked through before it is trained on: what would end a run, and what would spoil its
result.

`examine` opens every picture, for scripts/check_data.py; `quick` opens none, for recipes.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from fewshot import InputError
from fewshot.data import detection
from fewshot.data.detection import DetectionSet, DetectionSplit, objects_by_class
from fewshot.data.layouts import Kind

SHOWN = 3  # findings of a kind
QUICK_PICTURES = 10_000  # larger sets are not compared file by file before each run


@dataclass(frozen=True)
class Finding:
    kind: str  # what is wrong, whatever the file
    text: str  # one line: where, what is wrong, what to do
    fatal: bool  # training would fail on it, or learn something else


def quick(split: DetectionSplit, shots: int | Literal["all"]) -> list[str]:
    """What a run should say of its data before it begins. Pictures are not decoded.

    Raises:
        InputError: what would end the run later.
    """
    findings = list(_classes(split, shots))
    if len(split.train) + len(split.test) <= QUICK_PICTURES:
        findings += _same_files(split)
    for finding in findings:
        if finding.fatal:
            raise InputError(finding.text)
    return [text for _, _, texts in grouped(findings) for text in (*texts[:SHOWN], *_more(texts))]


def examine(
    name: str,
    root: str | Path,
    shots: int | Literal["all"],
    novel: Sequence[str] = (),
    layout: Kind | None = None,
) -> tuple[list[str], list[Finding]]:
    """What was recognised, in words, and all that is wrong with a set; every picture is decoded, by
    many threads.

    Two pictures are the same if their pixels are: one that was resized or compressed again is not
    found.
    """
    faults: list[str] = []
    notes: list[str] = []
    findings: list[Finding] = []
    try:
        split = detection.open_split(name, root, novel=novel, layout=layout, fault=faults.append)
        if name in detection.PUBLISHED:
            notes = [
                f"{name}: pictures: {len(split.train)} to train on, {len(split.test)} to test on"
            ]
        notes = list(dict.fromkeys([*notes, *split.train.notes, *split.test.notes]))
        findings = [*_classes(split, shots), *_pictures(split)]
    except InputError as error:
        faults.append(str(error))
    return notes, [Finding(_kind(text), text, True) for text in dict.fromkeys(faults)] + findings


def report(findings: Sequence[Finding]) -> str:
    """Findings by kind, fatal ones first: how many there are, and the first few."""
    lines = []
    for fatal, kind, texts in grouped(findings):
        lines.append(f"{'error' if fatal else 'warning'}: {kind}: {len(texts)}")
        lines += [f"    {text}" for text in (*texts[:SHOWN], *_more(texts))]
    return "\n".join(lines)


def grouped(findings: Sequence[Finding]) -> list[tuple[bool, str, list[str]]]:
    """(fatal, kind, texts), fatal kinds first."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for finding in sorted(findings, key=lambda finding: not finding.fatal):
        groups.setdefault((finding.fatal, finding.kind), []).append(finding.text)
    return [(*key, texts) for key, texts in groups.items()]


def _more(texts: Sequence[str]) -> list[str]:
    return [f"... and {len(texts) - SHOWN} more like this"] if len(texts) > SHOWN else []


def _kind(fault: str) -> str:
    """What is wrong, of "FILE: what is wrong; what to do", without names and numbers."""
    wrong = (fault.partition(": ")[2] or fault).partition(";")[0]
    return re.sub(r"'[^']*'|\[[^]]*\]|\{.*|\d[\d.]*", "…", wrong).strip()


def _classes(split: DetectionSplit, shots: int | Literal["all"]) -> Iterator[Finding]:
    train, test = split.train, split.test
    tested = dict(zip(test.classes, objects_by_class(test)))
    for name, objects in zip(train.classes, objects_by_class(train)):
        what = f"{train.name}: class {name!r} has"
        if not objects:
            text = f"{what} no object to train on; annotate some, or take the class out of the data"
            yield Finding("class without an object to train on", text, True)
        elif shots != "all" and len(objects) < shots:
            text = f"{what} {len(objects)} objects for {shots} shots, so these are used; annotate more for the rest"
            yield Finding("class with fewer objects than shots", text, False)
        if not tested[name]:
            text = f"{what} no object in the test part, so no result; move a picture with one there"
            yield Finding("class without an object to test on", text, False)


def _pictures(split: DetectionSplit) -> Iterator[Finding]:
    """What decoding shows: damage, other sizes than annotated, and pictures that are in both parts."""
    work = [(dataset, i) for dataset in (split.train, split.test) for i in range(len(dataset))]
    seen: dict[str, dict[bytes, list[str]]] = {"train": {}, "test": {}}
    with ThreadPoolExecutor() as pool:
        looks = tqdm(
            pool.map(_look, *zip(*work)) if work else (),
            total=len(work),
            unit="picture",
            leave=False,
        )
        for (dataset, i), (pixels, fault) in zip(work, looks):
            if fault:
                damaged = "not readable" in fault
                kind = (
                    "picture that cannot be read"
                    if damaged
                    else "picture of another size than annotated"
                )
                yield Finding(kind, fault, True)
            else:
                record = dataset.records[i]
                seen[dataset.part].setdefault(pixels, []).append(record.path or record.id)
    yield from _in_both(seen["train"], seen["test"])


def _look(dataset: DetectionSet, index: int) -> tuple[bytes, str]:
    """A hash of a picture's pixels, or what is wrong with it."""
    try:
        image = dataset.image(index)
    except InputError as error:
        return b"", str(error)
    return hashlib.blake2b(
        image.numpy().data, digest_size=16, salt=repr(image.shape[1:]).encode()[:16]
    ).digest(), ""


def _same_files(split: DetectionSplit) -> Iterator[Finding]:
    """Pictures of which both parts have the very file. Only files of sizes that both parts have are
    read.
    """
    paths = [[r.path for r in dataset.records if r.path] for dataset in (split.train, split.test)]
    sizes = [[os.path.getsize(path) for path in part] for part in paths]
    common = set(sizes[0]) & set(sizes[1])
    found: list[dict[bytes, list[str]]] = [{}, {}]
    for there, part, size in zip(found, paths, sizes):
        for path in (path for path, n in zip(part, size) if n in common):
            there.setdefault(hashlib.blake2b(Path(path).read_bytes()).digest(), []).append(path)
    yield from _in_both(*found)


def _in_both(train: dict[bytes, list[str]], test: dict[bytes, list[str]]) -> Iterator[Finding]:
    for pixels, paths in train.items():
        for one, other in product(paths, test.get(pixels, ())):
            text = f"{one} (train) and {other} (test) are the same picture, which the test then knows; take one out"
            yield Finding("picture in both parts", text, False)

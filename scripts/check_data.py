"""Look through a detection data set before training on it: every file and every picture.

    python scripts/check_data.py my_objects
    python scripts/check_data.py my_objects --shots 5 --novel-classes kettle teapot
    python scripts/check_data.py voc --data-root data

Reports what was recognised, errors on which training would fail (exit status 1), and warnings:
pictures that cannot be read or are of another size than annotated, boxes without area or outside
their picture, pictures that both parts have, classes with too few objects, names that differ in
case or blanks, and whatever else is wrong with the annotations.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from fewshot import InputError
from fewshot.data import check


@dataclass
class Args:
    dataset: tyro.conf.Positional[str]  # your own folder, or glyphs, voc, coco, as recipes take it
    data_root: str = "data"  # folder that holds the data set
    shots: int | Literal["all"] = 10  # boxes per class that are to be trained on
    novel_classes: tuple[str, ...] = ()  # which of your own data's classes are novel
    layout: Literal["coco", "voc", "yolo"] | None = None  # of your own data, where two are found


def main(args: Args) -> int:
    notes, findings = check.examine(
        args.dataset, args.data_root, args.shots, args.novel_classes, args.layout
    )
    print(*notes, sep="\n", end="\n" * bool(notes))
    print(check.report(findings), end="\n" * bool(findings))
    errors = sum(finding.fatal for finding in findings)
    print(f"{errors} errors, {len(findings) - errors} warnings")
    return int(errors > 0)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except InputError as error:
        sys.exit(f"error: {error}")

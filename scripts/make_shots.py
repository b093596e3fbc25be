"""Draw the K shots of every class that detectors are fine-tuned on, to look at them, keep them and
share them.

    python scripts/make_shots.py voc --data-root data --split 1 --shots 1 2 3 5 10 --seeds 0 1 2
    python scripts/make_shots.py my_objects --shots 5 all --format coco
    python scripts/make_shots.py voc --data-root data --shots 10 --shot-lists data/few_shot_ann/voc
    python scripts/make_shots.py glyphs --show runs/tfa/glyphs-split1-small/10shot-seed0/shots.json
    accelerate launch recipes/tfa.py --dataset voc --shots 10 --shot-lists shots/voc-split1/seed0/10shot.json

Every draw is a picture of its objects by class, novel ones orange, and what `--shot-lists` of a
recipe reads: a shots.json, or a folder with a list per class, as published. A recipe's own draw of
the same seed is the same; and a seed's 1, 2, 3, ... shots contain each other. Lists in txt name
pictures, not objects: where these hold more objects of the class than were chosen, reading them
draws anew, and a line says for which classes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm.auto import tqdm

from fewshot import InputError, show
from fewshot.data import detection, k_shot
from fewshot.data.detection import DetectionSet
from fewshot.training import folders


@dataclass
class Args:
    dataset: tyro.conf.Positional[str]  # glyphs, voc, coco, or your own, as recipes take it
    data_root: str = "data"  # folder that holds the data set
    split: Literal[1, 2, 3] = 1  # which classes are novel
    novel_classes: tuple[str, ...] = ()  # which of your own data's classes are novel
    layout: Literal["coco", "voc", "yolo"] | None = None  # of own data laid out as two of these
    shots: tuple[int | Literal["all"], ...] = (1, 2, 3, 5, 10)  # objects per class, a draw for each
    seeds: tuple[int, ...] = (0,)  # a draw for each
    shot_lists: Path | None = None  # published lists or a shots.json, to turn into another format
    format: Literal["json", "txt", "coco"] = "json"  # a shots.json; lists: VOC's txt, COCO's json
    show: Path | None = None  # only make the picture of this shots.json, beside it
    out: Path | None = None  # where the files go; by default shots/<what is drawn>


def main(args: Args) -> None:
    """Raises InputError for what `open_detection` and `choose_shots` refuse."""
    choice = {"split": args.split, "novel": args.novel_classes, "layout": args.layout}
    dataset = detection.open_detection(args.dataset, args.data_root, part="train", **choice)
    for note in dataset.notes:
        print(note)
    if args.show:
        draw(k_shot.load_shots(args.show, dataset), args.show.with_suffix(".png"))
        return

    wanted = [(k, seed) for seed in args.seeds for k in args.shots]
    if not wanted or min(args.seeds) < 0:
        raise InputError(
            "nothing to draw: give --shots and --seeds at least one number each, seeds from 0 on"
        )

    split = f"-split{args.split}" if args.dataset in detection.PUBLISHED_SPLITS else ""
    out = args.out or Path("shots") / f"{Path(args.dataset).stem}{split}"
    for k, seed in tqdm(wanted, unit="draw", leave=False):
        chosen = k_shot.choose_shots(dataset, k, seed, args.shot_lists)
        for note in chosen.notes[len(dataset.notes) :]:
            tqdm.write(note)
        folder = out / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        if args.format == "json":
            folders.write_json(folder / f"{k}shot.json", k_shot.shots_of(chosen))
        else:
            for name, content in k_shot.lists_of(chosen, k, args.format).items():
                (folder / name).write_text(content, encoding="utf-8")
        draw(chosen, folder / f"{k}shot.png")

        if args.format == "txt":
            moved = differing(chosen, k_shot.choose_shots(dataset, k, seed, folder))
            if moved:
                tqdm.write(
                    f"{folder}: the pictures of {k} shots of {', '.join(moved)} hold more objects, and reading "
                    "their lists draws others of these; --format json or coco keeps the chosen ones"
                )


def differing(a: DetectionSet, b: DetectionSet) -> list[str]:
    """The classes of which two choices from one set hold other objects."""

    def objects(chosen: DetectionSet) -> set[tuple]:
        return {
            (chosen.classes[label], record.id, *box)
            for record in chosen.records
            for label, box in zip(record.labels, record.boxes.tolist())
        }

    return sorted({name for name, *_ in objects(a) ^ objects(b)})


def draw(chosen: DetectionSet, picture: Path) -> None:
    """Make the picture, and say what there is."""
    show.shots(chosen).save(picture)
    counts = k_shot.counts(chosen)
    each = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    pictures = f"{len(chosen)} pictures of {len(chosen.classes)} classes"
    tqdm.write(f"{picture}: {sum(counts)} objects, {each} of each class, on {pictures}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")

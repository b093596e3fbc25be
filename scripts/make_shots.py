"""Draw the K shots of every class that detectors are fine-tuned on, to look at them, keep them and share them.

    python scripts/make_shots.py voc --data-root data --split 1 --shots 1 5 10 --seeds 0 1 2
    python scripts/make_shots.py voc --data-root data --shots 10 --shot-lists data/few_shot_ann/voc
    python scripts/make_shots.py glyphs --show runs/tfa/glyphs-split1-small/10shot-seed0/shots.json
    accelerate launch recipes/tfa.py --dataset voc --shots 10 --shot-lists shots/voc-split1/10shot-seed0.json

Every draw is a shots.json, which `--shot-lists` of a recipe reads, and a picture with a row per class, novel ones
orange. A recipe's own draw of the same seed is the same; and a seed's 1, 2, 3, ... shots contain each other.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm.auto import tqdm

from fewshot import InputError, run, show
from fewshot.data import detection, k_shot


@dataclass
class Args:
    dataset: tyro.conf.Positional[str]  # glyphs, voc, coco, or your own in COCO's format, as recipes take it
    data_root: str = "data"  # folder that holds the data set
    split: Literal[1, 2, 3] = 1  # which classes are novel
    novel_classes: tuple[str, ...] = ()  # which of your own data's classes are novel
    shots: tuple[int, ...] = (1, 2, 3, 5, 10)  # boxes per class, a file for each
    seeds: tuple[int, ...] = (0,)  # a file for each
    shot_lists: str | None = None  # folder of published few-shot lists, to be turned into files of this kind
    show: Path | None = None  # only make the picture of this shots.json, beside it
    out: Path = Path("shots")  # where <dataset>-split<split>/<K>shot-seed<seed>.json and .png go


def main(args: Args) -> None:
    dataset = detection.open_detection(
        args.dataset, args.data_root, part="train", split=args.split, novel=args.novel_classes
    )
    for note in dataset.notes:
        print(note)
    if args.show:
        draw(k_shot.load_shots(args.show, dataset), args.show)
        return
    folder = args.out / f"{Path(args.dataset).stem}-split{args.split}"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(k, seed) for k in args.shots for seed in args.seeds]
    for k, seed in tqdm(wanted, unit="draw", leave=False):
        path = folder / f"{k}shot-seed{seed}.json"
        chosen = k_shot.choose_shots(dataset, k, seed, args.shot_lists)
        run.write_json(path, k_shot.shots_of(chosen))
        draw(chosen, path)
        for note in chosen.notes[len(dataset.notes) :]:
            tqdm.write(note)


def draw(chosen: detection.DetectionSet, path: Path) -> None:
    """Make the picture beside `path`, and say what there is."""
    picture = path.with_suffix(".png")
    show.shots(chosen).save(picture)
    counts = [len(objects) for objects in k_shot.objects_by_class(chosen)]
    each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    pictures = f"{len(chosen)} pictures of {len(chosen.classes)} classes"
    tqdm.write(f"{path}: {sum(counts)} objects, {each} of each class, on {pictures}; see {picture}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")

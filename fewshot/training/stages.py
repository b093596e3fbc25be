"""What a detector's run goes through before its loop: its stages, their data and pictures, how long
they will train.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator

from fewshot import InputError
from fewshot.data import check, k_shot
from fewshot.data.detection import (
    PUBLISHED,
    PUBLISHED_SPLITS,
    DetectionSet,
    DetectionSplit,
    open_split,
)
from fewshot.data.pipeline import Pipeline
from fewshot.detectors import calibrate
from fewshot.training import bases, folders, launch, run
from fewshot.training.folders import mean_interval
from fewshot.training.schedule import Passes, Schedule, choose

LARGE = 800 * 1333  # pixels of a picture that published detectors look for objects in
FEWEST = 300  # proposals: on NEU-DET 100 cost a tenth of the AP and save a quarter of the time


def wanted(
    accelerator: Accelerator, method: str, args: Any, backbone: str
) -> Iterator[tuple[str, Any, str]]:
    """(stage, its arguments, its folder) of what `--stage`, `--seeds` and `--test-only` ask for and
    is not there yet.

    The base model is trained first, unless it is there or `--base` is another; then follow the
    fine-tunings, one for each seed, whose mean result is printed at the end. With `--test-only` the
    stage is "test". Folders lie in `--out`, by default named by data, split, and the backbone (by
    default `backbone`) or what is fine-tuned.
    """
    split = f"split{args.split}" if args.dataset in PUBLISHED_SPLITS else None
    begin = args.backbone or (bases.label(args.base) if args.base else backbone)
    args.out = args.out or folders.default(method, args.dataset, split, begin)
    if args.stage == "base" and args.calibrate:
        raise InputError(
            "--calibrate is by the shots of fine-tuning: leave it out of base training"
        )
    if args.calibrate:  # fetched once, and what is wrong with it is said before anything is trained
        launch.on_main_only(accelerator, lambda: calibrate.backbone(args.calibrate))
    if args.stage != "base" and not args.test_only:  # said before a base model is trained
        k_shot.check_choice(args.shots, args.shot_lists)
    if not (args.base or args.test_only):
        args.backbone = begin
    base, runs = f"{args.out}/base", []
    base_wanted = args.stage == "base" or (
        args.stage == "all" and not args.base and not args.test_only
    )
    if base_wanted and folders.due(accelerator, method, args, base, shared=args.stage == "all"):
        yield "test" if args.test_only else "base", args, base
    if args.stage == "base":
        return
    stage, named = (
        ("finetune", "")
        if args.stage == "all"
        else (args.stage, "-novel" * (args.stage == "novel"))
    )
    args.base = args.base or f"{base}/model.safetensors"
    for each in run.each_seed(args):
        runs.append(f"{args.out}/{args.shots}shot-seed{each.seed}{named}")
        if folders.due(accelerator, method, each, runs[-1]):
            yield "test" if args.test_only else stage, each, runs[-1]
    _over_seeds(accelerator, args, runs)


def opened(args: Any, **choice: Any) -> DetectionSplit:
    """Both parts of the data set that a detection recipe's `args` name; `open_split` has `choice`
    and the errors.
    """
    source = (args.dataset, args.data_root, args.split, args.novel_classes)
    return open_split(*source, layout=args.layout, test_images=args.test_images, **choice)


def pictures(
    args: Any, short: int | tuple[int, ...] | None, long: int | None, flip: bool, multiple: int = 1
) -> Pipeline:
    """How pictures become samples: as published, if `--short` and `--long` do not say otherwise.

    Own pictures are never enlarged, unless `--short` asks for it.
    """
    enlarge = args.published != "own" or args.short is not None
    return Pipeline(args.short or short, args.long or long, flip, multiple, enlarge)


def planned(
    accelerator: Accelerator,
    args: Any,
    stage: str,
    table: Mapping[Any, Schedule | Passes],
    batch: int,
    train: DetectionSet,
    test: DetectionSet,
    pictures: Pipeline,
) -> Schedule:
    """The schedule that `args` ask for a stage, which is announced with its data.

    Args:
        table, batch: the rows of a recipe's table for this data set (`choose`), and the pictures
            per step they are for.
        train, test: what it trains and tests on, as `pictures`.
    """
    schedule = choose(table, stage, args, pictures=len(train), batch=batch).scaled(args, batch)
    announce(accelerator, train, test, pictures, schedule)
    return schedule


def announce(
    accelerator: Accelerator,
    train: DetectionSet,
    test: DetectionSet,
    pictures: Pipeline,
    schedule: Schedule | None = None,
) -> None:
    """Say what the user should hear of the data, and what is about to be done with them, if
    anything is trained.

    Raises:
        InputError: own data would end or spoil the run (`check.quick`).
    """
    notes = list(train.notes)
    if train.name not in PUBLISHED:
        notes += launch.on_main(
            accelerator, lambda: check.quick(DetectionSplit(train, test, [], []), "all")
        )
    objects, steps = sum(len(r.labels) for r in train.records), ""
    if schedule is not None:
        passes = schedule.steps * schedule.batch / max(len(train), 1)
        steps = f"; {schedule.steps} steps of {schedule.batch} pictures: {passes:.2g} passes"
    sizes = sorted((r.height * r.width, r.height, r.width) for r in train.records) or [(0, 0, 0)]
    _, height, width = sizes[len(sizes) // 2]
    new = pictures.resized(height, width)
    size = (
        f"as they are, {width} x {height}"
        if new == (height, width)
        else f"{width} x {height} -> {new[1]} x {new[0]}"
    )
    accelerator.print(
        *notes,
        f"{len(train)} pictures ({size}) with {objects} objects of {len(train.classes)} classes{steps}",
        sep="\n",
    )


def fitting_proposals(
    pictures: Pipeline, dataset: DetectionSet, most: int = 1000
) -> tuple[int, int]:
    """Proposals for tests on pictures of any size, before and after NMS: published numbers are for
    large pictures.

    After NMS `most`, cut in proportion to the median picture's area as the network gets it, but at
    least `FEWEST`: a first stage that was trained on other objects ranks these low.
    """
    areas = [float(np.prod(pictures.resized(r.height, r.width))) for r in dataset.records]
    return 1000, min(max(round(most * float(np.median(areas)) / LARGE), FEWEST), most)


def _over_seeds(accelerator: Accelerator, args: Any, runs: Sequence[str]) -> None:
    """Print the mean result of `--seeds`, whose folders are `runs`, with its 95 % interval by
    Student's t.
    """
    if len(runs) > 1:
        results = [json.loads(folders.result_file(args, folder).read_text()) for folder in runs]
        for name in [name for name in ("AP50", "AP") if name in results[0]]:
            for group in results[0][name]:
                values = [result[name][group] for result in results]
                mean, half = mean_interval(values)
                single = ", ".join(f"{value:.1f}" for value in values)
                accelerator.print(
                    f"{name} {group}: {mean:.1f} ± {half:.1f} over {len(values)} seeds ({single})"
                )

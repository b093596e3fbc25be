"""What a detector's run goes through before its loop: its stages, their data and pictures, how long
they will train.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed

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
from fewshot.training import bases, folders, launch
from fewshot.training.folders import Stage, mean_interval
from fewshot.training.schedule import Passes, Schedule, choose

LARGE = 800 * 1333  # pixels of a picture that published detectors look for objects in
FEWEST = 300  # proposals: on NEU-DET 100 cost a tenth of the AP and save a quarter of the time
# what a base model must have in common with what is fine-tuned from it
SHARED = ("dataset", "novel_classes", "split", "backbone", "style", "short", "long")
SHARED += ("support_size",)


def run_stages(
    accelerator: Accelerator,
    method: str,
    args: Any,
    backbone: str,
    functions: Mapping[str, Callable[[Stage, Accelerator], None]],
) -> None:
    """Do what a detection recipe's `args` ask for and is not there yet: every stage by the function
    of its name.

    Each begins as a run of its `--seed` alone would. The mean over `--seeds` is printed at the end.
    """
    check_choices(accelerator, args)
    stages = list_stages(method, args, backbone)
    alike = SHARED if args.stage == "all" else None
    # all folders are looked at before anything is trained
    left = [
        folders.due(accelerator, method, stage, alike if stage.name == "base" else None)
        for stage in stages
    ]

    for stage in left:
        if stage is not None:
            set_seed(stage.args.seed)
            functions[stage.name](stage, accelerator)

    print_mean(accelerator, args, [stage.folder for stage in stages if stage.name != "base"])


def check_choices(accelerator: Accelerator, args: Any) -> None:
    """Raises InputError naming what is wrong with `--calibrate` or the shots, before anything is
    trained.
    """
    if args.stage == "base" and args.calibrate:
        raise InputError(
            "--calibrate is by the shots of fine-tuning: leave it out of base training"
        )
    if args.calibrate:  # fetched once
        launch.on_main_only(accelerator, lambda: calibrate.backbone(args.calibrate))
    if args.stage != "base" and not args.test_only:
        k_shot.check_choice(args.shots, args.shot_lists)


def list_stages(method: str, args: Any, backbone: str) -> list[Stage]:
    """What `--stage` and `--seeds` ask for, whether it is done or not.

    First comes base training, unless `--base` is another model, then the fine-tunings, one for each
    seed; with `--test-only` they are what is tested, and "all" means the fine-tuned models. Folders
    lie in `--out`, by default named by data, split, and the backbone (by default `backbone`) or
    what is fine-tuned.
    """
    split = f"split{args.split}" if args.dataset in PUBLISHED_SPLITS else None
    begin = args.backbone or (bases.label(args.base) if args.base else backbone)
    args = replace(args, out=args.out or folders.default(method, args.dataset, split, begin))
    if not (args.base or args.test_only):
        args = replace(args, backbone=begin)

    stages = []
    base = f"{args.out}/base"
    if args.stage == "base" or (args.stage == "all" and not args.base and not args.test_only):
        stages.append(Stage("base", args, base))
    if args.stage == "base":
        return stages

    name = "finetune" if args.stage == "all" else args.stage
    if not (args.base or args.test_only):
        args = replace(args, base=f"{base}/model.safetensors")
    for seed in args.seeds or [args.seed]:
        folder = f"{args.out}/{args.shots}shot-seed{seed}"
        if name == "novel":
            folder += "-novel"
        stages.append(Stage(name, replace(args, seed=seed, seeds=()), folder))
    return stages


def print_mean(accelerator: Accelerator, args: Any, runs: Sequence[str]) -> None:
    """Print the mean result of `--seeds`, whose folders are `runs`, with its 95 % interval by
    Student's t.
    """
    if len(runs) < 2:
        return
    results = [json.loads(folders.result_file(args, folder).read_text()) for folder in runs]
    for name in ("AP50", "AP"):
        for group in results[0].get(name, ()):
            values = [result[name][group] for result in results]
            mean, half = mean_interval(values)
            single = ", ".join(f"{value:.1f}" for value in values)
            accelerator.print(
                f"{name} {group}: {mean:.1f} ± {half:.1f} over {len(values)} seeds ({single})"
            )


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
    stage: Stage,
    table: Mapping[Any, Schedule | Passes],
    batch: int,
    train: DetectionSet,
    test: DetectionSet,
    pictures: Pipeline,
) -> Schedule:
    """The schedule that a stage's arguments ask for, which is announced with its data.

    Args:
        table, batch: the rows of a recipe's table for this data set (`choose`), and the pictures
            per step they are for.
        train, test: what it trains and tests on, as `pictures`.
    """
    row = choose(table, stage.name, stage.args, pictures=len(train), batch=batch)
    schedule = row.scaled(stage.args, batch)
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

    # of the median picture
    sizes = sorted((r.height * r.width, r.height, r.width) for r in train.records) or [(0, 0, 0)]
    _, height, width = sizes[len(sizes) // 2]
    new_height, new_width = pictures.resized(height, width)
    size = f"{width} x {height} -> {new_width} x {new_height}"
    if (new_height, new_width) == (height, width):
        size = f"as they are, {width} x {height}"

    objects = sum(len(r.labels) for r in train.records)
    plan = f"{len(train)} pictures ({size}) with {objects} objects of {len(train.classes)} classes"
    if schedule is not None:
        passes = schedule.steps * schedule.batch / max(len(train), 1)
        plan += f"; {schedule.steps} steps of {schedule.batch} pictures: {passes:.2g} passes"
    accelerator.print(*notes, plan, sep="\n")


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

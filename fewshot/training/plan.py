"""What a classifier's run works on and how long it will take: opened, checked and said before its
first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from fewshot.backbones import networks
from fewshot.data import episodes
from fewshot.data.classification import open_domain, open_splits
from fewshot.data.image_set import ImageSet
from fewshot.training import folders
from fewshot.training.folders import Stage
from fewshot.training.schedule import Passes, Schedule


def find_stage(accelerator: Accelerator, method: str, args: Any) -> Stage | None:
    """What is to be done in `--out`, by default runs/METHOD/DATASET-NOVEL-BACKBONE-SEED: `due`."""
    novel = args.novel and Path(args.novel).stem
    folder = args.out or folders.default(
        method, args.dataset, novel, args.backbone, f"seed{args.seed}"
    )
    return folders.due(accelerator, method, Stage("train", replace(args, out=folder), folder))


def opened(accelerator: Accelerator, args: Any) -> tuple[ImageSet, ImageSet, ImageSet]:
    """What trains, validates and tests: the splits of `--dataset`, their pictures as `--backbone`
    and `--size` ask.

    With `--test-dataset` that one tests instead, its test split or all its class folders.

    Raises:
        InputError: a data set cannot be opened (`open_dataset`), or has too little for the tasks.
    """
    with accelerator.local_main_process_first():  # one process fills the cache
        sets = open_splits(
            args.dataset, args.data_root, args.novel, cache=args.cache, **networks.inputs(args)
        )
        if args.test_dataset:
            root = args.test_root or args.data_root
            sets = (*sets[:2], open_domain(args.test_dataset, root, sets[0], cache=args.cache))
    for split in sets[1:]:
        episodes.check(split, args.ways, max(args.shots), args.queries)
    return sets


def planned(
    accelerator: Accelerator,
    args: Any,
    row: Schedule | Passes,
    sets: Sequence[ImageSet],
    *,
    pictures: int = 1,
    batch: int | None = None,
) -> tuple[Schedule, int]:
    """The schedule that `args` ask for, and the steps between validations.

    Own data have `Passes` over their training pictures in place of a length; a training of them
    that ends before the first `--eval-every` is validated ten times.

    Args:
        row: of a recipe's SCHEDULE.
        sets: what trains, validates and tests.
        pictures: that `--batch-size` counts as one: those of an episode.
        batch: where `--batch-size` has no default.
    """
    train_set, _, test_set = sets
    batch = args.batch_size or batch
    shown = batch * pictures  # pictures of a step
    own = isinstance(row, Passes)
    if own:
        row = row.over(len(train_set), shown)
    schedule = row.scaled(args)._replace(batch=batch)

    every = args.eval_every
    if own and every > schedule.steps:
        every = max(1, schedule.steps // 10)

    if args.test_dataset:
        accelerator.print(
            f"tested on {test_set.origin}: {len(test_set)} pictures of {len(test_set.classes)} classes"
        )
    if not args.test_only:
        train, val, test = (len(part.classes) for part in sets)
        passes = schedule.steps * shown / len(train_set)
        accelerator.print(
            f"{train_set.origin}: {len(train_set)} pictures; classes: {train} to train, {val} to "
            f"validate, {test} to test\n{schedule.steps} steps of {shown} pictures: {passes:.3g} "
            f"passes; validated every {every}"
        )
    return schedule, every

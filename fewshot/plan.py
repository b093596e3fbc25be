"""What a classifier's training will take: known from its data, and said before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from fewshot.data.image_set import ImageSet
from fewshot.schedule import Passes, Schedule


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

    Own data have `Passes` over their training pictures in place of a length; a training of them that ends before the
    first `--eval-every` is validated ten times.

    Args:
        row: of a recipe's SCHEDULE.
        sets: what trains, validates and tests.
        pictures: that `--batch-size` counts as one: those of an episode.
        batch: where `--batch-size` has no default.
    """
    train_set, batch, every = sets[0], args.batch_size or batch, args.eval_every
    shown = batch * pictures
    own = isinstance(row, Passes)
    schedule = (row.over(len(train_set), shown) if own else row).scaled(args)._replace(batch=batch)
    if own and every > schedule.steps:
        every = max(1, schedule.steps // 10)
    if not args.test_only:
        classes = ", ".join(f"{len(part.classes)} to {verb}" for part, verb in zip(sets, ("train", "validate", "test")))
        accelerator.print(
            f"{train_set.origin}: {len(train_set)} pictures; classes: {classes}\n{schedule.steps} steps of {shown} "
            f"pictures: {schedule.steps * shown / len(train_set):.3g} passes; validated every {every}"
        )
    return schedule, every

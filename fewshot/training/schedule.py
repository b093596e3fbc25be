"""How long and at what rate a stage trains: published rows, what lies between two of them, and own
data's rule.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Schedule(NamedTuple):
    """How long and at what rate SGD or Adam train: steps, peak rate, milestones at which it falls,
    warm-up steps.

    At 0-based step t the rate is lr * gamma^{#(milestones <= t)}, times 1 - (1 - t / warmup)(1 -
    ratio) while t < warmup: the two multiply, as in the reference's schedules. `batch` is the
    global batch that it is meant for.
    """

    steps: int
    lr: float
    milestones: tuple[int, ...] = ()
    warmup: int = 0
    gamma: float = 0.1
    ratio: float = 0.001
    batch: int = 1

    def scaled(self, args: Any, published: int | None = None) -> Schedule:
        """The schedule that `args` ask for: `--iters` stretches milestones and warm-up, `--lr`
        replaces the rate.

        With `published`, the batch that the steps and the rate are for, another `--batch-size`
        scales the rate by the ratio and the steps by its inverse (the linear rule).
        """
        batch = args.batch_size or published or self.batch
        ratio = batch / published if published else 1
        lr = self.lr * ratio if args.lr is None else args.lr
        return self.stretched(args.iters or max(1, round(self.steps / ratio)))._replace(
            lr=lr, batch=batch
        )

    def stretched(self, steps: int) -> Schedule:
        """The same with so many steps, milestones and warm-up at the same share of them."""
        milestones, warmup = (
            tuple(m * steps // self.steps for m in self.milestones),
            self.warmup * steps // self.steps,
        )
        return self._replace(steps=steps, milestones=milestones, warmup=warmup)

    def of(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """The scheduler: it multiplies each group's own rate."""

        def factor(t: int) -> float:
            warm = 1 - (1 - t / self.warmup) * (1 - self.ratio) if t < self.warmup else 1.0
            return warm * self.gamma ** sum(m <= t for m in self.milestones)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Cosine(Schedule):
    """A `Schedule` that falls to the rate where its warm-up began, `ratio` of the peak, along half
    a cosine.

    As timm's, of which the published training had one: the cosine began at step 0, and the warm-up
    hides its beginning.
    """

    __slots__ = ()

    def of(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """The scheduler: it multiplies each group's own rate."""

        def factor(t: int) -> float:
            share = (
                t / self.warmup if t < self.warmup else (1 + math.cos(math.pi * t / self.steps)) / 2
            )
            return self.ratio + (1 - self.ratio) * share

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Passes(NamedTuple):
    """The schedule of own data, whose size nobody knows beforehand: `passes` over the training
    pictures.

    Of n pictures in batches of b these are passes * n / b steps, but at least `least` and at most
    `most`. The rate is warmed up in the first twentieth and falls to a tenth at four fifths.
    """

    passes: int
    lr: float
    least: int
    most: int

    def over(self, pictures: int, batch: int) -> Schedule:
        """The schedule for so many pictures in batches of `batch`."""
        steps = min(max(round(self.passes * pictures / batch), self.least), self.most)
        return Schedule(steps, self.lr, (steps * 4 // 5,), steps // 20)


def choose(
    table: Mapping[Any, Schedule | Passes],
    stage: str,
    args: Any,
    *,
    pictures: int,
    batch: int | None = None,
) -> Schedule:
    """The row of a detection recipe's table for a stage: of base training, or of fine-tuning on
    `--shots`.

    Between two published numbers of shots, steps and rate change linearly with the number,
    milestones and warm-up keep the lower row's share; beyond the last, as for `all` objects, and
    below the first, the nearest row holds. Own data have `Passes` instead, one row for base
    training and one, "few", for any number of shots.

    Args:
        table: by "base" and number of shots, or (split, number of shots) where a split has rows of
            its own.
        pictures: that are trained on. batch: pictures per step that the table is for.

    Raises:
        InputError: `--shots` is none or fewer.
    """
    stage = "base" if stage == "base" else "few"
    if stage in table:
        row = table[stage]
        return row.over(pictures, batch) if isinstance(row, Passes) else row
    rows = {
        key[1]: row for key, row in table.items() if isinstance(key, tuple) and key[0] == args.split
    }
    rows = rows or {key: row for key, row in table.items() if isinstance(key, int)}
    known = sorted(rows)
    shots = known[-1] if args.shots == "all" else min(max(args.shots, known[0]), known[-1])
    if shots in rows:
        return rows[shots]
    i = bisect.bisect(known, shots)
    low, high = rows[known[i - 1]], rows[known[i]]
    share = (shots - known[i - 1]) / (known[i] - known[i - 1])
    between = low.stretched(round(low.steps + share * (high.steps - low.steps)))
    return between._replace(lr=low.lr + share * (high.lr - low.lr))

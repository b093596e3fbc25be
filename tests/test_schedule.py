"""How long a stage trains: published rows, what lies between them, and own data's rule."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fewshot.training.schedule import Passes, Schedule, choose


@dataclass
class Args:
    shots: int | str = 10
    split: int = 1
    batch_size: int | None = None
    iters: int | None = None
    lr: float | None = None


TABLE = {
    "base": Schedule(1000, 0.02),
    1: Schedule(100, 0.01, (80,), 10),
    5: Schedule(300, 0.03, (240,), 10),
    (2, 1): Schedule(700, 0.5),
    (2, 5): Schedule(900, 0.5),
}


def chosen(stage: str = "finetune", **args) -> Schedule:
    return choose(TABLE, stage, Args(**args), pictures=40, batch=4)


def test_published_rows_are_taken_as_they_are():
    assert chosen("base") == TABLE["base"]
    assert chosen(shots=1) == TABLE[1] and chosen(shots=5) == TABLE[5]
    assert chosen(shots=1, split=2) == TABLE[2, 1] and chosen("base", split=2) == TABLE["base"]


def test_between_and_beyond_published_shots():
    assert chosen(shots=3) == Schedule(
        200, pytest.approx(0.02), (160,), 20
    )  # half way, as a share of the steps
    assert chosen(shots=2).steps == 150 and chosen(shots=3, split=2).steps == 800
    assert chosen(shots=30) == TABLE[5] == chosen(shots="all")
    steps = [chosen(shots=k).steps for k in range(1, 8)]
    assert steps == sorted(steps)


def test_own_data_are_passed_over_so_many_times():
    own = {"base": Passes(12, 0.01, 500, 20_000), "few": Passes(30, 0.01, 200, 2000)}
    stages = [(60, "finetune"), (4, "finetune"), (10_000, "finetune"), (1000, "base")]
    steps = [choose(own, stage, Args(), pictures=n, batch=4).steps for n, stage in stages]
    assert steps == [450, 200, 2000, 3000]
    schedule = choose(own, "finetune", Args(shots="all"), pictures=60, batch=4)
    assert schedule == Schedule(450, 0.01, (360,), 22)
    # a batch of another size sees every picture as often
    args = Args(batch_size=2)
    assert choose(own, "finetune", args, pictures=60, batch=4).scaled(args, 4)[:2] == (900, 0.005)


def rates(base: float, steps: list[int], **schedule) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = Schedule(1, base, **schedule).of(optimizer)
    return [base * scheduler.lr_lambdas[0](t) for t in steps]


def test_schedule_equals_the_published_ones():
    tfa = rates(0.02, [0, 50, 100, 12000], warmup=100, milestones=(12000, 16000))
    assert tfa == pytest.approx([2e-5, 0.01001, 0.02, 0.002])
    baseline = rates(
        0.05,
        [0, 1500, 2999, 3000, 36000, 72000],
        warmup=3000,
        ratio=0.25,
        milestones=(36000, 72000),
    )
    assert baseline == pytest.approx([0.0125, 0.03125, 0.0499875, 0.05, 0.005, 0.0005])
    # a milestone inside the warm-up multiplies with it
    assert rates(1.0, [5], warmup=10, ratio=0.0, milestones=(5,), gamma=0.5) == pytest.approx(
        [0.25]
    )


def test_another_batch_size_scales_rate_and_steps():
    published = Schedule(1000, 0.02, (700,), 100)
    assert published.scaled(Args(), 16) == Schedule(1000, 0.02, (700,), 100, batch=16)
    assert published.scaled(Args(batch_size=4), 16) == Schedule(4000, 0.005, (2800,), 400, batch=4)
    assert published.scaled(Args(lr=0.5, iters=100), 16) == Schedule(100, 0.5, (70,), 10, batch=16)
    # without a published batch the rate and the steps are what they are
    assert published.scaled(Args(batch_size=4)) == Schedule(1000, 0.02, (700,), 100, batch=4)

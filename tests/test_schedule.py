"""How long a stage trains: published rows, what lies between them, and own data's rule."""

from dataclasses import dataclass

import pytest

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

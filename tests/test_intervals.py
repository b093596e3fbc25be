"""Means and their intervals, against the textbook."""

import math

import pytest

from fewshot.training.folders import mean_interval


def test_three_values():
    mean, half = mean_interval([70.0, 72.0, 74.0])  # s = 2, t(2) = 4.303
    assert mean == 72 and half == pytest.approx(4.303 * 2 / math.sqrt(3))


def test_one_value_has_no_interval_and_many_have_the_normal_one():
    assert mean_interval([5.0]) == (5.0, None)
    values = [0.0, 1.0] * 50
    mean, half = mean_interval(values)
    assert mean == 0.5 and half == pytest.approx(1.984 * math.sqrt(25 / 99) / 10, rel=1e-3)  # t(99)


def test_thirty_one_values_are_the_last_of_the_table():
    _, half = mean_interval([float(i) for i in range(31)])
    assert half == pytest.approx(2.042 * math.sqrt(31 * 32 / 12) / math.sqrt(31))

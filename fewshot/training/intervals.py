"""Means of several runs, and how far off they may be."""

from collections.abc import Sequence

import numpy as np

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; with more it is NORMAL + 2.4 / degrees to 0.1 %
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
STUDENT += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
NORMAL = 1.960


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of independent values, and half the width of its 95 % interval by Student's t; None of one value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), None
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else NORMAL + 2.4 / (n - 1)
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / np.sqrt(n))

"""Means over seeds and how sure they are: standard errors and Student's t intervals.

An interval is written as (mean, half its width).
"""

import functools
import math
import statistics

import numpy as np


@functools.cache
def t975(df: int) -> float:
    """The 97.5% quantile of Student's t with `df` degrees of freedom.

    With t = sqrt(df) tan a, P(|T| < t) is the integral of cos(a)^(df - 1) from 0 to a, divided by
    the same from 0 to pi/2. Summed up on a grid; right to six digits for df up to 1000.

    >>> [round(t975(df), 3) for df in (1, 2, 4, 9)]
    [12.706, 4.303, 2.776, 2.262]
    """
    if df < 1:
        raise ValueError(f"df must be at least 1, got {df}")
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (df - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])  # trapezoids
    return float(np.sqrt(df) * np.tan(np.interp(0.95 * below[-1], below, angle)))


def mean_and_half(values) -> tuple[float, float]:
    """Mean, and half the width of its 95% t interval: t975(n - 1) s / sqrt(n); nan for n = 1.

    >>> mean_and_half([1.0, 3.0])                # s = sqrt(2), so s / sqrt(n) = 1
    (2.0, 12.706...)
    """
    if not len(values):
        raise ValueError("values must not be empty")
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, math.nan
    return mean, t975(len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5


def plus_minus(values: list[float], show="{:.3f}".format) -> str:
    """Mean ± standard error; the mean alone for one value, "-" for none.

    >>> plus_minus([1.0, 3.0]), plus_minus([0.5]), plus_minus([])
    ('2.000 ± 1.000', '0.500', '-')
    """
    if not values:
        return "-"
    text = show(statistics.mean(values))
    if len(values) > 1:
        text += f" ± {show(statistics.stdev(values) / len(values) ** 0.5)}"
    return text

"""Confidence intervals: of a rate, of a median, and of anything by resampling."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
Floats = NDArray[np.float64]


def wilson(successes: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of a rate; sensible at 0 and 1 and for few trials.

    Args:
        successes: 0 to `trials`.
        trials: at least 1.
        level: confidence, 0 to 1.

    Raises:
        ValueError: the counts are impossible.

    Source: Wilson 1927, score interval without continuity correction.
    """
    if not 0 <= successes <= trials or trials < 1:
        msg = f"wilson: impossible counts; got {successes} of {trials}, expected 0 to n of n. Count again."
        raise ValueError(msg)
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    rate = successes / trials
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    centre, scale = rate + z * z / (2 * trials), 1 + z * z / trials
    # At the ends the formula gives exactly 0 and 1, floating point almost.
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if successes == trials else min(1.0, (centre + spread) / scale)
    return low, high


def median_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of the median between two of the sorted values; assumes no distribution.

    The k-th smallest and k-th largest value, with the largest k whose coverage is at least `level`. Fewer than six
    values cannot reach 95 %: then smallest and largest, whose coverage is ``1 - 0.5 ** (n - 1)``.

    Args:
        values: at least one, in any order.
        level: confidence, 0 to 1.

    Raises:
        ValueError: there are no values.

    Source: Conover, Practical Nonparametric Statistics, 3.2 (order statistics and the binomial).
    """
    ordered = sorted(values)
    count = len(ordered)
    if not count:
        msg = "median_interval: no values; got 0, expected at least 1. Take samples first."
        raise ValueError(msg)
    allowed = Fraction((1 - level) / 2) * 2**count  # exact: a float ends at 2 ** 1024
    outside, rank = 1, 0  # in units of 0.5 ** count: P(fewer than rank + 1 values lie below the median)
    while outside <= allowed:
        rank += 1
        outside += math.comb(count, rank)
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[count - rank]


def bootstrap(
    data: Floats | tuple[Floats, ...],
    statistic: Callable[..., float],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the percentile interval of a statistic under resampling of the samples.

    Args:
        data: (n, ...) values; several arrays of equal n are resampled together, which keeps pairs together.
        statistic: takes the arrays and returns a number; resamples where it is not finite are left out.
        seed: of the resampling.
        resamples: how many.
        level: confidence, 0 to 1.

    Raises:
        ValueError: no samples, unequal counts, or the statistic was never finite.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile interval).
    """
    arrays = data if isinstance(data, tuple) else (data,)
    counts = {len(array) for array in arrays}
    if len(counts) != 1 or 0 in counts:
        msg = f"bootstrap: got sample counts {sorted(counts)}, expected one count above 0. Pair the samples."
        raise ValueError(msg)
    count = counts.pop()
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        chosen = generator.integers(0, count, count)
        value = float(statistic(*(array[chosen] for array in arrays)))
        if math.isfinite(value):
            found.append(value)
    if not found:
        msg = "bootstrap: the statistic was never finite; expected a number for most resamples. Use another one."
        raise ValueError(msg)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

"""Whether losses of single removals add up to those of many at once: measured over random sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Pair:
    """One random set of units.

    Attributes:
        size: how many units it removes.
        summed: sum of their losses, each removed alone.
        joint: loss with all of them removed.
    """

    size: int
    summed: float
    joint: float


def random_sets(
    units: Sequence[str], sizes: Sequence[int], count: int, generator: torch.Generator
) -> list[tuple[str, ...]]:
    """Return `count` sets of units in all, of these sizes in turn, drawn evenly; smaller ones first."""
    shares = sorted(sizes[index % len(sizes)] for index in range(count))
    return [
        tuple(units[i] for i in sorted(torch.randperm(len(units), generator=generator)[:size].tolist()))
        for size in shares
    ]


def measured(
    sets: Sequence[tuple[str, ...]], alone: Mapping[str, float], joint: Callable[[tuple[str, ...]], float]
) -> list[Pair]:
    """Return summed and joint losses of sets of units."""
    return [Pair(len(found), sum(alone[unit] for unit in found), joint(found)) for found in sets]


def additivity(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return rank and linear correlation of summed with joint losses, over all sets and for each size, as JSON values.

    Returns:
        ``sets``, ``spearman``, ``pearson``, ``joint_over_summed`` (median), and ``by_size``: the same for sets of one
        size, where only the choice of units differs. A correlation is None where losses do not vary.
    """
    ordered = sorted(pairs, key=lambda pair: pair.size)
    by_size = {str(size): _of(list(group)) for size, group in groupby(ordered, key=lambda pair: pair.size)}
    return {**_of(ordered), "by_size": by_size}


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return the correlation of ranks, equal values sharing the mean of theirs; None where one does not vary."""
    return pearson(_ranks(a), _ranks(b))


def pearson(a: Sequence[float] | NDArray[np.float64], b: Sequence[float] | NDArray[np.float64]) -> float | None:
    """Return the linear correlation; None where one does not vary or there are fewer than two values."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(x) < 2 or not np.ptp(x) or not np.ptp(y):
        return None
    return round(float(np.corrcoef(x, y)[0, 1]), 4)


def _of(pairs: Sequence[Pair]) -> dict[str, Any]:
    summed, joint = [pair.summed for pair in pairs], [pair.joint for pair in pairs]
    ratios = [pair.joint / pair.summed for pair in pairs if pair.summed > 0]
    return {
        "sets": len(pairs),
        "spearman": spearman(summed, joint),
        "pearson": pearson(summed, joint),
        "joint_over_summed": round(float(np.median(ratios)), 4) if ratios else None,
    }


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    found = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(found, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return middle

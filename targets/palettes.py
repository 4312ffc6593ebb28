"""Palettes: weights as codes into a table of a few values, found by one-dimensional k-means.

Values are taken in 16-bit floating point, of which there are no more than 65,536: k-means works on how often each
occurs, so its cost hardly depends on how many weights there are, and it is the same on every machine and in every run.
It begins where the ideal quantizer of many levels has its own (Panter and Dite 1951: their density follows the cube
root of the values') and goes on as Lloyd's until nothing moves.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Halves = NDArray[np.float16]
Codes = NDArray[np.uint8]
_Doubles = NDArray[np.float64]
_ROUNDS, _MOVES, _STILL = 100, 200, 1e-5
"""Steps at most, exchanges of values at most, and how little a step has to help to be the last."""
_PRUNED = 1e-3
"""Share of zeros from which on they are no chance: the table has an entry for zero then, and they stay zero."""


def palettize(values: NDArray[Any], bits: int) -> NDArray[Any]:
    """Return weights with each replaced by the nearest of a few values.

    What has no more different values than the table entries stays as it is in 16 bits, so doing it twice changes
    nothing.

    Args:
        values: finite, below 65,520 in magnitude, any shape, float16 or float32.
        bits: of a code, at most 8.

    Returns:
        The same shape and dtype; at most ``2 ** bits`` different values, each exact in float16. Where a thousandth of
        the values or more is zero, zeros stay zeros.

    Raises:
        ValueError: a value is not finite in float16.
    """
    table, codes = palette_of(values, bits)
    found: NDArray[Any] = table[codes].astype(values.dtype, copy=False)
    return found


def palette_of(values: NDArray[Any], bits: int) -> tuple[Halves, Codes]:
    """Return a table of at most ``2 ** bits`` values in ascending order, and the code of every weight.

    Args, Raises: as `palettize`; there may be no weights, whose table is empty.
    """
    words = _words(values)
    counts = np.bincount(words.ravel(), minlength=1 << 16)
    order, levels = _finite()
    if counts[order].sum() + counts[_MINUS_ZERO] != words.size:
        raise ValueError("got values that are not finite in 16-bit floating point")
    counts[0] += counts[_MINUS_ZERO]
    present = counts[order] > 0
    found = _centers(levels[present], counts[order][present], 1 << bits)
    table = np.unique(found.astype(np.float16).astype(np.float64)).astype(np.float16)
    code_of = np.zeros(1 << 16, np.uint8)
    if table.size:
        code_of[order] = np.searchsorted(_borders(table.astype(np.float64)), levels)
        code_of[_MINUS_ZERO] = code_of[0]
    return table, code_of[words]


def distinct(values: NDArray[Any]) -> int:
    """Return how many different values there are in 16-bit floating point, the two zeros being one."""
    counts = np.bincount(_words(values).ravel(), minlength=1 << 16)
    counts[0] += counts[_MINUS_ZERO]
    counts[_MINUS_ZERO] = 0
    return int(np.count_nonzero(counts))


_MINUS_ZERO = 0x8000


def _words(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Return the bit patterns of values in 16 bits; those of infinity where one is too large."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float16).view(np.uint16)


@lru_cache(1)
def _finite() -> tuple[NDArray[np.intp], _Doubles]:
    """Return the bit patterns of all finite values but minus zero, by value, and the values."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    known = np.flatnonzero(np.isfinite(values))
    known = known[known != _MINUS_ZERO]
    order = known[np.argsort(values[known], kind="stable")]
    return order, values[order]


def _borders(centers: _Doubles) -> _Doubles:
    """Return where the next of some ascending values is as near."""
    return (centers[1:] + centers[:-1]) / 2


def _centers(levels: _Doubles, counts: NDArray[np.intp], size: int) -> _Doubles:
    """Return at most `size` values that values at some levels are near to, in the mean square.

    Args:
        levels: ascending, each once.
        counts: how often each occurs.
        size: of the table.
    """
    if levels.size <= size:
        return levels
    known = _Levels(levels, counts)
    centers, error = known.settled(_spread(levels, counts, size))
    for _ in range(_MOVES):
        other = known.moved(centers)
        if other is None:
            break
        settled, left = known.settled(other)
        if left >= error:
            break
        centers, error = settled, left
    return centers


def _spread(levels: _Doubles, counts: NDArray[np.intp], size: int) -> _Doubles:
    """Return where k-means begins: as dense as the cube root of the values' own density."""
    share = np.cumsum(np.cbrt(counts * np.gradient(levels) ** 2))
    return np.asarray(np.interp((np.arange(size) + 0.5) / size * share[-1], share, levels))


class _Levels:
    """Values and how often each occurs, summed up, so that cells of any size cost the same."""

    def __init__(self, levels: _Doubles, counts: NDArray[np.intp]) -> None:
        zeros = int(counts[levels == 0].sum())
        self._levels, self._keeps_zero = levels, zeros >= max(1, _PRUNED * counts.sum())
        weights = counts.astype(np.float64)
        sums = [np.cumsum(part) for part in (weights, weights * levels, weights * levels * levels)]
        self._sums = np.stack([np.concatenate([[0.0], part]) for part in sums])

    def settled(self, centers: _Doubles) -> tuple[_Doubles, float]:
        """Return what Lloyd's steps make of some values, and the squared error that they leave."""
        error = np.inf
        for _ in range(_ROUNDS):
            bounds = self._bounds(centers)
            held, mean, spread = self._cells(bounds[:-1], bounds[1:])
            before, error = error, float((spread + held * (mean - centers) ** 2).sum())
            if error >= before * (1 - _STILL):
                break
            centers = self._zeroed(np.where(held > 0, mean, centers))
        return centers, error

    def moved(self, centers: _Doubles) -> _Doubles | None:
        """Return the values with the one that serves least taken to where it serves most; None where there is none."""
        bounds = self._bounds(centers)
        held, mean, spread = self._cells(bounds[:-1], bounds[1:])
        middle = np.searchsorted(self._levels, mean, side="right").clip(bounds[:-1], bounds[1:])
        (_, left, below), (_, right, above) = self._cells(bounds[:-1], middle), self._cells(middle, bounds[1:])
        gains = spread - below - above
        costs = held[1:] * held[:-1] / np.maximum(held[1:] + held[:-1], 1) * np.diff(mean) ** 2
        if self._keeps_zero:
            costs[(centers[1:] == 0) | (centers[:-1] == 0)] = np.inf
        lost = int(np.argmin(costs))
        gains[lost : lost + 2] = 0
        split = int(np.argmax(gains))
        if gains[split] <= costs[lost]:
            return None
        merged = np.average(mean[lost : lost + 2], weights=held[lost : lost + 2] + 1e-9)
        rest = np.delete(centers, [lost, lost + 1, split])
        return self._zeroed(np.sort(np.concatenate([rest, [merged, left[split], right[split]]])))

    def _bounds(self, centers: _Doubles) -> NDArray[np.intp]:
        edges = np.searchsorted(self._levels, _borders(centers), side="right")
        return np.concatenate([[0], edges, [self._levels.size]])

    def _cells(self, begin: NDArray[np.intp], end: NDArray[np.intp]) -> tuple[_Doubles, _Doubles, _Doubles]:
        """Return how many values there are between bounds, their mean, and their squared distance from it."""
        held, total, squares = self._sums[:, end] - self._sums[:, begin]
        mean = total / np.maximum(held, 1)
        return held, mean, np.maximum(squares - total * mean, 0)

    def _zeroed(self, centers: _Doubles) -> _Doubles:
        """Return the values with the one whose cell holds zero moved there, where zeros are kept."""
        if self._keeps_zero:
            centers[np.searchsorted(_borders(centers), 0.0)] = 0.0
        return centers

"""From scores of steps and cuts to a depth for every step: the best choice that stays within a budget of compute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from exporter.errors import RecipeError
from exporter.networks.schedule import MAX_PATTERNS

GRAIN = 2000
"""Parts of a whole call in which costs are counted, each rounded up: the budget is never exceeded."""

Floats = NDArray[np.float64]


def best_depths(keep: Floats, costs: Sequence[float], keep_ratio: float) -> list[int]:
    """Return the depth of every step, by the largest sum of scores of all cuts that are computed through.

    A step at depth d computes what lies outside of its d innermost levels, so cuts d + 1 and beyond count for it; the
    cascade is in that sum. The first step has depth 0. Solved exactly, as a knapsack with one choice per step; where
    the network has more levels than graphs are allowed, for every choice of allowed depths.

    Args:
        keep: (steps, levels) at least 0: what computing through the cut of depth 1, 2, ... is worth at a step.
        costs: of depths 0 to levels, from 1 to 0.
        keep_ratio: of the cost of all steps.

    Raises:
        RecipeError: the first step alone costs more than that.
    """
    steps, levels = keep.shape
    if keep_ratio * steps < 1:
        raise RecipeError(
            f"prune.keep_ratio: got {keep_ratio:g}, expected at least {1 / steps:.4g}: the first of {steps} steps "
            "computes everything. Keep more."
        )
    worth = np.concatenate([np.cumsum(keep[:, ::-1], axis=1)[:, ::-1], np.zeros((steps, 1))], axis=1)
    budget = int(np.floor(keep_ratio * steps * GRAIN + 1e-9))
    prices = np.ceil(np.asarray(costs) * GRAIN - 1e-9).astype(int)
    inner = range(1, levels)
    sets = combinations(inner, min(len(inner), MAX_PATTERNS - 1))
    found = [_knapsack(worth, prices, (0, *chosen, levels), budget) for chosen in sets]
    return max(found, key=lambda answer: answer[0])[1]


def _knapsack(worth: Floats, prices: NDArray[np.int_], allowed: Sequence[int], budget: int) -> tuple[float, list[int]]:
    """Return the largest worth within the budget, and the depths that reach it; ties go to the shallower depth."""
    steps = len(worth)
    best = np.zeros(budget + 1)
    taken = np.zeros((steps, budget + 1), np.int8)
    for step in range(steps):
        options = (0,) if step == 0 else allowed
        reached = np.full((len(options), budget + 1), -np.inf)
        for row, depth in enumerate(options):
            price = prices[depth]
            reached[row, price:] = best[: budget + 1 - price] + worth[step, depth]
        choice = reached.argmax(axis=0)
        best = reached[choice, np.arange(budget + 1)]
        taken[step] = np.asarray(options, np.int8)[choice]
    depths, left = [], budget
    for step in reversed(range(steps)):
        depth = int(taken[step, left])
        depths.append(depth)
        left -= int(prices[depth])
    return float(best[budget]), depths[::-1]

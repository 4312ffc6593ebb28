"""The 0-1 knapsack, exactly: which units to give up so that enough is saved at the least cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cheapest(costs: Sequence[float], weights: Sequence[float], least: float) -> list[int] | None:
    """Return the items of least total cost whose weights sum to `least` or more; None where all of them do not.

    Dynamic programming over partial sums that no other beats in both weight and cost, which needs no rounding: weights
    may be parameters or milliseconds. Weights beyond `least` are worth no more than `least`.

    Source: Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation", 1969.

    Args:
        costs: one per item, of any sign.
        weights: one per item, not negative.
        least: what must be reached.
    """
    if sum(weights) < least:
        return None
    weight, cost = np.zeros(1), np.zeros(1)
    steps: list[np.ndarray] = []
    for item_cost, item_weight in zip(costs, weights, strict=True):
        every_weight = np.concatenate([weight, np.minimum(weight + item_weight, max(least, 0.0))])
        every_cost = np.concatenate([cost, cost + item_cost])
        order = np.lexsort((every_cost, -every_weight))
        sorted_cost = every_cost[order]
        before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_cost)[:-1]])
        kept = order[sorted_cost < before]
        steps.append(kept)
        weight, cost = every_weight[kept], every_cost[kept]
    place = int(np.argmax(weight))  # the sum of floats may end a rounding below `least`
    chosen = []
    for item in range(len(steps) - 1, -1, -1):
        origin = int(steps[item][place])
        width = len(steps[item - 1]) if item else 1
        if origin >= width:
            chosen.append(item)
        place = origin % width
    return chosen[::-1]

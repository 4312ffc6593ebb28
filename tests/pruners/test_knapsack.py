"""The knapsack: against every subset."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.pruners.knapsack import cheapest

ITEMS = st.lists(st.tuples(st.floats(-1, 10), st.floats(0, 10) | st.integers(0, 4)), max_size=8)


@given(ITEMS, st.floats(0, 30))
def test_nothing_cheaper_saves_enough(items, least):
    costs, weights = [cost for cost, _ in items], [weight for _, weight in items]
    every = chain.from_iterable(combinations(range(len(items)), n) for n in range(len(items) + 1))
    enough = [found for found in every if sum(weights[i] for i in found) >= least]
    chosen = cheapest(costs, weights, least)
    if not enough:
        assert chosen is None or sum(weights[i] for i in chosen) >= least - 1e-9
        return
    best = min(sum(costs[i] for i in found) for found in enough)
    assert chosen is not None
    assert sum(weights[i] for i in chosen) >= least - 1e-9
    assert sum(costs[i] for i in chosen) == pytest.approx(best, abs=1e-9)


def test_greedy_by_ratio_would_lose_here():
    """The item of the best ratio (6 for 1) leaves no room for the two that fill the need exactly."""
    assert cheapest([1.0, 5.0, 5.0], [6.0, 5.0, 5.0], 10) == [0, 1]
    assert cheapest([4.0, 3.0, 3.0], [6.0, 5.0, 5.0], 10) == [1, 2]


def test_hundreds_of_thousands_of_parameters_need_no_rounding():
    assert cheapest([1.0, 1.0, 1.9], [500_001, 499_999, 1_000_000], 1_000_001) is not None
    assert cheapest([1.0, 1.0, 1.9], [500_001, 499_999, 1_000_000], 1_000_000) == [2]


def test_what_is_out_of_reach_is_told():
    assert cheapest([1.0, 1.0], [2.0, 3.0], 5.1) is None
    assert cheapest([], [], 0.0) == []

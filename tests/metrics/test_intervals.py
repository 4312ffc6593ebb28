from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from exporter.metrics.intervals import bootstrap, median_interval, wilson


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.9, 0.95]))
def test_wilson_is_scipys(counts: tuple[int, int], level: float) -> None:
    expected = stats.binomtest(*counts).proportion_ci(confidence_level=level, method="wilson")
    assert wilson(*counts, level=level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_known_values() -> None:
    # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for right, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(right, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(29, 29)[1] == 1.0


@pytest.mark.parametrize(("right", "trials"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(right: int, trials: int) -> None:
    with pytest.raises(ValueError, match="impossible counts"):
        wilson(right, trials)


def test_median_interval_ranks_of_the_tables() -> None:
    # Conover, table A3 (p = 0.5): 95 % limits for the median
    for count, rank in ((6, 1), (9, 2), (10, 2), (20, 6), (30, 10), (40, 14), (50, 18)):
        values = np.random.default_rng(0).permutation(np.arange(1, count + 1))
        assert median_interval(list(values)) == (rank, count + 1 - rank)


@given(st.integers(6, 1500))
def test_median_interval_is_the_shortest_that_covers(count: int) -> None:
    low, high = median_interval(list(range(1, count + 1)))
    assert low + high == count + 1
    assert stats.binom.cdf(low - 1, count, 0.5) <= 0.025 < stats.binom.cdf(low, count, 0.5)


def test_median_interval_of_few_values_is_their_range() -> None:
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (1.0, 5.0)
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_bootstrap_of_a_mean_is_close_to_the_t_interval() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 200)
    expected = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert bootstrap(values, np.mean, seed=0) == pytest.approx(expected, abs=0.05)


def test_bootstrap_is_repeatable_and_seeded() -> None:
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap(values, np.mean, seed=3) == bootstrap(values, np.mean, seed=3)
    assert bootstrap(values, np.mean, seed=3) != bootstrap(values, np.mean, seed=4)


def test_bootstrap_keeps_pairs_together() -> None:
    a = np.random.default_rng(2).normal(10, 3, 100)
    assert bootstrap((a * 2, a), lambda x, y: x.sum() / y.sum(), seed=0) == pytest.approx((2.0, 2.0))


def test_bootstrap_refuses_what_it_cannot_resample() -> None:
    for data in (np.zeros(0), (np.zeros(3), np.zeros(4))):
        with pytest.raises(ValueError, match="sample counts"):
            bootstrap(data, np.mean, seed=0)
    with pytest.raises(ValueError, match="never finite"):
        bootstrap(np.zeros(3), lambda _: float("nan"), seed=0)

"""Palettes: few values, the best there are or nearly so, the same every time, and zeros stay zeros."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from targets.palettes import distinct, palette_of, palettize

BITS = [2, 4, 6, 8]


def drawn(count: int = 40_000, *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(5, count) * 0.03).astype(np.float32)


def error(values: np.ndarray, found: np.ndarray) -> float:
    return float(np.mean((values.astype(np.float64) - found.astype(np.float64)) ** 2))


def uniform(values: np.ndarray, bits: int) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    step = (high - low) / (2**bits - 1)
    return low + step * np.round((values - low) / step)


class TestPalettize:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_few_values_each_exact_in_sixteen_bits(self, bits: int, dtype: type) -> None:
        values = drawn().astype(dtype).reshape(100, 4, 100)
        found = palettize(values, bits)
        assert found.shape == values.shape
        assert found.dtype == dtype
        assert len(np.unique(found.astype(np.float64))) == 2**bits
        assert np.array_equal(found.astype(np.float16).astype(dtype), found)

    @settings(max_examples=50, deadline=None)
    @given(
        arrays(np.float32, st.integers(0, 300), elements=st.floats(-60000, 60000, width=16)),
        st.integers(1, 8),
    )
    def test_twice_is_once(self, values: np.ndarray, bits: int) -> None:
        once = palettize(values, bits)
        assert distinct(once) <= 2**bits
        assert np.array_equal(palettize(once, bits), once)
        assert np.array_equal(palettize(values.copy(), bits), once)

    @pytest.mark.parametrize("bits", BITS)
    def test_better_than_even_steps(self, bits: int) -> None:
        values = drawn()
        assert error(values, palettize(values, bits)) < 0.8 * error(values, uniform(values, bits))

    @pytest.mark.parametrize(("bits", "worse"), [(2, 1.001), (4, 1.01), (6, 1.05), (8, 1.05)])
    def test_nearly_the_best_there_is(self, bits: int, worse: float) -> None:
        kmeans = pytest.importorskip("coremltools._deps")._kmeans1d  # exact, by dynamic programming
        values = drawn().astype(np.float16)
        levels, counts = np.unique(values.astype(np.float32), return_counts=True)
        best = kmeans.cluster(levels, 2**bits, weights=counts)
        least = float(np.sum(counts * (levels - np.take(best.centroids, best.clusters)) ** 2)) / values.size
        assert error(values, palettize(values, bits)) < worse * least

    def test_far_values_do_not_take_the_table(self) -> None:
        rng = np.random.default_rng(3)
        values = np.concatenate([rng.normal(0, 0.01, 50_000), [3.0, -2.0, 2.5]])
        assert error(values, palettize(values.astype(np.float32), 8)) < 1e-8

    def test_pruned_weights_stay_zero(self) -> None:
        values = drawn()
        values[::2] = 0
        for bits in BITS:
            found = palettize(values, bits)
            assert not found[::2].any()
            assert len(np.unique(found)) == 2**bits

    @pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e6])
    def test_what_is_not_finite_is_refused(self, wrong: float) -> None:
        with pytest.raises(ValueError, match="not finite in 16-bit"):
            palettize(np.array([1, wrong], np.float32), 4)


class TestPaletteOf:
    def test_table_and_codes_make_the_values(self) -> None:
        values = drawn()
        table, codes = palette_of(values, 6)
        assert np.all(np.diff(table.astype(np.float32)) > 0)
        assert codes.dtype == np.uint8
        assert np.array_equal(table[codes].astype(np.float32), palettize(values, 6))

    def test_each_weight_has_its_nearest_value(self) -> None:
        values = drawn().astype(np.float16)
        table, codes = palette_of(values, 4)
        far = np.abs(values.astype(np.float64)[:, None] - table.astype(np.float64))
        assert np.allclose(far[np.arange(len(codes)), codes], far.min(axis=1), atol=1e-12)

    def test_millions_of_weights_are_counted_right(self) -> None:
        """numpy 2.3 sorts millions of 16-bit floats wrongly on some processors; nothing here may rest on that."""
        values = np.random.default_rng(0).normal(0, 0.02, 4_000_000).astype(np.float16)
        assert distinct(values) == len(np.unique(values.astype(np.float32)))
        assert distinct(palettize(values, 4)) == 16

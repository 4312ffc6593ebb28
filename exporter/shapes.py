"""Engines with open shapes: latency at each point that the recipe names, and what open shapes cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.metrics.latency import Latency, Timer
from exporter.metrics.measurement import Measurement
from exporter.metrics.place import Place
from exporter.recipe import Shapes
from targets.base import Session, TensorSpec

Array = NDArray[Any]
Feeds = Mapping[str, Array]
FIXED = "fixed shapes"
_OPEN = -1


@dataclass(frozen=True)
class Point:
    """One corner of the range.

    Attributes:
        batch: images per call.
        size: side of the image in pixels.
    """

    batch: int
    size: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.size} x {self.size}"


def points_of(shapes: Shapes, size: int) -> tuple[Point, ...]:
    """Return every combination of the named values; `size` is the recipe's own, where it names none."""
    return tuple(Point(*pair) for pair in product(shapes.batch, shapes.size or (size,)))


def feeds_at(
    feeds: Feeds, inputs: tuple[TensorSpec, ...], point: Point, sampling: Mapping[str, Any]
) -> dict[str, Array]:
    """Return recorded inputs grown or cut to a point: rows repeat, and so do the latent's rows and columns, or places.

    Args:
        feeds: of one call at the recipe's own batch and size.
        inputs: of the session; only axes that are open (-1) change.
        point: where to.
        sampling: the recipe's, size resolved; tells what the feeds were recorded at.
    """
    found: dict[str, Array] = {}
    for spec in inputs:
        array = np.asarray(feeds[spec.name], dtype=spec.dtype)
        for axis, length in enumerate(spec.shape):
            if length == _OPEN:
                factor = _factor(spec, axis, point, sampling)
                array = array.take(range(int(array.shape[axis] * factor)), axis, mode="wrap")
        found[spec.name] = np.ascontiguousarray(array) if array.ndim else array
    return found


def _factor(spec: TensorSpec, axis: int, point: Point, sampling: Mapping[str, Any]) -> Fraction:
    """Return how much longer an open axis is: with images, with their side, or, where places are packed, its square."""
    if spec.name == "img_ids" or axis == 1:
        return Fraction(point.size, sampling["size"]) ** 2
    return Fraction(point.batch, sampling["batch"]) if axis == 0 else Fraction(point.size, sampling["size"])


def measure_points(
    session: Session, feeds: Feeds, points: tuple[Point, ...], place: Place, timer: Timer, sampling: Mapping[str, Any]
) -> Measurement:
    """Return ``latency.shapes_ms``: one call at the slowest point; every point is in the note and the detail."""
    taken: dict[Point, Latency] = {}
    for point in points:
        given = feeds_at(feeds, session.inputs, point, sampling)
        taken[point] = timer.measure(_call(session, given))
    worst = max(taken.values(), key=lambda latency: latency.median_ms)
    low, high = worst.interval_ms
    rows = [
        {
            "batch": point.batch,
            "size": point.size,
            "median_ms": latency.median_ms,
            "interval_ms": list(latency.interval_ms),
            "samples": len(latency.samples_ms),
        }
        for point, latency in taken.items()
    ]
    note = "; ".join(f"{point}: {latency.median_ms:.4g} ms" for point, latency in taken.items())
    return place.measured(
        "latency.shapes_ms",
        worst.median_ms,
        "ms",
        low=low,
        high=high,
        samples=len(worst.samples_ms),
        note=f"the slowest of {note}",
        detail={"points": rows},
    )


def measure_cost(session: Session, fixed: Session, feeds: Feeds, place: Place, timer: Timer) -> Measurement:
    """Return ``latency.shapes_cost``: one call with open shapes over the same call with fixed ones, timed in pairs."""
    pairs = timer.interleaved(_call(session, feeds), _call(fixed, feeds))
    ratio = pairs.ratio(FIXED)
    return place.measured(
        "latency.shapes_cost",
        ratio.value,
        "",
        low=ratio.low,
        high=ratio.high,
        samples=ratio.pairs,
        ratio=ratio,
        note=f"at the recipe's own batch and size: {pairs.a.median_ms:.4g} ms with open shapes, "
        f"{pairs.b.median_ms:.4g} ms with fixed ones",
    )


def _call(session: Session, feeds: Feeds) -> Callable[[], object]:
    return lambda: session(feeds)

"""Latency: warm-up until stable, median with an interval, and interleaved pairs for every claim of "faster"."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exporter.errors import ComponentFailed
from exporter.metrics.intervals import median_interval
from exporter.metrics.machine import Mode
from exporter.metrics.measurement import Measurement, Ratio
from exporter.metrics.place import Place

Call = Callable[[], object]
"""One inference, finished when it returns: a call that queues work on a device must wait for it."""

Clock = Callable[[], int]
LEAST_SAMPLES = 30
FEWEST_SAMPLES = 3
MS = 1e-6


@dataclass(frozen=True)
class Latency:
    """Samples of one call, taken under one mode.

    Attributes:
        samples_ms: in the order taken.
        warmup: calls before the first sample.
        stable: whether the warm-up ended because the times had settled.
        mode: what the machine was like.
        asked: how many samples were asked for.
    """

    samples_ms: tuple[float, ...]
    warmup: int
    stable: bool
    mode: Mode
    asked: int = LEAST_SAMPLES

    @property
    def median_ms(self) -> float:
        """Median."""
        return statistics.median(self.samples_ms)

    @property
    def p90_ms(self) -> float:
        """90th percentile, interpolated."""
        return float(np.quantile(self.samples_ms, 0.9))

    @property
    def interval_ms(self) -> tuple[float, float]:
        """Interval of the median by order statistics, 95 % from six samples on."""
        return median_interval(self.samples_ms)

    def note(self) -> str:
        """Return how the samples were taken, and what is wrong with them."""
        count = len(self.samples_ms)
        parts = [f"{count} samples after {self.warmup} calls of warm-up"]
        if count < self.asked:
            parts.append(f"the time budget allowed {count} of {self.asked} samples")
        if count < 6:
            parts.append("the interval is smallest to largest, less than 95 %")
        if not self.stable:
            parts.append("the times had not settled when the warm-up's share of the budget was spent")
        return "; ".join([*parts, *self.mode.warnings()])


@dataclass(frozen=True)
class Pairs:
    """Two calls timed pair by pair in alternating order.

    Attributes:
        a: the one in question.
        b: the baseline.
    """

    a: Latency
    b: Latency

    def ratio(self, to: str) -> Ratio:
        """Return the median of a / b over the pairs, with its interval; `to` names the baseline."""
        ratios = [x / y for x, y in zip(self.a.samples_ms, self.b.samples_ms, strict=True)]
        low, high = median_interval(ratios)
        return Ratio(to=to, value=statistics.median(ratios), low=low, high=high, pairs=len(ratios))


@dataclass(frozen=True)
class Timer:
    """Times calls.

    Warm-up: windows of `window` calls; it ends when the medians of two successive windows differ by at most
    `tolerance`, or when `warmup_share` of the budget is spent. There is at least one call of warm-up and at least
    `FEWEST_SAMPLES` samples, whatever the budget.

    Attributes:
        samples: how many to take.
        budget_s: seconds for warm-up and samples together; when it is spent, fewer samples are taken and said.
        window: calls per window of the warm-up.
        tolerance: relative difference of two medians that counts as settled.
        warmup_share: of the budget.
        clock: nanoseconds, monotonic.
        mode: reads the machine's mode; called once per result.
    """

    samples: int = LEAST_SAMPLES
    budget_s: float = 60.0
    window: int = 5
    tolerance: float = 0.05
    warmup_share: float = 1 / 3
    clock: Clock = time.perf_counter_ns
    mode: Callable[[], Mode] = field(default=Mode.read)

    def measure(self, call: Call) -> Latency:
        """Return the latency of a call."""
        start = self.clock()
        warmup, stable = self._warm_up(call, start, self.budget_s * self.warmup_share)
        taken: list[float] = []
        while len(taken) < self.samples and (len(taken) < FEWEST_SAMPLES or self._seconds(start) < self.budget_s):
            taken.append(self._once(call))
        return Latency(tuple(taken), warmup, stable, self.mode(), self.samples)

    def interleaved(self, a: Call, b: Call) -> Pairs:
        """Time two calls pair by pair: a b, b a, a b, ... so that drift of the machine falls on both.

        With the same call twice it is the A/A control: the ratio's interval should hold 1.
        """
        start = self.clock()
        warm_a = self._warm_up(a, start, self.budget_s * self.warmup_share / 2)
        warm_b = self._warm_up(b, self.clock(), self.budget_s * self.warmup_share / 2)
        taken_a: list[float] = []
        taken_b: list[float] = []
        while len(taken_a) < self.samples and (len(taken_a) < FEWEST_SAMPLES or self._seconds(start) < self.budget_s):
            if len(taken_a) % 2:
                taken_b.append(self._once(b))
                taken_a.append(self._once(a))
            else:
                taken_a.append(self._once(a))
                taken_b.append(self._once(b))
        mode = self.mode()
        return Pairs(
            Latency(tuple(taken_a), *warm_a, mode, self.samples),
            Latency(tuple(taken_b), *warm_b, mode, self.samples),
        )

    def _warm_up(self, call: Call, start: int, budget_s: float) -> tuple[int, bool]:
        calls = 0
        before: float | None = None
        while True:
            times: list[float] = []
            while len(times) < self.window:
                times.append(self._once(call))
                if self._seconds(start) >= budget_s:
                    return calls + len(times), False
            calls += len(times)
            median = statistics.median(times)
            if before is not None and abs(median - before) <= self.tolerance * before:
                return calls, True
            before = median

    def _once(self, call: Call) -> float:
        start = self.clock()
        call()
        return (self.clock() - start) * MS

    def _seconds(self, start: int) -> float:
        return (self.clock() - start) * 1e-9


def latency_measurements(latency: Latency, place: Place, ratio: Ratio | None = None) -> list[Measurement]:
    """Return ``latency.median_ms`` (interval, paired ratio) and ``latency.p90_ms``.

    Args:
        latency: of this cell.
        place: the cell.
        ratio: to the dense engine on the same target, from `Timer.interleaved`.
    """
    low, high = latency.interval_ms
    detail: dict[str, Any] = {"mode": latency.mode.to_json(), "warmup": latency.warmup, "stable": latency.stable}
    count = len(latency.samples_ms)
    return [
        place.measured(
            "latency.median_ms",
            latency.median_ms,
            "ms",
            low=low,
            high=high,
            samples=count,
            ratio=ratio,
            note=latency.note(),
            detail={**detail, "samples_ms": list(latency.samples_ms)},
        ),
        place.measured("latency.p90_ms", latency.p90_ms, "ms", samples=count, note=latency.note(), detail=detail),
    ]


def check_comparable(a: Latency, b: Latency) -> None:
    """Refuse two latencies taken under different modes.

    Raises:
        ComponentFailed: they were; the message names what differs.
    """
    differing = a.mode.differs(b.mode)
    if differing:
        got, want = a.mode.settings(), b.mode.settings()
        told = ", ".join(f"{name} {got.get(name)!r} against {want.get(name)!r}" for name in differing)
        msg = f"latency: taken under different modes; got {told}, expected equal ones. Measure both in one run."
        raise ComponentFailed(msg)

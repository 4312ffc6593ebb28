from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ComponentFailed
from exporter.metrics.latency import Latency, Pairs, Timer, check_comparable, latency_measurements
from exporter.metrics.machine import Mode, cpu_model, usable_cores
from exporter.metrics.place import Place
from exporter.timing import Timing, latency_of

PLACE = Place("1-pruned", "openvino", "unet")
MODE = Mode(threads=2, cpu="a processor", cores=2, governor="performance", turbo="on", power="mains", load=0.4)


class FakeClock:
    """Time that passes only when something is called."""

    def __init__(self) -> None:
        self.now = 0
        self.order = ""

    def __call__(self) -> int:
        return self.now

    def work(self, times_ms: Iterator[float] | float, name: str = "") -> Callable[[], None]:
        def call() -> None:
            self.now += round((times_ms if isinstance(times_ms, float) else next(times_ms)) * 1e6)
            self.order += name

        return call


def timer(clock: FakeClock, **changes: Any) -> Timer:
    return Timer(clock=clock, mode=lambda: MODE, **changes)


def falling(steady: float) -> Iterator[float]:
    """Slow at first, as a machine that warms up, then steady with a ripple."""
    for index in range(10_000):
        yield steady + 50 * 0.7**index + 0.01 * (index % 3)


def test_warm_up_ends_when_windows_agree_and_is_left_out() -> None:
    clock = FakeClock()
    found = timer(clock).measure(clock.work(falling(10.0)))
    assert found.stable
    assert found.warmup % 5 == 0
    assert found.warmup >= 10
    assert len(found.samples_ms) == 30
    assert max(found.samples_ms) < 10.3
    assert found.median_ms == pytest.approx(statistics.median(found.samples_ms))
    low, high = found.interval_ms
    assert (low, high) == (sorted(found.samples_ms)[9], sorted(found.samples_ms)[20])
    assert "30 samples after" in found.note()


def test_constant_call_needs_two_windows() -> None:
    clock = FakeClock()
    found = timer(clock).measure(clock.work(3.0))
    assert (found.warmup, found.stable) == (10, True)
    assert (found.median_ms, found.p90_ms, found.interval_ms) == (3.0, 3.0, (3.0, 3.0))


def test_unsteady_call_is_measured_and_said() -> None:
    clock = FakeClock()
    rising = (10.0 * 1.3**index for index in range(10_000))
    found = timer(clock, budget_s=30.0).measure(clock.work(rising))
    assert not found.stable
    assert "had not settled" in found.note()


def test_slow_call_gets_fewer_samples_and_says_so() -> None:
    clock = FakeClock()
    found = timer(clock, budget_s=60.0).measure(clock.work(6000.0))
    assert found.warmup == 4  # a third of the budget
    assert len(found.samples_ms) == 6
    assert clock.now <= 61e9
    assert "the time budget allowed 6 of 30 samples" in found.note()


def test_very_slow_call_still_gets_three_samples_after_one_of_warm_up() -> None:
    clock = FakeClock()
    found = timer(clock, budget_s=1.0).measure(clock.work(iter([9000.0, 5000.0, 7000.0, 6000.0])))
    assert (found.warmup, found.samples_ms) == (1, (5000.0, 7000.0, 6000.0))
    assert found.interval_ms == (5000.0, 7000.0)
    assert "smallest to largest, less than 95 %" in found.note()


def test_a_call_below_the_clocks_resolution_ends() -> None:
    clock = FakeClock()
    assert timer(clock).measure(clock.work(0.0)).median_ms == 0.0


def test_pairs_alternate_and_share_the_drift() -> None:
    """A machine that slows down by half over the run moves both medians, and not the ratio."""
    clock = FakeClock()

    def drifting(ms: float) -> Iterator[float]:
        while True:
            yield ms * (1 + clock.now / 4e9)

    pairs = timer(clock).interleaved(clock.work(drifting(8.0), "a"), clock.work(drifting(10.0), "b"))
    assert clock.order.endswith("abbaabba")
    assert clock.order[-60:].count("a") == 30
    ratio = pairs.ratio("0-dense")
    assert ratio.to == "0-dense"
    assert ratio.pairs == 30
    assert ratio.value == pytest.approx(0.8, abs=0.01)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.high - ratio.low < 0.02
    assert max(pairs.b.samples_ms) / min(pairs.b.samples_ms) > 1.1


def test_control_of_a_call_with_itself_holds_one() -> None:
    clock = FakeClock()
    call = clock.work(10 + (index * 7919 % 13) / 10 for index in range(10_000))
    ratio = timer(clock).interleaved(call, call).ratio("itself")
    assert ratio.low <= 1.0 <= ratio.high


def test_slow_pairs_stay_within_the_budget() -> None:
    clock = FakeClock()
    pairs = timer(clock, budget_s=30.0).interleaved(clock.work(1000.0), clock.work(2000.0))
    assert 3 <= len(pairs.a.samples_ms) == len(pairs.b.samples_ms) < 30
    assert clock.now <= 34e9
    assert pairs.ratio("0-dense").value == 0.5


def test_real_clock_measures_a_real_sleep() -> None:
    import time

    found = Timer(samples=5, window=1, budget_s=5.0).measure(lambda: time.sleep(0.01))
    assert found.median_ms >= 10.0


def test_measurements_carry_everything() -> None:
    clock = FakeClock()
    pairs = timer(clock).interleaved(clock.work(8.0), clock.work(10.0))
    median, p90 = latency_measurements(pairs.a, PLACE, pairs.ratio("0-dense"))
    assert (median.name, median.value, median.unit, median.samples) == ("latency.median_ms", 8.0, "ms", 30)
    assert median.ratio is not None
    assert median.ratio.value == 0.8
    assert median.detail["mode"] == MODE.to_json()
    assert len(median.detail["samples_ms"]) == 30
    assert (p90.name, p90.value, p90.low, p90.ratio) == ("latency.p90_ms", 8.0, None, None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"threads": 4}, "threads 2 against 4"),
        ({"governor": "powersave"}, "governor 'performance' against 'powersave'"),
        ({"power": "battery", "turbo": "off"}, "power 'mains' against 'battery', turbo 'on' against 'off'"),
        ({"settings_of_run": {"batch": 2}}, "batch None against 2"),
    ],
)
def test_different_modes_are_not_compared(change: dict[str, Any], told: str) -> None:
    a = Latency((1.0,), 1, True, MODE)
    check_comparable(a, Latency((2.0,), 1, True, replace(MODE, load=7.0)))
    with pytest.raises(ComponentFailed, match=told):
        check_comparable(a, Latency((2.0,), 1, True, replace(MODE, **change)))


def test_busy_machine_and_battery_are_noted() -> None:
    busy = Latency((1.0,) * 30, 1, True, replace(MODE, load=7.0, power="battery"))
    assert "the machine was busy (load 7.0 on 2 cores); on battery" in busy.note()
    assert "busy" not in Latency((1.0,) * 30, 1, True, MODE).note()


def test_pairs_of_unequal_length_are_a_bug() -> None:
    a, b = Latency((1.0,), 1, True, MODE), Latency((1.0, 2.0), 1, True, MODE)
    with pytest.raises(ValueError, match="zip"):
        Pairs(a, b).ratio("0-dense")


@pytest.mark.parametrize(
    ("files", "governor", "turbo"),
    [
        ({}, "unknown", "unknown"),
        ({"cpu0/cpufreq/scaling_governor": "powersave\n", "intel_pstate/no_turbo": "0\n"}, "powersave", "on"),
        ({"intel_pstate/no_turbo": "1\n"}, "unknown", "off"),
        ({"cpufreq/boost": "1\n"}, "unknown", "on"),
        ({"cpufreq/boost": "0\n", "cpu0/cpufreq/scaling_governor": ""}, "unknown", "off"),
    ],
)
def test_mode_is_read_from_the_kernels_files(tmp_path: Path, files: dict[str, str], governor: str, turbo: str) -> None:
    for name, content in files.items():
        path = tmp_path / "devices/system/cpu" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    mode = Mode.read(threads=3, settings={"batch": 2}, system=tmp_path)
    assert (mode.governor, mode.turbo, mode.threads) == (governor, turbo, 3)
    assert mode.settings()["batch"] == 2
    assert mode.cores == usable_cores() >= 1


def test_processor_is_named(tmp_path: Path) -> None:
    table = tmp_path / "cpuinfo"
    table.write_text("processor : 0\nmodel name\t: Some CPU @ 2.0 GHz\n")
    assert cpu_model(table) == "Some CPU @ 2.0 GHz"
    assert cpu_model(tmp_path / "none")


class OnDevice:
    """A session that takes no time, and whose device says that it took 2 ms."""

    inputs = outputs = ()

    def __call__(self, feeds: object) -> dict[str, object]:
        return {}

    def timed(self, feeds: object) -> tuple[dict[str, object], float]:
        return {}, 2.0


def test_what_a_devices_own_clock_says_stands_beside_the_call() -> None:
    place, timer = Place("0-dense", "trt", "unet"), Timer(samples=5, budget_s=1.0)
    found = latency_of(Timing(OnDevice(), [{}], place, timer, is_denoiser=True), None)
    by_name = {item.name: item for item in found}
    assert by_name["latency.device_ms"].value == 2.0
    assert by_name["latency.device_ms"].samples == 5
    assert by_name["latency.median_ms"].value < 1.0
    plain = latency_of(Timing(lambda feeds: {}, [{}], place, timer, is_denoiser=False), None)
    assert {item.name for item in plain} == {"latency.median_ms", "latency.p90_ms"}

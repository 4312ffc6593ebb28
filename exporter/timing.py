"""How fast a component of an engine is, against what, and what the engine costs a device; needs no torch."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from exporter.loops import loop_of_calls, scheduled_latency
from exporter.metrics.intervals import median_interval
from exporter.metrics.latency import Timer, latency_measurements
from exporter.metrics.machine import Mode
from exporter.metrics.measurement import Measurement, Ratio
from exporter.metrics.place import DENSE, Place
from exporter.metrics.size import memory_measurement, run_child, size_measurement
from exporter.networks.chain import ChainSession
from targets.base import DeviceTimed, Session

Feeds = Mapping[str, NDArray[Any]]
Open = Callable[[], Session]
_LONGEST_S = 600
_IN_PAIRS = ("latency.median_ms", "latency.loop_ms")
"""What is told as a ratio to the dense engine."""


@dataclass(frozen=True)
class Timing:
    """A component that is timed.

    Attributes:
        session: of its engine.
        calls: recorded, with the rows that the engine takes; one per step for a denoiser.
        place: where the measurements go, with its component.
        timer: of its target.
        is_denoiser: whether its calls make a loop.
        untimed: why times taken here say nothing; empty where they do.
    """

    session: Session
    calls: Sequence[Feeds]
    place: Place
    timer: Timer
    is_denoiser: bool
    untimed: str = ""

    def call(self) -> object:
        """Make the call that stands for all."""
        return self.session(self.calls[0])


def timer_of(seconds: float, batch: int, target: str, options: Mapping[str, Any]) -> Timer:
    """Return the timer of a target, whose mode has what must be equal for two of its latencies to be compared."""
    settings = {"batch": batch, "target": target, **options}
    return Timer(budget_s=seconds, mode=lambda: Mode.read(threads=options.get("threads"), settings=settings))


def latency_of(it: Timing, open_dense: Open | None) -> list[Measurement]:
    """Time a component; against the dense engine of the same target, pair by pair, where there is one."""
    if it.untimed:
        return [it.place.missing("latency.median_ms", "ms", it.untimed)]
    dense = None if open_dense is None else open_dense()
    ratio = None
    try:
        if isinstance(it.session, ChainSession):
            return scheduled_latency(it.session, it.calls, dense, it.place, it.timer)
        if dense is None:
            latency = it.timer.measure(it.call)
        else:
            pairs = it.timer.interleaved(it.call, lambda: dense(it.calls[0]))
            latency, ratio = pairs.a, pairs.ratio(DENSE)
    finally:
        if dense is not None:
            dense.close()
    loop = [loop_of_calls(latency, len(it.calls), it.place, ratio)] if it.is_denoiser else []
    return [*latency_measurements(latency, it.place, ratio), *_on_device(it), *loop]


def _on_device(it: Timing) -> list[Measurement]:
    """Return ``latency.device_ms``, of sessions whose device has a clock: the network without transfers."""
    if not isinstance(it.session, DeviceTimed):
        return []
    taken = [it.session.timed(it.calls[0])[1] for _ in range(it.timer.samples)]
    low, high = median_interval(taken)
    note = "between events of the device, without moving inputs and answers; right after the calls that were timed"
    value = statistics.median(taken)
    return [it.place.measured("latency.device_ms", value, "ms", low=low, high=high, samples=len(taken), note=note)]


def times_of_dense(dense: Iterable[Measurement], place: Place) -> list[Measurement]:
    """Return what a component of the dense engine took as what one with the very same files takes.

    Timed again, pair by pair, it would be 1 within its interval, for the longest of the budget where calls are long.

    Args:
        dense: measurements of the dense engine on the same target.
        place: the cell, with the component.
    """
    note = f"the engine of {DENSE}, file by file: its times, not taken again"
    same = Ratio(to=DENSE, value=1.0, low=1.0, high=1.0, pairs=0)
    return [
        item.model_copy(
            update={
                "state": place.state,
                "ratio": same if item.name in _IN_PAIRS else item.ratio,
                "note": f"{note}; {item.note}" if item.note else note,
            }
        )
        for item in dense
        if item.component == place.component and item.name.startswith("latency.")
    ]


def over_float(it: Timing, rivals: Mapping[str, Open]) -> Measurement:
    """Time a quantized component against itself in float, pair by pair; the fastest float engine counts.

    Args:
        it: the quantized one.
        rivals: what the float engine computes in, such as ``bf16``, -> opens it.
    """
    ratios = {}
    for precision, open_rival in rivals.items():
        with closing(open_rival()) as other:
            pairs = it.timer.interleaved(it.call, lambda other=other: other(it.calls[0]))  # type: ignore[misc]
        ratios[precision] = pairs.ratio(f"the same in {precision}")
    worst = max(ratios.values(), key=lambda ratio: ratio.value)
    return it.place.measured(
        "latency.over_float",
        worst.value,
        "",
        low=worst.low,
        high=worst.high,
        samples=worst.pairs,
        ratio=worst,
        note=f"one call over {worst.to}, the fastest float engine of {', '.join(ratios)} here",
        detail={precision: ratio.model_dump() for precision, ratio in ratios.items()},
    )


def footprint(
    engine: Path,
    target: str,
    options: Mapping[str, Any],
    place: Place,
    fed: Mapping[Path, Feeds],
    untimed: str = "",
) -> list[Measurement]:
    """Load an engine in a process of its own, without torch, and call it as it was fed: what it costs a device.

    Args:
        engine: its folder.
        target: type.
        options: of the target.
        place: the cell.
        fed: what the target opens, by its place in the engine's folder -> the inputs of a call.
        untimed: why it is not loaded for that here; empty where it is.
    """
    components = dict.fromkeys(path.parts[0] for path in fed)
    sizes = [size_measurement(place, engine), *(size_measurement(place.at(name), engine / name) for name in components)]
    if untimed:
        return [place.missing("load_ms", "ms", untimed), place.missing("peak_rss_mib", "MiB", untimed), *sizes]
    shapes = {path.name: {name: array.shape for name, array in feeds.items()} for path, feeds in fed.items()}
    places = [str(engine / path) for path in fed]
    command = [sys.executable, "-m", "targets.footprint", target, json.dumps(dict(options)), json.dumps(shapes)]
    child = run_child([*command, *places], timeout_s=_LONGEST_S, paths=sys.path)
    times = json.loads(child.output.strip().splitlines()[-1])
    load = place.measured(
        "load_ms",
        sum(times["load_ms"].values()),
        "ms",
        samples=1,
        note="all components, in a new process, the runtime's own import left out",
        detail=times,
    )
    return [load, memory_measurement(place, child.peak_rss_mib), *sizes]


def fed_parts(name: str, session: Session, call: Feeds, ending: str) -> dict[Path, Feeds]:
    """Return what a target opens of a component, and what each was fed: itself, or the graphs of its schedule.

    Args:
        name: of the component.
        session: that was called.
        call: of a component without a schedule.
        ending: of the files that graphs are in.
    """
    if isinstance(session, ChainSession):
        return {Path(name, f"{part}{ending}"): feeds for part, feeds in session.fed.items()}
    return {Path(name): call}

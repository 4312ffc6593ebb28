"""Which charts a run gives: error per timestep, latency against fidelity, and curves that stages recorded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.metrics.measurement import Measurement
from exporter.report.charts import Axes, Line, Point, line_chart, scatter_chart
from exporter.report.formatting import EQUAL_DB, number, plural, quantity, timestep
from exporter.report.record import RunRecord, StateRecord
from exporter.report.table import FIDELITY, FIDELITY_COLUMN, IMAGE_COLUMN, JUDGE_COLUMN, LATENCY_COLUMN, deciding

_SHORTEST_CURVE = 8
_AGAINST = (
    (FIDELITY_COLUMN, "worst-timestep PSNR (dB)", "teacher-forced fidelity"),
    (JUDGE_COLUMN, "right-prompt rate", "right-prompt rate"),
    (IMAGE_COLUMN, "image PSNR (dB)", "free-running image PSNR"),
)


@dataclass(frozen=True)
class Chart:
    """One chart: what it shows, the SVG, and what is not drawn and why."""

    title: str
    svg: str
    notes: tuple[str, ...]


def tradeoffs(record: RunRecord) -> tuple[Chart, ...]:
    """Return latency against each kind of fidelity that at least one cell has."""
    made = (_tradeoff(record, index) for index in range(len(_AGAINST)))
    return tuple(chart for chart in made if chart is not None)


def timesteps(record: RunRecord) -> tuple[Chart, ...]:
    """Return fidelity over the timesteps, one chart per target, one line per state, all to one scale."""
    states = [state.id for state in record.states]
    charts: list[tuple[str, list[Line], list[str]]] = []
    for target in dict.fromkeys(cell.target for cell in record.cells):
        lines, notes = [], []
        for cell in (cell for cell in record.cells if cell.target == target and cell.status == "ok"):
            found = (curve_of(item) for item in cell.measurements if item.name == FIDELITY)
            points = next(filter(None, found), ())
            if not points:
                notes.append(f"{cell.state}: not measured per timestep")
                continue
            lines.append(_timestep_line(cell.state, _series(states, cell.state), points))
            off = sum(not _is_drawn(value) for _, value in points)
            if off:
                notes.append(f"{cell.state}: {plural(off, 'timestep')} of {len(points)} equal or not finite, not drawn")
        if lines:
            charts.append((target, lines, notes))
    scale = _scale([value for _, lines, _ in charts for line in lines for _, value in line.points])
    return tuple(_timestep_chart(index, *chart, scale) for index, chart in enumerate(charts))


def curves(state: StateRecord, index: int) -> tuple[Chart, ...]:
    """Return a chart for every list of numbers or of [step, number] among the facts of a state, such as a loss."""
    made = []
    for place, (name, pairs) in enumerate(_lists(state.facts, "")):
        axes = Axes(f"fact-{index}-{place}", "step", name.rpartition(".")[2], f"{name} of state {state.id}")
        line = Line(f"{name}: first {number(pairs[0][1])}, last {number(pairs[-1][1])}", index, pairs)
        made.append(Chart(name, line_chart([line], axes), ()))
    return tuple(made)


def curve_of(measurement: Measurement) -> tuple[tuple[float, float], ...]:
    """Return (timestep, value) pairs of a measurement whose `detail` has a ``curve``, in the order of denoising.

    ``detail["curve"]`` is a list of [timestep, value]; anything else gives no pairs.
    """
    return tuple(sorted(_pairs(measurement.detail.get("curve")), reverse=True))


def _tradeoff(record: RunRecord, index: int) -> Chart | None:
    column, axis, title = _AGAINST[index]
    states = [state.id for state in record.states]
    targets = list(dict.fromkeys(cell.target for cell in record.cells))
    points, notes = [], []
    for cell in record.cells:
        x, y = deciding(cell.measurements, LATENCY_COLUMN), deciding(cell.measurements, column)
        place = f"{cell.state} on {cell.target}"
        if x is None or y is None or x.value is None or y.value is None:
            notes.append(f"{place}: not measured")
        elif not (math.isfinite(x.value) and _is_drawn(y.value)):
            notes.append(f"{place}: {quantity(y.value, y.unit)} at {quantity(x.value, x.unit)}, off the scale")
        else:
            points.append(_point(place, x, y, (states, targets)))
    if not points:
        return None
    limits = {gate.limit for gate in record.gates if gate.metric == column.metric and gate.limit is not None}
    limit = next(iter(limits)) if len(limits) == 1 else None
    axes = Axes(f"tradeoff-{index}", "latency of one call, median (ms)", axis, f"Latency against {title}", limit=limit)
    return Chart(f"Latency against {title}", scatter_chart(points, axes), tuple(notes))


def _point(place: str, x: Measurement, y: Measurement, names: tuple[list[str], list[str]]) -> Point:
    states, targets = names
    series = _series(states, x.state)
    return Point(
        label=f"{place}: {quantity(x.value, x.unit)}, {quantity(y.value, y.unit)}",
        series=series,
        marker=targets.index(x.target) if x.target in targets else 0,
        text=str(series),
        x=x.value or 0.0,
        y=y.value or 0.0,
        x_interval=_interval(x),
        y_interval=_interval(y),
    )


def _interval(measurement: Measurement) -> tuple[float, float] | None:
    if measurement.low is None or measurement.high is None:
        return None
    return measurement.low, measurement.high


def _timestep_chart(
    index: int, target: str, lines: list[Line], notes: list[str], scale: tuple[float, float] | None
) -> Chart:
    axes = Axes(
        f"timesteps-{index}",
        "timestep (denoising runs to the right)",
        "PSNR to dense (dB)",
        f"Fidelity per timestep on {target}",
        is_reversed=True,
        y_range=scale,
    )
    return Chart(target, line_chart(lines, axes), tuple(notes))


def _timestep_line(state: str, series: int, points: tuple[tuple[float, float], ...]) -> Line:
    at, value = min(points, key=lambda point: point[1])
    drawn = tuple((x, y if _is_drawn(y) else math.nan) for x, y in points)
    return Line(f"{state}: worst {quantity(value, 'dB')} at timestep {timestep(at)}", series, drawn, str(series))


def _scale(values: list[float]) -> tuple[float, float] | None:
    finite = [value for value in values if _is_drawn(value)]
    if not finite:
        return None
    room = max(0.5, 0.06 * (max(finite) - min(finite)))
    return min(finite) - room, max(finite) + room


def _series(states: list[str], state: str) -> int:
    return states.index(state) if state in states else len(states)


def _lists(found: Any, name: str) -> Iterator[tuple[str, tuple[tuple[float, float], ...]]]:
    if isinstance(found, Mapping):
        for key, value in found.items():
            yield from _lists(value, f"{name}.{key}" if name else str(key))
    elif isinstance(found, list) and len(found) >= _SHORTEST_CURVE:
        pairs = _pairs(found if isinstance(found[0], list) else [list(pair) for pair in enumerate(found)])
        if len(pairs) == len(found) and any(math.isfinite(value) for _, value in pairs):
            yield name, pairs


def _pairs(found: object) -> tuple[tuple[float, float], ...]:
    entries = found if isinstance(found, list) else []
    pairs = ((_float(entry[0]), _float(entry[1])) for entry in entries if isinstance(entry, list) and len(entry) == 2)
    return tuple((x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(x))


def _is_drawn(value: float) -> bool:
    """Return whether a value has a place on a scale: equal answers count as 200 dB, which would flatten the rest."""
    return math.isfinite(value) and abs(value) < EQUAL_DB


def _float(value: object) -> float | None:
    """Return a number; infinite ones come back from ``report.json`` as the strings that `float` reads."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None

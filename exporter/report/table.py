"""The table state x target: one row per cell, one column per metric that decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from exporter.metrics.measurement import Measurement
from exporter.metrics.names import METRICS
from exporter.report.formatting import (
    NOT_MEASURED,
    apart,
    interval,
    is_higher_better,
    limit_sign,
    quantity,
    ratio,
    timestep,
)
from exporter.report.record import CellRecord, GateRecord, RunRecord

DENOISERS = ("unet", "transformer")
FIDELITY = "fidelity.teacher_forced.psnr_db"
GateStatus = Literal["passed", "missed", "not measured"]


@dataclass(frozen=True)
class Column:
    """One metric of the table.

    Attributes:
        metric: name in the vocabulary.
        title: short name for the head of the column.
        hint: what it compares, in a few words.
        of_denoiser: of values per component show the denoiser's and name the others below; else show the worst.
    """

    metric: str
    title: str
    hint: str
    of_denoiser: bool = False


FIDELITY_COLUMN = Column(FIDELITY, "Fidelity", "teacher-forced PSNR to dense, worst timestep")
JUDGE_COLUMN = Column("fidelity.judge_rate", "Right prompt", "judge's rate, 95 % interval")
IMAGE_COLUMN = Column("fidelity.image.psnr_db", "Images", "free-running PSNR to dense")
LATENCY_COLUMN = Column("latency.median_ms", "Latency", "one call: median, paired ratio to dense", of_denoiser=True)
COLUMNS = (
    FIDELITY_COLUMN,
    JUDGE_COLUMN,
    IMAGE_COLUMN,
    LATENCY_COLUMN,
    Column("size_bytes", "Size", "engine on disk"),
    Column("lowering.psnr_db", "Lowering", "PSNR to the same state before it"),
)


@dataclass(frozen=True)
class Limit:
    """A gate on one entry: its status and its limit as text, such as ``≥ 28.00 dB``."""

    status: GateStatus
    text: str


@dataclass(frozen=True)
class Entry:
    """One metric of one cell.

    Attributes:
        column: the metric.
        value: the value as text, or "not measured".
        is_measured: False where there is no value.
        details: interval, ratio, worst timestep and component; one short line each.
        limits: the gates on this metric.
        status: ``missed`` when any gate is, else ``not measured`` when any is, else ``passed``; empty without a gate.
        note: number of the reason below the table, 0 when measured.
    """

    column: Column
    value: str
    is_measured: bool
    details: tuple[str, ...]
    limits: tuple[Limit, ...]
    status: GateStatus | Literal[""]
    note: int


@dataclass(frozen=True)
class Row:
    """One cell: a state on a target.

    Attributes:
        cell: the record.
        is_first: whether it is the first row of its state.
        entries: one per column; empty when the cell did not run to its end.
    """

    cell: CellRecord
    is_first: bool
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Table:
    """The whole table; `reasons` are the notes on missing values, numbered from 1."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    reasons: tuple[str, ...]


def build(record: RunRecord) -> Table:
    """Return the table of a run, states in their order, targets in the recipe's."""
    columns = _columns(record)
    reasons: list[str] = []
    rows: list[Row] = []
    states = [state.id for state in record.states]
    targets = [target.name for target in record.targets]
    for cell in sorted(record.cells, key=lambda cell: (_index(states, cell.state), _index(targets, cell.target))):
        is_first = not rows or rows[-1].cell.state != cell.state
        gates = [gate for gate in record.gates if (gate.state, gate.target) == (cell.state, cell.target)]
        entries = tuple(_entry(column, cell, gates, reasons) for column in columns) if cell.has_engine else ()
        rows.append(Row(cell, is_first, entries))
    return Table(columns, tuple(rows), tuple(reasons))


def deciding(measurements: Iterable[Measurement], column: Column) -> Measurement | None:
    """Return the measurement that decides in one cell, None when there is none.

    That of the whole pipeline where one was taken. Else that of the denoiser, or the worst of the components, as the
    column says: a latency must be the same component's in every row, a fidelity must not hide a bad decoder.
    """
    found = [measurement for measurement in measurements if measurement.name == column.metric]
    chosen = [measurement for measurement in found if measurement.component is None]
    if not chosen and column.of_denoiser:
        chosen = [measurement for measurement in found if measurement.component in DENOISERS]
    chosen = chosen or found
    measured = [measurement for measurement in chosen if measurement.value is not None]
    if not measured:
        return chosen[0] if chosen else None
    worst = min if is_higher_better(column.metric) else max
    return worst(measured, key=lambda measurement: measurement.value if measurement.value is not None else 0.0)


def limit_of(gate: GateRecord, unit: str, shown: str | None = None, *, relative: bool = False) -> Limit:
    """Return a gate as a limit, in digits that tell it apart from the value that was compared.

    Args:
        gate: the gate.
        unit: of its metric.
        shown: the component whose value stands beside the limit; a gate on another one names it.
        relative: leave a limit relative to dense in the recipe's words: the value beside it was not taken in the same
            moment as dense's, only the pairs were, and they are what was compared.
    """
    of = f" {gate.component}" if gate.component not in (None, shown) else ""
    if gate.limit is None:
        return Limit(gate.status, f"limit not known{of}")
    words = gate.gate.get("max" if limit_sign(gate) == "≤" else "min")
    if relative and isinstance(words, str) and "dense" in words:
        return Limit(gate.status, f"{limit_sign(gate)} {words.replace('*', '×')}{of}")
    text = quantity(gate.limit, unit) if gate.got is None else apart(gate.got, gate.limit, unit)[1]
    return Limit(gate.status, f"{limit_sign(gate)} {text}{of}")


def unit_of(record: RunRecord, metric: str) -> str:
    """Return the unit of a metric, empty when neither the vocabulary nor the run knows it."""
    if metric in METRICS:
        return METRICS[metric].unit
    units = (
        measurement.unit for cell in record.cells for measurement in cell.measurements if measurement.name == metric
    )
    return next(units, "")


def _columns(record: RunRecord) -> tuple[Column, ...]:
    known = {column.metric for column in COLUMNS}
    gated = dict.fromkeys(gate.metric for gate in record.gates if gate.metric not in known)
    return (*COLUMNS, *(Column(metric, metric.rpartition(".")[2], metric) for metric in gated))


def _entry(column: Column, cell: CellRecord, gates: list[GateRecord], reasons: list[str]) -> Entry:
    measurement = deciding(cell.measurements, column)
    mine = [gate for gate in gates if gate.metric == column.metric]
    shown = measurement.component if measurement else None
    unit = measurement.unit if measurement else ""
    # What other components passed is left out: of several components the value shown is the one that decides.
    told = [gate for gate in mine if gate.status != "passed" or gate.component in (None, shown)] or mine
    limits = tuple(dict.fromkeys(limit_of(gate, unit, shown, relative=True) for gate in told))
    status = _worst_status(limits)
    if measurement is None or measurement.value is None:
        reason = (measurement.note if measurement else "") or "the run recorded no value and no reason"
        note = _note(f"{column.metric}: {reason}", reasons)
        return Entry(column, NOT_MEASURED, False, (), limits, status, note)
    return Entry(
        column, quantity(measurement.value, unit), True, _details(measurement, column, cell), limits, status, 0
    )


def _details(measurement: Measurement, column: Column, cell: CellRecord) -> tuple[str, ...]:
    where = [measurement.component] if measurement.component else []
    if measurement.timestep is not None:
        where.append(f"timestep {timestep(measurement.timestep)}")
    others = [
        f"{other.component} {quantity(other.value, other.unit)}"
        for other in cell.measurements
        if column.of_denoiser and other.name == column.metric and measurement.component and other is not measurement
    ]
    paired = ratio(measurement)
    own = "" if paired and column.of_denoiser else interval(measurement.low, measurement.high, measurement.unit)
    lines = (
        own,
        *paired,
        ", ".join(where),
        *others,
    )
    return tuple(line for line in lines if line)


def _worst_status(limits: tuple[Limit, ...]) -> GateStatus | Literal[""]:
    order: tuple[GateStatus, ...] = ("missed", "not measured", "passed")
    return next((status for status in order if any(limit.status == status for limit in limits)), "")


def _note(reason: str, reasons: list[str]) -> int:
    if reason not in reasons:
        reasons.append(reason)
    return reasons.index(reason) + 1


def _index(names: list[str], name: str) -> int:
    return names.index(name) if name in names else len(names)

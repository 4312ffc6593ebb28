"""The cell of an engine that this machine can build but not run: what it shows standing still, and no more."""

from __future__ import annotations

from pathlib import Path

from exporter.artifact import Artifact
from exporter.errors import ComponentFailed
from exporter.lowering.engine import Column
from exporter.metrics.names import METRICS
from exporter.metrics.place import Place
from exporter.metrics.size import size_measurement
from exporter.metrics.sparse import sparse_measurements
from exporter.report.record import CellRecord
from exporter.runtime import EngineFacts
from targets.base import BuildsElsewhere, TargetError

_RUNNING = (
    "lowering.psnr_db",
    "fidelity.teacher_forced.psnr_db",
    "fidelity.image.psnr_db",
    "fidelity.judge_rate",
    "latency.median_ms",
)
"""What the report has a column for, and only an engine that runs can show."""


def built_cell(state: Artifact, engine: Artifact, column: Column, out: Path) -> CellRecord:
    """Return the cell of an engine that is not run.

    Args:
        state: what was lowered.
        engine: its engine.
        column: the target, which does not run here.
        out: the run's folder.

    Raises:
        ComponentFailed: the engine is damaged, or the target cannot say anything about it.
    """
    reason = f"{column.target.capabilities().reason} Run it on such a device."
    place, facts = Place(state.path.name, column.name), EngineFacts.of(engine)
    if not isinstance(column.target, BuildsElsewhere):
        raise ComponentFailed(f"target {column.name}: its engines do not run here: {reason}")
    found = [place.missing(name, METRICS[name].unit, f"built, not run: {reason}") for name in _RUNNING]
    found.append(size_measurement(place, engine.path))
    evidence = {}
    for name in facts.components:
        try:
            told = column.target.built(engine.path / name)
        except TargetError as error:
            raise ComponentFailed(f"target {column.name}, {name}: {error}") from error
        found += [*sparse_measurements(told, place.at(name)), size_measurement(place.at(name), engine.path / name)]
        evidence[name] = told.to_json()
    return CellRecord(
        state=place.state,
        target=place.target,
        status="built",
        error=reason,
        measurements=found,
        evidence=evidence,
        engine=str(engine.path.relative_to(out)),
    )

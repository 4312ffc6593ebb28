"""What an engine that a machine can build but not run shows standing still, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from exporter.errors import ComponentFailed
from exporter.metrics.measurement import Measurement
from exporter.metrics.names import METRICS
from exporter.metrics.place import Place
from exporter.metrics.size import size_measurement
from exporter.metrics.sparse import Weighed, sparse_measurements
from exporter.report.record import CellRecord
from targets.base import BuildsElsewhere, Target, TargetError

IMAGES = ("fidelity.image.psnr_db", "fidelity.judge_rate")
_RUNNING = ("lowering.psnr_db", "fidelity.teacher_forced.psnr_db", *IMAGES, "latency.median_ms")
"""What the report has a column for, and only an engine that runs can show."""


def missing(names: Iterable[str], place: Place, why: str) -> list[Measurement]:
    """Return these metrics as not measured."""
    return [place.missing(name, METRICS[name].unit, why) for name in names]


def built_cell(
    engine: Path, components: Mapping[str, Callable[[], Weighed]], target: Target, place: Place, base: Path
) -> CellRecord:
    """Return the cell of an engine that is not run.

    Args:
        engine: its folder.
        components: that were compiled, each in a folder of its name -> what its graph shows of its weights.
        target: that compiled them and does not run here.
        place: the cell.
        base: what the engine's path is told relative to.

    Raises:
        ComponentFailed: the engine is damaged, or the target cannot say anything about it.
    """
    reason = f"{target.capabilities().reason} Run it on such a device."
    if not isinstance(target, BuildsElsewhere):
        raise ComponentFailed(f"target {place.target}: its engines do not run here: {reason}")
    found = [*missing(_RUNNING, place, f"built, not run: {reason}"), size_measurement(place, engine)]
    evidence: dict[str, Any] = {}
    for name, weigh in components.items():
        try:
            told = target.built(engine / name)
        except TargetError as error:
            raise ComponentFailed(f"target {place.target}, {name}: {error}") from error
        found += sparse_measurements(told, place.at(name), weigh)
        found.append(size_measurement(place.at(name), engine / name))
        evidence[name] = told.to_json()
    return CellRecord(
        state=place.state,
        target=place.target,
        status="built",
        error=reason,
        measurements=found,
        evidence=evidence,
        engine=str(engine.relative_to(base)),
    )

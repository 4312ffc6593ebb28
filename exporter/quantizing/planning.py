"""Makes a plan by measurement: what each unit costs in fidelity, what it saves on the target, the best of both."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.qdq import write_quantized
from calibration.schemes import BITS, FLOAT
from calibration.sites import Site, sites_of
from exporter.artifact import digest_of
from exporter.errors import RecipeError
from exporter.lowering.engine import Column, compile_apart
from exporter.progress import Progress, task
from exporter.pruners.notes import notes
from exporter.quantizing.plan import plan_text
from exporter.quantizing.search import Found, search
from exporter.quantizing.trial import Trial, decibels, sensitivities
from exporter.quantizing.units import unit_ms, units_of

_CALLS = 5  # of a profile
_NOTES = "sensitivity.json"


@dataclass(frozen=True)
class Planned:
    """A plan, and why.

    Attributes:
        plan: module path -> scheme.
        text: the same as a table, to be read and edited.
        facts: JSON-ready.
    """

    plan: dict[str, str]
    text: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Planner:
    """Plans for one network on one target.

    Attributes:
        trial: the float graph and its calls.
        scheme: of what is quantized.
        column: the target; None where bytes count, which no target has to tell.
        workdir: keeps what was found out.
        progress: one unit per unit.
    """

    trial: Trial
    scheme: str
    column: Column | None
    workdir: Path
    progress: Progress

    def plan(self, limit_db: float) -> Planned:
        """Return the plan that saves most while the worst call keeps to the limit.

        Raises:
            RecipeError: no plan keeps to it.
        """
        graph = ir.load(self.trial.graph).graph
        sites = sites_of(graph)
        units = units_of(sites)
        key = digest_of([self.scheme, list(units), limit_db])
        with notes(self.workdir / _NOTES, key) as known:
            with task(self.progress, "sensitivity", len(units)) as told:

                def once(name: str, find: Any) -> Any:
                    value = known.once(name, find)
                    told.advance(note=name)
                    return value

                errors = sensitivities(self.trial, units, self.scheme, once)
            cost = self._bytes if self.column is None else self._ms
            took = {what: known.once(what, partial(cost, units, what)) for what in (FLOAT, self.scheme)}
            gains = {unit: took[FLOAT][unit] - took[self.scheme][unit] for unit in units}
            found = search(errors, gains, limit_db, lambda chosen: self._together(units, chosen))
        if found is None:
            best = max(decibels(max(errors[unit])) for unit in units)
            raise RecipeError(
                f"quantize.limit_db: got {limit_db:g}, expected less: no unit in {self.scheme} that saves anything "
                f"keeps to it; the most exact alone answers with {best:.1f} dB. Lower it, or leave the stage out."
            )
        return self._told(found, units, errors, took)

    def _together(self, units: Mapping[str, Sequence[str]], chosen: Sequence[str]) -> list[float]:
        return self.trial.errors({site: self.scheme for unit in chosen for site in units[unit]})

    def _bytes(self, units: Mapping[str, tuple[str, ...]], scheme: str) -> dict[str, float]:
        """Return unit -> bytes of its weights in a scheme."""
        sites = sites_of(ir.load(self.trial.graph).graph)
        counts = {name: _count(site) for name, site in sites.items()}
        return {unit: sum(counts[name] * BITS[scheme] / 8 for name in names) for unit, names in units.items()}

    def _ms(self, units: Mapping[str, tuple[str, ...]], scheme: str) -> dict[str, float]:
        """Return unit -> ms on the target with every unit in a scheme."""
        schemes = {site: scheme for sites in units.values() for site in sites}
        with tempfile.TemporaryDirectory(dir=self.workdir) as folder:
            graph, engine = Path(folder) / "graph", Path(folder) / "engine"
            graph.mkdir()
            engine.mkdir()
            write_quantized(self.trial.graph, graph, schemes, self.trial.fit, self.trial.manner)
            sites = sites_of(ir.load(self.trial.graph).graph)
            assert self.column is not None
            compile_apart(self.column, graph / "model.onnx", engine)
            shutil.rmtree(graph)
            session = self.column.target.open(engine, self.column.options)
            try:
                return unit_ms(session.profile(self.trial.calls[0], _CALLS), sites, units)
            finally:
                session.close()

    def _told(
        self,
        found: Found,
        units: Mapping[str, tuple[str, ...]],
        errors: Mapping[str, Sequence[float]],
        took: Mapping[str, Mapping[str, float]],
    ) -> Planned:
        plan = {unit: self.scheme if unit in found.units else FLOAT for unit in units} | {"": FLOAT}
        alone = {unit: f"{decibels(max(values)):.1f}" for unit, values in errors.items()}
        columns = {"alone_db": alone}
        measure = "bytes" if self.column is None else "ms"
        columns |= {f"{what}_{measure}": {unit: f"{took[what][unit]:.3f}" for unit in units} for what in took}
        facts = {
            "quantized_units": len(found.units),
            "units": len(units),
            "worst_db": round(found.worst_db, 2),
            "tries": [list(entry) for entry in found.tries],
            "target": None if self.column is None else self.column.name,
            f"float_{measure}": round(sum(took[FLOAT].values()), 3),
            f"all_{measure}": round(sum(took[self.scheme].values()), 3),
            "table": [
                {"unit": unit, "scheme": plan[unit], "alone_db": float(alone[unit])}
                | {f"{what}_{measure}": round(took[what][unit], 4) for what in took}
                for unit in units
            ],
        }
        return Planned(plan, plan_text(plan, columns), facts)


def _count(site: Site) -> int:
    """Return how many weights a site has."""
    weight = site.weight
    return 0 if weight is None or weight.shape is None else math.prod(weight.shape.numpy())

"""Makes a plan by measurement: what each unit costs in fidelity, what it saves on the target, the best of both.

What was found out of a network on some calls is kept beside the run's states, so that another limit, or another
target, does not ask for it again.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.qdq import write_quantized
from calibration.schemes import BITS, FLOAT
from calibration.sites import Site, sites_of
from exporter.artifact import digest_of
from exporter.compiling import compile_graphs
from exporter.errors import ComponentFailed, RecipeError, ToolMissing
from exporter.lowering.workshop import Column
from exporter.metrics.latency import Timer
from exporter.progress import Progress, task
from exporter.pruners.notes import Notes
from exporter.quantizing.plan import plan_text
from exporter.quantizing.search import Found, Proven, fastest, search
from exporter.quantizing.trial import Trial, decibels, sensitivities
from exporter.quantizing.units import unit_ms, units_of
from targets.base import Profiled, TargetError, TargetMissing

_CALLS = 5  # of a profile
_TIMER = Timer(samples=20, budget_s=60.0)
_MARGINS = (0.1, 0.3)
"""Of a unit's time in float, that it has to save to be quantized, in one plan after the other."""


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
        known: of this network and these calls: errors and times that were taken before.
        workdir: for files that are gone afterwards.
        progress: one unit per unit.
    """

    trial: Trial
    scheme: str
    column: Column | None
    known: Notes
    workdir: Path
    progress: Progress

    def plan(self, limit_db: float) -> Planned:
        """Return the plan that saves most while the worst call keeps to the limit.

        Raises:
            RecipeError: no plan keeps to it.
            ToolMissing, ComponentFailed: the target is not here, or refuses the network.
        """
        units = units_of(sites_of(ir.load(self.trial.graph).graph))
        with task(self.progress, "sensitivity", len(units)) as told:

            def once(name: str, find: Any) -> Any:
                value = self.known.once(f"{self.scheme} {name}", find)
                told.advance(note=name)
                return value

            errors = sensitivities(self.trial, units, self.scheme, once)
        cost = self._bytes if self.column is None else self._ms
        took = {what: self.known.once(self._named(what), partial(cost, units, what)) for what in (FLOAT, self.scheme)}
        gains = {unit: took[FLOAT][unit] - took[self.scheme][unit] for unit in units}
        found = search(errors, gains, limit_db, partial(self._together, units))
        if found is None:
            best = max(decibels(max(errors[unit])) for unit in units)
            raise RecipeError(
                f"quantize.limit_db: got {limit_db:g}, expected less: no unit in {self.scheme} that saves anything "
                f"keeps to it; the most exact alone answers with {best:.1f} dB. Lower it, or leave the stage out."
            )
        proven = () if self.column is None else self._proven(found, units, errors, took, limit_db)
        return self._told(proven[0].plan if proven else found, proven, units, errors, took)

    def _named(self, what: str) -> str:
        """Return the name that times or bytes are known by: of the target and its machine, where it is one."""
        if self.column is None:
            return f"{what} bytes"
        here = self.column.target.capabilities()
        of = digest_of([self.column.target.type, asdict(self.column.options), here.version, here.device])
        return f"{what} ms {of}"

    def _together(self, units: Mapping[str, Sequence[str]], chosen: Sequence[str]) -> list[float]:
        return self.trial.errors({site: self.scheme for unit in chosen for site in units[unit]})

    def _proven(
        self,
        first: Found,
        units: Mapping[str, Sequence[str]],
        errors: Mapping[str, Sequence[float]],
        took: Mapping[str, Mapping[str, float]],
        limit_db: float,
    ) -> tuple[Proven, ...]:
        """Time plans against the float network, pair by pair; the fastest first."""
        feeds, whole_ms = self.trial.calls[0], sum(took[FLOAT].values())

        def gains(margin: float = 0.0) -> dict[str, float]:
            return {unit: (1 - margin) * took[FLOAT][unit] - took[self.scheme][unit] for unit in units}

        def plans() -> Iterator[Found]:
            yield first
            for margin in _MARGINS:
                other = search(errors, gains(margin), limit_db, partial(self._together, units))
                if other is not None:
                    yield other

        def promise(plan: Found) -> float:
            saved = gains()
            return 1 - sum(saved[unit] for unit in plan.units) / whole_ms

        with self._engine({}) as plain:

            def over_float(plan: Found) -> float:
                with self._engine({site: self.scheme for unit in plan.units for site in units[unit]}) as rounded:
                    pairs = _TIMER.interleaved(lambda: rounded(feeds), lambda: plain(feeds))
                return pairs.ratio("float").value

            return fastest(plans(), promise, over_float)

    def _bytes(self, units: Mapping[str, tuple[str, ...]], scheme: str) -> dict[str, float]:
        """Return unit -> bytes of its weights in a scheme."""
        sites = sites_of(ir.load(self.trial.graph).graph)
        counts = {name: weights_of(site) for name, site in sites.items()}
        return {unit: sum(counts[name] * BITS[scheme] / 8 for name in names) for unit, names in units.items()}

    def _ms(self, units: Mapping[str, tuple[str, ...]], scheme: str) -> dict[str, float]:
        """Return unit -> ms on the target with every unit in a scheme."""
        sites = sites_of(ir.load(self.trial.graph).graph)
        with self._engine({site: scheme for named in units.values() for site in named}) as session:
            return unit_ms(session.profile(self.trial.calls[0], _CALLS), sites, units)

    @contextmanager
    def _engine(self, schemes: Mapping[str, str]) -> Iterator[Profiled]:
        """Build the network with these sites in these schemes, for as long as it is needed."""
        assert self.column is not None
        with tempfile.TemporaryDirectory(dir=self.workdir) as folder:
            graph, engine = Path(folder) / "graph", Path(folder) / "engine"
            graph.mkdir()
            engine.mkdir()
            write_quantized(self.trial.graph, graph, schemes, self.trial.fit, self.trial.manner)
            try:
                compile_graphs(self.column.target, self.column.options, graph, engine)
                session = self.column.target.open(engine, self.column.options)
            except TargetMissing as error:
                raise ToolMissing(f"quantize: target {self.column.name}: {error}") from error
            except TargetError as error:
                raise ComponentFailed(f"quantize: target {self.column.name}: {error}") from error
            shutil.rmtree(graph)
            try:
                yield session
            finally:
                session.close()

    def _told(
        self,
        found: Found,
        proven: Sequence[Proven],
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
            "over_float": [
                {
                    "units": len(item.plan.units),
                    "promised": round(item.promised, 4),
                    "measured": round(item.measured, 4),
                }
                for item in proven
            ],
            f"float_{measure}": round(sum(took[FLOAT].values()), 3),
            f"all_{measure}": round(sum(took[self.scheme].values()), 3),
            "table": [
                {"unit": unit, "scheme": plan[unit], "alone_db": float(alone[unit])}
                | {f"{what}_{measure}": round(took[what][unit], 4) for what in took}
                for unit in units
            ],
        }
        return Planned(plan, plan_text(plan, columns), facts)


def weights_of(site: Site) -> int:
    """Return how many weights a site has."""
    weight = site.weight
    return 0 if weight is None or weight.shape is None else math.prod(weight.shape.numpy())

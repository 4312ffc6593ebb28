"""`report.html`: one file that needs nothing from outside, rendered from a template that escapes everything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from exporter.report import evidence, formatting, images, plots, table, verdict
from exporter.report.charts import MARKER_GLYPHS, SERIES
from exporter.report.record import GateRecord, RunRecord, StateRecord

_LONGEST_LIST = 12
_MOST_FACTS = 60
_TABLE = 12
"""Lines from which a fact is a table."""
_GATE_ORDER = {"missed": 0, "not measured": 1, "passed": 2}


@dataclass(frozen=True)
class StateView:
    """One state as the page shows it."""

    record: StateRecord
    series: int
    stage: str
    parameters: str
    parameters_share: str
    size: str
    size_share: str
    components: tuple[tuple[str, str, str], ...]
    facts: tuple[tuple[str, str], ...]
    curves: tuple[plots.Chart, ...]


@dataclass(frozen=True)
class GateView:
    """One gate as the page shows it: the limit, what was compared, and the recipe's own words."""

    record: GateRecord
    limit: str
    got: str
    written: str


def render_html(record: RunRecord, root: Path) -> str:
    """Return the page of a run.

    Equal records and images give equal pages. Every text of the record is escaped; the page carries a content
    security policy that allows no script and no request.

    Args:
        record: the run.
        root: the folder that the record's image paths are relative to; a missing image is said in its place.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    environment.filters.update(
        quantity=formatting.quantity,
        seconds=formatting.seconds,
        count=formatting.count,
        number=formatting.number,
        timestep=formatting.timestep,
        measured=formatting.measured,
        plural=formatting.plural,
        breakable=_breakable,
        marker=lambda index: MARKER_GLYPHS[index % len(MARKER_GLYPHS)],
    )
    return environment.get_template("page.html.j2").render(_context(record, root))


def flat(found: Any, name: str = "") -> list[tuple[str, str]]:
    """Return nested JSON as (dotted name, text) pairs; long lists are shortened."""
    if isinstance(found, Mapping):
        if not found:
            return [(name, "none")] if name else []
        return [pair for key, value in found.items() for pair in flat(value, f"{name}.{key}" if name else str(key))]
    if isinstance(found, list):
        return _flat_list(found, name)
    return [(name, _scalar(found))]


def _context(record: RunRecord, root: Path) -> dict[str, Any]:
    states = [_state(record, index) for index in range(len(record.states))]
    targets = list(
        dict.fromkeys([*(target.name for target in record.targets), *(cell.target for cell in record.cells)])
    )
    gates = [_gate(record, gate) for gate in sorted(record.gates, key=lambda gate: _GATE_ORDER[gate.status])]
    return {
        "css": Markup(_file("page.css")),
        "record": record,
        "verdict": verdict.judge(record),
        "table": table.build(record),
        "open_gates": [gate for gate in gates if gate.record.status != "passed"],
        "passed_gates": [gate for gate in gates if gate.record.status == "passed"],
        "tradeoffs": [_drawn(chart) for chart in plots.tradeoffs(record)],
        "timesteps": [_drawn(chart) for chart in plots.timesteps(record)],
        "gallery": images.build(record, root),
        "amplification": images.AMPLIFICATION,
        "states": states,
        "series": {state.record.id: state.series for state in states},
        "targets": targets,
        "evidence": evidence.build(record),
        "max_layers": evidence.MAX_LAYERS,
        "started": formatting.moment(record.started),
        "environment": flat(record.environment),
        "sampling": flat(record.sampling),
        "source": flat(record.source),
        "options": {target.name: flat(target.options) for target in record.targets},
        "recipe": yaml.safe_dump(_plain(record.recipe), sort_keys=False, allow_unicode=True, width=100),
        "interval": formatting.interval,
        "ratio": formatting.ratio,
        "not_measured": formatting.NOT_MEASURED,
    }


def _state(record: RunRecord, index: int) -> StateView:
    state, dense = record.states[index], record.states[0]
    parameters, size = sum(state.parameters.values()), sum(state.size_bytes.values())
    components = tuple(
        (name, formatting.count(amount), formatting.quantity(_maybe(state.size_bytes.get(name)), "bytes"))
        for name, amount in state.parameters.items()
    )
    charts = plots.curves(state, index)
    drawn = {chart.title for chart in charts}
    return StateView(
        record=state,
        series=index % SERIES + 1,
        stage=_one_line(state.stage) if state.stage else "the source, unchanged",
        parameters=formatting.count(parameters),
        parameters_share=_share(parameters, sum(dense.parameters.values()), index),
        size=formatting.quantity(size, "bytes"),
        size_share=_share(size, sum(dense.size_bytes.values()), index),
        components=components,
        facts=_bounded([pair for pair in flat(_short_first(state.facts)) if pair[0] not in drawn]),
        curves=tuple(_drawn(chart) for chart in charts),
    )


def _gate(record: RunRecord, gate: GateRecord) -> GateView:
    unit = table.unit_of(record, gate.metric)
    got = formatting.quantity(gate.got, unit)
    if gate.got is not None and gate.limit is not None:
        got = formatting.apart(gate.got, gate.limit, unit)[0]
    return GateView(gate, table.limit_of(gate, unit, gate.component).text, got, _one_line(gate.gate))


def _short_first(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts with tables, such as a score per block, behind what fits on a line."""
    return dict(sorted(facts.items(), key=lambda pair: len(flat(pair[1])) > _TABLE))


def _bounded(facts: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    more = len(facts) - _MOST_FACTS
    return (*facts[:_MOST_FACTS], *([("...", f"{more} more in report.json")] if more > 0 else []))


def _drawn(chart: plots.Chart) -> plots.Chart:
    # The SVG is built by an XML library from escaped text, so it is markup already.
    return plots.Chart(chart.title, Markup(chart.svg), chart.notes)


def _share(part: float, whole: float, index: int) -> str:
    return f"{100 * part / whole:.0f} % of dense" if index and whole else ""


def _maybe(value: int | None) -> float | None:
    return None if value is None else float(value)


def _one_line(found: Mapping[str, Any]) -> str:
    """Return a part of the recipe as YAML's flow style, without the outer braces."""
    text = yaml.safe_dump(_plain(found), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.strip().removeprefix("{").removesuffix("}")


def _plain(found: Any) -> Any:
    """Return JSON-ready data without None: what the user did not write is not shown as written."""
    if isinstance(found, Mapping):
        return {str(key): _plain(value) for key, value in found.items() if value is not None}
    if isinstance(found, list | tuple):
        return [_plain(value) for value in found]
    return found if isinstance(found, bool | int | float) else formatting.printable(found)


def _flat_list(found: list[Any], name: str) -> list[tuple[str, str]]:
    if any(isinstance(value, Mapping | list) for value in found) and len(found) <= _LONGEST_LIST:
        return [pair for index, value in enumerate(found) for pair in flat(value, f"{name}[{index}]")]
    shown = [_scalar(value) for value in found[:_LONGEST_LIST]]
    more = [f"... {len(found)} in all"] if len(found) > _LONGEST_LIST else []
    return [(name, ", ".join([*shown, *more]) or "none")]


def _scalar(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else formatting.number(value)
    return str(value)


def _breakable(name: str) -> Markup:
    """Return a dotted name that may be broken after each dot."""
    return Markup(".<wbr>").join(formatting.printable(name).split("."))


def _clean(value: Any) -> Any:
    return value if isinstance(value, Markup) else formatting.printable(value)


def _file(name: str) -> str:
    return resources.files("exporter.report").joinpath(name).read_text(encoding="utf-8")

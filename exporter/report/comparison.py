"""Two runs side by side: every number of both, what differs in the recipes, and which numbers must not be compared.

A number is set against the other run's only where nothing but the recipe's choices differs that it depends on. Where
something else does (other prompts, seeds, machine, versions), both numbers are shown and the reason stands beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from exporter.metrics.measurement import Measurement
from exporter.report.record import CellRecord, RunRecord
from exporter.report.table import COLUMNS, Column, deciding

Group = Literal["fidelity", "lowering", "latency", "size"]

_MORE = (Column("load_ms", "Load", "opening the engine"), Column("peak_rss_mib", "Memory", "peak of a loaded engine"))
_MACHINE = ("cpu", "cores", "memory_mib", "cuda", "os", "torch_threads")
_PROMPT_KEYS = ("prompts", "images", "calls", "seed", "judge")
_TIMED: tuple[Group, ...] = ("latency",)
_IMAGES: tuple[Group, ...] = ("fidelity",)
_INPUTS: tuple[Group, ...] = ("fidelity", "lowering")
_SHAPES = frozenset({"size", "batch"})
"""Of the sampling: what a call's latency depends on; the rest changes images only."""


@dataclass(frozen=True)
class Difference:
    """A key that differs between the two.

    Attributes:
        key: dotted path, such as ``stages[0].prune.keep_ratio``.
        a: value in the first run, None where it has none.
        b: value in the second run.
    """

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Obstacle:
    """Something beside the recipe's choices that differs.

    Attributes:
        what: for people, such as ``other machine``.
        groups: kinds of numbers that it makes incomparable.
        differences: what exactly.
    """

    what: str
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Pair:
    """One metric of one cell, in both runs.

    Attributes:
        state: id of the state.
        target: name of the target.
        metric: its name.
        unit: of both values.
        component: whose value it is, None for the whole pipeline.
        a: value of the first run; None where it was not measured, `why_a` says why.
        b: value of the second run.
        why_a: reason for a missing value.
        why_b: reason for a missing value.
        difference: b - a, None where they must not be compared or one is missing.
        ratio: b / a, None there too, and of decibels.
        refused: why they must not be compared; empty where they may be.
    """

    state: str
    target: str
    metric: str
    unit: str
    component: str | None
    a: float | None
    b: float | None
    why_a: str
    why_b: str
    difference: float | None
    ratio: float | None
    refused: str


@dataclass(frozen=True)
class Gates:
    """How many gates of a cell have which status, in both runs."""

    state: str
    target: str
    a: Mapping[str, int]
    b: Mapping[str, int]


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        a: facts of the first run: name, started, exit code, whether it is complete.
        b: facts of the second run.
        recipe: what differs in the recipes.
        obstacles: what differs beside them.
        pairs: states x targets x metrics.
        gates: per cell.
    """

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    recipe: tuple[Difference, ...]
    obstacles: tuple[Obstacle, ...]
    pairs: tuple[Pair, ...]
    gates: tuple[Gates, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form; keys as the attributes."""
        return asdict(self)


def compare(a: RunRecord, b: RunRecord) -> Comparison:
    """Set two runs side by side."""
    obstacles = tuple(_obstacles(a, b))
    cells = list(dict.fromkeys((cell.state, cell.target) for cell in (*a.cells, *b.cells)))
    order = list(dict.fromkeys(state.id for state in (*a.states, *b.states)))
    cells.sort(key=lambda cell: order.index(cell[0]) if cell[0] in order else len(order))
    pairs = [pair for cell in cells for pair in _pairs(a, b, cell, obstacles)]
    gates = [Gates(state, target, _gates(a, state, target), _gates(b, state, target)) for state, target in cells]
    return Comparison(
        _facts(a), _facts(b), tuple(differences(a.recipe, b.recipe)), obstacles, tuple(pairs), tuple(gates)
    )


def differences(a: Any, b: Any, key: str = "") -> Iterator[Difference]:
    """Yield what differs between two JSON-like values, by dotted path."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys((*a, *b)):
            yield from differences(a.get(name), b.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        for index in range(max(len(a), len(b))):
            mine = a[index] if index < len(a) else None
            yield from differences(mine, b[index] if index < len(b) else None, f"{key}[{index}]")
    elif a != b:
        yield Difference(key, a, b)


def _facts(record: RunRecord) -> dict[str, Any]:
    names = ("name", "started", "seconds", "complete", "exit_code", "exporter_version")
    return {name: getattr(record, name) for name in names}


def _obstacles(a: RunRecord, b: RunRecord) -> Iterator[Obstacle]:
    machines = [{key: record.environment.get(key) for key in _MACHINE} for record in (a, b)]
    yield from _obstacle("other machine", _TIMED, machines)
    versions = [
        {"exporter": record.exporter_version, **(record.environment.get("libraries") or {})} for record in (a, b)
    ]
    yield from _obstacle("other versions of libraries", _TIMED, versions)
    asked = [_prompts(record) for record in (a, b)]
    yield from _obstacle("other prompts or seeds", _INPUTS, asked)
    sampling = [{key: value for key, value in record.sampling.items() if key not in _SHAPES} for record in (a, b)]
    yield from _obstacle("other sampling", _INPUTS, sampling)
    shapes = [{key: value for key, value in record.sampling.items() if key in _SHAPES} for record in (a, b)]
    yield from _obstacle("other image size or batch", (*_INPUTS, *_TIMED), shapes)
    sources = [{"digest": record.source.get("digest")} for record in (a, b)]
    yield from _obstacle("other source model: each is compared with its own dense pipeline", _IMAGES, sources)


def _obstacle(what: str, groups: tuple[Group, ...], sides: list[dict[str, Any]]) -> Iterator[Obstacle]:
    found = tuple(differences(sides[0], sides[1]))
    if found:
        yield Obstacle(what, groups, found)


def _prompts(record: RunRecord) -> dict[str, Any]:
    """Return what was asked for: the recipe's words, and the very prompts and seeds where images show them."""
    measured = record.recipe.get("measure") or {}
    asked = {key: measured.get(key) for key in _PROMPT_KEYS}
    shown = next((cell.images for cell in record.cells if cell.images), [])
    return asked | {"texts": [f"{image.prompt} (seed {image.seed})" for image in shown]}


def _pairs(a: RunRecord, b: RunRecord, cell: tuple[str, str], obstacles: tuple[Obstacle, ...]) -> Iterator[Pair]:
    cells = [_cell(record, cell) for record in (a, b)]
    for column in (*COLUMNS, *_MORE):
        found = [deciding(item.measurements, column) if item else None for item in cells]
        if not any(found) and column in _MORE:
            continue
        one, other = found
        reasons = [_why(item, measured) for item, measured in zip(cells, found, strict=True)]
        refused = _refusal(column.metric, obstacles, one, other)
        known = next((measured for measured in found if measured), None)
        unit = known.unit if known else ""
        mine, theirs = (measured.value if measured else None for measured in found)
        yield Pair(
            state=cell[0],
            target=cell[1],
            metric=column.metric,
            unit=unit,
            component=known.component if known else None,
            a=mine,
            b=theirs,
            why_a=reasons[0],
            why_b=reasons[1],
            difference=theirs - mine if not refused and mine is not None and theirs is not None else None,
            ratio=_ratio(mine, theirs) if not refused and unit != "dB" else None,
            refused=refused,
        )


def _cell(record: RunRecord, place: tuple[str, str]) -> CellRecord | None:
    return next((cell for cell in record.cells if (cell.state, cell.target) == place), None)


def _why(cell: CellRecord | None, measured: Measurement | None) -> str:
    if measured is not None and measured.value is not None:
        return ""
    if cell is None:
        return "no such state or target in this run"
    if not cell.has_engine:
        return f"{cell.status}: {cell.error or 'no reason was recorded'}"
    return (measured.note if measured else "") or "not measured"


def _refusal(metric: str, obstacles: Iterable[Obstacle], a: Measurement | None, b: Measurement | None) -> str:
    group = group_of(metric)
    reasons = [obstacle.what for obstacle in obstacles if group in obstacle.groups]
    if a is not None and b is not None and a.component != b.component:
        reasons.append(f"other component ({a.component or 'pipeline'} and {b.component or 'pipeline'})")
    return "; ".join(reasons)


def group_of(metric: str) -> Group:
    """Return which kind of number a metric is: what it depends on beside the model."""
    if metric.startswith("fidelity."):
        return "fidelity"
    if metric.startswith("lowering."):
        return "lowering"
    return "latency" if metric.endswith(("_ms", "_mib")) else "size"


def _ratio(a: float | None, b: float | None) -> float | None:
    return b / a if a is not None and b is not None and a > 0 else None


def _gates(record: RunRecord, state: str, target: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for gate in record.gates:
        if (gate.state, gate.target) == (state, target):
            found[gate.status] = found.get(gate.status, 0) + 1
    return found

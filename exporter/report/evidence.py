"""What the compilers really did, condensed: counts, groups of like layers, and a bounded list of layers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.report.record import RunRecord

MAX_LAYERS = 300
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Group:
    """Layers that are alike: operation, precision, kernel, device, and how many there are."""

    type: str
    precision: str
    kernel: str
    device: str
    count: int


@dataclass(frozen=True)
class Part:
    """The evidence of one component on one target.

    Attributes:
        component: the component.
        states: the states whose engines gave exactly this evidence; a component is lowered once where nothing changed.
        runtime: library and version.
        device: the device's full name.
        requested: the precision that was asked for.
        total: number of executed layers.
        precisions: precision -> layers, most first.
        kernels: kernel -> layers, most first.
        devices: device -> layers, most first.
        groups: like layers, most first.
        layers: the first `MAX_LAYERS` layers as the runtime names them, in execution order.
        notes: what the target noted.
    """

    component: str
    states: tuple[str, ...]
    runtime: str
    device: str
    requested: str
    total: int
    precisions: tuple[tuple[str, int], ...]
    kernels: tuple[tuple[str, int], ...]
    devices: tuple[tuple[str, int], ...]
    groups: tuple[Group, ...]
    layers: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]


def build(record: RunRecord) -> tuple[tuple[str, tuple[Part, ...]], ...]:
    """Return target -> its parts, in the recipe's order; equal evidence of several states appears once."""
    states: dict[tuple[str, str, str], list[str]] = {}
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for cell in record.cells:
        for component, evidence in cell.evidence.items():
            key = (cell.target, component, json.dumps(evidence, sort_keys=True, default=str))
            states.setdefault(key, []).append(cell.state)
            found[key] = evidence
    targets: dict[str, list[Part]] = {}
    for key, evidence in found.items():
        targets.setdefault(key[0], []).append(_part(key[1], tuple(states[key]), evidence))
    return tuple((target, tuple(parts)) for target, parts in targets.items())


def _part(component: str, states: tuple[str, ...], evidence: Mapping[str, Any]) -> Part:
    layers = [layer for layer in evidence.get("layers", ()) if isinstance(layer, Mapping)]
    kinds = Counter(_kind(layer) for layer in layers)
    groups = tuple(Group(*kind, count) for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
    return Part(
        component=component,
        states=states,
        runtime=_text(evidence, "runtime"),
        device=_text(evidence, "device"),
        requested=_text(evidence, "requested_precision"),
        total=len(layers),
        precisions=_counts(layers, "precision"),
        kernels=_counts(layers, "kernel"),
        devices=_counts(layers, "device"),
        groups=groups,
        layers=tuple(layers[:MAX_LAYERS]),
        notes=(*(str(note) for note in evidence.get("notes", ())), *_placement(evidence.get("placement"))),
    )


def _placement(told: Any) -> list[str]:
    """Return what a lint found for a device that is not here, a sentence for each rule."""
    if not isinstance(told, Mapping):
        return []
    counts = f"{_text(told, 'risky')} of {_text(told, 'operations')} operations"
    notes = [f"lint for the {_text(told, 'device')}: {counts} break a rule; it certifies nothing"]
    for item in told.get("findings", ()):
        if isinstance(item, Mapping):
            place = ", ".join(map(str, list(item.get("examples", ()))[:1]))
            rule = f"{_text(item, 'strength')}: {_text(item, 'rule')}: {_text(item, 'count')}, such as {place}"
            notes.append(f"{rule}. {_text(item, 'fix')} ({_text(item, 'source')})")
    return notes


def _kind(layer: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return _text(layer, "type"), _text(layer, "precision"), _text(layer, "kernel"), _text(layer, "device")


def _counts(layers: list[Mapping[str, Any]], key: str) -> tuple[tuple[str, int], ...]:
    counted = Counter(_text(layer, key) for layer in layers)
    return tuple(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _text(found: Mapping[str, Any], key: str) -> str:
    return str(found.get(key) or _UNKNOWN)

"""Limits on measurements: absolute, or relative to dense; judged at the unfavourable end of the interval."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from exporter.errors import RecipeError
from exporter.metrics.measurement import Measurement
from exporter.metrics.names import METRICS

Bound = Literal["min", "max"]
Status = Literal["passed", "missed", "not measured"]
DENOISERS = ("unet", "transformer")
KEYS = ("metric", "min", "max", "targets", "state", "component")
GRAMMAR = "a number, or '0.95 * dense', 'dense - 2', 'dense + 0.5'"
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_RELATIVE = re.compile(rf"\s*(?:(?P<factor>{_NUMBER})\s*\*\s*)?dense(?:\s*(?P<sign>[+-])\s*(?P<offset>{_NUMBER}))?\s*")


@dataclass(frozen=True)
class Limit:
    """``factor * dense + offset``; without a factor just the offset.

    Attributes:
        factor: None for an absolute limit.
        offset: the absolute limit, or what is added to dense.
    """

    factor: float | None
    offset: float

    @property
    def relative(self) -> bool:
        """Whether it needs dense's value."""
        return self.factor is not None

    def resolve(self, dense: float | None) -> float | None:
        """Return the limit as a number; None when it needs dense's value and there is none."""
        if self.factor is None:
            return self.offset
        return None if dense is None else self.factor * dense + self.offset

    @classmethod
    def parse(cls, text: object, place: str) -> Limit:
        """Return the limit that a recipe means.

        Args:
            text: a number, or text as in `GRAMMAR`.
            place: key path for the message.

        Raises:
            RecipeError: it is neither.
        """
        if isinstance(text, int | float) and not isinstance(text, bool) and math.isfinite(text):
            return cls(None, float(text))
        if isinstance(text, str):
            if re.fullmatch(rf"\s*[+-]?(?:{_NUMBER})\s*", text):
                return cls.parse(float(text), place)
            match = _RELATIVE.fullmatch(text)
            if match:
                factor = float(match["factor"]) if match["factor"] else 1.0
                offset = float(match["offset"] or 0) * (-1 if match["sign"] == "-" else 1)
                if math.isfinite(factor) and math.isfinite(offset):
                    return cls(factor, offset)
        msg = f"{place}: not a limit; got {text!r}, expected {GRAMMAR}. Write it in one of these forms."
        raise RecipeError(msg)


@dataclass(frozen=True)
class Gate:
    """One entry of the recipe's ``gates``.

    Attributes:
        spec: as written.
        metric: its name.
        bounds: a minimum, a maximum or both.
        targets: the targets it holds for; None for all.
        state: a state's id, ``final`` or ``all``.
        component: only measurements of this component; ``denoiser``, ``all``, or None for the usual one (see
            `_matching`).
    """

    spec: dict[str, Any]
    metric: str
    bounds: tuple[tuple[Bound, Limit], ...]
    targets: tuple[str, ...] | None
    state: str
    component: str | None

    @classmethod
    def parse(cls, spec: Mapping[str, Any], place: str) -> Gate:
        """Return the gate of a recipe.

        Args:
            spec: a mapping with the keys in `KEYS`.
            place: key path for messages, such as ``recipe.yaml: gates[0]``.

        Raises:
            RecipeError: an unknown key or metric, no limit, or a limit that cannot be read.
        """
        for key in spec:
            if key not in KEYS:
                _refuse(f"{place}.{key}", "unknown key", str(key), KEYS)
        metric = spec.get("metric")
        if metric not in METRICS:
            _refuse(f"{place}.metric", "unknown metric", str(metric), tuple(METRICS))
        bounds: list[tuple[Bound, Limit]] = []
        if spec.get("min") is not None:
            bounds.append(("min", Limit.parse(spec["min"], f"{place}.min")))
        if spec.get("max") is not None:
            bounds.append(("max", Limit.parse(spec["max"], f"{place}.max")))
        if not bounds:
            msg = f"{place}: no limit; got neither, expected 'min' or 'max'. Add one: {GRAMMAR}."
            raise RecipeError(msg)
        state, component = spec.get("state"), spec.get("component")
        return cls(
            spec=dict(spec),
            metric=str(metric),
            bounds=tuple(bounds),
            targets=_names(spec.get("targets"), f"{place}.targets"),
            state="all" if state is None else str(state),
            component=None if component is None else str(component),
        )

    def check(self, states: Sequence[str], targets: Sequence[str], place: str) -> None:
        """Refuse names of states and targets that the recipe does not have.

        Raises:
            RecipeError: there is one; with the closest name that exists.
        """
        if self.state not in ("all", "final", *states):
            _refuse(f"{place}.state", "no such state", self.state, ("all", "final", *states))
        for target in self.targets or ():
            if target not in targets:
                _refuse(f"{place}.targets", "no such target", target, tuple(targets))


@dataclass(frozen=True)
class GateResult:
    """A limit applied to one measurement; the fields of the report's gate record.

    Attributes:
        gate: as written.
        metric: name.
        state: id.
        target: name.
        component: of the measurement.
        timestep: of the measurement.
        status: ``not measured`` is never ``passed``.
        limit: as a number; None when it could not be resolved.
        got: what was compared; None when not measured.
        message: the sentence for people.
    """

    gate: dict[str, Any]
    metric: str
    state: str
    target: str
    component: str | None
    timestep: float | None
    status: Status
    limit: float | None
    got: float | None
    message: str


def evaluate(
    gates: Iterable[Gate],
    measurements: Sequence[Measurement],
    states: Sequence[str],
    targets: Sequence[str],
    *,
    only_state: str | None = None,
) -> list[GateResult]:
    """Apply gates to measurements.

    Every gate gives one result per limit, target, state and matching measurement: of the component that it names, or
    of the whole pipeline where the metric has such a value, of the denoiser for latency, else of every component.
    Nothing is skipped but dense against itself: what was not measured says so.

    Compared is the unfavourable end of the 95 % interval: the low one with a minimum, the high one with a maximum, or
    the value where there is no interval. A relative limit compares the unfavourable end of the paired ratio to dense
    times dense's value where there is such a ratio, because a pair shares the noise that two intervals would add up.

    Args:
        gates: of the recipe.
        measurements: of all cells.
        states: ids of all states of the recipe in order, dense first, whether made or not.
        targets: names of all targets.
        only_state: judge only cells of this state.
    """
    results: list[GateResult] = []
    for gate in gates:
        wanted = {"all": tuple(states), "final": tuple(states[-1:])}.get(gate.state, (gate.state,))
        for target in targets if gate.targets is None else gate.targets:
            for state in wanted:
                if only_state in (None, state):
                    results.extend(_cell(gate, measurements, state, target, states[0]))
    return results


def _cell(gate: Gate, measurements: Sequence[Measurement], state: str, target: str, dense: str) -> Iterable[GateResult]:
    found = _matching(gate, measurements, state, target)
    reference = {m.component: m for m in _matching(gate, measurements, dense, target)}
    for bound, limit in gate.bounds:
        if limit.relative and state == dense:
            continue
        if not found:
            empty = Measurement(
                name=gate.metric,
                value=None,
                state=state,
                target=target,
                component=gate.component,
                note=_why_none(gate, measurements, state, target),
            )
            yield _judge(gate, bound, limit, empty, None)
        for measurement in found:
            yield _judge(gate, bound, limit, measurement, reference.get(measurement.component))


def _why_none(gate: Gate, measurements: Sequence[Measurement], state: str, target: str) -> str:
    """Return why a component has no such value: as the whole cell says it, where that has none either."""
    here = (m for m in measurements if (m.name, m.state, m.target) == (gate.metric, state, target))
    told = next((m.note for m in here if m.component is None and m.value is None), "")
    return told or "nothing was measured here: the state, the target or the metric was not run"


def _matching(gate: Gate, measurements: Sequence[Measurement], state: str, target: str) -> list[Measurement]:
    here = [m for m in measurements if (m.name, m.state, m.target) == (gate.metric, state, target)]
    if gate.component == "all":
        return here
    if gate.component == "denoiser":
        return [m for m in here if m.component in DENOISERS]
    if gate.component is not None:
        return [m for m in here if m.component == gate.component]
    # Without a component: the whole pipeline where the metric has such a value; for latency the denoiser, which
    # runs once per step; else every component.
    whole = [m for m in here if m.component is None]
    denoiser = [m for m in here if m.component in DENOISERS] if gate.metric.startswith("latency.") else []
    return whole or denoiser or here


def _judge(gate: Gate, bound: Bound, limit: Limit, measurement: Measurement, dense: Measurement | None) -> GateResult:
    base = dense.value if dense is not None else None
    resolved = limit.resolve(base)
    got, end = _compared(measurement, bound, limit, dense)
    problem = ""
    if got is None:
        problem = measurement.note or "no reason was given"
    elif resolved is None:
        problem = f"dense was not measured on {measurement.target}, so '{gate.spec[bound]}' has no value"
    elif limit.relative and dense is not None and end != "ratio" and _modes_differ(measurement, dense):
        problem = "dense was timed under another mode; measure both in one run"
    status: Status = "not measured" if problem else "passed" if _holds(bound, got, resolved) else "missed"
    result = GateResult(
        gate=gate.spec,
        metric=gate.metric,
        state=measurement.state,
        target=measurement.target,
        component=measurement.component,
        timestep=_timestep(measurement),
        status=status,
        limit=resolved,
        got=None if problem else got,
        message="",
    )
    message = _unmeasured(result, problem) if problem else _message(result, measurement, bound, end, base)
    return GateResult(**{**result.__dict__, "message": message})


def _compared(
    measurement: Measurement, bound: Bound, limit: Limit, dense: Measurement | None
) -> tuple[float | None, str]:
    """Return the number to compare, and what it is: ``ratio``, ``low``, ``high`` or nothing for the plain value."""
    if measurement.value is None or not math.isfinite(measurement.value):
        return None, ""
    ratio = measurement.ratio
    # The baseline's name may say more than the state, such as "0-dense in torch".
    paired = ratio is not None and dense is not None and ratio.to.split(" ")[0] == dense.state
    if limit.relative and paired and ratio is not None and dense is not None and dense.value is not None:
        return (ratio.low if bound == "min" else ratio.high) * dense.value, "ratio"
    end = measurement.low if bound == "min" else measurement.high
    if end is None:
        return measurement.value, ""
    return end, "low" if bound == "min" else "high"


def _holds(bound: Bound, got: float | None, limit: float | None) -> bool:
    if got is None or limit is None or math.isnan(got):
        return False
    return got >= limit if bound == "min" else got <= limit


def _modes_differ(measurement: Measurement, dense: Measurement) -> bool:
    a, b = ({k: v for k, v in m.detail.get("mode", {}).items() if k != "load"} for m in (measurement, dense))
    return a != b


def _timestep(measurement: Measurement) -> float | None:
    """Return the measurement's timestep, or the worst one of its curve in dB."""
    if measurement.timestep is not None:
        return measurement.timestep
    curve = measurement.detail.get("curve") or []
    if not measurement.name.endswith("psnr_db") or not curve:
        return None
    return float(min(curve, key=lambda point: point[1])[0])


def _place(result: GateResult) -> str:
    part = f", component {result.component}" if result.component else ""
    return f"gate {result.metric}, state {result.state}, target {result.target}{part}"


def _message(result: GateResult, measurement: Measurement, bound: Bound, end: str, base: float | None) -> str:
    unit = METRICS[result.metric].unit
    got, limit = _number(result.got, unit), _number(result.limit, unit)
    if got == limit and result.status == "missed":  # a miss by less than the digits shown
        got, limit = f"{result.got!r}", f"{result.limit!r}"
    at = f" at timestep {result.timestep:g}" if result.timestep is not None else ""
    value = _number(measurement.value, unit)
    ends = {
        "low": f" (low end of the interval of {value})",
        "high": f" (high end of the interval of {value})",
        "ratio": f" ({'low' if bound == 'min' else 'high'} end of the paired ratio to dense; measured {value})",
        "": "",
    }
    text = f"{_place(result)}: got {got}{at}{ends[end]}, limit {limit}"
    costly = measurement.detail.get("most_costly")
    if costly:
        text += f"; alone, {costly[0]['unit']} costs most ({_number(costly[0]['alone_db'], 'dB')})"
    if "dense" in str(result.gate[bound]):
        text += f" ({_written(result.gate[bound])}, where dense has {_number(base, unit)})"
    return f"{text}. {METRICS[result.metric].advice}" if result.status == "missed" else f"{text}."


def _unmeasured(result: GateResult, why: str) -> str:
    limits = [f"{key} {_written(result.gate[key])}" for key in ("min", "max") if result.gate.get(key) is not None]
    return f"{_place(result)}: not measured; expected {', '.join(limits)}. Reason: {why.strip().rstrip('.')}."


def _written(limit: object) -> str:
    return f"{limit:g}" if isinstance(limit, int | float) else str(limit).strip()


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "nothing"
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    if unit in ("dB", "ms", "MiB", "bytes", "images", "layers"):
        digits = {"dB": 1, "MiB": 1, "ms": 2}.get(unit, 0)
        return f"{value:.{digits}f}"
    return f"{value:.4g}"


def _names(value: object, place: str) -> tuple[str, ...] | None:
    if value is None or value == "all":
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        msg = f"{place}: not target names; got {value!r}, expected 'all' or a list of names. Name the recipe's targets."
        raise RecipeError(msg)
    return tuple(names)


def _refuse(place: str, what: str, got: str, known: Sequence[str]) -> None:
    close = difflib.get_close_matches(got, known, n=1)
    fix = f"Did you mean '{close[0]}'?" if close else "Use one of these."
    msg = f"{place}: {what}; got '{got}', expected one of {', '.join(known)}. {fix}"
    raise RecipeError(msg)

"""One cell of the table state x target: what lowering did, what the image lost, how fast, how large."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import targets
from calibration.schemes import FLOAT
from exporter.answering import ask_component, dense_reference, own_answers
from exporter.artifact import Artifact
from exporter.bench import Bench
from exporter.lowering.feeds import recorded_calls
from exporter.lowering.rivals import Lowered
from exporter.metrics.fidelity import Answers, component_fidelity, lowering, teacher_forced
from exporter.metrics.measurement import Measurement
from exporter.metrics.place import Place
from exporter.metrics.placement import placement_measurements
from exporter.metrics.sparse import sparse_measurements
from exporter.networks.components import Component
from exporter.pictures import draw
from exporter.progress import task
from exporter.report.record import CellRecord
from exporter.runtime import EngineFacts, close_sessions, open_session, open_sessions
from exporter.sessions import fitted, run_batched
from exporter.shapes import measure_cost, measure_points, points_of
from exporter.states import components_of, config_of
from exporter.timing import Open, Timing, fed_parts, footprint, latency_of, over_float, timer_of, times_of_dense
from targets.base import Session

Array = NDArray[Any]
Feeds = Mapping[str, Array]
_COSTLY = 3
"""Units of a quantized state that are named."""


def measure_cell(state: Artifact, lowered: Lowered, target: str, bench: Bench) -> CellRecord:
    """Measure an engine of a state.

    Args:
        state: what was lowered.
        lowered: its engine, and what that is held to.
        target: the recipe's name of the target.
        bench: what all cells share.

    Raises:
        ComponentFailed: it cannot be loaded, answers with the wrong shape, or dies.
    """
    engine, graphs = lowered.engine, {name: item.graph for name, item in lowered.quantized.items()}
    place, facts = Place(state.path.name, target), EngineFacts.of(engine)
    seconds: dict[str, float] = {}
    found: list[Measurement] = []
    evidence: dict[str, Any] = {}
    fed: dict[Path, Feeds] = {}
    timer = timer_of(bench.recipe.measure.latency_seconds, bench.sampling["batch"], facts.target, facts.options)
    known, untimed = components_of(state.path, facts.components), targets.target(facts.target).capabilities().untimed
    with _clock(seconds, "torch"):  # before any engine is loaded, so that the largest network is in memory once
        for component in known:
            own_answers(state, component, bench, graphs)
            dense_reference(component, bench)
    sessions = open_sessions(engine.path, facts)
    try:
        with _clock(seconds, "fidelity"):
            found += _answers(state, sessions, place, bench, graphs)
        with _clock(seconds, "images"):
            measurements, images = draw(engine.path, sessions, place, bench)
            found += measurements
        with _clock(seconds, "latency"), task(bench.progress, f"Latency {place.state} on {target}", len(known)) as told:
            for component in known:
                name, session = component.name, sessions[component.name]
                calls = fitted(session, timed_calls(component, state.path, bench))
                timing = Timing(session, calls, place.at(name), timer, component.role == "denoiser", untimed)
                found += _known_times(timing, engine, bench) or _times(timing, lowered, facts, bench)
                fed |= fed_parts(name, session, calls[0], facts.ending)
                told_of_layers = session.evidence()
                found += sparse_measurements(told_of_layers, place.at(name), partial(lowered.weighed, name))
                found += placement_measurements(told_of_layers, place.at(name))
                evidence[name] = told_of_layers.to_json()
                sessions.pop(name).close()  # the next pair finds the memory free
                told.advance()
    finally:
        close_sessions(sessions)
    with _clock(seconds, "footprint"):
        found += footprint(engine.path, facts.target, facts.options, place, fed, untimed)
    return CellRecord(
        state=place.state,
        target=place.target,
        status="ok",
        measurements=found,
        images=images,
        evidence=evidence,
        engine=str(engine.path.relative_to(bench.out)),
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


def _answers(
    state: Artifact, sessions: Mapping[str, Session], place: Place, bench: Bench, graphs: Mapping[str, Path]
) -> list[Measurement]:
    """Put the recorded calls to every component: against its state itself, and against dense."""
    found: list[Measurement] = []
    for component in components_of(state.path, sessions):
        session = sessions[component.name]
        here = place.at(component.name)
        got = ask_component(component, lambda feeds, session=session: run_batched(session, feeds), state.path, bench)  # type: ignore[misc]
        found += lowering(own_answers(state, component, bench, graphs), got, here)
        reference = dense_reference(component, bench)
        if isinstance(got, Answers) and isinstance(reference, Answers):
            found.append(_with_units(teacher_forced(reference, got, here), state, component))
        else:
            found.append(component_fidelity(np.asarray(reference), np.asarray(got), here))
    return found


def _with_units(found: Measurement, state: Artifact, component: Component) -> Measurement:
    """Return a measurement of a quantized state with the units that cost most, where its stage has looked at each."""
    facts = state.manifest.facts["facts"]
    table = facts.get("search", {}).get("table", []) if facts.get("component") == component.name else []
    costly = sorted((row for row in table if row["scheme"] != FLOAT), key=lambda row: row["alone_db"])[:_COSTLY]
    told = [{"unit": row["unit"], "alone_db": row["alone_db"]} for row in costly]
    return found.model_copy(update={"detail": {**found.detail, "most_costly": told}}) if told else found


def _known_times(it: Timing, engine: Artifact, bench: Bench) -> list[Measurement]:
    """Return the times of a component that is the dense engine's own on this target, file by file; else nothing."""
    target, part = it.place.target, str(it.place.component)
    dense, cell = bench.engines.get(target), bench.dense_cells.get(target)
    if it.untimed or dense is None or cell is None or dense.part_digest(part) != engine.part_digest(part):
        return []
    known = times_of_dense(cell.measurements, it.place)
    return known if all(item.value is not None for item in known) else []


def _times(it: Timing, lowered: Lowered, facts: EngineFacts, bench: Bench) -> list[Measurement]:
    """Time a component against all that it is held to on its target."""
    name, dense = str(it.place.component), bench.engines.get(it.place.target)
    found = latency_of(it, None if dense is None else partial(open_session, dense.path / name, facts))
    if it.untimed:
        return found
    if name in lowered.quantized:
        found.append(over_float(it, _rivals(lowered.quantized[name].floats, facts)))
    if lowered.fixed is not None:
        found += _shapes(it, lowered.fixed.path, facts, bench)
    return found


def _rivals(floats: Mapping[str, Path], facts: EngineFacts) -> dict[str, Open]:
    """Return how the float engines of a component are opened, by what they compute in."""
    made: dict[str, Open] = {}
    for precision, engine in floats.items():
        options = {**facts.options, "precision": precision} if "precision" in facts.options else facts.options
        made[precision] = partial(open_session, engine, replace(facts, options=options))
    return made


def _shapes(it: Timing, fixed: Path, facts: EngineFacts, bench: Bench) -> list[Measurement]:
    """Time a component at each point of the recipe's shapes, and the denoiser against one with fixed shapes."""
    feeds = it.calls[0]
    assert bench.recipe.shapes is not None
    points = points_of(bench.recipe.shapes, bench.sampling["size"])
    own = bench.sampling | {"batch": min(bench.sampling["batch"], bench.recording.count)}
    found = [measure_points(it.session, feeds, points, it.place, it.timer, own)]
    if it.is_denoiser:
        with closing(open_session(fixed, facts)) as other:
            found.append(measure_cost(it.session, other, feeds, it.place, it.timer))
    return found


def timed_calls(component: Component, state: Path, bench: Bench) -> list[Mapping[str, Array]]:
    """Return the recorded calls that are timed: of one batch of real prompts."""
    batch = min(bench.sampling["batch"], bench.recording.count)
    config = config_of(state / component.folder)
    return [call.feeds for call in recorded_calls(component, config, bench.recording, range(batch))]


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started

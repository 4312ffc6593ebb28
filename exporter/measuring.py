"""One cell of the table state x target: what lowering did, what the image lost, how fast, how large."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.schemes import FLOAT
from exporter.artifact import Artifact
from exporter.bench import DENSE, Bench
from exporter.loops import loop_of_calls, scheduled_latency
from exporter.lowering.feeds import denoiser_feeds, recorded_calls
from exporter.lowering.rivals import Lowered, Quantized
from exporter.lowering.wrappers import MAIN_OUTPUTS, part_of, signature, wrap
from exporter.metrics.fidelity import (
    Answer,
    Answers,
    Subset,
    ask,
    component_fidelity,
    lowering,
    recorded_answers,
    teacher_forced,
)
from exporter.metrics.latency import Timer, latency_measurements
from exporter.metrics.machine import Mode
from exporter.metrics.measurement import Measurement
from exporter.metrics.place import Place
from exporter.metrics.size import memory_measurement, run_child, size_measurement
from exporter.metrics.sparse import sparse_measurements
from exporter.networks.chain import ChainSession
from exporter.networks.components import Component
from exporter.networks.cuts import torch_chain
from exporter.networks.schedule import read_schedule
from exporter.networks.storage import load_network
from exporter.pictures import draw
from exporter.progress import task
from exporter.report.record import CellRecord
from exporter.runtime import EngineFacts, close_sessions, open_session, open_sessions, run_batched
from exporter.shapes import measure_cost, measure_points, points_of
from exporter.states import components_of, config_of
from targets.base import Session
from targets.ort import OnnxRuntime

Array = NDArray[Any]
Ask = Callable[[Mapping[str, Array]], dict[str, Array]]
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
    engine, quantized = lowered.engine, lowered.quantized
    place, facts = Place(state.path.name, target), EngineFacts.of(engine)
    seconds: dict[str, float] = {}
    found: list[Measurement] = []
    evidence: dict[str, Any] = {}
    fed: dict[str, Mapping[str, Array]] = {}
    known = components_of(state.path, facts.components)
    with _clock(seconds, "torch"):  # before any engine is loaded, so that the largest network is in memory once
        for component in known:
            _own_answers(state, component, bench, quantized)
            _dense_reference(component, bench)
    sessions = open_sessions(engine.path, facts)
    try:
        with _clock(seconds, "fidelity"):
            found += _answers(state, sessions, place, bench, quantized)
        with _clock(seconds, "images"):
            measurements, images = draw(engine.path, sessions, place, bench)
            found += measurements
        with _clock(seconds, "latency"), task(bench.progress, f"Latency {place.state} on {target}", len(known)) as told:
            for component in known:
                name, session = component.name, sessions[component.name]
                calls = _timed_calls(component, session, state.path, bench)
                found += _times(_Timed(component, session, calls, facts, place.at(name), bench), lowered)
                if isinstance(session, ChainSession):
                    fed |= {f"{name}/{part}": feeds for part, feeds in session.fed.items()}
                else:
                    fed[name] = calls[0]
                told_of_layers = session.evidence()
                found += sparse_measurements(told_of_layers, place.at(name))
                evidence[name] = told_of_layers.to_json()
                sessions.pop(name).close()  # the next pair finds the memory free
                told.advance()
    finally:
        close_sessions(sessions)
    with _clock(seconds, "footprint"):
        found += _footprint(engine.path, facts, place, fed)
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
    state: Artifact, sessions: Mapping[str, Session], place: Place, bench: Bench, quantized: Mapping[str, Quantized]
) -> list[Measurement]:
    """Put the recorded calls to every component: against its state itself, and against dense."""
    found: list[Measurement] = []
    for component in components_of(state.path, sessions):
        session = sessions[component.name]
        here = place.at(component.name)
        got = _ask_component(component, lambda feeds, session=session: run_batched(session, feeds), state.path, bench)  # type: ignore[misc]
        found += lowering(_own_answers(state, component, bench, quantized), got, here)
        reference = _dense_reference(component, bench)
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


def _dense_reference(component: Component, bench: Bench) -> Answers | Array:
    """Return what the dense pipeline answered: recorded, or computed in torch where 8-bit images were recorded."""
    if component.role == "denoiser":
        return recorded_answers(bench.recording, Subset(prompts=len(bench.rows)))
    found: Array = np.asarray(_in_torch(bench.dense, component, bench))
    return found


def _own_answers(
    state: Artifact, component: Component, bench: Bench, quantized: Mapping[str, Quantized]
) -> Answers | Array:
    """Return what a state itself answers: in torch, or, where it is quantized, its graph taken at its word."""
    if component.name not in quantized:
        return _in_torch(state, component, bench)
    graph = quantized[component.name].graph
    if str(graph) not in bench.torch_answers:
        session = OnnxRuntime().open_as_written(graph)
        try:
            asked = partial(run_batched, session)
            bench.torch_answers[str(graph)] = _ask_component(component, asked, state.path, bench)
        finally:
            session.close()
    found: Answers | Array = bench.torch_answers[str(graph)]
    return found


def _in_torch(state: Artifact, component: Component, bench: Bench) -> Answers | Array:
    digest = f"{component.name} {state.part_digest(component.folder)}"  # a VAE's two halves share a folder
    if digest not in bench.torch_answers:
        folder = state.path / component.folder
        network = part_of(component, load_network(folder, cls=component.cls))
        schedule = read_schedule(folder) if component.role == "denoiser" else None
        names, module = signature(network), wrap(network)

        def answer(feeds: Mapping[str, Array]) -> dict[str, Array]:
            with torch.inference_mode():
                found = module(*(torch.from_numpy(np.asarray(feeds[name])) for name in names.inputs))
            outputs = found if isinstance(found, tuple) else (found,)
            return {name: value.numpy() for name, value in zip(names.outputs, outputs, strict=True)}

        asked = answer if schedule is None else torch_chain(network, schedule)
        bench.torch_answers[digest] = _ask_component(component, asked, state.path, bench)
    found: Answers | Array = bench.torch_answers[digest]
    return found


def _ask_component(component: Component, answer: Ask, state: Path, bench: Bench) -> Answers | Array:
    config = config_of(state / component.folder)
    if component.role == "denoiser":
        asked = _denoiser(component, config, answer)
        return ask(bench.recording, asked, Subset(prompts=len(bench.rows)), bench.progress)
    found = answer(next(recorded_calls(component, config, bench.recording, bench.rows)).feeds)
    return found[next(name for name in MAIN_OUTPUTS if name in found)]


def _denoiser(component: Component, config: Mapping[str, Any], answer: Ask) -> Answer:
    def ask_denoiser(sample: Array, timestep: float, given: Mapping[str, Array]) -> Array:
        return answer(denoiser_feeds(component.cls, config, sample, timestep, given))["out_sample"]

    return ask_denoiser


@dataclass(frozen=True)
class _Timed:
    """A component that is timed.

    Attributes:
        component: of the state.
        session: of its engine.
        calls: recorded, with the rows that the engine takes.
        facts: of the engine.
        place: where the measurements go.
        bench: what all cells share.
    """

    component: Component
    session: Session
    calls: Sequence[Mapping[str, Array]]
    facts: EngineFacts
    place: Place
    bench: Bench

    @property
    def timer(self) -> Timer:
        mode = {"batch": self.bench.sampling["batch"], "target": self.facts.target, **self.facts.options}
        return Timer(
            budget_s=self.bench.recipe.measure.latency_seconds,
            mode=lambda: Mode.read(threads=self.facts.options.get("threads"), settings=mode),
        )

    def call(self) -> object:
        """Make the call that stands for all."""
        return self.session(self.calls[0])


def _times(it: _Timed, lowered: Lowered) -> list[Measurement]:
    """Time a component against all that it is held to on its target."""
    found, name = _latency(it), it.component.name
    if name in lowered.quantized:
        found.append(_over_float(it, lowered.quantized[name].floats))
    if lowered.fixed is not None:
        found += _shapes(it, lowered.fixed.path)
    return found


def _latency(it: _Timed) -> list[Measurement]:
    """Time a component on recorded calls; against the dense engine of the same target, pair by pair."""
    name, paired, ratio = it.component.name, it.bench.engines.get(it.place.target), None
    dense = None if paired is None else open_session(paired.path / name, it.facts)
    try:
        if isinstance(it.session, ChainSession):
            return scheduled_latency(it.session, it.calls, dense, it.place, it.timer)
        if dense is None:
            latency = it.timer.measure(it.call)
        else:
            pairs = it.timer.interleaved(it.call, lambda: dense(it.calls[0]))
            latency, ratio = pairs.a, pairs.ratio(DENSE)
    finally:
        if dense is not None:
            dense.close()
    loop = [loop_of_calls(latency, len(it.calls), it.place, ratio)] if it.component.role == "denoiser" else []
    return [*latency_measurements(latency, it.place, ratio), *loop]


def _over_float(it: _Timed, floats: Mapping[str, Path]) -> Measurement:
    """Time a quantized component against itself in float, at every precision, pair by pair; the fastest one counts."""
    ratios = {}
    for precision, engine in floats.items():
        options = {**it.facts.options, "precision": precision} if precision else it.facts.options
        other = open_session(engine, replace(it.facts, options=options))
        try:
            pairs = it.timer.interleaved(it.call, lambda other=other: other(it.calls[0]))  # type: ignore[misc]
        finally:
            other.close()
        ratios[precision] = pairs.ratio(f"the same in {precision or 'float'}")
    worst = max(ratios.values(), key=lambda ratio: ratio.value)
    detail = {precision: ratio.model_dump() for precision, ratio in ratios.items()}
    note = f"one call over {worst.to}, the fastest float engine of {', '.join(ratios) or 'float'} here"
    return it.place.measured(
        "latency.over_float",
        worst.value,
        "",
        low=worst.low,
        high=worst.high,
        samples=worst.pairs,
        ratio=worst,
        note=note,
        detail=detail,
    )


def _shapes(it: _Timed, fixed: Path) -> list[Measurement]:
    """Time a component at each point of the recipe's shapes, and the denoiser against one with fixed shapes."""
    bench, feeds = it.bench, it.calls[0]
    assert bench.recipe.shapes is not None
    points = points_of(bench.recipe.shapes, bench.sampling["size"])
    own = bench.sampling | {"batch": min(bench.sampling["batch"], bench.recording.count)}
    found = [measure_points(it.session, feeds, points, it.place, it.timer, own)]
    if it.component.role == "denoiser":
        other = open_session(fixed, it.facts)
        try:
            found.append(measure_cost(it.session, other, feeds, it.place, it.timer))
        finally:
            other.close()
    return found


def _timed_calls(component: Component, session: Session, state: Path, bench: Bench) -> list[dict[str, Array]]:
    """Return the recorded calls with exactly the rows the engine was compiled for, all of them real."""
    batch = min(bench.sampling["batch"], bench.recording.count)
    rows = session.rows if isinstance(session, ChainSession) else -1
    found = []
    for call in recorded_calls(component, config_of(state / component.folder), bench.recording, range(batch)):
        feeds = {}
        for spec in session.inputs:
            array = np.asarray(call.feeds[spec.name], dtype=spec.dtype)
            wanted = max(rows, spec.shape[0]) if array.ndim else -1
            if array.ndim and wanted not in (-1, len(array)):  # fewer prompts recorded than the batch holds
                array = np.resize(array, (wanted, *array.shape[1:]))
            feeds[spec.name] = np.ascontiguousarray(array) if array.ndim else array
        found.append(feeds)
    return found


def _footprint(
    engine: Path, facts: EngineFacts, place: Place, fed: Mapping[str, Mapping[str, Array]]
) -> list[Measurement]:
    """Load the engine in a process of its own, without torch, and call it as `fed`: what it costs a device."""
    parts = [(engine / (f"{name}{facts.ending}" if "/" in name else name), feeds) for name, feeds in fed.items()]
    shapes = {path.name: {key: array.shape for key, array in feeds.items()} for path, feeds in parts}
    folders = [str(path) for path, _ in parts]
    command = [sys.executable, "-m", "targets.footprint", facts.target, json.dumps(facts.options)]
    command += [json.dumps(shapes), *folders]
    child = run_child(command, timeout_s=600)
    times = json.loads(child.output.strip().splitlines()[-1])
    load = place.measured(
        "load_ms",
        sum(times["load_ms"].values()),
        "ms",
        samples=1,
        note="all components, in a new process, the runtime's own import left out",
        detail=times,
    )
    sizes = [size_measurement(place.at(name), engine / name) for name in facts.components]
    return [load, memory_measurement(place, child.peak_rss_mib), size_measurement(place, engine), *sizes]


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started

"""A recipe, carried out: states, engines, measurements, gates, report. What is finished is reused by the next run."""

from __future__ import annotations

import dataclasses
import datetime
import time
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from calibration.errors import CalibrationError
from exporter import __version__
from exporter.artifact import Artifact, disk_failure, locked, write_text
from exporter.bench import Bench
from exporter.built import built_cell
from exporter.cells import Cells, cell_key, shared_key
from exporter.collection import remember_used
from exporter.elsewhere.merged import with_merged
from exporter.environment import environment
from exporter.errors import ComponentFailed, ExporterError, exit_code_of
from exporter.lowering.converter import Converter
from exporter.lowering.engine import (
    begin_conversions,
    compile_fixed,
    compile_state,
    expect_conversions,
    export_float,
    export_state,
    tokens_of,
)
from exporter.lowering.rivals import Lowered, quantized_of
from exporter.lowering.workshop import Column, Workshop
from exporter.memo import MEMO, FileMemo
from exporter.meter import Meter
from exporter.metrics.gates import evaluate
from exporter.metrics.place import DENSE, Place
from exporter.networks.components import Component, denoiser
from exporter.preflight import Plan, check_recipe, parse_gates
from exporter.progress import Progress, Silent
from exporter.pruners.base import Stopwatch
from exporter.recipe import Recipe
from exporter.recordings import dense_recording, export_options, resolved_sampling
from exporter.report.formatting import measured
from exporter.report.record import CellRecord, GateRecord, RunRecord, StateRecord, TargetRecord
from exporter.report.writing import write_record, write_reports
from exporter.states import components_of, pipeline_class_of
from exporter.stopwatch import TargetStopwatch
from exporter.transforms import Lab, make_dense, make_state
from exporter.unchanged import note_finished, note_started
from targets.base import TargetError


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass
class _Run:
    """What one run knows so far."""

    recipe: Recipe
    plan: Plan
    out: Path
    progress: Progress
    memo: FileMemo
    measure_again: bool
    converter: Converter
    started: str = field(default_factory=_now)
    meter: Meter = field(default_factory=Meter)
    shared: str = ""
    states: dict[str, Artifact] = field(default_factory=dict)
    records: list[StateRecord] = field(default_factory=list)
    cells: list[CellRecord] = field(default_factory=list)
    gates: list[GateRecord] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    found: bool = False
    peak_mib: float = 0.0


def run_recipe(  # noqa: PLR0913 - the command's flags
    recipe: Recipe,
    out: Path | str,
    *,
    progress: Progress | None = None,
    verify: bool = False,
    measure_again: bool = False,
    until: str | None = None,
    targets: tuple[str, ...] | None = None,
    states: tuple[str, ...] | None = None,
    ignore_memory: bool = False,
) -> RunRecord:
    """Carry out a recipe and write its report.

    Args:
        recipe: what to do.
        out: folder of the run; made when missing, resumed when not.
        progress: what long work reports to; None for silence.
        verify: hash every file of the source and of reused artifacts, whatever earlier runs found out about it.
        measure_again: measure every cell, also where nothing that it depends on has changed.
        until: stop after this state or phase.
        targets: only these targets of the recipe.
        states: measure only these states.
        ignore_memory: start although the run is not expected to fit into memory; the report notes it.

    Returns:
        The record that was written to ``out/report.json``; its `exit_code` says how it went.

    Raises:
        RecipeError, SourceError: before any work.
        ExporterError: a state could not be made; what was measured before it is in the report.
    """
    out, progress = Path(out), progress or Silent()
    memo = FileMemo() if verify else FileMemo.load(out)
    plan = check_recipe(
        recipe,
        out,
        until=until,
        targets=targets,
        states=states,
        memo=memo,
        resume=not measure_again,
        ignore_memory=ignore_memory,
    )
    with locked(out), closing(Converter()) as converter:
        run = _Run(recipe, plan, out, progress, memo, measure_again, converter)
        run.found = (out / "states").is_dir()
        run.codes += [error.exit_code for error in plan.problems.values()]
        try:
            _carry_out(run)
        except (ExporterError, KeyboardInterrupt, OSError, CalibrationError) as error:
            failure = _as_ours(error, out)
            code = failure.exit_code if failure else 130
            _write(run, complete=False, code=code, stopped=str(failure or "interrupted"))
            if failure is None or failure is error:
                raise
            raise failure from error
        return _write(run, complete=True, code=exit_code_of(run.codes))


def _carry_out(run: _Run) -> None:
    if run.plan.expected is not None:
        note_started(run.out)
        expect_conversions(run.plan.columns, run.converter)
    dense, reused, took = _timed(lambda: _dense(run))
    _note_state(run, dense, reused, took)
    recording = dense_recording(run.recipe, dense, run.out, run.progress, run.memo)
    run.used |= {DENSE, recording.folder.parent.name}
    run.shared = shared_key(run.recipe, dense, recording, environment(), run.memo)
    sampling = resolved_sampling(run.recipe, dense.path)
    export = export_options(run.recipe, dense.path)
    requested = run.recipe.export.requested
    shop = Workshop(run.out, export, recording, sampling, run.progress, run.memo, requested, run.used, run.converter)
    column = next((column for column in run.plan.columns if _is_timed(column)), None)
    stopwatch = _stopwatch(run, column, dense, shop)
    lab = Lab(run.recipe, run.out, run.progress, run.memo, stopwatch, column, partial(_float_graph, shop))
    bench = Bench(run.recipe, run.out, dense, recording, sampling, run.progress)
    parent = dense
    for name in run.plan.states:
        if name != DENSE:
            index = int(name.partition("-")[0]) - 1
            parent, reused, took = _timed(
                lambda parent=parent, index=index, name=name: make_state(
                    index, parent, dense, run.out / "states" / name, lab
                )
            )
            _note_state(run, parent, reused, took)
        if name in run.plan.measured:
            if run.plan.until != "export":
                begin_conversions(parent, run.plan.columns, shop)
            for column in run.plan.columns:
                run.cells.append(_cell(run, parent, column, shop, bench))
                run.peak_mib = shop.peak_mib
                _save_memo(run)
                if not run.cells[-1].reused:  # what an earlier run took is on the disk as it is
                    write_record(_record(run, complete=False, code=exit_code_of(run.codes)), run.out)
            if not _pass_gates(run, name) and run.recipe.on_miss == "stop" and name != run.plan.states[-1]:
                run.notes.append(f"stopped after {name}: a gate was missed and on_miss is stop")
                break
    write_text(run.out / "used.json", remember_used(run.out, sorted(run.used)))
    _save_memo(run)
    if run.found:
        run.progress.say(f"{len(run.memo.read)} of {run.memo.asked} files read again")
    if all(cell.has_engine for cell in run.cells):
        note_finished(run.out, run.plan.key)


def _float_graph(shop: Workshop, state: Artifact, component: Component) -> Path:
    return export_float(state, component, shop).path / "model.onnx"


def _stopwatch(run: _Run, column: Column | None, dense: Artifact, shop: Workshop) -> Stopwatch | str:
    """Return what methods that cut by time ask: it does nothing, and costs nothing, until then."""
    if column is None:
        return "no target of the recipe can be used here"
    part = next(part for part in components_of(dense.path) if part.role == "denoiser")
    export = dataclasses.replace(shop.export, tokens=tokens_of(part, shop))
    return TargetStopwatch(column, export, run.out / "work" / "stopwatch", run.progress)


def _is_timed(column: Column) -> bool:
    here = column.target.capabilities()
    return here.runs and not here.untimed


def _save_memo(run: _Run) -> None:
    write_text(run.out / MEMO, run.memo.text())


def _dense(run: _Run) -> tuple[Artifact, bool]:
    return make_dense(run.plan.source, run.plan.facts, run.out / "states" / DENSE, run.memo)


def _cell(run: _Run, state: Artifact, column: Column, shop: Workshop, bench: Bench) -> CellRecord:
    """Lower and measure one state on one target; a failure here is this cell's own."""
    name = state.path.name
    earlier = next((cell for cell in run.cells if cell.target == column.name and cell.status == "failed"), None)
    shop.seconds.clear()
    made = len(shop.made)
    try:
        exported = export_state(state, shop, column.target)
        if run.plan.until == "export":
            return CellRecord(state=name, target=column.name, status="not run", error="stopped by --until export")
        engine = compile_state(state, exported, column, shop)
        if run.plan.until == "compile":
            return CellRecord(state=name, target=column.name, status="not run", error="stopped by --until compile")
        lowered = Lowered(engine, None, {}, exported)
        if not column.target.capabilities().runs:
            weighed = {part: partial(lowered.weighed, part) for part in exported}
            return built_cell(engine.path, weighed, column.target, Place(name, column.name), run.out)
        lowered = dataclasses.replace(lowered, quantized=quantized_of(state, exported, column, shop))
        if run.recipe.shapes is not None and _is_timed(column):
            fixed = compile_fixed(state, denoiser(pipeline_class_of(state.path)), column, shop)
            lowered = dataclasses.replace(lowered, fixed=fixed)
        cell = _measured(run, state, column, bench, lowered)
        if name == DENSE:
            bench.engines[column.name], bench.dense_cells[column.name] = engine, cell
        told = ["engine reused"] if len(shop.made) == made else []
        if told or cell.reused:
            run.progress.say(f"{name} on {column.name}: {', '.join([*told, measured(cell) or 'measured now'])}")
        return cell.model_copy(update={"seconds": {**shop.seconds, **cell.seconds}})
    except (ExporterError, TargetError) as caught:
        error = caught if isinstance(caught, ExporterError) else ComponentFailed(str(caught))
        run.codes.append(ComponentFailed.exit_code if error.exit_code not in (1, 4) else error.exit_code)
        note = f" (it failed for state {earlier.state} too)" if earlier else ""
        return CellRecord(state=name, target=column.name, status="failed", error=f"{error}{note}")


def _measured(run: _Run, state: Artifact, column: Column, bench: Bench, lowered: Lowered) -> CellRecord:
    """Return an earlier run's cell where nothing that it depends on has changed, or measure."""
    name = state.path.name
    paired = None if name == DENSE else bench.engines.get(column.name)
    key = cell_key(run.shared, state, lowered.engine, dense_engine=paired, fixed=lowered.fixed)
    kept = Cells(run.out, run.memo)
    cell = None if run.measure_again else kept.find(name, column.name, key)
    if cell is not None:
        return cell
    from exporter.measuring import measure_cell  # seconds to import

    run.converter.settle()
    cell = measure_cell(state, lowered, column.name, bench)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    cell = cell.model_copy(update={"measured_at": now})
    kept.keep(cell, key)
    return cell


def _pass_gates(run: _Run, state: str) -> bool:
    """Evaluate the gates that concern a state; return whether none was missed."""
    measurements = [item for cell in run.cells for item in cell.measurements]
    names = [column.name for column in run.plan.columns]
    failed = {(cell.state, cell.target) for cell in run.cells if not cell.has_engine}
    results = evaluate(parse_gates(run.recipe), measurements, run.recipe.state_ids, names, only_state=state)
    found = [GateRecord(**vars(item)) for item in results if (item.state, item.target) not in failed]
    run.gates += found
    run.gated.add(state)
    missed = [gate for gate in found if gate.status == "missed"]
    unknown = [gate for gate in found if gate.status == "not measured"] if run.recipe.unmeasured == "fail" else []
    if missed or unknown:
        run.codes.append(3)
    return not missed and not unknown


def _pending(run: _Run) -> int:
    """Return how many gates wait for states that were not measured yet."""
    names, gates = [column.name for column in run.plan.columns], parse_gates(run.recipe)
    waiting = [state for state in run.plan.measured if state not in run.gated]
    return sum(len(evaluate(gates, [], run.recipe.state_ids, names, only_state=state)) for state in waiting)


def _note_state(run: _Run, state: Artifact, reused: bool, took: float) -> None:
    facts = state.manifest.facts
    run.states[state.path.name] = state
    run.used.add(state.path.name)
    _save_memo(run)
    if reused:
        run.progress.say(f"{state.path.name} reused")
    run.records.append(
        StateRecord(
            id=state.path.name,
            stage=facts["stage"],
            digest=state.digest,
            parent=state.manifest.parent,
            parameters=facts["parameters"],
            size_bytes=facts["size_bytes"],
            seconds=round(took, 3),
            reused=reused,
            facts=facts["facts"],
        )
    )


def _write(run: _Run, *, complete: bool, code: int, stopped: str = "") -> RunRecord:
    record = _record(run, complete=complete, code=code).model_copy(update={"stopped": stopped})
    record = with_merged(record, run.out)
    write_reports(record, run.out)
    return record


def _record(run: _Run, *, complete: bool, code: int) -> RunRecord:
    return RunRecord(
        name=run.recipe.name,
        exporter_version=__version__,
        recipe=run.recipe.model_dump(mode="json", exclude_none=True),
        started=run.started,
        seconds=round(run.meter.seconds, 3),
        complete=complete,
        exit_code=code,
        environment=environment(),
        sampling=run.recipe.sampling.model_dump(mode="json"),
        source=dataclasses.asdict(run.plan.facts),
        states=run.records,
        targets=_target_records(run),
        cells=run.cells + _missing_cells(run),
        gates=run.gates,
        pending=0 if complete else _pending(run),
        forecast=_forecast(run) if complete else {},
        notes=[*run.plan.notes, *run.notes],
    )


def _forecast(run: _Run) -> dict[str, dict[str, float]]:
    """Compare preflight's figures with what happened; a run that found work done proves nothing about them."""
    expected = run.plan.expected
    if expected is None or run.plan.until != "measure" or run.found or any(c.status != "ok" for c in run.cells):
        return {}
    from exporter.forecast import compare

    return compare(expected, run.meter.took(run.out, run.peak_mib))


def _target_records(run: _Run) -> list[TargetRecord]:
    found = []
    for column in run.plan.columns:
        here = column.target.capabilities()
        found.append(
            TargetRecord(
                name=column.name,
                type=column.target.type,
                options=run.recipe.targets[column.name].given,
                version=here.version,
                device=here.device,
            )
        )
    for name, error in run.plan.problems.items():
        spec = run.recipe.targets[name]
        found.append(
            TargetRecord(name=name, type=spec.type, options=spec.given, version=None, device="", problem=str(error))
        )
    return found


def _missing_cells(run: _Run) -> list[CellRecord]:
    """Cells of targets that cannot be used here: shown as not run, with the reason."""
    return [
        CellRecord(state=state, target=name, status="not run", error=str(error))
        for state in run.plan.measured
        if state in run.states
        for name, error in run.plan.problems.items()
    ]


def _timed(work: Any) -> Any:
    started = time.monotonic()
    artifact, reused = work()
    return artifact, reused, 0.0 if reused else time.monotonic() - started


def _as_ours(error: BaseException, out: Path) -> ExporterError | None:
    """Return the error as one of ours; None for Ctrl-C."""
    if isinstance(error, ExporterError):
        return error
    if isinstance(error, OSError):
        return disk_failure(out, error)
    return ComponentFailed(str(error)) if isinstance(error, CalibrationError) else None

"""Carries a stage out: the float graph of the parent's component, recorded calls, ranges, and the plan that is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.errors import CalibrationError
from calibration.fitting import Fit, fit, fit_means
from calibration.index import file_digest
from calibration.narrowing import overflowing
from calibration.qdq import Manner
from calibration.recording import Recording
from calibration.schemes import FP16, INT4_WEIGHTS, PALETTE_MIXED, PALETTES, ROUNDING
from calibration.sites import sites_of
from calibration.statistics import Feeds, Study
from calibration.timesteps import chosen
from exporter import __version__
from exporter.artifact import digest_of
from exporter.errors import ComponentFailed, RecipeError, ToolMissing
from exporter.loan import DenseLoan
from exporter.lowering.feeds import denoiser_call, recorded_calls
from exporter.lowering.quantized import write_folded
from exporter.lowering.workshop import Column
from exporter.networks.components import Component
from exporter.networks.quantization import FIT, TABLE, Quantization, write_quantization
from exporter.progress import task
from exporter.pruners.notes import Notes
from exporter.quantizing.mixing import Mixer
from exporter.quantizing.options import QuantizeOptions
from exporter.quantizing.plan import check_units, plan_text, read_plan, schemes_of
from exporter.quantizing.planning import Planned, Planner
from exporter.quantizing.trial import Trial
from exporter.states import config_of
from targets.base import TargetError, TargetMissing
from targets.palettes import palettize

_TRIED = 4
"""Calls that plans are tried on."""


@dataclass(frozen=True)
class Subject:
    """What is quantized.

    Attributes:
        component: of a state.
        folder: its folder in that state.
        digest: of that folder.
        graph: ONNX file of it in float, weights in the state.
        rounds_results: whether a target has integer kernels only for convolutions whose results are rounded.
        column: the target that plans are made for; None where none runs here.
        workdir: keeps what is done, so that an interrupted stage goes on.
        kept: of the run: what was found out of a network outlasts the stage.
    """

    component: Component
    folder: Path
    digest: str
    graph: Path
    rounds_results: bool
    column: Column | None
    workdir: Path
    kept: Path


def quantize(subject: Subject, options: QuantizeOptions, loan: DenseLoan, out: Path) -> dict[str, Any]:
    """Write ``quantization.json``, and the ranges where activations are rounded, into a folder; return facts.

    Raises:
        RecipeError: the plan names a unit that is not there, or there are no prompts.
        ComponentFailed: a range cannot be fitted.
    """
    calibration = options.calibration
    given = read_plan(Path(options.plan)) if options.plan else {}
    recording = loan.recording(calibration.prompts, calibration.samples)
    graph = write_folded(subject.graph, subject.workdir / "float")
    names = list(sites_of(ir.load(graph).graph))
    check_units(given, names, options.plan or "quantize.plan")
    results = options.results == "int8" or (options.results == "auto" and subject.rounds_results)
    manner = Manner(options.group_size, results, palettize=palettize)
    facts: dict[str, Any] = {"scheme": options.scheme}
    found = None
    wanted = {options.scheme, *given.values()}
    if wanted & {*ROUNDING, INT4_WEIGHTS}:
        found = _fitted(subject, graph, recording, options, loan, ranges=bool(wanted & {*ROUNDING}))
        found.save(out / FIT)
        facts["fit"] = dict(found.facts)
    plan: dict[str, str] = {"": options.scheme}
    measured = options.limit_db is not None or options.scheme == PALETTE_MIXED
    if measured:
        calls, guidance = _asked(subject, recording, options, loan)
        known = _known(subject, recording, options, manner, loan)
        planned = _planned(subject, Trial(graph, found, manner, calls, guidance), known, options, loan)
        plan, facts = planned.plan, facts | {"search": planned.facts}
        (out / TABLE).write_text(planned.text, encoding="utf-8")
    plan |= given
    if not measured:
        (out / TABLE).write_text(plan_text(plan), encoding="utf-8")
    wide: dict[str, float] = {}
    if FP16 in plan.values():
        wide = _overflowing(subject, graph, recording, options, loan)
        facts["kept_in_float"] = wide
    write_quantization(out, Quantization(plan, options.group_size, results, tuple(sorted(wide)), recording.digest))
    schemes = list(schemes_of(plan, names).values())
    counts = {scheme: schemes.count(scheme) for scheme in dict.fromkeys(schemes)}
    return {**facts, "layers": counts, "recording": recording.digest}


def _asked(
    subject: Subject, recording: Recording, options: QuantizeOptions, loan: DenseLoan
) -> tuple[list[Feeds], float | None]:
    """Return the calls that plans are tried on, first and last step among them, and the guidance that joins rows."""
    if subject.component.role != "denoiser":
        key = "size" if options.limit_db is None else "limit_db"
        raise RecipeError(
            f"quantize.{key}: got {getattr(options, key):g} for {subject.component.name}, expected it for the "
            "denoiser: plans are made by its answers. Leave it out, or write a plan."
        )
    config = config_of(subject.folder)
    steps = chosen(recording, "uniform", _TRIED, loan.batch, loan.seed)
    feeds: list[Feeds] = [denoiser_call(subject.component, config, recording, step, rows).feeds for step, rows in steps]
    return feeds, recording.guidance if recording.index.guided else None


def _known(subject: Subject, recording: Recording, options: QuantizeOptions, manner: Manner, loan: DenseLoan) -> Notes:
    """Return what is known of this network, these calls and this way of rounding."""
    of = [subject.digest, subject.component.name, file_digest(subject.graph), recording.digest, loan.seed, loan.batch]
    how = [asdict(options.calibration), options.smoothness, options.group_size, manner.results, version("onnxruntime")]
    key = digest_of([of, how, __version__])
    subject.kept.mkdir(parents=True, exist_ok=True)
    return Notes(subject.kept / f"sensitivity-{key[:16]}.json", key)


def _planned(subject: Subject, trial: Trial, known: Notes, options: QuantizeOptions, loan: DenseLoan) -> Planned:
    if options.scheme == PALETTE_MIXED:
        return Mixer(trial, known, loan.progress).plan(options.limit_db, options.size)
    by_bytes = options.objective == "bytes" or options.scheme in PALETTES
    column = None if by_bytes else subject.column
    if column is None and not by_bytes:
        raise RecipeError(
            "quantize.limit_db: got no target of the recipe that runs here, expected one to take times on. Write "
            "objective: bytes, or a plan."
        )
    assert options.limit_db is not None
    return Planner(trial, options.scheme, column, known, subject.workdir, loan.progress).plan(options.limit_db)


def _fitted(
    subject: Subject, graph: Path, recording: Recording, options: QuantizeOptions, loan: DenseLoan, *, ranges: bool
) -> Fit:
    feeds = list(calls_of(subject.component, subject.folder, recording, options, loan))
    with task(loan.progress, "calibrate", len(feeds) * (1 + ranges)) as told:
        study = Study(graph, feeds, as_written, subject.workdir, told.advance)
        try:
            return fit(study, options.smoothness) if ranges else fit_means(study)
        except CalibrationError as error:
            raise ComponentFailed(f"{subject.component.name}: {error}") from error


def _overflowing(
    subject: Subject, graph: Path, recording: Recording, options: QuantizeOptions, loan: DenseLoan
) -> dict[str, float]:
    """Return module path -> the largest magnitude recorded there, of modules that stay in float for it."""
    feeds = list(calls_of(subject.component, subject.folder, recording, options, loan))
    with task(loan.progress, "overflow", len(feeds)) as told:
        try:
            return overflowing(Study(graph, feeds, as_written, subject.workdir, told.advance))
        except CalibrationError as error:
            raise ComponentFailed(f"{subject.component.name}: {error}") from error


def calls_of(
    component: Component, folder: Path, recording: Recording, options: QuantizeOptions, loan: DenseLoan
) -> list[Feeds]:
    """Return the recorded calls that ranges are fitted on, with exactly as many rows as the graph takes."""
    batch, wanted = loan.batch, options.calibration
    if recording.count < batch:
        raise ComponentFailed(
            f"quantize.calibration.samples: got {recording.count}, expected at least a batch of {batch}. Raise it."
        )
    config = config_of(folder)
    asked = chosen(recording, wanted.timesteps, wanted.calls, batch, loan.seed)
    if component.role != "denoiser":  # one call each
        parts = list(dict.fromkeys(rows for _, rows in asked))
        return [next(recorded_calls(component, config, recording, rows)).feeds for rows in parts]
    return [denoiser_call(component, config, recording, step, rows).feeds for step, rows in asked]


def as_written(path: Path) -> Callable[[Feeds], Mapping[str, Any]]:
    """Load a graph as it is written, with little memory."""
    from targets.ort import OnnxRuntime

    try:
        return OnnxRuntime().open_as_written(path)
    except TargetMissing as error:
        raise ToolMissing(f"quantize: {error}") from error
    except TargetError as error:
        raise ComponentFailed(f"quantize: {error}") from error

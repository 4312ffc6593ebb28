"""Stages that make a state from the last one: dense from the source, pruned, tuned.

A state is a pipeline folder. What a stage did not touch is linked from its parent, so weights are stored once.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import targets
from exporter import __version__
from exporter.artifact import Artifact, digest_of, link_file, link_tree, reusable, write_artifact
from exporter.dense import fill_dense
from exporter.errors import RecipeError
from exporter.loan import DenseLoan
from exporter.lowering.workshop import Column
from exporter.memo import FileMemo
from exporter.networks.components import Component
from exporter.networks.cuts import levels_of
from exporter.networks.loras import fused_entry
from exporter.networks.pipeline import load_pipeline
from exporter.networks.quantization import FILES as QUANTIZATION_FILES
from exporter.networks.schedule import SCHEDULE, read_schedule, write_schedule
from exporter.networks.source import SourceFacts
from exporter.networks.sparsity import Claims, carried, load_claims
from exporter.networks.stock import is_built_by
from exporter.networks.storage import load_network, load_surgery, parameter_count, read_config, save_network
from exporter.networks.surgery import Snapshot, Surgery, diff
from exporter.networks.weights import present_names, read_headers, weight_files
from exporter.progress import Progress
from exporter.prompts import prompt_set
from exporter.pruners import PRUNERS, pruner
from exporter.pruners.base import Context, Stopwatch
from exporter.quantizing.options import quantize_options
from exporter.quantizing.plan import read_plan
from exporter.recipe import Recipe, StageSpec
from exporter.recordings import resolved_sampling
from exporter.sampling import use_scheduler
from exporter.states import components_of, form_of, image_size
from exporter.tuning import TUNERS, tuner
from exporter.tuning.base import Shelf, TuneContext
from exporter.validation import hint, one_of, options_from

LIBRARIES = ("torch", "diffusers", "transformers", "torch-pruning", "accelerate", "safetensors")
"""Versions of these enter the key of every state."""

EMBEDDED_PROMPTS = "shapes-train"
"""What a stage of the embedded model looks at or trains on where the recipe names no prompts."""
QUIET_PROMPTS = "shapes-calibration"
"""The same for ranges."""

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Lab:
    """What stages share: where to work, what to report to, what a target tells.

    Attributes:
        recipe: the whole recipe.
        out: the run's folder.
        progress: what long work reports to.
        memo: what is known of files.
        stopwatch: of the first usable target, or why there is none.
        column: that target.
        float_graph: exports a component of a state in float and returns its ONNX file, weights in the state; None where
            nothing is lowered.
    """

    recipe: Recipe
    out: Path
    progress: Progress
    memo: FileMemo
    stopwatch: Stopwatch | str = "no target of the recipe can be used here"
    column: Column | None = None
    float_graph: Callable[[Artifact, Component], Path] | None = None

    @property
    def shelf(self) -> Shelf:
        """Training data of all stages; it stays until `exporter gc`."""
        return Shelf(self.out / "work" / "data", seed_of(self.recipe.seed, 0, "data"))

    def prompts(self, name: str) -> list[str]:
        """Return the prompts of a named set or file."""
        return list(prompt_set(name).prompts)


def stage_options(recipe: Recipe, index: int) -> Any:
    """Check a stage's method and options; return the options as the method's dataclass.

    Raises:
        RecipeError: unknown method or option, or a wrong value.
    """
    stage, place = recipe.stages[index], f"stages[{index}]"
    embedded = (recipe.source.path or "").startswith("reference:")
    if stage.kind == "quantize":
        return quantize_options(stage.options, f"{place}.quantize", QUIET_PROMPTS if embedded else None)
    registry = PRUNERS if stage.kind == "prune" else TUNERS
    if stage.method not in registry:
        msg = f"{place}.{stage.kind}.method: got '{stage.method}', expected {one_of(registry)}."
        raise RecipeError(msg + hint(stage.method, registry))
    method = pruner(stage.method) if stage.kind == "prune" else tuner(stage.method)
    given = stage.options
    if embedded and takes_prompts(method.options) and "prompts" not in given:
        given |= {"prompts": EMBEDDED_PROMPTS}
    return options_from(method.options, given, f"{place}.{stage.kind}")


def takes_prompts(options: type) -> bool:
    """Return whether a method with these options looks at what the model draws."""
    return any(field.name == "prompts" for field in fields(options))


def make_dense(source: Path, facts: SourceFacts, final: Path, memo: FileMemo | None = None) -> tuple[Artifact, bool]:
    """Copy what is needed of a source pipeline into the first state.

    Returns:
        The artifact and whether it was already there.
    """
    key = digest_of(["dense", __version__, facts.digest])
    found = reusable(final, key, memo)
    if found is not None:
        return found, True

    def build(folder: Path) -> Mapping[str, Any]:
        fill_dense(source, facts, folder)
        return _facts_of(folder, None, {"safety_checker": facts.safety_checker, "loras": fused_entry(facts.loras)})

    return write_artifact(final, build, kind="state", key=key, parent=None, made=_versions(), memo=memo), False


def make_state(index: int, parent: Artifact, dense: Artifact, final: Path, lab: Lab) -> tuple[Artifact, bool]:
    """Carry out stage `index` of the recipe on its parent state.

    Returns:
        The artifact and whether it was already there.
    """
    stage = lab.recipe.stages[index]
    options = stage_options(lab.recipe, index)
    recipe_part = {"seed": lab.recipe.seed, "stage": stage.kind, "method": stage.method, "options": asdict(options)}
    dependent = any(hasattr(options, name) for name in ("prompts", "of_sampling"))
    if stage.kind != "prune" or dependent:  # what it draws comes from the dense pipeline
        recipe_part |= {"dense": dense.digest, "sampling": lab.recipe.sampling.model_dump()}
    if stage.kind == "quantize":
        plan = read_plan(Path(options.plan)) if options.plan else None
        recipe_part |= {"plan": plan, "rounds_results": _rounds_results(lab.recipe)}
        if options.limit_db is not None and lab.column is not None:
            recipe_part |= {"target": lab.stopwatch if isinstance(lab.stopwatch, str) else lab.stopwatch.digest}
    by_latency = getattr(options, "budget", "") == "latency" or getattr(options, "latency", None) is not None
    if by_latency and not isinstance(lab.stopwatch, str):
        recipe_part |= {"target": lab.stopwatch.digest}
    key = digest_of([parent.digest, recipe_part, _versions()])
    found = reusable(final, key, lab.memo)
    if found is not None:
        return found, True
    workdir = lab.out / "work" / key[:32]
    workdir.mkdir(parents=True, exist_ok=True)
    carry_out = {"prune": _prune, "tune": _tune, "quantize": _quantize}[stage.kind]

    def build(folder: Path) -> Mapping[str, Any]:
        facts = carry_out(stage, options, _Job(index, parent, dense, lab, workdir, folder))
        for item in sorted(parent.path.iterdir()):
            if item.is_dir() and not (folder / item.name).exists():
                link_tree(item, folder / item.name)
        shutil.copyfile(parent.path / "model_index.json", folder / "model_index.json")
        return _facts_of(folder, stage, facts)

    made = write_artifact(
        final,
        build,
        kind="state",
        key=key,
        parent=parent.digest,
        made=_versions(),
        sources=[parent.path],
        memo=lab.memo,
    )
    shutil.rmtree(workdir, ignore_errors=True)
    return made, False


@dataclass(frozen=True)
class _Job:
    """One stage at work: where it stands, what it starts from, and the folder of the state it makes."""

    index: int
    parent: Artifact
    dense: Artifact
    lab: Lab
    workdir: Path
    folder: Path


def _prune(stage: StageSpec, options: Any, job: _Job) -> dict[str, Any]:
    """Edit one network; what happened is found by comparing before and after, not told by the pruner."""
    component = component_named(job.parent.path, getattr(options, "component", "denoiser"), f"stages[{job.index}]")
    folder = job.parent.path / component.folder
    network = load_network(folder, cls=component.cls)
    before = Snapshot.of(network)
    parameters = parameter_count(network)
    loan = _loan(job, "prune")
    context = Context(torch.Generator().manual_seed(loan.seed), job.lab.progress, job.workdir, loan)
    outcome = pruner(stage.method)(options).prune(network, context)
    surgery = diff(before, network)
    left = round(parameter_count(network) / parameters, 6)
    stock = outcome.config if outcome.config is not None and is_built_by(network, outcome.config) else None
    told: dict[str, Any] = {"stock_config": stock is not None} if outcome.config is not None else {}
    claims = load_claims(folder)
    if outcome.schedule is not None and surgery.is_empty:
        for path in (path for path in sorted(folder.iterdir()) if path.is_file() and path.name != SCHEDULE):
            link_file(path, job.folder / component.folder / path.name)
        write_schedule(job.folder / component.folder, outcome.schedule)
    else:
        claims, lost = carried(claims, surgery, network.state_dict())
        claims = {**claims, **outcome.sparsity}
        record = Surgery() if stock else load_surgery(folder).then(surgery)
        _save(network, component, job, record, claims, config=stock)
        told |= {"sparsity_lost": lost} if lost else {}
    told |= _zeros(network, claims)
    return {"component": component.name, "parameters_over_before": left, **_edits(surgery), **told, **outcome.facts}


def _loan(job: _Job, purpose: str) -> DenseLoan:
    seed = seed_of(job.lab.recipe.seed, job.index, purpose)
    sampling = resolved_sampling(job.lab.recipe, job.dense.path)
    folder = job.workdir / "loan"
    return DenseLoan(job.dense, sampling, job.lab.stopwatch, seed, folder, job.lab.progress, job.lab.shelf)


def _quantize(stage: StageSpec, options: Any, job: _Job) -> dict[str, Any]:
    """Say how one component is rounded; its weights stay the parent's."""
    from exporter.quantizing.stage import Subject, quantize  # seconds to import

    del stage
    component = component_named(job.parent.path, options.component, f"stages[{job.index}]")
    folder, out = job.parent.path / component.folder, job.folder / component.folder
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.name not in QUANTIZATION_FILES):
        link_file(path, out / path.name)
    assert job.lab.float_graph is not None
    graph, rounds = job.lab.float_graph(job.parent, component), _rounds_results(job.lab.recipe)
    digest = job.parent.part_digest(component.folder, without=QUANTIZATION_FILES)
    kept = job.lab.out / "work" / "quantizing"
    subject = Subject(component, folder, digest, graph, rounds, job.lab.column, job.workdir, kept)
    return {"component": component.name, **quantize(subject, options, _loan(job, "quantize"), out)}


def _rounds_results(recipe: Recipe) -> bool:
    """Return whether a target of the recipe computes convolutions in integers only where their results are rounded."""
    return any(
        targets.target(spec.type).rounds_results for spec in recipe.targets.values() if spec.type in targets.TARGETS
    )


def _zeros(network: nn.Module, claims: Claims) -> dict[str, Any]:
    """Return how many layers have zeros that compilers may count on, and what of the whole network is not zero."""
    if not claims:
        return {}
    left = sum(int(torch.count_nonzero(parameter)) for parameter in network.parameters())
    return {"layers_with_zeros": len(claims), "non_zero_share": round(left / parameter_count(network), 4)}


def _edits(surgery: Surgery) -> dict[str, int]:
    return {
        "lists_shortened": len(surgery.keep),
        "modules_replaced": len(surgery.stand_in),
        "modules_resized": len(surgery.resize),
    }


def _tune(stage: StageSpec, options: Any, job: _Job) -> dict[str, Any]:
    """Train the parent's denoiser towards the dense one; shapes and zeros stay, so its record and its claims do too."""
    component = component_named(job.parent.path, "denoiser", f"stages[{job.index}]")
    folder = job.parent.path / component.folder
    student, claims = load_network(folder, cls=component.cls), load_claims(folder)
    before = Snapshot.of(student)
    teacher = load_pipeline(job.dense.path)
    sampling = job.lab.recipe.sampling
    use_scheduler(teacher, sampling.scheduler)
    facts = tuner(stage.method)(options).tune(
        student,
        teacher,
        TuneContext(
            seed=seed_of(job.lab.recipe.seed, job.index, "tune"),
            progress=job.lab.progress,
            workdir=job.workdir,
            prompts=job.lab.prompts,
            steps=sampling.steps,
            guidance=sampling.guidance,
            size=image_size(sampling.size, job.dense.path),
            form=form_of(job.dense.path),
            shelf=job.lab.shelf,
            sparsity=claims,
        ),
    )
    _save(student, component, job, load_surgery(folder).then(diff(before, student)), claims)
    return {"component": component.name, **_zeros(student, claims), **facts}


def _save(
    network: nn.Module,
    component: Component,
    job: _Job,
    surgery: Surgery,
    claims: Claims,
    *,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Store in the parent's own precision, so that sizes of states compare and fp16 in means fp16 out.

    The config is the parent's unless another is given, which the record then starts from.
    """
    folder = job.parent.path / component.folder
    nn.Module.to(network, _stored_dtype(folder, component.cls))  # diffusers' own cast warns about nothing
    original = read_config(folder, component.cls) if config is None else config
    save_network(network, job.folder / component.folder, surgery=surgery, original_config=original, sparsity=claims)
    schedule = read_schedule(folder)
    if schedule is not None:  # of an earlier stage: it says which levels are computed, not how wide they are
        if levels_of(network) != schedule.levels:
            raise RecipeError(
                f"stages[{job.index}]: got a network of other levels than its schedule is for, expected "
                f"{schedule.levels}. Schedule the steps after what removes levels."
            )
        write_schedule(job.folder / component.folder, schedule)


def _stored_dtype(folder: Path, cls: str) -> torch.dtype:
    names = [fact.dtype for fact in read_headers(weight_files(folder, cls)).values()]
    return _DTYPES.get(max(set(names), key=names.count), torch.float32)


def component_named(state: Path, name: str, place: str) -> Component:
    """Return a component of a state by its name or role.

    Raises:
        RecipeError: the pipeline has none of that name.
    """
    known = components_of(state)
    for component in known:
        if name in (component.name, component.role):
            return component
    msg = f"{place}.component: got '{name}', expected denoiser | {one_of(part.name for part in known)}."
    raise RecipeError(msg)


def seed_of(seed: int, index: int, purpose: str) -> int:
    """Return a seed that differs for every stage and purpose and follows from the recipe's."""
    return int(digest_of([seed, index, purpose])[:8], 16)


def _facts_of(folder: Path, stage: StageSpec | None, facts: dict[str, Any]) -> dict[str, Any]:
    sizes, counts = {}, {}
    for component in components_of(folder):
        files = weight_files(folder / component.folder, component.cls)
        sizes[component.name] = sum(file.stat().st_size for file in files)
        stored = present_names(component.cls, read_headers(files)).values()
        counts[component.name] = sum(math.prod(fact.shape) for fact in stored)
    return {
        "stage": {stage.kind: stage.given} if stage is not None else None,
        "parameters": counts,
        "size_bytes": sizes,
        "facts": facts,
    }


def _versions() -> dict[str, str]:
    return {"diffusion-exporter": __version__, **{name: version(name) for name in LIBRARIES}}

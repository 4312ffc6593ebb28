"""Before any work: does this recipe fit this machine, and what will it take."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

import targets
from exporter.errors import ExporterError, RecipeError, SourceError, ToolMissing
from exporter.forecast import Forecast, forecast
from exporter.lowering.engine import Column
from exporter.metrics.gates import Gate
from exporter.metrics.size import size_bytes
from exporter.networks.components import components
from exporter.networks.loras import find_lora
from exporter.networks.single_file import refuse_pickles
from exporter.networks.source import Choice, SourceFacts, check_source, open_source
from exporter.prompts import prompt_set
from exporter.recipe import Recipe
from exporter.reference import SHAPES
from exporter.sampling import check_open_sizes, check_prompts, check_sampling
from exporter.states import image_size, vae_scale
from exporter.transforms import stage_options
from exporter.validation import hint, one_of, options_from
from targets.base import TargetError, TargetMissing

_UNTIL_KINDS = ("prune", "tune", "export", "compile", "measure")


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        states: ids of the states that are made, in order.
        measured: ids of the states that are lowered and measured.
        columns: the usable targets.
        problems: errors per target that is not usable; the run goes on without it and ends with their exit code.
        until: where each measured state stops: ``export``, ``compile`` or ``measure``.
        source: the source's folder; `facts` what was found there.
        expected: memory, disk and time.
        notes: what a user should know.
    """

    states: tuple[str, ...]
    measured: tuple[str, ...]
    columns: tuple[Column, ...]
    problems: dict[str, ExporterError]
    until: str
    source: Path
    facts: SourceFacts
    expected: Forecast
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {
            "states": list(self.states),
            "measured": list(self.measured),
            "targets": {column.name: asdict(column.options) for column in self.columns},
            "problems": {name: str(error) for name, error in self.problems.items()},
            "until": self.until,
            **asdict(self.expected),
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """Return the plan for people."""
        columns = ", ".join(f"{column.name} ({column.target.type})" for column in self.columns)
        free = psutil.virtual_memory().available >> 20
        lines = [
            f"Source    {self.facts.pipeline_class}, {sum(self.facts.parameters.values()) / 1e6:.1f} M parameters",
            f"States    {' -> '.join(self.states)}; measured: {', '.join(self.measured)}",
            f"Targets   {columns or 'none usable'}",
            f"Memory    about {self.expected.memory_mib} MiB at the peak; {free} MiB are free",
            f"Disk      about {self.expected.disk_mib} MiB",
            f"Time      about {self.expected.seconds} s on this machine as it is now ({os.cpu_count()} cores)",
            *(f"Note      {note}" for note in self.notes),
            *(f"Problem   {error}" for error in self.problems.values()),
        ]
        return "\n".join(lines)

    def raise_problems(self) -> None:
        """Raise the first problem, when there is one."""
        for error in self.problems.values():
            raise error


def check_recipe(
    recipe: Recipe,
    out: Path,
    *,
    until: str | None = None,
    targets: tuple[str, ...] | None = None,
    states: tuple[str, ...] | None = None,
) -> Plan:
    """Check a recipe against its source, the methods' options, the targets and this machine; change nothing.

    Args:
        recipe: the recipe.
        out: the run's folder; only its free space is looked at.
        until: see `exporter run --until`.
        targets: names of the targets to use; None for all.
        states: ids of the states to measure; None for the recipe's.

    Raises:
        RecipeError: anything in the recipe or the arguments that cannot be carried out.
        SourceError: the source is missing, damaged or unsupported.
    """
    made, last = _extent(recipe, until)
    measured = _measured(recipe, made, states)
    source = open_source(_source_of(recipe), variant=recipe.source.variant)
    for index in range(len(recipe.stages)):
        stage_options(recipe, index)
    facts = check_source(source, _choice_of(recipe))
    _check_stages(recipe, facts, source)
    if recipe.shapes is not None:
        check_open_sizes(recipe.shapes.size, recipe.sampling, source)
    prompts = prompt_set(recipe.measure.prompts)
    if len(prompts.prompts) < recipe.measure.images:
        msg = (
            f"measure.images: got {recipe.measure.images}, but '{recipe.measure.prompts}' has "
            f"{len(prompts.prompts)} prompts, expected at most as many. Lower images or give more prompts."
        )
        raise RecipeError(msg)
    check_prompts(prompts.prompts[: recipe.measure.images], source)
    columns, problems = _columns(recipe, targets)
    parse_gates(recipe)
    latent = image_size(recipe.sampling.size, source) // vae_scale(source)
    types = [column.target.type for column in columns]
    expected = forecast(recipe, facts, source, latent=latent, states=len(made), measured=len(measured), columns=types)
    _room(out, expected, recipe, max(facts.parameters, key=lambda name: facts.parameters[name]))
    return Plan(made, measured, columns, problems, last, source, facts, expected, facts.notes)


def _extent(recipe: Recipe, until: str | None) -> tuple[tuple[str, ...], str]:
    """Return the states to make and the last phase for `--until`."""
    ids = recipe.state_ids
    if until is None or until == "measure":
        return ids, "measure"
    if until in ids:
        return ids[: ids.index(until) + 1], "measure"
    if until in ("export", "compile"):
        return ids, until
    kinds = [stage.kind for stage in recipe.stages]
    if until in kinds:
        return ids[: len(kinds) - kinds[::-1].index(until) + 1], "measure"
    known = (*ids, *dict.fromkeys(kinds), "export", "compile", "measure")
    msg = f"--until: got '{until}', expected {one_of(known)}.{hint(until, known)}"
    raise RecipeError(msg)


def _measured(recipe: Recipe, made: tuple[str, ...], states: tuple[str, ...] | None) -> tuple[str, ...]:
    for name in states or ():
        if name not in recipe.state_ids:
            msg = f"--states: got '{name}', expected {one_of(recipe.state_ids)}.{hint(name, recipe.state_ids)}"
            raise RecipeError(msg)
    chosen = recipe.measured_states if states is None else ("0-dense", *states)
    return tuple(name for name in made if name in chosen)


def _columns(recipe: Recipe, chosen: tuple[str, ...] | None) -> tuple[tuple[Column, ...], dict[str, ExporterError]]:
    for name in chosen or ():
        if name not in recipe.targets:
            msg = f"--targets: got '{name}', expected {one_of(recipe.targets)}.{hint(name, recipe.targets)}"
            raise RecipeError(msg)
    columns: list[Column] = []
    problems: dict[str, ExporterError] = {}
    for name, spec in recipe.targets.items():
        if chosen is not None and name not in chosen:
            continue
        if spec.type not in targets.TARGETS:
            known = targets.TARGETS
            msg = f"targets.{name}.type: got '{spec.type}', expected {one_of(known)}.{hint(spec.type, known)}"
            raise RecipeError(msg)
        target = targets.target(spec.type)
        options: Any = options_from(target.options, spec.given, f"targets.{name}")
        here = target.capabilities()
        if not here.available:
            problems[name] = ToolMissing(f"target {name}: {here.reason} Run: {here.install}")
            continue
        try:
            target.check(options)
        except TargetMissing as error:
            problems[name] = ToolMissing(f"target {name}: {error}")
        except TargetError as error:
            msg = f"targets.{name}: {error}"
            raise RecipeError(msg) from error
        else:
            columns.append(Column(name, target, options))
    return tuple(columns), problems


def parse_gates(recipe: Recipe) -> list[Gate]:
    """Return the recipe's gates.

    Raises:
        RecipeError: an unknown metric, or a limit that cannot be read.
    """
    return [Gate.parse(gate.model_dump(exclude_none=True), f"gates[{i}]") for i, gate in enumerate(recipe.gates)]


def _source_of(recipe: Recipe) -> str | Path | dict[str, str]:
    given = recipe.source
    if given.hub is not None:
        return {"hub": given.hub, "revision": given.revision or ""}
    path = given.path or ""
    if _is_single_file(recipe):
        return _config_of(path, given.config)
    if not path.startswith("reference:"):
        return path
    if path != "reference:shapes":
        raise RecipeError(f"source.path: got '{path}', expected reference:shapes or a folder. There is one of them.")
    return SHAPES


def _is_single_file(recipe: Recipe) -> bool:
    return recipe.source.config is not None or Path(recipe.source.path or "").is_file()


def _config_of(path: str, config: str | None) -> Path:
    """Return the folder that completes a single checkpoint file."""
    if not Path(path).expanduser().is_file():
        raise SourceError(f"source.path: no such file; got {path}, expected a checkpoint. Check the path.")
    refuse_pickles(Path(path))
    if config is None:
        raise SourceError(
            f"source.path: {path} holds weights only; expected source.config beside it: a local folder with "
            "model_index.json, a config.json per component, tokenizer and scheduler, such as a copy of the model's "
            "pipeline folder without its weights. Nothing is fetched for it."
        )
    if not Path(config).expanduser().is_dir():
        raise SourceError(f"source.config: no such folder; got {config}, expected one with model_index.json.")
    return Path(config).expanduser()


def _choice_of(recipe: Recipe) -> Choice:
    given = recipe.source
    return Choice(
        variant=given.variant,
        safety_checker=given.safety_checker == "keep",
        loras=tuple(find_lora(lora.path, lora.weight, f"source.loras[{i}]") for i, lora in enumerate(given.loras)),
        single_file=Path(given.path or "").expanduser() if _is_single_file(recipe) else None,
    )


def _check_stages(recipe: Recipe, facts: SourceFacts, source: Path) -> None:
    names = {part.name for part in components(facts.pipeline_class)} | {"denoiser"}
    for index, stage in enumerate(recipe.stages):
        wanted = stage.options.get("component", "denoiser")
        if wanted not in names:
            place = f"stages[{index}].{stage.kind}.component"
            msg = f"{place}: got '{wanted}', expected {one_of(sorted(names))}.{hint(str(wanted), names)}"
            raise RecipeError(msg)
    check_sampling(recipe.sampling, source)


def _room(out: Path, expected: Forecast, recipe: Recipe, largest: str) -> None:
    """Refuse a run that would not fit, with what to change."""
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free >> 20
    written = size_bytes(out) >> 20 if out.is_dir() else 0
    if expected.disk_mib - written > free:
        msg = (
            f"--out {out}: not enough room; got {free} MiB free, expected about {expected.disk_mib - written} MiB. "
            "Give another folder, or free some space."
        )
        raise RecipeError(msg)
    available = psutil.virtual_memory().available >> 20
    if expected.unmapped_mib > available:
        fixes = ["close other programs"]
        if any(stage.kind == "tune" for stage in recipe.stages):
            fixes.append("tune on a larger machine")
        if recipe.sampling.batch > 1:
            fixes.append("write sampling.batch: 1")
        fixes.append(f"cut more of {largest} (keep_ratio)")
        msg = (
            f"memory: the run would not fit; got {available} MiB free, expected about {expected.unmapped_mib} MiB that "
            f"cannot be paged out. To change that: {', or '.join(fixes)}."
        )
        raise RecipeError(msg)

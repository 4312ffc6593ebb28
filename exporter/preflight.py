"""Before any work: does this recipe fit this machine, and what will it take."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from exporter import __version__
from exporter.artifact import digest_of
from exporter.compiling import ready_target
from exporter.errors import ExporterError, Findings, RecipeError, SourceError, ToolMissing
from exporter.lowering.workshop import Column
from exporter.memo import FileMemo
from exporter.metrics.gates import Gate
from exporter.networks.components import check_requested
from exporter.networks.loras import find_lora
from exporter.networks.single_file import refuse_pickles
from exporter.networks.source import Choice, SourceFacts, check_source, open_source
from exporter.prompts import prompt_set
from exporter.pruners import pruner
from exporter.quantizing.checks import check_plans, speed_gates
from exporter.recipe import GateSpec, Recipe, read_mended
from exporter.reference import SHAPES
from exporter.room import check_disk, check_memory
from exporter.sampling import check_open_sizes, check_prompts, check_sampling
from exporter.stage_checks import check_data, check_named, check_stages
from exporter.states import image_size, vae_scale
from exporter.transforms import stage_options, takes_prompts
from exporter.unchanged import is_finished
from exporter.validation import hint, one_of

if TYPE_CHECKING:
    from exporter.forecast import Forecast
_UNTIL_KINDS = ("prune", "tune", "quantize", "export", "compile", "measure")


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
        expected: memory, disk and time; None where a run was asked about that has left everything already.
        key: digest of all that decides what a run leaves.
        notes: what a user should know.
    """

    states: tuple[str, ...]
    measured: tuple[str, ...]
    columns: tuple[Column, ...]
    problems: dict[str, ExporterError]
    until: str
    source: Path
    facts: SourceFacts
    expected: Forecast | None
    key: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {
            "states": list(self.states),
            "measured": list(self.measured),
            "targets": {column.name: asdict(column.options) for column in self.columns},
            "problems": {name: str(error) for name, error in self.problems.items()},
            "until": self.until,
            **(asdict(self.expected) if self.expected else {}),
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """Return the plan for people."""
        columns = ", ".join(f"{column.name} ({column.target.type})" for column in self.columns)
        lines = [
            f"Source    {self.facts.pipeline_class}, {sum(self.facts.parameters.values()) / 1e6:.1f} M parameters",
            f"States    {' -> '.join(self.states)}; measured: {', '.join(self.measured)}",
            f"Targets   {columns or 'none usable'}",
            *self._expected_lines(),
            *(f"Note      {note}" for note in self.notes),
            *(f"Problem   {error}" for error in self.problems.values()),
        ]
        return "\n".join(lines)

    def _expected_lines(self) -> list[str]:
        if self.expected is None:
            return ["Forecast  none: everything is there"]
        free = psutil.virtual_memory().available >> 20
        return [
            f"Memory    about {self.expected.memory_mib} MiB at the peak, {self.expected.phase}; {free} MiB are free",
            f"Disk      about {self.expected.disk_mib} MiB",
            f"Time      about {self.expected.seconds} s on this machine as it is now ({os.cpu_count()} cores)",
        ]

    def raise_problems(self) -> None:
        """Raise the first problem, when there is one."""
        for error in self.problems.values():
            raise error


def check_recipe(  # noqa: PLR0913 - the command's flags
    recipe: Recipe,
    out: Path = Path(),
    *,
    until: str | None = None,
    targets: tuple[str, ...] | None = None,
    states: tuple[str, ...] | None = None,
    memo: FileMemo | None = None,
    resume: bool = False,
    found: Findings | None = None,
    ignore_memory: bool = False,
) -> Plan:
    """Check a recipe against its source, the methods' options, the targets and this machine; change nothing.

    Args:
        recipe: the recipe.
        out: the run's folder, where free space and what is known of files are looked at; by default this folder.
        until: see `exporter run --until`.
        targets: names of the targets to use; None for all.
        states: ids of the states to measure; None for the recipe's.
        memo: what is known of the source's files; by default what runs in `out` found out.
        resume: forecast nothing where the same run came to its end in `out`.
        found: what is known to be wrong already; independent problems are raised together.
        ignore_memory: accept a run that is not expected to fit into memory; the plan notes it.

    Raises:
        RecipeError: anything in the recipe or the arguments that cannot be carried out.
        SourceError: the source is missing, damaged or unsupported.
    """
    found = found or Findings()
    made, last = _extent(recipe, until)
    measured = _measured(recipe, made, states)
    options = {}
    for index in range(len(recipe.stages)):
        with found.gather():
            options[index] = stage_options(recipe, index)
            check_data(recipe, index, options[index])
    columns, problems = _columns(recipe, targets, found)
    for index, gate in enumerate(recipe.gates):
        with found.gather():
            _gate(index, gate)
    prompts: tuple[str, ...] = ()
    with found.gather():
        prompts = _prompts(recipe)
    memo = memo or FileMemo.load(out)
    with found.gather():
        source = open_source(_source_of(recipe), variant=recipe.source.variant)
        facts = check_source(source, _choice_of(recipe, memo), memo)
        for index, known in options.items():
            with found.gather():
                check_named(f"stages[{index}]", known, facts)
        _check_fit(recipe, facts, source, prompts, found)
    found.raise_all()
    key = digest_of([__version__, recipe.model_dump(mode="json"), facts.digest, last, made, measured, targets])
    plan = Plan(made, measured, columns, problems, last, source, facts, None, key, facts.notes)
    return plan if resume and is_finished(out, key) else _forecast(plan, recipe, out, ignore_memory=ignore_memory)


def _forecast(plan: Plan, recipe: Recipe, out: Path, *, ignore_memory: bool) -> Plan:
    """Return the plan with what it will take; a run that would not fit is refused."""
    from exporter.forecast import forecast  # seconds to import and to compute

    latent = image_size(recipe.sampling.size, plan.source) // vae_scale(plan.source)
    expected = forecast(recipe, plan.facts, plan.source, latent=latent, measured=plan.measured, columns=plan.columns)
    check_disk(out, expected)
    notes = check_memory(expected, recipe, plan.facts, ignore=ignore_memory)
    return replace(plan, expected=expected, notes=(*plan.notes, *_uncounted(recipe), *notes))


def _uncounted(recipe: Recipe) -> list[str]:
    """Say which stages take time that the estimate leaves out: what they look at depends on what they find."""
    looking = [
        f"stages[{index}] ({stage.method})"
        for index, stage in enumerate(recipe.stages)
        if stage.kind == "prune" and takes_prompts(pruner(stage.method).options)
    ]
    told = (
        "what they draw, measure and train to choose what goes is not in the estimate; the run says how long it takes."
    )
    return [f"{', '.join(looking)}: {told}"] if looking else []


def check_file(path: Path, settings: Iterable[str], out: Path | None = None) -> Plan:
    """Read a recipe and check it, as `check_recipe` does; what the file itself has wrong is told beside the rest.

    Args:
        path: the YAML file.
        settings: changes, as for `read_recipe`.
        out: the run's folder; None for ``runs/NAME``.

    Raises:
        RecipeError, SourceError: as `read_recipe` and `check_recipe`, independent problems together.
    """
    found = Findings()
    recipe = read_mended(path, settings, found)
    if recipe is None:
        found.raise_all()
    assert recipe is not None
    return check_recipe(recipe, out or Path("runs") / recipe.name, found=found)


def _prompts(recipe: Recipe) -> tuple[str, ...]:
    prompts = prompt_set(recipe.measure.prompts).prompts
    if len(prompts) < recipe.measure.images:
        msg = (
            f"measure.images: got {recipe.measure.images}, but '{recipe.measure.prompts}' has "
            f"{len(prompts)} prompts, expected at most as many. Lower images or give more prompts."
        )
        raise RecipeError(msg)
    return prompts[: recipe.measure.images]


def _check_fit(recipe: Recipe, facts: SourceFacts, source: Path, prompts: tuple[str, ...], found: Findings) -> None:
    """Gather what the recipe asks of its source that this one does not have."""
    with found.gather():
        check_requested(facts.pipeline_class, recipe.export.requested)
    with found.gather():
        check_stages(recipe, facts)
    with found.gather():
        check_plans(recipe.stages, source)
    with found.gather():
        check_sampling(recipe.sampling, source)
        if recipe.shapes is not None:
            check_open_sizes(recipe.shapes.size, recipe.sampling, source)
    with found.gather():
        check_prompts(prompts, source)


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


def _columns(
    recipe: Recipe, chosen: tuple[str, ...] | None, found: Findings
) -> tuple[tuple[Column, ...], dict[str, ExporterError]]:
    for name in chosen or ():
        if name not in recipe.targets:
            msg = f"--targets: got '{name}', expected {one_of(recipe.targets)}.{hint(name, recipe.targets)}"
            raise RecipeError(msg)
    columns: list[Column] = []
    problems: dict[str, ExporterError] = {}
    for name, spec in recipe.targets.items():
        if chosen is not None and name not in chosen:
            continue
        try:
            with found.gather():
                columns.append(Column(name, *ready_target(name, spec.type, spec.given)))
        except ToolMissing as error:
            problems[name] = error
    return tuple(columns), problems


def parse_gates(recipe: Recipe) -> list[Gate]:
    """Return the recipe's gates, and those that stages imply.

    Raises:
        RecipeError: an unknown metric, or a limit that cannot be read.
    """
    implied = speed_gates(dict(zip(recipe.state_ids[1:], recipe.stages, strict=True)))
    return [*(_gate(index, gate) for index, gate in enumerate(recipe.gates)), *implied]


def _gate(index: int, gate: GateSpec) -> Gate:
    return Gate.parse(gate.model_dump(exclude_none=True), f"gates[{index}]")


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


def _choice_of(recipe: Recipe, memo: FileMemo) -> Choice:
    given = recipe.source
    return Choice(
        variant=given.variant,
        safety_checker=given.safety_checker == "keep",
        loras=tuple(
            find_lora(lora.path, lora.weight, f"source.loras[{i}]", memo) for i, lora in enumerate(given.loras)
        ),
        single_file=Path(given.path or "").expanduser() if _is_single_file(recipe) else None,
    )

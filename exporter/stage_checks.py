"""What stages ask of a source, of prompts and of one another, looked at before any work."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import targets
from exporter.errors import RecipeError
from exporter.networks.components import components, family
from exporter.networks.source import SourceFacts
from exporter.prompts import prompt_set
from exporter.pruners.matrix import SCHEDULES, refusal
from exporter.quantizing.checks import check_order, check_schemes
from exporter.quantizing.options import CalibrationOptions, QuantizeOptions
from exporter.recipe import Recipe
from exporter.validation import hint, one_of, options_from
from targets.base import RefusesSchemes


def check_data(recipe: Recipe, index: int, options: Any) -> None:
    """Refuse prompts of a stage that are not there or too few, and schemes that a target does not run.

    Args:
        recipe: the recipe.
        index: of the stage.
        options: of the stage.

    Raises:
        RecipeError: naming the key.
    """
    place = f"stages[{index}].{recipe.stages[index].kind}"
    if isinstance(options, QuantizeOptions):
        check_schemes(options, place, _schemes(recipe))
        options, place = options.calibration, f"{place}.calibration"
    named = getattr(options, "prompts", None)
    if named is None:
        return
    try:
        known = len(prompt_set(named).prompts)
    except RecipeError as error:
        raise RecipeError(f"{place}.prompts: {error}") from error
    wanted = getattr(options, "least_prompts", 1)
    if known < wanted:
        key = "samples" if isinstance(options, CalibrationOptions) else "images"
        got = f"{place}.{key}: got {wanted}, but '{named}' has {known} prompts, expected at most as many."
        raise RecipeError(f"{got} Lower {key} or give more prompts.")


def _schemes(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Return the schemes of the recipe's targets, and why one cannot be had with a target's options."""
    offered: dict[str, dict[str, str]] = {}
    for name, spec in recipe.targets.items():
        if spec.type not in targets.TARGETS:
            continue
        target = targets.target(spec.type)
        refused: Mapping[str, str] = {}
        if isinstance(target, RefusesSchemes):
            with suppress(RecipeError):  # wrong options are told where targets are looked at
                refused = target.refused(options_from(target.options, spec.given, f"targets.{name}"))
        offered[f"{name} ({spec.type})"] = {scheme: refused.get(scheme, "") for scheme in target.schemes}
    return offered


def check_named(place: str, options: Any, facts: SourceFacts) -> None:
    """Refuse to quantize without prompts where the family draws from them: inputs are recorded in any case.

    Raises:
        RecipeError: naming the key.
    """
    if not isinstance(options, QuantizeOptions) or options.calibration.prompts is not None:
        return
    if family(facts.pipeline_class).asked != "batch_size":
        got = f"{place}.quantize.calibration.prompts: missing; expected a set or file of prompts to record inputs with."
        raise RecipeError(f"{got} Write prompts: FILE (one a line), or a built-in set such as everyday.")


def check_stages(recipe: Recipe, facts: SourceFacts) -> None:
    """Refuse stages that do not suit the source's family, or one another.

    Raises:
        RecipeError: naming the stage.
    """
    names = {part.name for part in components(facts.pipeline_class)} | {"denoiser"}
    scheduled = [index for index, stage in enumerate(recipe.stages) if stage.method in SCHEDULES]
    if len(scheduled) > 1:
        first, second = (recipe.stages[index].method for index in scheduled[:2])
        raise RecipeError(
            f"stages[{scheduled[1]}].prune.method: got {second} after {first} in stages[{scheduled[0]}], expected one "
            "schedule of steps. Remove one of them."
        )
    check_order(recipe.stages)
    for index, stage in enumerate(recipe.stages):
        if stage.kind == "tune" and not family(facts.pipeline_class).distills:
            raise RecipeError(
                f"stages[{index}].tune: cannot distil this family; got {facts.pipeline_class}, expected one with a "
                "schedule of betas that draws from prompts. Remove the stage."
            )
        reason = refusal(stage.method, facts.pipeline_class) if stage.kind == "prune" else ""
        if reason:
            raise RecipeError(
                f"stages[{index}].prune.method: {stage.method} does not prune {facts.pipeline_class}: {reason}. Choose "
                "another method: `exporter pruners` lists which prunes what."
            )
        wanted = stage.options.get("component", "denoiser")
        if wanted not in names:
            place = f"stages[{index}].{stage.kind}.component"
            msg = f"{place}: got '{wanted}', expected {one_of(sorted(names))}.{hint(str(wanted), names)}"
            raise RecipeError(msg)

"""The sampling a recipe asks for: whether the source's family can do it, and its scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from pathlib import Path
from typing import Any

from calibration.calling import Drawing
from exporter.errors import RecipeError, SourceError
from exporter.networks.components import denoiser
from exporter.networks.reading import read_object
from exporter.recipe import Sampling
from exporter.states import config_of, family_of, image_size, own_size, pipeline_class_of, size_step, vae_scale
from exporter.validation import one_of

_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
}
"""Name in the recipe to diffusers' class and the options that it is given."""


def use_scheduler(pipeline: Any, name: str) -> None:
    """Give the pipeline the scheduler of this name; ``source`` leaves its own.

    Args:
        pipeline: diffusers', changed in place.
        name: a value of the recipe's ``sampling.scheduler``.
    """
    if name == "source":
        return
    import diffusers  # seconds to import

    named, changes = _SCHEDULERS[name]
    cls = getattr(diffusers, named)
    if not isinstance(pipeline.scheduler, cls):
        if name == "ddim":  # by default it clips, as no scheduler does whose config is silent on it
            changes = {"clip_sample": bool(pipeline.scheduler.config.get("clip_sample", False))}
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **changes)


def check_sampling(sampling: Sampling, source: Path) -> None:
    """Check that pipelines of the source's family can sample as the recipe says.

    Args:
        sampling: of the recipe.
        source: folder of the pipeline.

    Raises:
        RecipeError: another scheduler, size or guidance is needed; the message says which.
        SourceError: the source does not say for which size it was made.
    """
    name, family = pipeline_class_of(source), family_of(source)
    if sampling.scheduler not in family.schedulers:
        raise RecipeError(
            f"sampling.scheduler: {name} cannot be driven with it; got '{sampling.scheduler}', expected "
            f"{one_of(family.schedulers)}. Write scheduler: source."
        )
    if family.guidance == "none" and "guidance" in sampling.model_fields_set and sampling.guidance > 1:
        raise RecipeError(
            f"sampling.guidance: {name} has no guidance; got {sampling.guidance:g}, expected at most 1. Remove the key."
        )
    most = read_object(source / "scheduler" / "scheduler_config.json", SourceError).get("original_inference_steps")
    if sampling.scheduler == "source" and isinstance(most, int) and sampling.steps > most:
        raise RecipeError(
            f"sampling.steps: the source's scheduler was distilled to at most {most} steps; got {sampling.steps}. "
            "Write 4, which is what such models are made for."
        )
    size = image_size(sampling.size, source)
    if not family.sized and size != own_size(source):
        raise RecipeError(
            f"sampling.size: {name} draws images of its own size only; got {size}, expected {own_size(source)}. "
            "Remove the key."
        )
    step = size_step(source)
    if size % step:
        raise RecipeError(
            f"sampling.size: got {size}, expected a multiple of {step}, as VAE and denoiser divide it. "
            f"Write {max(step, size // step * step)}."
        )
    largest = _largest(source)
    if largest and size > largest:
        raise RecipeError(
            f"sampling.size: {name} knows positions up to {largest} pixels; got {size}, expected at most {largest}. "
            f"Write {largest}."
        )


def check_open_sizes(sizes: Sequence[int], sampling: Sampling, source: Path) -> None:
    """Check that engines of the source's family can be open for these image sides.

    Args:
        sizes: of the recipe's shapes, rising; none leaves the size fixed.
        sampling: of the recipe.
        source: folder of the pipeline.

    Raises:
        RecipeError: the family draws one size only, or the denoiser cannot take one of them.
        SourceError: the source does not say for which size it was made.
    """
    if not sizes:
        return
    name, own = pipeline_class_of(source), image_size(sampling.size, source)
    if not family_of(source).sized and tuple(sizes) != (own,):
        raise RecipeError(
            f"shapes.size: {name} draws images of its own size only; got {list(sizes)}, expected none. Leave "
            "shapes.size out; shapes.batch works."
        )
    config = config_of(source / denoiser(name).folder)
    levels = len(config.get("block_out_channels", ())) or 1
    factor = lcm(size_step(source), vae_scale(source) * 2 ** (levels - 1))
    for size in sizes:
        if size % factor:
            raise RecipeError(
                f"shapes.size: got {size}, expected multiples of {factor}, which VAE and denoiser scale by. "
                f"Write {max(factor, size // factor * factor)}."
            )
    largest = _largest(source)
    if largest and sizes[-1] > largest:
        raise RecipeError(
            f"shapes.size: {name} knows positions up to {largest} pixels; got {sizes[-1]}, expected at most {largest}."
        )
    if not sizes[0] <= own <= sizes[-1]:
        raise RecipeError(
            f"shapes.size: got {list(sizes)}, expected a range that holds the source's own size, {own}. "
            "Widen it, or set sampling.size."
        )


def _largest(source: Path) -> int:
    """Return the largest image side that the denoiser has positions for; 0 where any will do."""
    config = config_of(source / denoiser(pipeline_class_of(source)).folder)
    return size_step(source) * int(config.get("pos_embed_max_size") or 0)


def check_prompts(prompts: Sequence[str], source: Path) -> None:
    """Check that every prompt names a class, where the source draws classes instead of texts.

    Raises:
        RecipeError: naming the first that does not.
    """
    name = pipeline_class_of(source)
    if family_of(source).asked != "class_labels":
        return
    labels = read_object(source / "model_index.json", SourceError).get("id2label") or {}
    names = [part.strip() for entry in labels.values() for part in str(entry).split(",")]
    count = int(config_of(source / denoiser(name).folder)["num_embeds_ada_norm"])
    for prompt in prompts:
        if prompt not in names and not (prompt.isdecimal() and int(prompt) < count):
            known = f" or a name such as {names[0]!r}" if names else ""
            raise RecipeError(
                f"measure.prompts: {name} draws classes; got {prompt[:60]!r}, expected a number from 0 to "
                f"{count - 1}{known}, one per line. Name another file."
            )


def drawing_of(sampling: Mapping[str, Any]) -> Drawing:
    """Return how images are made, from a recipe's sampling with its size filled in."""
    size = int(sampling["size"])
    return Drawing(int(sampling["steps"]), float(sampling["guidance"]), size, size)

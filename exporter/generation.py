"""One image from an engine folder, as `exporter generate` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibration.calling import draw
from calibration.errors import CalibrationError
from exporter.artifact import disk_failure
from exporter.errors import RecipeError
from exporter.networks.safety import attach_safety_checker
from exporter.networks.schedule import check_guidance, read_schedule
from exporter.runtime import check_engine, open_sessions, pipeline_of
from exporter.sampling import drawing_of
from exporter.states import components_of, form_of, is_guided_by_rows


def generate_image(
    engine: Path, prompt: str, out: Path, *, seed: int = 0, steps: int | None = None, guidance: float | None = None
) -> list[str]:
    """Make an image and write it as PNG.

    Args:
        engine: an engine folder.
        prompt: what to draw; cut where the tokenizer ends, as diffusers does, with a note.
        out: the PNG.
        seed: seed of the initial noise.
        steps: denoising steps; None for the recipe's.
        guidance: guidance scale; None for the recipe's.

    Returns:
        Lines to show: what was made, and what a user must know.

    Raises:
        RecipeError: `out` is not a PNG.
        RecipeError: steps or guidance that the denoiser's schedule was not made for.
        ArtifactError: the engine is damaged or does not fit this machine.
    """
    if out.suffix.lower() != ".png":
        msg = f"--out: got '{out}', expected a file ending in .png. Write --out {out.with_suffix('.png')}."
        raise RecipeError(msg)
    _, facts = check_engine(engine)
    pipeline = attach_safety_checker(pipeline_of(engine, open_sessions(engine, facts)), engine)
    sampling = facts.sampling
    chosen_steps = steps if steps is not None else int(sampling["steps"])
    chosen_guidance = guidance if guidance is not None else float(sampling["guidance"])
    _check_schedule(engine, sampling, chosen_steps, chosen_guidance)
    drawing = drawing_of({**sampling, "steps": chosen_steps, "guidance": chosen_guidance})
    form = form_of(engine)
    try:
        image = draw(pipeline, form, [prompt], [seed], drawing, output_type="pil")[0]
    except CalibrationError as error:
        raise RecipeError(str(error)) from error
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        image.save(out)
    except OSError as error:
        raise disk_failure(out, error) from error
    made = f"{out}: {image.width}x{image.height}, {chosen_steps} steps, guidance {chosen_guidance:g}, seed {seed}, "
    return [
        made + f"state {facts.state} on {facts.target} {facts.runtime}",
        *(truncation_note(getattr(pipeline, form.tokenizers[0]), prompt) if form.tokenizers else []),
    ]


def _check_schedule(engine: Path, sampling: Mapping[str, Any], steps: int, guidance: float) -> None:
    """Refuse other steps, or another layout of guidance, than a scheduled denoiser was made for."""
    part = next(part for part in components_of(engine) if part.role == "denoiser")
    schedule = read_schedule(engine / part.folder)
    if schedule is None:
        return
    if steps != int(sampling["steps"]):
        raise RecipeError(
            f"--steps: got {steps}, expected {sampling['steps']}: {part.name} follows a schedule that was made "
            "for this list of steps. Leave --steps out, or make a state with another."
        )
    check_guidance(schedule, is_guided_by_rows(engine, guidance), "--guidance")


def truncation_note(tokenizer: object, prompt: str) -> list[str]:
    """Return a note when a prompt is longer than the tokenizer takes, else nothing."""
    limit = tokenizer.model_max_length  # type: ignore[attr-defined]
    ids = tokenizer(prompt, truncation=False, padding=False, verbose=False).input_ids  # type: ignore[operator]
    if len(ids) <= limit:
        return []
    lost = tokenizer.decode(ids[limit - 1 : -1])  # type: ignore[attr-defined]
    return [f"Note: the prompt has {len(ids)} tokens and the text encoder takes {limit}; this part was cut off: {lost}"]

"""The one recording of the dense pipeline that a run compares everything with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibration.index import LAYOUT
from calibration.recording import Recording
from exporter import __version__
from exporter.artifact import Artifact, digest_of, reusable, write_artifact
from exporter.lowering.options import ExportOptions
from exporter.memo import FileMemo
from exporter.progress import Progress
from exporter.prompts import prompt_set
from exporter.recipe import Recipe
from exporter.states import family_of, form_of, image_size, is_guided_by_rows, vae_scale

_DATA = "data"


def resolved_sampling(recipe: Recipe, dense: Path) -> dict[str, Any]:
    """Return the recipe's sampling with size and guidance filled in from the source where the recipe has none."""
    sampling = recipe.sampling.model_dump(mode="json")
    sampling["size"] = image_size(recipe.sampling.size, dense)
    if family_of(dense).guidance == "none":
        sampling["guidance"] = 1.0
    return sampling


def export_options(recipe: Recipe, dense: Path) -> ExportOptions:
    """Return the shapes that components are exported with."""
    sampling, scale = resolved_sampling(recipe, dense), vae_scale(dense)
    made = ExportOptions(
        opset=recipe.export.opset,
        dynamic=recipe.export.dynamic or recipe.shapes is not None,
        batch=sampling["batch"],
        guided=is_guided_by_rows(dense, sampling["guidance"]),
        latent=sampling["size"] // scale,
    )
    if recipe.shapes is None:
        return made
    batches = (*recipe.shapes.batch, made.batch)
    latents = (*(side // scale for side in recipe.shapes.size), made.latent)
    return replace(made, batches=(min(batches), max(batches)), latents=(min(latents), max(latents)))


def dense_recording(recipe: Recipe, dense: Artifact, out: Path, progress: Progress, memo: FileMemo) -> Recording:
    """Record the dense pipeline on the recipe's prompts, or find it done.

    Raises:
        CalibrationError: the pipeline cannot be recorded.
    """
    sampling = resolved_sampling(recipe, dense.path)
    prompts = prompt_set(recipe.measure.prompts)
    chosen = prompts.first(recipe.measure.images)
    part = {"prompts": chosen.digest, "seed": recipe.measure.seed, "sampling": sampling}
    key = digest_of(["recording", LAYOUT, __version__, dense.digest, part])
    final = out / "recordings" / f"dense-{key[:16]}"
    found = reusable(final, key, memo)

    def build(folder: Path) -> Mapping[str, Any]:
        from calibration.record import record  # diffusers takes seconds to import
        from exporter.networks.pipeline import load_pipeline
        from exporter.sampling import use_scheduler

        pipeline = load_pipeline(dense.path)
        use_scheduler(pipeline, sampling["scheduler"])
        pipeline.set_progress_bar_config(disable=True)
        made = record(
            pipeline,
            chosen,
            folder / _DATA,
            seed=recipe.measure.seed,
            steps=sampling["steps"],
            guidance=sampling["guidance"],
            size=sampling["size"],
            batch=sampling["batch"],
            progress=progress,
            model=dense.digest,
            form=form_of(dense.path),
        )
        return {"digest": made.digest, **part}

    if found is None:
        write_artifact(final, build, kind="recording", key=key, parent=dense.digest, memo=memo)
    return Recording.open(final / _DATA, verify=False)

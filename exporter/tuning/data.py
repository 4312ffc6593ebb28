"""Training data of a denoiser: clean latents with their prompts, from the dense pipeline itself or from images.

Latents are made once, chunk by chunk, and kept in the work folder; noise is drawn anew for every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor

from calibration.calling import Drawing, Form, conditions, draw
from exporter.artifact import digest_of
from exporter.errors import ComponentFailed, RecipeError
from exporter.networks.inputs import as_arguments
from exporter.progress import Progress, task
from exporter.tuning.checkpoint import digest_of_tensors, read, write
from exporter.tuning.images import CaptionedImages

EMPTY = ""


@dataclass(frozen=True)
class Batch:
    """What a denoiser is asked, and the answer that the data alone would give.

    Attributes:
        feeds: the sample (batch, channels, height, width), ``timestep`` (batch,) int64 and what else the denoiser is
            given, as keyword arguments of its forward.
        target: (batch, channels, height, width); noise, velocity or clean latents, as the model predicts.
    """

    feeds: dict[str, Any]
    target: Tensor


@dataclass(frozen=True)
class LatentData:
    """Clean latents, what the denoiser is given with them, and the noise schedule of the pipeline they belong to.

    Attributes:
        latents: (images, channels, height, width) float32 on the CPU, scaled as the denoiser sees them.
        prompt_of: (images,) int64; row of `given` that describes each.
        given: inputs besides sample and timestep, each (prompts + 1, ...) on the CPU; the last row is without a prompt.
        scheduler: the pipeline's schedule.
        sample: name of the denoiser's first input.
    """

    latents: Tensor
    prompt_of: Tensor
    given: Mapping[str, Tensor]
    scheduler: DDPMScheduler
    sample: str = "sample"

    def batch(
        self, size: int, *, dropout: float, generator: torch.Generator, device: torch.device, both: bool = False
    ) -> Batch:
        """Return noised latents at timesteps spread evenly over the schedule, one random timestep per stratum.

        Args:
            size: how many.
            dropout: share of prompts that become the empty prompt, so that guidance keeps working.
            generator: a CPU generator; the batch follows from its state alone, on any device.
            device: where the batch goes.
            both: ask everything twice, without the prompts first and then with them, as guidance does; none is dropped.
        """
        images = torch.randint(len(self.latents), (size,), generator=generator)
        total = int(self.scheduler.config.num_train_timesteps)
        strata = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        timesteps = (strata * total).long().clamp_max(total - 1)
        dropped = torch.rand(size, generator=generator) < dropout
        last = len(next(iter(self.given.values()), self.latents)) - 1
        prompts = torch.where(dropped, last, self.prompt_of[images])
        noise = torch.randn(self.latents[images].shape, generator=generator)
        if both:
            prompts = torch.cat([torch.full_like(prompts, last), self.prompt_of[images]])
            images, timesteps, noise = images.repeat(2), timesteps.repeat(2), torch.cat([noise, noise])
        clean = self.latents[images]
        noised = self.scheduler.add_noise(clean, noise, timesteps)
        given = {name: rows[prompts] for name, rows in self.given.items()}
        feeds = {self.sample: noised, "timestep": timesteps, **given}
        target = self._target(clean, noise, timesteps)
        return Batch(as_arguments({name: value.to(device) for name, value in feeds.items()}), target.to(device))

    def _target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(clean, noise, timesteps)
            return velocity
        return clean


@dataclass(frozen=True)
class Generation:
    """How the dense pipeline makes latents.

    Attributes:
        steps: denoising steps.
        guidance: guidance scale; 1 and below is none.
        size: image side in pixels.
        seed: the initial noise of image i is drawn from seed + i.
        batch: images at a time.
        form: how the dense pipeline is called.
    """

    steps: int
    guidance: float
    size: int
    seed: int
    batch: int
    form: Form = Form()  # noqa: RUF009 - frozen

    @property
    def drawing(self) -> Drawing:
        """Steps, guidance and size, as the pipeline is called with them."""
        return Drawing(self.steps, self.guidance, self.size, self.size)


def generated(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    count: int,
    plan: Generation,
    *,
    folder: Path,
    progress: Progress,
) -> LatentData:
    """Return latents that the dense pipeline itself makes for the prompts.

    Args:
        pipeline: on the device to work on.
        prompts: used in turn until there are `count` latents.
        count: how many latents.
        plan: how to make them.
        folder: finished chunks are kept here and found again.
        progress: one unit per latent.
    """
    chosen = [prompts[i % len(prompts)] for i in range(count)]
    made_with = digest_of(
        [
            digest_of_tensors(getattr(pipeline, plan.form.denoiser).state_dict()),
            _plain(pipeline.scheduler.config),
            [plan.steps, plan.guidance, plan.size, plan.seed, plan.batch],
        ]
    )

    def make(start: int, stop: int) -> Tensor:
        # One generator per image: what an image becomes does not depend on its neighbours in the batch.
        seeds = range(plan.seed + start, plan.seed + stop)
        shown = getattr(pipeline, "_progress_bar_config", {})
        pipeline.set_progress_bar_config(disable=True)
        try:
            kind = "latent" if plan.form.decoder else "pt"
            made: Tensor = draw(pipeline, plan.form, chosen[start:stop], seeds, plan.drawing, output_type=kind)
        finally:
            pipeline.set_progress_bar_config(**shown)
        latents = made.float().cpu()
        return latents if plan.form.decoder else latents * 2 - 1  # the pipeline answers pixels from 0 to 1

    chunks = _Chunks(folder, "latents", count, plan.batch)
    latents = chunks.all(lambda start, stop: digest_of([made_with, chosen[start:stop], start]), make, progress)
    return _with_text(pipeline, latents, chosen, plan)


def encoded(
    pipeline: DiffusionPipeline,
    images: CaptionedImages,
    plan: Generation,
    *,
    folder: Path,
    progress: Progress,
) -> LatentData:
    """Return the latents that the dense pipeline's own encoder gives for captioned images.

    Args:
        pipeline: on the device to work on.
        images: files and their captions.
        plan: its ``size`` is what images are scaled and cropped to; its ``batch`` how many at a time.
        folder: finished chunks are kept here and found again.
        progress: one unit per image.

    Raises:
        RecipeError: an image cannot be read, or the pipeline has no encoder.
    """
    if not plan.form.decoder:
        raise RecipeError(
            f"tune.data: {type(pipeline).__name__} has no autoencoder to encode images with; got a folder, expected "
            "'generated'. Write data: generated."
        )
    vae = pipeline.vae
    weights = digest_of_tensors(vae.state_dict())
    shift = getattr(vae.config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def make(start: int, stop: int) -> Tensor:
        pixels = images.pixels(start, stop, plan.size).to(vae.device, vae.dtype)
        latents: Tensor = vae.encode(pixels).latent_dist.mode()
        scaled: Tensor = (latents - shift) * vae.config.scaling_factor
        return scaled.float().cpu()

    chunks = _Chunks(folder, "encoded", len(images.captions), plan.batch)
    latents = chunks.all(
        lambda start, stop: digest_of([weights, plan.size, images.digest(start, stop)]), make, progress
    )
    return _with_text(pipeline, latents, list(images.captions), plan)


@dataclass(frozen=True)
class _Chunks:
    """Latents that are made a chunk at a time, each kept under the digest of what it was made from."""

    folder: Path
    name: str
    count: int
    size: int

    def all(self, key: Callable[[int, int], str], make: Callable[[int, int], Tensor], progress: Progress) -> Tensor:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = []
        with task(progress, f"training data ({self.name})", self.count):
            for start in range(0, self.count, self.size):
                stop = min(start + self.size, self.count)
                path = self.folder / f"{self.name}-{start:06d}.safetensors"
                kept = read(path, key=key(start, stop))
                if kept is None:
                    made = make(start, stop)
                    write(path, {"latents": made}, key=key(start, stop))
                    found.append(made)
                else:
                    found.append(kept.tensors["latents"])
                progress.advance(stop - start)
        latents = torch.cat(found)
        if not latents.isfinite().all():
            got = f"tune: the dense pipeline made latents that are not finite (of {self.count}); expected numbers."
            raise ComponentFailed(f"{got} Load it in float32, or check the source with `exporter check`.")
        return latents


def _with_text(pipeline: DiffusionPipeline, latents: Tensor, prompts: list[str], plan: Generation) -> LatentData:
    unique = list(dict.fromkeys(prompts))
    row = {prompt: index for index, prompt in enumerate(unique)}
    return LatentData(
        latents=latents,
        prompt_of=torch.tensor([row[prompt] for prompt in prompts]),
        given=_given(pipeline, unique, plan),
        scheduler=noise_schedule(pipeline.scheduler.config),
        sample=plan.form.inputs[0],
    )


def _given(pipeline: DiffusionPipeline, prompts: list[str], plan: Generation, batch: int = 64) -> dict[str, Tensor]:
    """Return what the pipeline gives its denoiser for each prompt and, in the last row, without one."""
    parts: list[dict[str, Tensor]] = []
    empty: dict[str, Tensor] = {}
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        rows = conditions(pipeline, plan.form, texts, plan.drawing)
        halves = {name: torch.split(value.cpu(), len(texts)) for name, value in rows.items()}
        side = -1 if not plan.form.conditional_first else 0
        parts.append({name: half[side] for name, half in halves.items()})
        empty = {name: half[-1 - side][:1] for name, half in halves.items() if len(half) == 2}
    if not empty:  # the denoiser answers one row: without a prompt is with an empty one
        empty = {name: value.cpu() for name, value in conditions(pipeline, plan.form, [EMPTY], plan.drawing).items()}
    return {name: torch.cat([*(part[name] for part in parts), empty[name]]) for name in empty}


def noise_schedule(config: Any) -> DDPMScheduler:
    """Return the schedule that a diffusion pipeline was trained with, from its scheduler's config.

    Raises:
        RecipeError: the scheduler is not one of noise prediction on a discrete schedule.
    """
    plain = _plain(config)
    known = ("epsilon", "v_prediction", "sample")
    if "beta_schedule" not in plain or plain.get("prediction_type", "epsilon") not in known:
        name = plain.get("_class_name", "unknown")
        got = f"tune.method: distill cannot add the noise of scheduler {name} ({plain.get('prediction_type')})"
        expected = f"expected a schedule of betas that predicts one of {', '.join(known)}"
        raise RecipeError(f"{got}; {expected}. Tune this family with another method.")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    taken = {name: plain[name] for name in (*names, "rescale_betas_zero_snr") if name in plain}
    return DDPMScheduler(**taken)


def _plain(config: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(config).items() if isinstance(value, str | int | float | list | None)}

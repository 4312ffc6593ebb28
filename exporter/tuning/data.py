"""Training data of a denoiser: clean latents with their prompts, from the dense pipeline itself or from images.

Latents are made once, chunk by chunk, and kept in the work folder; noise is drawn anew for every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from calibration.calling import Drawing, Form, conditions, draw
from exporter.artifact import digest_of
from exporter.errors import ComponentFailed, RecipeError
from exporter.networks.inputs import as_arguments, takes_timestep_as_share
from exporter.progress import Progress, task
from exporter.tuning.checkpoint import digest_of_tensors, read, write
from exporter.tuning.images import CaptionedImages

EMPTY = ""


Schedule: TypeAlias = DDPMScheduler | FlowMatchEulerDiscreteScheduler
"""How much noise a level has: of betas, or of a straight flow from data to noise."""


@dataclass(frozen=True)
class Batch:
    """What a denoiser is asked, and the answer that the data alone would give.

    Attributes:
        feeds: the sample (batch, ...), ``timestep`` (batch,), int64 or for a flow float32, and what else the denoiser
            is given, as keyword arguments of its forward.
        target: (batch, ...); noise, velocity or clean latents, as the model predicts.
    """

    feeds: dict[str, Any]
    target: Tensor


@dataclass(frozen=True)
class LatentData:
    """Clean latents, what the denoiser is given with them, and the noise schedule of the pipeline they belong to.

    Attributes:
        latents: (images, ...) float32 on the CPU, scaled and shaped as the denoiser sees them: (images, channels,
            height, width), or (images, tokens, channels).
        prompt_of: (images,) int64; row of `given` that describes each.
        given: inputs besides sample and timestep, each (prompts + 1, ...) on the CPU; the last row is without a prompt.
        scheduler: the pipeline's schedule.
        sample: name of the denoiser's first input.
        shared: further inputs, without an axis of rows.
        timestep_unit: what the denoiser takes a timestep of 1 as.
    """

    latents: Tensor
    prompt_of: Tensor
    given: Mapping[str, Tensor]
    scheduler: Schedule
    sample: str = "sample"
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    timestep_unit: float = 1.0

    @property
    def levels(self) -> int:
        """How many levels of noise there are; 0 has the least."""
        return int(self.scheduler.config.num_train_timesteps)

    def batch(
        self, size: int, *, dropout: float, generator: torch.Generator, device: torch.device, both: bool = False
    ) -> Batch:
        """Return noised latents at levels spread evenly over the schedule, one random level per stratum.

        Args:
            size: how many.
            dropout: share of prompts that become the empty prompt, so that guidance keeps working.
            generator: a CPU generator; the batch follows from its state alone, on any device.
            device: where the batch goes.
            both: ask everything twice, without the prompts first and then with them, as guidance does; none is dropped.
        """
        images = torch.randint(len(self.latents), (size,), generator=generator)
        strata = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        levels = (strata * self.levels).long().clamp_max(self.levels - 1)
        dropped = torch.rand(size, generator=generator) < dropout
        noise = torch.randn(self.latents[images].shape, generator=generator)
        if both:
            images, levels, noise = images.repeat(2), levels.repeat(2), torch.cat([noise, noise])
            dropped = torch.arange(2 * size) < size
        return self.noised(images, levels, noise, dropped=dropped, device=device)

    def noised(
        self, images: Tensor, levels: Tensor, noise: Tensor, *, device: torch.device, dropped: Tensor | None = None
    ) -> Batch:
        """Return latents with this noise at these levels, and the prompt of each.

        Args:
            images: (batch,) int64 rows of `latents`.
            levels: (batch,) int64 from 0, next to no noise, below `levels`.
            noise: (batch, ...) standard normal, float32 on the CPU.
            device: where the batch goes.
            dropped: (batch,) bool, whose prompts become the empty one; by default none.
        """
        clean = self.latents[images]
        prompts = self.prompt_of[images]
        if dropped is not None:
            prompts = torch.where(dropped, len(next(iter(self.given.values()), self.latents)) - 1, prompts)
        noised, timesteps, target = self._mixed(clean, noise, levels)
        given = {name: rows[prompts] for name, rows in self.given.items()}
        feeds = {self.sample: noised, "timestep": timesteps, **given, **self.shared}
        return Batch(as_arguments({name: value.to(device) for name, value in feeds.items()}), target.to(device))

    def _mixed(self, clean: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the noised latents, the timesteps as the denoiser takes them, and what it should answer."""
        schedule = self.scheduler
        if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
            at = self.levels - 1 - levels  # its own lists begin with the most noise
            sigmas = schedule.sigmas[at].reshape(-1, *[1] * (clean.dim() - 1)).to(clean)
            timesteps = schedule.timesteps[at] * self.timestep_unit
            return sigmas * noise + (1 - sigmas) * clean, timesteps, noise - clean
        noised = schedule.add_noise(clean, noise, levels)
        kind = schedule.config.prediction_type
        if kind == "v_prediction":
            return noised, levels, schedule.get_velocity(clean, noise, levels)
        return noised, levels, noise if kind == "epsilon" else clean


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
            made = _drawn(pipeline, plan, chosen[start:stop], seeds)
        finally:
            pipeline.set_progress_bar_config(**shown)
        return made.float().cpu()

    chunks = _Chunks(folder, "latents", count, plan.batch)
    latents = chunks.all(lambda start, stop: digest_of([made_with, chosen[start:stop], start]), make, progress)
    return _with_text(pipeline, latents, chosen, plan)


def _drawn(pipeline: Any, plan: Generation, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Return clean latents, or pixels from -1 to 1 where the denoiser draws those."""
    form = plan.form
    if not form.decoder:
        pixels: Tensor = draw(pipeline, form, texts, seeds, plan.drawing, output_type="pt")
        return pixels * 2 - 1
    if form.asked != "class_labels":
        latents: Tensor = draw(pipeline, form, texts, seeds, plan.drawing, output_type="latent")
        return latents
    fed: list[Tensor] = []
    vae = getattr(pipeline, form.decoder)  # its pipeline answers images only
    first = vae.post_quant_conv if vae.post_quant_conv is not None else vae.decoder
    handle = first.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    try:
        draw(pipeline, form, texts, seeds, plan.drawing)
    finally:
        handle.remove()
    scale: float = vae.config.scaling_factor
    return torch.cat(fed) * scale


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
                made_from = key(start, stop)
                path = self.folder / f"{self.name}-{start:06d}-{made_from[:16]}.safetensors"
                kept = read(path, key=made_from)
                if kept is None:
                    made = make(start, stop)
                    write(path, {"latents": made}, key=made_from)
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
    schedule = training_schedule(pipeline.scheduler.config)
    as_share = takes_timestep_as_share(type(getattr(pipeline, plan.form.denoiser)).__name__)
    given, shared = _given(pipeline, unique, plan)
    return LatentData(
        latents=latents,
        prompt_of=torch.tensor([row[prompt] for prompt in prompts]),
        given=given,
        scheduler=schedule,
        sample=plan.form.inputs[0],
        shared=shared,
        timestep_unit=1 / schedule.config.num_train_timesteps if as_share else 1.0,
    )


Rows = dict[str, Tensor]


def _given(pipeline: DiffusionPipeline, prompts: list[str], plan: Generation, batch: int = 64) -> tuple[Rows, Rows]:
    """Return what the pipeline gives its denoiser for each prompt and, in the last row, without one; what all share."""
    parts: list[Rows] = []
    empty: Rows = {}
    shared: Rows = {}
    drawing = plan.drawing
    if plan.form.asked == "class_labels":  # no name stands for no class: only guidance brings it
        drawing = replace(drawing, guidance=max(drawing.guidance, 2.0))
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        rows = conditions(pipeline, plan.form, texts, drawing)
        shared = {name: rows.pop(name).cpu() for name in plan.form.shared if name in rows}
        halves = {name: torch.split(value.cpu(), len(texts)) for name, value in rows.items()}
        side = -1 if not plan.form.conditional_first else 0
        parts.append({name: half[side] for name, half in halves.items()})
        empty = {name: half[-1 - side][:1] for name, half in halves.items() if len(half) == 2}
    if not empty:  # the denoiser answers one row: without a prompt is with an empty one
        rows = conditions(pipeline, plan.form, [EMPTY], drawing)
        empty = {name: value.cpu() for name, value in rows.items() if name not in shared}
    return {name: torch.cat([*(part[name] for part in parts), empty[name]]) for name in empty}, shared


def training_schedule(config: Any) -> Schedule:
    """Return the schedule that a pipeline was trained with, from its scheduler's config, of betas or of a flow.

    Raises:
        RecipeError: the scheduler is of another kind.
    """
    plain = _plain(config)
    if plain.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        flow: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_config(plain)
        return flow
    return noise_schedule(config)


def noise_schedule(config: Any) -> DDPMScheduler:
    """Return the schedule that a diffusion pipeline was trained with, from its scheduler's config.

    Raises:
        RecipeError: the scheduler is not one of noise prediction on a discrete schedule.
    """
    plain = _plain(config)
    known = ("epsilon", "v_prediction", "sample")
    if "beta_schedule" not in plain or plain.get("prediction_type", "epsilon") not in known:
        name = plain.get("_class_name", "unknown")
        got = f"data: cannot add the noise of scheduler {name} ({plain.get('prediction_type')})"
        expected = f"expected a schedule of betas that predicts one of {', '.join(known)}"
        raise RecipeError(f"{got}; {expected}. Use a method that adds no noise of its own for this family.")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    taken = {name: plain[name] for name in (*names, "rescale_betas_zero_snr") if name in plain}
    return DDPMScheduler(**taken)


def _plain(config: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(config).items() if isinstance(value, str | int | float | list | None)}

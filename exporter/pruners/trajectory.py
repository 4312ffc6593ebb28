"""A whole denoising trajectory as a function of what the denoiser is, and its gradient one step at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from calibration.calling import Drawing, Form, first_inputs
from exporter.errors import ComponentFailed
from exporter.networks.inputs import as_arguments, takes_timestep_as_share
from exporter.tuning.data import noise_schedule

Answer = Callable[[dict[str, Any]], Tensor]
"""Keyword arguments of a denoiser's forward to its answer, (rows, ...)."""


@dataclass(frozen=True)
class Trajectory:
    """Steps from noise to clean latents for n images, each a function of the last latents alone.

    The solver is of one step, whatever the pipeline samples with: DDIM where there is a schedule of betas, Euler for a
    flow, a consistency model's own. Steps that keep a history have no derivative of one step.

    Attributes:
        form: how the pipeline is called.
        solver: diffusers' scheduler with its timesteps set, no step taken.
        given: inputs of the denoiser besides sample and timestep, in the pipeline's order of rows.
        shape: of the latents, (n, ...).
        guidance: scale; None where the denoiser answers one row per image.
        timestep_unit: what the denoiser takes a timestep of 1 as.
        seed: of the noise that a consistency model adds between its steps.
    """

    form: Form
    solver: Any
    given: dict[str, Tensor]
    shape: tuple[int, ...]
    guidance: float | None
    timestep_unit: float
    seed: int

    @classmethod
    def of(cls, pipeline: Any, form: Form, texts: Sequence[str], drawing: Drawing, *, seed: int) -> Trajectory:
        """Return the trajectory of these texts.

        Args:
            pipeline: one's own; its scheduler is replaced.
            form: how it is called.
            texts: one per image.
            drawing: steps, guidance and size.
            seed: of the noise between steps, where there is any.
        """
        pipeline.scheduler = single_step(pipeline.scheduler)
        asked = first_inputs(pipeline, form, texts, drawing)
        sample = asked[form.inputs[0]]
        as_share = takes_timestep_as_share(type(getattr(pipeline, form.denoiser)).__name__)
        return cls(
            form=form,
            solver=copy.deepcopy(pipeline.scheduler),
            given={name: asked[name] for name in form.given},
            shape=(len(texts), *sample.shape[1:]),
            guidance=drawing.guidance if len(sample) == 2 * len(texts) else None,
            timestep_unit=1 / pipeline.scheduler.config.num_train_timesteps if as_share else 1.0,
            seed=seed,
        )

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return len(self.solver.timesteps)

    def noise(self, generator: torch.Generator) -> Tensor:
        """Return latents to begin with, float32."""
        return torch.randn(self.shape, generator=generator) * float(getattr(self.solver, "init_noise_sigma", 1.0))

    def step(self, index: int, latents: Tensor, answer: Answer) -> Tensor:
        """Return the latents after step `index`, counted from 0; equal inputs give equal latents.

        Args:
            index: of the step.
            latents: (n, ...) before it.
            answer: the denoiser.
        """
        timestep = self.solver.timesteps[index]
        rows = latents if self.guidance is None else torch.cat([latents, latents])
        fed = (timestep * self.timestep_unit).expand(len(rows))
        found = answer(as_arguments({self.form.inputs[0]: rows, "timestep": fed, **self.given}))
        if self.guidance is not None:
            first, second = found.chunk(2)
            uncond, cond = (second, first) if self.form.conditional_first else (first, second)
            found = uncond + self.guidance * (cond - uncond)
        solver, extra = copy.copy(self.solver), {}
        if isinstance(solver, LCMScheduler):
            extra["generator"] = torch.Generator("cpu").manual_seed(self.seed + index)
        if not isinstance(solver, DDIMScheduler):  # which has no place of its own to forget
            solver.set_begin_index(index)
        # A denoiser that predicts its variance too answers more channels than the solver takes.
        after: Tensor = solver.step(found[:, : latents.shape[1]], timestep, latents, return_dict=False, **extra)[0]
        return after

    @torch.no_grad()
    def run(self, latents: Tensor, answer: Answer) -> list[Tensor]:
        """Return the latents before the first step and after every one."""
        seen = [latents]
        for index in range(self.steps):
            seen.append(self.step(index, seen[-1], answer))
        return seen


def single_step(scheduler: Any) -> Any:
    """Return a scheduler whose steps have no history, for the same model and schedule.

    Raises:
        RecipeError: there is none, since the scheduler is of another kind of noise.
    """
    if isinstance(scheduler, DDIMScheduler | LCMScheduler | FlowMatchEulerDiscreteScheduler):
        return scheduler
    noise_schedule(scheduler.config)
    # Schedulers that never clip do not say so in their config, and DDIM's own default is to clip.
    clips = bool(scheduler.config.get("clip_sample", False))
    return DDIMScheduler.from_config(scheduler.config, clip_sample=clips)


def gradient_along(
    trajectory: Trajectory,
    latents: Tensor,
    values: Tensor,
    answering: Callable[[Tensor], Answer],
    loss_of: Callable[[Tensor], Tensor],
) -> tuple[float, Tensor]:
    """Return a loss on the last latents and its gradient with respect to what the denoiser is made with.

    All steps are run without gradients and their latents kept; then, from the last to the first, each is run again and
    differentiated alone, so that memory holds one step. Time is about two forward passes and a backward pass a step.

    Args:
        trajectory: the steps.
        latents: (n, ...) to begin with.
        values: what the denoiser depends on.
        answering: values to a denoiser; equal values must give equal answers.
        loss_of: (n, ...) last latents to a scalar.

    Returns:
        The loss, and its gradient, of the shape of `values`.

    Raises:
        ComponentFailed: loss or gradient is not finite.

    Source: time-step gradient checkpointing of EcoDiff (arXiv 2412.02852). Departs: what is drawn for a step is drawn
        once, so that the step that is differentiated is the one that was taken.
    """
    seen = trajectory.run(latents, answering(values.detach()))
    with torch.enable_grad():
        last = seen[-1].detach().requires_grad_()
        loss = loss_of(last)
        _check(loss, "the loss on the final latents")
        (along,) = torch.autograd.grad(loss, [last])
        total = torch.zeros_like(values)
        for index in reversed(range(trajectory.steps)):
            before, leaf = seen[index].detach().requires_grad_(), values.detach().requires_grad_()
            after = trajectory.step(index, before, answering(leaf))
            along, part = torch.autograd.grad(after, [before, leaf], along)
            _check(along, f"the gradient at step {index + 1} of {trajectory.steps}")
            _check(part, f"the gradient of the masks at step {index + 1} of {trajectory.steps}")
            total += part
    return float(loss.detach()), total


def _check(value: Tensor, what: str) -> None:
    if not bool(value.isfinite().all()):
        got = f"prune: {what} is not finite; expected numbers."
        raise ComponentFailed(f"{got} Check the source with `exporter check`, or take fewer sampler_steps.")

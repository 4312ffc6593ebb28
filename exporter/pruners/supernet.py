"""A sampler's whole trajectory through a U-Net whose gates mix what a step computes with what earlier steps left."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from calibration.calling import conditions
from exporter.networks.cuts import run_unet
from exporter.networks.schedule import reuse_of
from exporter.pruners.base import Loan
from exporter.pruners.sampler import Sampler


@dataclass(frozen=True)
class Start:
    """What one trajectory begins with.

    Attributes:
        noise: (images, ...) latents, standard normal.
        given: the denoiser's other inputs, rows as the pipeline orders them.
        seed: of the noise that a sampler may add.
    """

    noise: Tensor
    given: Mapping[str, Tensor]
    seed: int


@dataclass
class _Held:
    """What later steps may reuse: features by cut, and the last answer with the sample that it was for."""

    features: dict[int, Tensor]
    answer: Tensor
    sample: Tensor
    step: int


@dataclass(frozen=True)
class SuperNet:
    """A U-Net under its sampler; differentiable in the gates, each step's inside computed again on the way back.

    Attributes:
        network: its weights want no gradients.
        sampler: the dense pipeline with the sampler.
        loan: how the pipeline is called.
    """

    network: nn.Module
    sampler: Sampler
    loan: Loan

    def start(self, text: str, seed: int) -> Start:
        """Return the noise of a seed and the conditions of a text."""
        drawing, form, pipeline = self.loan.drawing, self.loan.form, self.sampler.pipeline
        config = cast("Any", self.network).config
        side = drawing.height // int(getattr(pipeline, "vae_scale_factor", 1))
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((1, config.in_channels, side, side), generator=generator)
        with torch.no_grad():
            given = conditions(pipeline, form, [text], drawing)
        return Start(noise, {name: value.detach().clone() for name, value in given.items()}, seed)

    def draw(self, start: Start, gates: Tensor | None = None) -> Tensor:
        """Return the final latents (images, ...).

        Args:
            start: where from.
            gates: (steps, levels, 2) weights of reusing and of computing at the cuts of depth 1, 2, ..., those of the
                last depth for the whole step; the first step computes everything. None for the plain network.
        """
        scheduler = self.sampler.pipeline.scheduler
        scheduler.set_timesteps(self.sampler.steps)
        known = inspect.signature(scheduler.step).parameters
        extra = {"generator": torch.Generator().manual_seed(start.seed)} if "generator" in known else {}
        latents = start.noise * scheduler.init_noise_sigma
        held: _Held | None = None
        for index, timestep in enumerate(scheduler.timesteps):
            sample = scheduler.scale_model_input(torch.cat([latents] * self.sampler.rows), timestep)
            feeds = {"sample": sample, "timestep": timestep, **start.given}
            if gates is None or held is None:
                answer, features = self._whole(feeds)
                held = _Held(features, answer, sample, index)
            else:
                answer = self._mixed(feeds, held, gates[index], index)
            latents = scheduler.step(self._guided(answer), timestep, latents, **extra, return_dict=False)[0]
        return cast("Tensor", latents)

    def image(self, latents: Tensor) -> Tensor:
        """Return images (images, 3, height, width) in 0 to 1 of latents."""
        if not self.loan.form.decoder:
            return (latents / 2 + 0.5).clamp(0, 1)
        vae = self.sampler.pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        decoded = vae.decode(latents / vae.config.scaling_factor + shift, return_dict=False)[0]
        return cast("Tensor", (decoded / 2 + 0.5).clamp(0, 1))

    def _whole(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        features: dict[int, Tensor] = {}

        def keep(cut: int, value: Tensor) -> Tensor:
            features[cut] = value
            return value

        return run_unet(self.network, feeds, meet=keep), features

    def _mixed(self, feeds: dict[str, Tensor], held: _Held, gates: Tensor, index: int) -> Tensor:
        """Answer one step and put what it mixed into `held`; `gates` are (levels, 2)."""
        cuts = sorted(held.features)

        def inside(sample: Tensor, gates: Tensor, *cached: Tensor) -> tuple[Tensor, ...]:
            made: dict[int, Tensor] = {}
            before = dict(zip(cuts, cached, strict=True))

            def mix(cut: int, value: Tensor) -> Tensor:
                made[cut] = gates[cut - 1, 0] * before[cut] + gates[cut - 1, 1] * value
                return made[cut]

            answer = run_unet(self.network, {**feeds, "sample": sample}, meet=mix)
            return (answer, *(made[cut] for cut in cuts))

        past = [held.features[cut] for cut in cuts]
        found = cast("tuple[Tensor, ...]", checkpoint(inside, feeds["sample"], gates, *past, use_reentrant=False))
        skip, keep = gates[-1]
        now = float(feeds["timestep"])
        a, b = reuse_of(self.sampler.pipeline.scheduler, self.sampler.timesteps[held.step], now)
        reused = a * held.answer + b * held.sample if b else held.answer
        answer = skip * reused + keep * found[0]
        held.answer = skip * held.answer + keep * found[0]
        held.sample = skip * held.sample + keep * feeds["sample"]
        kept = (skip * past_value + keep * value for past_value, value in zip(past, found[1:], strict=True))
        held.features = dict(zip(cuts, kept, strict=True))
        held.step = held.step if float(skip.detach()) > 0.5 else index
        return cast("Tensor", answer)

    def _guided(self, answer: Tensor) -> Tensor:
        if self.sampler.rows == 1:
            return answer
        uncond, cond = answer.chunk(2)
        return uncond + self.loan.drawing.guidance * (cond - uncond)

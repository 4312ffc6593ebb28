"""What removing something costs: how far a network's answers, latents or images are from the dense one's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from calibration.calling import draw
from exporter.errors import ComponentFailed, ToolMissing
from exporter.pruners.answers import Exam
from exporter.pruners.base import Context, Loan

Metric = Literal["guided", "latent", "clip"]
"""``guided``: mean squared error of guided answers to recorded calls. ``latent``: of the latents sampling ends with,
from the same noise. ``clip``: by how much the mean CLIP score of the images falls."""

METRICS: tuple[str, ...] = get_args(Metric)

Loss = Callable[[nn.Module], float]
"""A denoiser to what was lost against the dense one; 0 for the dense one itself, larger is worse."""

_STEPS = 10  # of the recorded ones, where answers are compared: errors of neighbours tell the same


def loss_of(metric: str, context: Context, prompts: str | None, images: int) -> Loss:
    """Return what tells by this metric how much an edited denoiser has lost.

    Args:
        metric: one of `METRICS`.
        context: lends the dense pipeline.
        prompts: a set or file of prompts.
        images: how many of them.

    Raises:
        RecipeError: no such prompts.
        ToolMissing: CLIP is asked for and its weights are not here.
    """
    loan = context.borrowed
    if metric == "guided":
        exam = Exam.of(loan.recording(prompts, images), loan.form, batch=loan.batch, steps=_STEPS)
        return lambda network: exam.loss(network).mean_guided
    texts = loan.texts(prompts)
    chosen = [texts[index % len(texts)] for index in range(images)]
    first = int(torch.randint(2**31, (), generator=context.generator))
    drawn = _Drawn(loan, chosen, list(range(first, first + images)))
    return drawn.latent_loss() if metric == "latent" else drawn.clip_loss()


class _Drawn:
    """Draws the same prompts from the same noise with any denoiser."""

    def __init__(self, loan: Loan, texts: list[str], seeds: list[int]) -> None:
        self._loan, self._texts, self._seeds = loan, texts, seeds
        self._pipeline = loan.pipeline()

    def latent_loss(self) -> Loss:
        """Return the mean squared error of the final latents."""
        kind = "latent" if self._loan.form.decoder else "pt"
        dense = self._draw(None, kind)
        return lambda network: _finite(float((self._draw(network, kind) - dense).square().mean()), "latents")

    def clip_loss(self) -> Loss:
        """Return by how much the mean CLIP score falls; negative where it rises."""
        from exporter.metrics.at_hand import full_clip

        clip = full_clip()
        if isinstance(clip, str):
            raise ToolMissing(f"prune.metric: got 'clip', but {clip}. Or write metric: guided.")

        def score(network: nn.Module | None) -> float:
            pixels = (np.asarray(self._draw(network, "np")) * 255).round().astype(np.uint8)
            return float(clip.scores(pixels, self._texts).mean())

        dense = score(None)
        return lambda network: _finite(dense - score(network), "CLIP scores")

    @torch.no_grad()
    def _draw(self, network: nn.Module | None, kind: str) -> Any:
        own = getattr(self._pipeline, self._loan.form.denoiser)
        parts = []
        try:
            if network is not None:
                setattr(self._pipeline, self._loan.form.denoiser, network)
            for start in range(0, len(self._texts), self._loan.batch):
                rows = slice(start, start + self._loan.batch)
                parts.append(
                    draw(
                        self._pipeline,
                        self._loan.form,
                        self._texts[rows],
                        self._seeds[rows],
                        self._loan.drawing,
                        output_type=kind,
                    )
                )
        finally:
            setattr(self._pipeline, self._loan.form.denoiser, own)
        return np.concatenate(parts) if kind == "np" else torch.cat(parts)


def _finite(value: float, what: str) -> float:
    if not np.isfinite(value):
        raise ComponentFailed(f"prune: {what} are not finite; expected numbers. Load the source in float32.")
    return value

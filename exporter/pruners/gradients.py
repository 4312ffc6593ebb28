"""Gradients of the denoising loss, summed over levels of noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.artifact import digest_of
from exporter.errors import ComponentFailed
from exporter.networks.probe import evaluating
from exporter.progress import task
from exporter.pruners.base import Context
from exporter.tuning.checkpoint import Checkpoint, Sparing, digest_of_tensors
from exporter.tuning.data import LatentData


def summed_gradients(
    network: nn.Module, data: LatentData, timesteps: int, threshold: float, context: Context
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the gradient of the loss on one mini-batch with one noise, summed over levels of noise, least first.

    Killed and called again with the same arguments and work folder, it goes on from its last checkpoint.

    Args:
        network: a denoiser; comes back as it was, without gradients.
        data: all of its latents are the mini-batch.
        timesteps: how many levels, spread evenly.
        threshold: the first level whose loss is below this share of the highest so far ends the sum, itself left out.
        context: the noise is drawn from its generator; `batch` of its loan go through the network at a time.

    Returns:
        Gradients by parameter name, float32 on the CPU; and ``timesteps_used``, ``timesteps_of``, ``loss_first`` and
        ``loss_last`` of those that were used.

    Raises:
        ComponentFailed: loss or gradients are not finite.
    """
    noise = torch.randn(data.latents.shape, generator=context.generator)
    batch = _MiniBatch(data, noise, context.borrowed.batch, next(network.parameters()).device)
    levels = torch.linspace(0, data.levels - 1, min(timesteps, data.levels)).round().long().tolist()
    weights = digest_of_tensors(network.state_dict())
    asked = digest_of_tensors({"latents": data.latents, "noise": noise, "prompt_of": data.prompt_of, **data.given})
    kept = Sparing(context.workdir / "gradients.safetensors", digest_of([weights, asked, levels, threshold]))
    losses: list[float] = []
    with _differentiable(network), task(context.progress, "gradients", len(levels)):
        losses += _restored(network, kept.read())
        context.progress.advance(len(losses))
        for level in levels[len(losses) :]:
            if not batch.add(network, level, losses, threshold):
                break
            kept.offer(len(losses), partial(_sum_so_far, network, losses))
            context.progress.advance(note=f"loss {losses[-1]:.4f}")
        found = _gradients_of(network)
    facts = {"timesteps_used": len(losses), "timesteps_of": len(levels)}
    return found, {**facts, "loss_first": _rounded(losses[0]), "loss_last": _rounded(losses[-1])}


@dataclass(frozen=True)
class _MiniBatch:
    """Latents and the noise that serves every level."""

    data: LatentData
    noise: Tensor
    at_once: int
    device: torch.device

    def add(self, network: nn.Module, level: int, losses: list[float], threshold: float) -> bool:
        """Add the gradient of one level to the network's, and its loss to `losses`; False, and neither, below the cut.

        Raises:
            ComponentFailed: the loss is not finite.
        """
        rows = torch.arange(len(self.noise))
        chunks = [rows[start : start + self.at_once] for start in range(0, len(rows), self.at_once)]
        parts = (self._loss(network, level, chunk) for chunk in chunks)  # the graph of one chunk at a time
        if threshold and losses:
            alone = list(parts) if len(chunks) == 1 else []
            value = float(alone[0].detach()) if alone else self._value(network, level, chunks)
            if value < threshold * max(losses):
                return False
            parts = (part for part in alone) if alone else (self._loss(network, level, chunk) for chunk in chunks)
        total = 0.0
        for part in parts:
            part.backward()  # type: ignore[no-untyped-call]
            total += float(part.detach())
        if not math.isfinite(total):
            got = f"prune: the loss of {type(network).__name__} at noise level {level} is {total}; expected a number."
            raise ComponentFailed(f"{got} Check the source with `exporter check`.")
        losses.append(total)
        return True

    @torch.no_grad()
    def _value(self, network: nn.Module, level: int, chunks: list[Tensor]) -> float:
        return sum(float(self._loss(network, level, chunk)) for chunk in chunks)

    def _loss(self, network: nn.Module, level: int, chunk: Tensor) -> Tensor:
        """Return the chunk's share of the mean squared error over the whole mini-batch."""
        batch = self.data.noised(chunk, torch.full_like(chunk, level), self.noise[chunk], device=self.device)
        answer: Tensor = network(**batch.feeds, return_dict=False)[0]
        # A denoiser that predicts its variance too answers more channels than the target has.
        loss = F.mse_loss(answer[:, : batch.target.shape[1]].float(), batch.target)
        return loss * (len(chunk) / len(self.noise))


def _restored(network: nn.Module, found: Checkpoint | None) -> list[float]:
    """Give a network the gradients of a checkpoint; return the losses."""
    if found is None:
        return []
    for name, value in found.part("gradient").items():
        parameter = network.get_parameter(name)
        parameter.grad = value.to(parameter)
    return [float(loss) for loss in found.tensors["losses"]]


def _sum_so_far(network: nn.Module, losses: list[float]) -> dict[str, Tensor]:
    gradients = {f"gradient.{name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"losses": torch.tensor(losses, dtype=torch.float64), **gradients}


def _gradients_of(network: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in network.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if not bool(gradient.isfinite().all()):
            got = f"prune: the gradient of {name} is not finite; expected numbers."
            raise ComponentFailed(f"{got} Check the source with `exporter check`, or take fewer timesteps.")
        found[name] = gradient.detach().float().cpu()
    return found


@contextmanager
def _differentiable(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients of every parameter on; everything as it was on the way out, gradients gone."""
    learnable = [parameter.requires_grad for parameter in network.parameters()]
    try:
        with evaluating(network), torch.enable_grad():
            for parameter in network.parameters():
                parameter.requires_grad_(True)
                parameter.grad = None
            yield
    finally:
        for parameter, was in zip(network.parameters(), learnable, strict=True):
            parameter.requires_grad_(was)
            parameter.grad = None


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")

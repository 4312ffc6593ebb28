"""What methods that put zeros by recorded inputs begin with: the layers, the calls, and which layers stay dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from exporter.artifact import digest_of
from exporter.networks.sparsity import pattern_mask
from exporter.progress import task
from exporter.pruners.activations import called
from exporter.pruners.answers import Exam
from exporter.pruners.base import Context
from exporter.pruners.patterns import SparseOptions
from exporter.pruners.sparse import Found, SparseLayer, sparse_layers
from exporter.tuning.checkpoint import digest_of_tensors, read, write

_STEPS = 4
"""Denoising steps at which sensitivity is measured, spread evenly."""


@dataclass(frozen=True)
class Start:
    """What a method works on.

    Attributes:
        found: layers to mask, in the order in which they are called; none where all is kept.
        exam: the recorded calls, rows without the prompts among them where there is guidance; None without layers.
        facts: what was measured on the way.
    """

    found: Found
    exam: Exam | None
    facts: dict[str, Any]


def start(network: nn.Module, options: SparseOptions, context: Context) -> Start:
    """Find the layers, record the dense pipeline, and leave the most sensitive layers dense.

    Args:
        network: the denoiser of a state, float32.
        options: the recipe's keys.
        context: what the run lends.

    Raises:
        RecipeError: no layer can be masked, all of them shall stay dense, or there are no prompts.
    """
    found = sparse_layers(network, options.pattern, options.keep_ratio, options.protect)
    if not found.layers:
        return Start(found, None, {})
    loan = context.borrowed
    recording = loan.recording(options.prompts, options.images)
    exam = Exam.of(recording, loan.form, batch=loan.batch)
    reached = called(network, found.layers, exam, progress=context.progress)
    idle = {layer.path: "never called" for layer in found.layers if layer not in reached}
    found = Found(tuple(reached), {**found.skipped, **idle})
    if not options.keep_dense:
        return Start(found, exam, {})
    few = Exam.of(recording, loan.form, batch=loan.batch, steps=_STEPS)
    measured = _sensitivities(network, found, few, context)
    most = sorted(measured, key=lambda path: -measured[path])[: options.keep_dense]
    told = {path: float(f"{value:.6g}") for path, value in measured.items()}
    return Start(found.without(most), exam, {"sensitivity": told})


@torch.no_grad()
def _sensitivities(network: nn.Module, found: Found, exam: Exam, context: Context) -> dict[str, float]:
    """Return, per layer, by how much masking it alone by magnitude raises the error of the guided answer."""
    path = context.workdir / "sensitivity.safetensors"
    claims = {layer.path: layer.pattern for layer in found.layers}
    key = digest_of([digest_of_tensors(network.state_dict()), claims, len(exam.calls)])
    kept = read(path, key=key)
    values: list[float] = kept.tensors["values"].tolist() if kept is not None else [exam.loss(network).mean_guided]
    with task(context.progress, "sensitivity of layers", len(found.layers)):
        context.progress.advance(len(values) - 1)
        for layer in found.layers[len(values) - 1 :]:
            values.append(_masked_alone(network, layer, exam))
            write(path, {"values": torch.tensor(values, dtype=torch.float64)}, key=key)
            context.progress.advance(note=layer.path)
    return {layer.path: value - values[0] for layer, value in zip(found.layers, values[1:], strict=True)}


def _masked_alone(network: nn.Module, layer: SparseLayer, exam: Exam) -> float:
    weight = layer.module.weight
    dense = weight.detach().clone()
    try:
        weight.mul_(pattern_mask(dense.abs(), layer.pattern))
        return exam.loss(network, layer.path).mean_guided
    finally:
        weight.copy_(dense)

"""What methods that put zeros by recorded inputs begin with: the layers, the calls, and which layers stay dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from exporter.artifact import digest_of
from exporter.networks.sparsity import pattern_mask
from exporter.progress import task
from exporter.pruners.activations import as_weight, called, column_norms
from exporter.pruners.answers import Exam
from exporter.pruners.base import Context, Outcome
from exporter.pruners.gain import expected_gain
from exporter.pruners.patterns import SparseOptions
from exporter.pruners.reordering import reorder
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


def start(network: nn.Module, options: SparseOptions, context: Context, *, by_inputs: bool = False) -> Start:
    """Find the layers, record the dense pipeline, leave the most sensitive layers dense, and reorder the others.

    Args:
        network: the denoiser of a state, float32.
        options: the recipe's keys.
        context: what the run lends.
        by_inputs: where channels are reordered, so that most of weights times the norms of their inputs stays; by
            default of weights alone.

    Raises:
        RecipeError: no layer can be masked, all of them shall stay dense, or there are no prompts.
    """
    found = sparse_layers(network, options.pattern, options.keep_ratio, options.protect, options.least)
    if not found.layers:
        return Start(found, None, {})
    loan = context.borrowed
    recording = loan.recording(options.prompts, options.images)
    exam = Exam.of(recording, loan.form, batch=loan.batch)
    reached = called(network, found.layers, exam, progress=context.progress)
    idle = {layer.path: "never called" for layer in found.layers if layer not in reached}
    found = Found(tuple(reached), {**found.skipped, **idle})
    facts: dict[str, Any] = {}
    if options.keep_dense:
        few = Exam.of(recording, loan.form, batch=loan.batch, steps=_STEPS)
        measured = _sensitivities(network, found, few, context)
        most = sorted(measured, key=lambda path: -measured[path])[: options.keep_dense]
        facts["sensitivity"] = {path: float(f"{value:.6g}") for path, value in measured.items()}
        found = found.without(most)
    if options.permute and found.layers:
        norms = input_norms(network, found.layers, exam, context) if by_inputs else {}
        key = "kept_magnitude_times_input" if by_inputs else "kept_magnitude"
        scores = partial(scores_of, norms=norms)
        facts[key] = reorder(network, found.layers, scores, options.protect, progress=context.progress)
    return Start(found, exam, facts)


def input_norms(network: nn.Module, layers: Sequence[SparseLayer], exam: Exam, context: Context) -> dict[str, Tensor]:
    """Return, by weight, the L2 norm of what each of its numbers is multiplied with, shaped to weigh the weight."""
    norms = column_norms(network, layers, exam, progress=context.progress)
    return {layer.name: as_weight(norms[layer.path][None], layer.module.weight[:1].shape) for layer in layers}


def scores_of(layer: SparseLayer, norms: Mapping[str, Tensor]) -> Tensor:
    """Return the sizes of a layer's weights, times the norms of their inputs where there are any."""
    size = layer.module.weight.detach().abs()
    return size * norms[layer.name] if layer.name in norms else size


def outcome(network: nn.Module, begun: Start, **facts: Any) -> Outcome:
    """Return what a method tells when the layers have their zeros."""
    return begun.found.outcome(**begun.facts, **facts, expected=expected_gain(network, begun.found.layers))


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

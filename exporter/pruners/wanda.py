"""Wanda for denoisers: zeros by the size of a weight times the size of what it is multiplied with.

Source: Wanda (arXiv 2306.11695): score |W_ij| ||X_j||_2, compared within a row for unstructured zeros and within m
consecutive inputs for n:m; weights that stay are not changed. Removes single weights; shapes stay. Needs prompts: X is
collected over the whole sampled trajectory, with and without the prompt where there is guidance, of the dense network
in one pass; no gradients, no training.

Departs: convolutions too, as matrices over (kernel position, input channel), where a row is an output channel; the
layers before one are not pruned first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from exporter.networks.sparsity import pattern_mask
from exporter.pruners.activations import as_matrix, as_weight, column_norms
from exporter.pruners.base import Context, Outcome
from exporter.pruners.informed import outcome, start
from exporter.pruners.patterns import SparseOptions
from exporter.pruners.sparse import SparseLayer


class Wanda:
    """Weights go by their size times the norm of their inputs.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[SparseOptions]] = SparseOptions

    def __init__(self, options: SparseOptions) -> None:
        self._options = options

    @torch.no_grad()
    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place.

        Raises:
            RecipeError: no layer can have these zeros, or there are no prompts.
            ComponentFailed: inputs that are not finite.
        """
        begun = start(network, self._options, context, by_inputs=True)
        if begun.exam is None:
            return begun.found.outcome()
        norms = column_norms(network, begun.found.layers, begun.exam, progress=context.progress)
        for layer in begun.found.layers:
            layer.module.weight.mul_(wanda_mask(layer, norms))
        return outcome(network, begun)


def wanda_mask(layer: SparseLayer, norms: Mapping[str, Tensor]) -> Tensor:
    """Return the bool mask of a layer's weight.

    Args:
        layer: the layer.
        norms: from `column_norms`.
    """
    weight = layer.module.weight.detach()
    scores = as_matrix(weight).abs() * norms[layer.path]
    if not layer.is_whole:
        return pattern_mask(as_weight(scores, weight.shape), layer.pattern)
    kept = max(1, round(scores.shape[1] * layer.pattern[0] / layer.pattern[1]))
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :kept]
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, order, True)
    return as_weight(mask, weight.shape)

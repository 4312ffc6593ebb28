"""Magnitude pruning: removes what has the smallest weights: channels, blocks, or single weights. Needs no data.

Source: L2 norms of coupled groups as in Torch-Pruning (arXiv 2301.12900, section 3.3), each layer of a group divided by
its mean norm. Departs: the mean over layers is of norms, not of squares, and ranking is always within one layer.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from exporter.pruners.base import Block, Context, Layer, Outcome
from exporter.pruners.one_shot import mask_weights, prune_by
from exporter.pruners.patterns import MaskOptions


class Magnitude:
    """Units go by the L2 norm of everything they are coupled to, blocks by the gain of their residual branch.

    Single weights become zero by their size, compared within their layer.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[MaskOptions]] = MaskOptions

    def __init__(self, options: MaskOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place.

        Raises:
            RecipeError: the options remove nothing from this network.
        """
        if self._options.cut == "weights":
            return mask_weights(network, self._options, torch.abs)
        return prune_by(self, network, self._options, progress=context.progress)

    def of_units(self, layer: Layer) -> Tensor:
        """Return (layer.units,) float32: mean over weights of the unit's L2 norm, relative to the layer's mean norm.

        Biases and norm parameters are left out: their scale says nothing about how much passes through a unit.
        """
        norms = [share.rows().float().norm(dim=1).cpu() for share in layer.shares if share.parameter.dim() > 1]
        return torch.stack([norm / norm.mean().clamp_min(1e-12) for norm in norms]).mean(dim=0)

    def of_block(self, block: Block) -> float:
        """Return the mean over the branch's weights of their root mean square times the square root of the fan-in.

        Without the fan-in every wide layer would look small, since initialisation and training scale weights by it.
        """
        gains = [
            float(weight.detach().float().square().mean().sqrt()) * math.sqrt(weight[0].numel())
            for _, weight in block.branch
        ]
        return sum(gains) / len(gains)

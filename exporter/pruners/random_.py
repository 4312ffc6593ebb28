"""Random pruning: removes units, blocks or single weights drawn evenly; the baseline that every other method must beat.

Needs nothing but the network and a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from exporter.pruners.base import Block, Context, Layer, Outcome
from exporter.pruners.one_shot import mask_weights, prune_by
from exporter.pruners.patterns import MaskOptions


class Random:
    """Every unit is as likely to go as any other of its layer; equal seeds give equal networks.

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
        draw = _Draw(context.generator)
        if self._options.cut == "weights":
            return mask_weights(network, self._options, draw.of_weights, progress=context.progress)
        return prune_by(draw, network, self._options, progress=context.progress)


@dataclass(frozen=True)
class _Draw:
    generator: torch.Generator

    def of_units(self, layer: Layer) -> Tensor:
        return torch.rand(layer.units, generator=self.generator)

    def of_weights(self, weight: Tensor) -> Tensor:
        return torch.rand(weight.shape, generator=self.generator)

    def of_block(self, block: Block) -> float:
        return float(torch.rand((), generator=self.generator))

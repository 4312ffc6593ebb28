"""Random pruning: removes units or blocks drawn evenly; the baseline that every other method must beat.

Needs nothing but the network and a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from exporter.pruners.base import Block, Context, CutOptions, Layer, Outcome
from exporter.pruners.one_shot import prune_by


class Random:
    """Every unit is as likely to go as any other of its layer; equal seeds give equal networks.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[CutOptions]] = CutOptions

    def __init__(self, options: CutOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place.

        Raises:
            RecipeError: the options remove nothing from this network.
        """
        return prune_by(_Draw(context.generator), network, self._options, progress=context.progress)


@dataclass(frozen=True)
class _Draw:
    generator: torch.Generator

    def of_units(self, layer: Layer) -> Tensor:
        return torch.rand(layer.units, generator=self.generator)

    def of_block(self, block: Block) -> float:
        return float(torch.rand((), generator=self.generator))

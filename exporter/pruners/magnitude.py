"""Magnitude pruning: removes what has the smallest weights: channels, blocks, or single weights. Needs no data.

Source: L2 norms of coupled groups as in Torch-Pruning (arXiv 2301.12900, section 3.3), each layer of a group divided by
its mean norm. Departs: the mean over layers is of norms, not of squares, and ranking is always within one layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from exporter.pruners.base import Block, Context, Layer, Outcome
from exporter.pruners.one_shot import mask_weights, prune_by
from exporter.pruners.patterns import MaskOptions, check_layers


@dataclass(frozen=True)
class MagnitudeOptions(MaskOptions):
    """Recipe keys of magnitude pruning.

    Attributes:
        keep_ratio: fraction kept, in (0, 1]: of each layer's width (``channels``), of the units (``blocks``), or of
            each layer's weights (``weights``).
        round_to: widths become multiples of it, at least 1; ignored by ``blocks`` and ``weights``.
        cut: remove ``channels`` of layers or whole ``blocks``, or put zeros in the place of single ``weights``.
        component: ``denoiser``, ``vae_decoder`` or a text encoder, by its name.
        protect: module path patterns (``mid_block``, ``down_blocks.*.attentions.*``) that are never touched, all below
            a match included.
        parts: which widths ``channels`` cuts. ``streams``, the residual streams that run through many blocks, cost
            most fidelity and are left alone unless named.
        ranking: ``local`` keeps the ratio of each layer's width, ``global`` of all widths together, so that layers of
            low scores give more; scores count relative to their layer's mean. Ignored by ``blocks``, which are ranked
            together, and by ``weights``.
        pattern: where ``weights`` may have their zeros: ``unstructured``, or ``n:m`` such as ``2:4``, which keeps at
            most n of m consecutive inputs of a layer and goes with a keep_ratio of n / m.
        least: fewest inputs and outputs of a layer that gets n:m; narrower ones stay dense. The default is what one
            sparse instruction takes, so that a kernel exists. Those that win are wider: TensorRT's maintainers saw
            gains from 256 on (issues 4065 and 3849 of NVIDIA/TensorRT). Write 256 where only speed there counts.
        permute: reorder the inputs of layers before n:m is put, so that more magnitude stays, wherever the layers that
            make and read them can be reordered alike: feed-forward neurons, values of a head, channels of a norm's
            group inside of a resnet. The dense network answers as before. Off by default: it takes minutes for a large
            network, and other weights stay than without.
    """

    permute: bool = False

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        super().__post_init__()
        check_layers(self.pattern, self.least, permute=self.permute)


class Magnitude:
    """Units go by the L2 norm of everything they are coupled to, blocks by the gain of their residual branch.

    Single weights become zero by their size, compared within their layer.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[MagnitudeOptions]] = MagnitudeOptions

    def __init__(self, options: MagnitudeOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place.

        Raises:
            RecipeError: the options remove nothing from this network.
        """
        if self._options.cut == "weights":
            permute = self._options.permute
            return mask_weights(network, self._options, torch.abs, progress=context.progress, permute=permute)
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

"""SparseGPT for denoisers: zeros in single weights, made good by the weights that stay.

Source: SparseGPT (arXiv 2301.00774), with damping and compensation block by block as there; convolutions as matrices
over (kernel position, input channel), so that 2:4 lies along the input channels as compilers check it. Removes single
weights, n:m or unstructured; shapes stay. Needs prompts (inputs of every layer over the whole sampled trajectory, with
and without the prompt where there is guidance); no gradients, no training.

Departs: layers are done in a few groups instead of block by block of a language model; the widest convolutions have
block-diagonal Hessians. Does not reproduce the joint sparsification and quantization of the paper.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from exporter.pruners.base import Context, Outcome
from exporter.pruners.hessians import HessianOptions, remove_by_hessian
from exporter.pruners.informed import outcome, start


class SparseGPT:
    """Weights go by what their removal costs the layer's answer when the others make good for it.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[HessianOptions]] = HessianOptions

    def __init__(self, options: HessianOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place.

        Raises:
            RecipeError: no layer can have these zeros, or there are no prompts.
            ComponentFailed: inputs that are not finite, or a Hessian without an inverse.
        """
        begun = start(network, self._options, context)
        if begun.exam is None:
            return begun.found.outcome()
        facts = remove_by_hessian(network, begun.found.layers, begun.exam, self._options, context)
        return outcome(network, begun, **facts)

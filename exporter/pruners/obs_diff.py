"""OBS-Diff: SparseGPT's removal with a Hessian in which early, noisy steps of the trajectory count more.

Source: OBS-Diff (ICLR 2026), its published code: H = 2 sum(w x x^T) / sum(w) over the sampled trajectory with guidance;
``log_decrease`` weights 0.8 + 0.4 ln(1 + i) / ln(T) in reversed order, so that the noisiest step counts 1.2 and the
last 0.8; modules in 4 groups, done one after the other; damping 0.01. Removes single weights, n:m or unstructured;
shapes stay. Needs prompts; no gradients, no training.

Departs: works on U-Nets, convolutions included, where the published code knows transformers of the SD3 class; groups
follow the order in which layers are called. Does not reproduce the structured form (heads and feed-forward neurons).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from exporter.pruners.base import Context, Outcome
from exporter.pruners.hessians import HessianOptions, remove_by_hessian
from exporter.pruners.informed import outcome, start


@dataclass(frozen=True)
class ObsDiffOptions(HessianOptions):
    """Recipe keys of OBS-Diff.

    Attributes:
        prompts: a set or file of prompts, none of those that the run measures on. The embedded model has its own.
        images: how many of them are drawn.
        pattern: ``n:m``, at most n of m consecutive inputs of a layer not zero, such as ``2:4``; or ``unstructured``.
        keep_ratio: fraction of a layer's weights that stay, in (0, 1]; for ``unstructured``. Follows from ``n:m``.
        protect: module path patterns that stay dense, all below a match included.
        keep_dense: how many of the most sensitive layers stay dense: those that, masked alone by magnitude, move the
            guided answer most.
        least: fewest inputs and outputs of a layer that gets n:m; narrower ones stay dense. The default is what one
            sparse instruction takes, so that a kernel exists. Those that win are wider: TensorRT's maintainers saw
            gains from 256 on (issues 4065 and 3849 of NVIDIA/TensorRT). Write 256 where only speed there counts.
        permute: reorder the inputs of layers before n:m is put, so that more magnitude stays, wherever the layers that
            make and read them can be reordered alike: feed-forward neurons, values of a head, channels of a norm's
            group inside of a resnet. The dense network answers as before. Off by default: it takes minutes for a large
            network, and other weights stay than without.
        groups: layers are done in so many groups, in the order in which they are called; each is shown what comes
            through the groups before it with their zeros.
        damping: added to the diagonal of a Hessian, as a fraction of its mean.
        weighting: of the denoising steps: ``log_decrease``, or ``uniform``, which is SparseGPT.
    """

    weighting: Literal["log_decrease", "uniform"] = "log_decrease"


class ObsDiff:
    """Weights go as in SparseGPT; the Hessian weighs the steps of the trajectory.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[ObsDiffOptions]] = ObsDiffOptions

    def __init__(self, options: ObsDiffOptions) -> None:
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
        steps = len({asked.timestep for asked in begun.exam.calls})
        weights = log_decrease(steps) if self._options.weighting == "log_decrease" else []
        facts = remove_by_hessian(network, begun.found.layers, begun.exam, self._options, context, weights)
        return outcome(network, begun, **facts, step_weights=[round(weight, 6) for weight in weights])


def log_decrease(steps: int) -> list[float]:
    """Return how much each step counts, the noisiest first: from 1.2 down to 0.8; 1.2 alone for a single one."""
    rising = [0.8 + 0.4 * math.log(1 + i) / math.log(steps) for i in range(steps)] if steps > 1 else [1.2]
    return rising[::-1]

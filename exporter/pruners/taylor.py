"""Taylor pruning: removes what the denoising loss would miss least, to first order.

Source: Molchanov et al. (arXiv 1611.06440), as Diff-Pruning (arXiv 2305.10924) applies it to diffusion: the gradient is
summed over the timesteps, all of them here, so that this is the ablation of ``diff-pruning`` without its cut.
Removes channels, heads and neurons, or whole blocks. Needs latents that the dense pipeline draws, and gradients: one
forward and one backward pass per timestep, no training. Not reproduced: images of the training set, whose place the
pipeline's own take; a level of noise in every `timesteps`-th of the schedule only, unless all are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from exporter.errors import RecipeError
from exporter.pruners.base import Block, Context, CutOptions, DataOptions, Layer, Outcome
from exporter.pruners.one_shot import prune_by
from exporter.pruners.protect import check_patterns


@dataclass(frozen=True)
class TaylorOptions(DataOptions, CutOptions):
    """Recipe keys.

    Attributes:
        keep_ratio: fraction kept, in (0, 1]: of widths (``channels``) or of the units (``blocks``).
        round_to: widths become multiples of it, at least 1; ignored by ``blocks``.
        cut: remove ``channels`` of layers, or whole ``blocks``.
        component: the ``denoiser``; no other component has this loss.
        protect: module path patterns that are never touched, all below a match included.
        parts: which widths ``channels`` cuts.
        ranking: ``local`` or ``global``.
        prompts: a set or file of prompts to draw for; none for a pipeline that takes none.
        images: how many latents make the one mini-batch.
        timesteps: how many levels of noise, spread evenly over the schedule; its own number of them takes each.
    """

    timesteps: int = field(default=100, metadata={"minimum": 1})

    @property
    def least_prompts(self) -> int:
        """Prompts are used in turn."""
        return 1

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        DataOptions.__post_init__(self)
        CutOptions.__post_init__(self)
        if self.timesteps < 1:
            got = f"prune.timesteps: got {self.timesteps}, expected a whole number of at least 1."
            raise RecipeError(f"{got} Write 100.")
        if self.component != "denoiser":
            got = f"prune.component: got {self.component!r}, expected denoiser, whose loss on noised latents is taken."
            raise RecipeError(f"{got} Write another method for this component, such as magnitude.")


class Taylor:
    """Units and blocks go by the change of the loss, to first order, that their removal would make.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[TaylorOptions]] = TaylorOptions

    def __init__(self, options: TaylorOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place.

        Raises:
            RecipeError: no prompts, or the options remove nothing from this network.
            ComponentFailed: loss or gradients are not finite.
        """
        return prune_by_gradients(network, self._options, context, combine=total_of_terms)


def total_of_terms(terms: Tensor) -> Tensor:
    """Return (units,) absolute values of the sums of (units, n) weights times gradients: ordinary Taylor."""
    return terms.sum(dim=1).abs()


def prune_by_gradients(
    network: nn.Module,
    options: TaylorOptions,
    context: Context,
    *,
    combine: Callable[[Tensor], Tensor],
    threshold: float = 0.0,
) -> Outcome:
    """Cut a network in place by its weights and the gradients of the denoising loss.

    Args:
        network: a denoiser.
        options: the recipe's keys.
        context: what the run lends.
        combine: (units, n) weights times gradients to (units,) scores.
        threshold: levels of noise are added, least first, until the loss falls below this share of the highest so far.

    Raises:
        RecipeError: no prompts, or the options remove nothing from this network.
        ComponentFailed: loss or gradients are not finite.
    """
    if options.keep_ratio == 1.0:
        return Outcome()
    from exporter.pruners.gradients import summed_gradients  # diffusers takes seconds to import

    check_patterns(network, options.protect)
    data = context.borrowed.data(options.prompts, options.images)
    found, facts = summed_gradients(network, data, options.timesteps, threshold, context)
    outcome = prune_by(_Scores(found, combine), network, options, progress=context.progress)
    return Outcome({**facts, **outcome.facts})


@dataclass(frozen=True)
class _Scores:
    """Mean over the coupled layers of what each loses; weights of layers and norms count, biases do not."""

    gradients: Mapping[str, Tensor]
    combine: Callable[[Tensor], Tensor]

    def of_units(self, layer: Layer) -> Tensor:
        return self._mean([self._terms(share.path, share.rows) for share in layer.shares if _is_weight(share.path)])

    def of_block(self, block: Block) -> float:
        terms = []
        for name, weight in block.branch:
            gradient = self.gradients[f"{block.path}.{name}"]
            terms.append((weight.detach().float() * gradient.to(weight.device)).reshape(1, -1))
        return float(self._mean(terms))

    def _terms(self, path: str, rows: Callable[..., Any]) -> Tensor:
        terms: Tensor = rows().float() * rows(self.gradients[path])
        return terms

    def _mean(self, terms: list[Tensor]) -> Tensor:
        return torch.stack([self.combine(values.double()) for values in terms]).mean(dim=0)


def _is_weight(path: str) -> bool:
    return path.rpartition(".")[2] == "weight"

"""Methods that score every unit once and remove the lowest: all they differ in is the importance."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from exporter.progress import Progress
from exporter.pruners.base import CutOptions, Importance, Outcome
from exporter.pruners.patterns import MaskOptions


def prune_by(importance: Importance, network: nn.Module, options: CutOptions, *, progress: Progress) -> Outcome:
    """Cut a network in place by these scores.

    Raises:
        RecipeError: the options remove nothing from this network.
    """
    from exporter.pruners.blocks import cut_blocks  # diffusers and torch-pruning take seconds to import
    from exporter.pruners.channels import cut_channels

    if options.cut == "blocks":
        cut_blocks(network, options, importance.of_block)
    else:
        cut_channels(network, options, importance.of_units, progress=progress)
    return Outcome()


def mask_weights(network: nn.Module, options: MaskOptions, score: Callable[[Tensor], Tensor]) -> Outcome:
    """Put zeros into the lowest-scored weights of every layer of a network, in place.

    Args:
        network: any that can be cut.
        options: the recipe's keys, with ``cut: weights``.
        score: a weight -> scores of its shape, larger is kept.

    Raises:
        RecipeError: no layer can have these zeros.
    """
    from exporter.pruners.sparse import mask_by, sparse_layers  # diffusers takes seconds to import

    found = sparse_layers(network, options.pattern, options.keep_ratio, options.protect)
    mask_by(found, lambda layer: score(layer.module.weight.detach()))
    return found.outcome()

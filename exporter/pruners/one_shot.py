"""Methods that score every unit once and remove the lowest: all they differ in is the importance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def mask_weights(
    network: nn.Module,
    options: MaskOptions,
    score: Callable[[Tensor], Tensor],
    *,
    progress: Progress,
    permute: bool = False,
) -> Outcome:
    """Put zeros into the lowest-scored weights of every layer of a network, in place.

    Args:
        network: any that can be cut.
        options: the recipe's keys, with ``cut: weights``.
        score: a weight -> scores of its shape, larger is kept.
        progress: where long work reports to.
        permute: reorder channels first, so that more of the scores, which are then at least 0, stays.

    Raises:
        RecipeError: no layer can have these zeros.
    """
    from exporter.pruners.gain import expected_gain  # diffusers takes seconds to import
    from exporter.pruners.reordering import reorder
    from exporter.pruners.sparse import mask_by, sparse_layers

    found = sparse_layers(network, options.pattern, options.keep_ratio, options.protect, options.least)
    facts: dict[str, Any] = {}
    if permute and found.layers:
        facts["kept_magnitude"] = reorder(
            network, found.layers, lambda layer: score(layer.module.weight.detach()), options.protect, progress=progress
        )
    mask_by(found, lambda layer: score(layer.module.weight.detach()))
    return found.outcome(**facts, expected=expected_gain(network, found.layers))

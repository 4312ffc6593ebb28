"""Methods that score every unit once and remove the lowest: all they differ in is the importance."""

from __future__ import annotations

from torch import nn

from exporter.progress import Progress
from exporter.pruners.base import CutOptions, Importance, Outcome


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

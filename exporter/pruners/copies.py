"""Copies of units: a layer of a stack, repeated behind itself with weights of its own.

A U-Net takes its resnets and attentions in pairs and each resnet on the way up takes one skip connection, so neither
list can grow. What can is the stack of layers inside of an attention block, or of a transformer: there a copy goes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from exporter.pruners.base import Block
from exporter.pruners.blocks import remove_blocks, without

MOST = 3
"""Copies of one layer: a record repeats an entry four times at most."""


def layer_of(network: nn.Module, block: Block) -> str | None:
    """Return the path of the layer that a copy of a block repeats; None where it has no copy."""
    module: Any = block.module
    if isinstance(module, Transformer2DModel):
        return f"{block.path}.transformer_blocks.0" if len(module.transformer_blocks) == 1 else None
    stack = block.path.rpartition(".")[0]
    if not isinstance(network.get_submodule(stack), nn.ModuleList) or not block.path.rpartition(".")[2].isdecimal():
        return None
    return block.path if stack.rpartition(".")[2].endswith("transformer_blocks") else None


def edit(network: nn.Module, removed: Sequence[Block], copied: Sequence[str]) -> None:
    """Take blocks out of a network and put copies of layers in; see `edited`, which does so for a while."""
    places = [_place(network, path) for path in copied]
    remove_blocks(network, list(removed))
    _insert(places)


@contextmanager
def edited(network: nn.Module, removed: Sequence[Block], copied: Sequence[str]) -> Iterator[None]:
    """Take blocks out of a network and put copies of layers in, for a while.

    Args:
        network: comes back as it was.
        removed: blocks that go.
        copied: paths of layers, none of which goes, in the numbering of the whole network; one mention per copy.
    """
    places = [_place(network, path) for path in copied]
    with without(network, list(removed)):
        before = {stack: dict(stack._modules) for stack, _ in places}
        try:
            _insert(places)
            yield
        finally:
            for stack, entries in before.items():
                stack._modules.clear()
                stack._modules.update(entries)


def _insert(places: Sequence[tuple[nn.ModuleList, nn.Module]]) -> None:
    """Put an exact copy behind each layer, wherever in its stack that is by now."""
    for stack, layer in places:
        index = next(index for index, entry in enumerate(stack) if entry is layer)
        stack.insert(index + 1, copy.deepcopy(layer))


def _place(network: nn.Module, path: str) -> tuple[nn.ModuleList, nn.Module]:
    return cast("nn.ModuleList", network.get_submodule(path.rpartition(".")[0])), network.get_submodule(path)

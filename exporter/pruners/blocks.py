"""Removing whole blocks: residual branches become stand-ins, layers of a stack are taken out of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import T5Block

from exporter.errors import ComponentFailed, RecipeError
from exporter.networks.standins import stand_in
from exporter.pruners.base import Block, CutOptions
from exporter.pruners.protect import Protects, check_patterns, is_protected

_STACKS = ("transformer_blocks", "single_transformer_blocks")
"""Stacks of whole layers that a transformer denoiser holds itself."""


def cut_blocks(network: nn.Module, options: CutOptions, score: Callable[[Block], float]) -> None:
    """Remove the lowest-scored blocks of a network, in place, so that `keep_ratio` of them stay, at least one.

    Nothing that changes the spatial size or the width is a block, so every skip connection keeps its partner.

    Args:
        network: of a class in `exporter.networks.inputs.INPUTS`; of an AutoencoderKL the decoder alone is cut.
        options: the recipe's keys.
        score: score of a block, larger is kept; of equals the earlier stays.

    Raises:
        RecipeError: the network has no removable block, or the ratio removes none of them.
        ComponentFailed: a score is not a number.
    """
    if options.keep_ratio == 1.0:
        return
    check_patterns(network, options.protect)
    found = blocks_of(network, options)
    if not found:
        got = f"prune.cut: {type(network).__name__} has no removable block; expected at least two."
        raise RecipeError(f"{got} Write cut: channels, or shorten protect.")
    kept = max(1, round(options.keep_ratio * len(found)))
    if kept == len(found):
        got = f"prune.keep_ratio: {options.keep_ratio:g} of {len(found)} blocks removes none; expected at least one."
        raise RecipeError(f"{got} Write {(len(found) - 1) / len(found):.3f} or less.")
    scores = [score(block) for block in found]
    for block, value in zip(found, scores, strict=True):
        if not math.isfinite(value):
            got = f"prune: the score of block {block.path} is {value}; expected a number."
            raise ComponentFailed(f"{got} Check the source with `exporter check`.")
    order = sorted(range(len(found)), key=lambda i: (-scores[i], i))
    remove_blocks(network, [found[i] for i in order[kept:]])


def blocks_of(network: nn.Module, options: Protects) -> list[Block]:
    """Return every block that `cut_blocks` would consider, in the network's order."""
    return [
        Block(path, module, tuple(_branch(module)))
        for path, module in _candidates(network)
        if not is_protected([path], options.protect)
    ]


def remove_blocks(network: nn.Module, blocks: list[Block]) -> None:
    """Take blocks out of a network: from the stack they are a layer of, else by a stand-in.

    A transformer that would lose its last block is bypassed whole, projections included.
    """
    stacks: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        if _is_stacked(block.module):
            stacks[block.path.rpartition(".")[0]].append(block)
        else:
            _replace(network, block.path, block.module)
    for path, removed in stacks.items():
        stack = cast("nn.ModuleList", network.get_submodule(path))
        owner = path.rpartition(".")[0]
        if len(removed) == len(stack) and owner:
            _replace(network, owner, network.get_submodule(owner))
            continue
        for index in sorted((int(block.path.rpartition(".")[2]) for block in removed), reverse=True):
            del stack[index]


@contextmanager
def without(network: nn.Module, blocks: list[Block]) -> Iterator[None]:
    """Take blocks out of a network for a while; inside, it is what `remove_blocks` leaves.

    The very same modules are back in their places afterwards, whatever happens.
    """
    slots: dict[nn.Module, dict[str, nn.Module | None]] = {}
    for block in blocks:
        path = block.path
        for _ in range(3):  # a layer's stack, the stack's owner, and where that owner stands
            path = path.rpartition(".")[0]
            owner = network.get_submodule(path)
            slots[owner] = dict(owner._modules)
    try:
        remove_blocks(network, blocks)
        yield
    finally:
        for owner, before in slots.items():
            owner._modules.clear()
            owner._modules.update(before)


def _candidates(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in network.named_modules():
        if isinstance(network, AutoencoderKL) and not path.startswith("decoder."):
            continue
        if isinstance(module, ResnetBlock2D):
            if module.upsample is None and module.downsample is None:
                yield path, module
        elif isinstance(module, Transformer2DModel):
            if module.in_channels == module.out_channels:
                stack = module.transformer_blocks
                layers = [(f"{path}.transformer_blocks.{i}", layer) for i, layer in enumerate(stack)]
                yield from layers if len(layers) > 1 else [(path, module)]
        elif isinstance(module, Attention):
            if path.split(".")[-2:-1] == ["attentions"] and module.residual_connection:
                yield path, module
        elif isinstance(module, CLIPEncoderLayer | T5Block):
            if not _is_bearing(network, path):
                yield path, module
        elif path.rpartition(".")[0] in _STACKS and not _is_bearing(network, path):
            yield path, module


def _is_bearing(network: nn.Module, path: str) -> bool:
    """Tell whether a layer of a stack holds what the network uses besides: it is no block."""
    stack, _, index = path.rpartition(".")
    last = len(cast("nn.ModuleList", network.get_submodule(stack))) - 1
    name = type(network).__name__
    # DiT takes the timestep's embedding from its first block, T5 the position bias; only SD3's last ends the text.
    first_bears = name in ("DiTTransformer2DModel", "T5EncoderModel") and index == "0"
    return first_bears or (name == "SD3Transformer2DModel" and int(index) == last)


def _is_stacked(module: nn.Module) -> bool:
    return not isinstance(module, ResnetBlock2D | Transformer2DModel | Attention)


def _branch(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1 and not name.startswith("conv_shortcut"):
            yield name, parameter


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    block: Any = module
    plain = not isinstance(module, ResnetBlock2D) or (block.conv_shortcut is None and block.output_scale_factor == 1.0)
    network.get_submodule(parent).register_module(name, stand_in("bypass" if plain else "shortcut", module))

"""Skip connections and paired lists: whether an edited network fits together; removing a layer with its partner.

Source: diffusers `UNet2DConditionModel.forward`: each down-block layer and sampler pushes its answer, each up-block
layer pops one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from exporter.errors import SurgeryError
from exporter.networks.probe import FORWARD_FAILURES, has_probe, run_probe
from exporter.networks.standins import Bypass, Gather, Shortcut

_MAX_MESSAGE = 200


@dataclass(frozen=True)
class Pair:
    """A layer of a down block (resnet and, where the block has them, attention) and the up-block layer to go with it.

    Attributes:
        down: index of the down block and of the layer in it.
        up: index of the up block and of the layer in it.
    """

    down: tuple[int, int]
    up: tuple[int, int]


def check_runnable(module: nn.Module) -> None:
    """Raise SurgeryError where a network does not fit together; networks of unknown classes pass unchecked.

    Two checks: what a forward pass would silently skip (lists of unequal length, skip connections nobody takes), then
    one forward pass on small inputs.
    """
    for path, block in module.named_modules():
        problem = _unpaired(block)
        if problem:
            raise SurgeryError(f"{path}: {problem}. Remove a resnet together with its attention.")
    if type(module).__name__ in ("UNet2DConditionModel", "UNet2DModel"):
        problem = skip_problem(module)
        if problem:
            raise SurgeryError(f"{problem}. Remove a layer with its partner: exporter.networks.wiring.drop_pair.")
    if not has_probe(module) or next(module.parameters()).device.type == "meta":
        return
    try:
        run_probe(module)
    except FORWARD_FAILURES as error:
        text = str(error).split("\n", 1)[0][:_MAX_MESSAGE]
        raise SurgeryError(
            f"{type(module).__name__}: the edited network does not run; got {type(error).__name__}: {text}. "
            "Leave shapes that fit each other."
        ) from error


def _unpaired(block: nn.Module) -> str:
    """Return what is wrong with the two lists of a block that a forward pass zips, or nothing."""
    resnets, attentions = block._modules.get("resnets"), block._modules.get("attentions")
    if not isinstance(resnets, nn.ModuleList) or not isinstance(attentions, nn.ModuleList):
        return ""
    expected = len(attentions) + (1 if "Mid" in type(block).__name__ else 0)
    if len(resnets) == expected:
        return ""
    return f"resnets and attentions are zipped, the rest is skipped; got {len(resnets)} resnets, expected {expected}"


def _blocks(unet: nn.Module, name: str) -> list[Any]:
    return list(cast("Any", getattr(unet, name)))


def _widths(layer: nn.Module) -> tuple[int, int] | None:
    """Return channels in and out of a layer, sampler or stand-in; None for one that keeps what it gets."""
    if isinstance(layer, Bypass):
        return None
    if isinstance(layer, Shortcut):
        conv = layer.conv_shortcut
        return (conv.in_channels, conv.out_channels) if isinstance(conv, nn.Conv2d) else None
    parts = layer._modules
    first = parts.get("conv1") or parts.get("proj_in") or parts.get("conv") or parts.get("Conv2d_0")
    last = parts.get("conv2") or parts.get("proj_out") or first
    if first is None or last is None:
        return None
    return _size(first, "in"), _size(last, "out")


def _size(layer: nn.Module, side: str) -> int:
    kind = "features" if isinstance(layer, nn.Linear | Gather) else "channels"
    return int(getattr(layer, f"{side}_{kind}"))


def _through(width: int, layer: nn.Module, place: str) -> int:
    widths = _widths(layer)
    if widths is None:
        return width
    if widths[0] != width:
        raise _Misfit(f"{place}: takes {widths[0]} channels but gets {width}")
    return widths[1]


def _through_layer(width: int, block: Any, index: int, place: str) -> int:
    """Return the width behind a resnet and, where the block has them, the attention beside it."""
    width = _through(width, block.resnets[index], f"{place}.resnets.{index}")
    attentions = block._modules.get("attentions")
    if attentions is None or index >= len(attentions) or attentions[index] is None:
        return width
    return _through(width, attentions[index], f"{place}.attentions.{index}")


class _Misfit(Exception):  # noqa: N818 - used within this file only, where it is turned into a sentence
    """Widths that do not fit, found while passing through the blocks."""


def skip_problem(unet: nn.Module) -> str:
    """Return what is wrong with the skip connections of a UNet2DConditionModel, or an empty string."""
    try:
        skips, width = _push(unet)
        _pop(unet, skips, width)
    except _Misfit as misfit:
        return str(misfit)
    return ""


def _push(unet: nn.Module) -> tuple[list[int], int]:
    width = int(cast("Any", unet).conv_in.out_channels)
    skips = [width]
    for b, block in enumerate(_blocks(unet, "down_blocks")):
        for i in range(len(block.resnets)):
            width = _through_layer(width, block, i, f"down_blocks.{b}")
            skips.append(width)
        for i, sampler in enumerate(block.downsamplers or ()):
            width = _through(width, sampler, f"down_blocks.{b}.downsamplers.{i}")
            skips.append(width)
    mid = cast("Any", unet).mid_block
    for i, layer in enumerate(mid.resnets if mid is not None else ()):
        width = _through(width, layer, f"mid_block.resnets.{i}")
    return skips, width


def _pop(unet: nn.Module, skips: list[int], width: int) -> None:
    left = list(skips)
    for b, block in enumerate(_blocks(unet, "up_blocks")):
        if not len(block.resnets):
            # `skips[-0:]` takes them all: diffusers would run on and drop every remaining skip connection.
            raise _Misfit(f"up_blocks.{b}.resnets: no layer is left")
        for i in range(len(block.resnets)):
            if not left:
                raise _Misfit(f"up_blocks.{b}.resnets.{i}: no skip is left; the down blocks give {len(skips)}")
            width = _through_layer(width + left.pop(), block, i, f"up_blocks.{b}")
        for i, sampler in enumerate(block.upsamplers or ()):
            width = _through(width, sampler, f"up_blocks.{b}.upsamplers.{i}")
    if left:
        raise _Misfit(f"up_blocks: {len(left)} of {len(skips)} skip connections are not taken")


def droppable_pairs(unet: nn.Module) -> list[Pair]:
    """Return the pairs that may go, one at a time, so that every width still fits; in the order of the down blocks.

    Args:
        unet: a UNet2DConditionModel, edited or not.
    """
    return list(_pairs(unet))


def _pairs(unet: nn.Module) -> Iterator[Pair]:
    down, up = _blocks(unet, "down_blocks"), _blocks(unet, "up_blocks")
    for b, block in enumerate(down):
        for i in range(len(block.resnets)):
            partner = _partner(unet, (b, i), up)
            if partner is not None:
                yield Pair((b, i), partner)


def _partner(unet: nn.Module, layer: tuple[int, int], up: list[Any]) -> tuple[int, int] | None:
    """Return the up-block layer to remove with a down-block layer: the one that takes its skip, else a neighbour.

    The neighbours are the other layers of that up block: the skip connections above move down by one, which fits as
    long as they have the same width.
    """
    taken = _taker(unet, layer)
    if taken is None or len(up[taken[0]].resnets) < 2:
        return None
    others = [(taken[0], i) for i in range(len(up[taken[0]].resnets)) if i != taken[1]]
    for candidate in [taken, *others]:
        if not _problem_without(unet, layer, candidate):
            return candidate
    return None


def _taker(unet: nn.Module, layer: tuple[int, int]) -> tuple[int, int] | None:
    """Return which up-block layer pops what a down-block layer pushed."""
    pushed: list[tuple[int, int] | None] = [None]
    for b, block in enumerate(_blocks(unet, "down_blocks")):
        pushed += [(b, i) for i in range(len(block.resnets))]
        pushed += [None for _ in block.downsamplers or ()]
    for b, block in enumerate(_blocks(unet, "up_blocks")):
        for i in range(len(block.resnets)):
            if pushed and pushed.pop() == layer:
                return b, i
    return None


def _problem_without(unet: nn.Module, down: tuple[int, int], up: tuple[int, int]) -> str:
    sides = ((_blocks(unet, "down_blocks")[down[0]], down[1]), (_blocks(unet, "up_blocks")[up[0]], up[1]))
    saved = [(block, name, entries) for block, _ in sides for name, entries in _paired(block)]
    for block, index in sides:
        for name, entries in _paired(block):
            block._modules[name] = nn.ModuleList([entry for i, entry in enumerate(entries) if i != index])
    try:
        return skip_problem(unet)
    finally:
        for block, name, entries in saved:
            block._modules[name] = entries


def _paired(block: Any) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists of a block that lose an entry together."""
    found = [(name, block._modules.get(name)) for name in ("resnets", "attentions")]
    return [(name, entries) for name, entries in found if isinstance(entries, nn.ModuleList)]


def drop_pair(unet: nn.Module, pair: Pair) -> None:
    """Remove a down-block layer and its up-block partner, in place; indices of later layers move down by one.

    Args:
        unet: a UNet2DConditionModel.
        pair: one of `droppable_pairs(unet)`, of the network as it is now.

    Raises:
        SurgeryError: without them the widths would not fit.
    """
    if pair not in droppable_pairs(unet):
        expected = [p for p in droppable_pairs(unet) if p.down == pair.down] or "another layer"
        raise SurgeryError(
            f"down_blocks.{pair.down[0]}.resnets.{pair.down[1]}: cannot go with that partner: widths or the number of "
            f"skip connections would not fit; got {pair}, expected {expected}. Use droppable_pairs."
        )
    for name, (b, i) in (("down_blocks", pair.down), ("up_blocks", pair.up)):
        for _, entries in _paired(_blocks(unet, name)[b]):
            del entries[i]

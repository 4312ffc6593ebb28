"""Units of a denoiser that a mask may silence: what a mask does to the weights, and how a silent unit is removed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn

from exporter.networks.standins import Gather, stand_in
from exporter.progress import Progress
from exporter.pruners.base import CutOptions, Layer, Share
from exporter.pruners.channels import layers_of, remove_units
from exporter.pruners.protect import is_protected
from exporter.pruners.ranking import steps_of

MODULATIONS = "modulations"
"""Part of a layer of Flux: outputs of the linear layer that makes shift, scale and gate of a block."""


@dataclass(frozen=True)
class Maskable:
    """One layer whose units have a mask each, and the parameters that a mask scales.

    Attributes:
        layer: heads, neurons or modulations.
        scaled: shares that are multiplied by their unit's mask: columns of the output projection, or the rows that
            make a modulation.
        bias: path of the output projection's bias, which goes with the last unit; empty where nothing may go whole.
        cost: parameters of one unit.
        least: fewest units that may stay.
    """

    layer: Layer
    scaled: tuple[Share, ...]
    bias: str
    cost: float
    least: int


def maskables(network: nn.Module, options: CutOptions, parts: Sequence[str]) -> list[Maskable]:
    """Return what can be masked in a denoiser, in its order, what is protected left out.

    Args:
        network: a denoiser.
        options: ratio, steps of width and protection; its own parts are heads and neurons.
        parts: kinds of unit, of ``heads``, ``neurons`` and ``modulations``.
    """
    found = [_of_branch(network, layer, options) for layer in layers_of(network, options) if layer.part in parts]
    if MODULATIONS in parts:
        found += [_of_modulation(layer, options) for layer in _modulations(network, options)]
    return found


def _of_branch(network: nn.Module, layer: Layer, options: CutOptions) -> Maskable:
    outputs = tuple(share for share in layer.shares if share.dim == 1)  # a silent unit adds nothing through these
    bias = outputs[0].path.removesuffix("weight") + "bias"
    whole = _may_go(network.get_submodule(layer.path))
    has_bias = any(name == bias for name, _ in network.named_parameters())
    least = 0 if whole else min(steps_of(layer, options))
    return Maskable(layer, outputs, bias if whole and has_bias else "", _cost(layer), least)


def _of_modulation(layer: Layer, options: CutOptions) -> Maskable:
    return Maskable(layer, layer.shares, "", _cost(layer), min(steps_of(layer, options)))


def _cost(layer: Layer) -> float:
    return float(sum(share.rows().shape[1] for share in layer.shares))


def _may_go(module: nn.Module) -> bool:
    """Tell whether a branch without units can be replaced: by nothing added, or by its own input."""
    if isinstance(module, Attention) and module.added_kv_proj_dim is None:
        return not module.residual_connection or cast("Any", module).rescale_output_factor == 1
    return isinstance(module, FeedForward)


def _modulations(network: nn.Module, options: CutOptions) -> list[Layer]:
    if type(network).__name__ != "FluxTransformer2DModel":
        return []
    found = []
    for path, module in network.named_modules():
        inner = cast("Any", module)
        if not isinstance(module, AdaLayerNormZero | AdaLayerNormZeroSingle) or isinstance(inner.linear, Gather):
            continue
        name = f"{path}.linear"
        if not is_protected([name], options.protect):
            units = inner.linear.out_features
            index = torch.arange(units).unsqueeze(1)
            shares = [Share(f"{name}.{own}", p, 0, index) for own, p in inner.linear.named_parameters()]
            found.append(Layer(name, MODULATIONS, units, 1, 1, tuple(shares)))
    return found


def masked_weights(network: nn.Module, found: Sequence[Maskable], masks: Tensor) -> dict[str, Tensor]:
    """Return the parameters that take the place of a network's own when its units are masked.

    Scaling a unit's columns of the projection that reads it equals multiplying what the unit puts out, so that no hook
    and no other forward is needed: `torch.func.functional_call` takes them.

    Args:
        network: the denoiser.
        found: what is masked.
        masks: (all units,) from 0 to 1, layer after layer.
    """
    scales: dict[str, Tensor] = {}
    changed: dict[str, Tensor] = {}
    for item, mask in zip(found, torch.split(masks, [item.layer.units for item in found]), strict=True):
        for share in item.scaled:
            size = share.parameter.shape[share.dim]
            entries = mask.to(share.parameter).repeat_interleave(share.index.shape[1])
            scale = torch.ones(size, dtype=share.parameter.dtype).index_copy(0, share.index.flatten(), entries)
            shape = [size if dim == share.dim else 1 for dim in range(share.parameter.dim())]
            scales[share.path] = scales.get(share.path, torch.ones(())) * scale.reshape(shape)
        if item.bias:
            changed[item.bias] = network.get_parameter(item.bias).detach() * mask.max().to(item.scaled[0].parameter)
    return changed | {path: network.get_parameter(path).detach() * scale for path, scale in scales.items()}


def remove_masked(
    network: nn.Module, found: Sequence[Maskable], gone: Sequence[list[int]], options: CutOptions, progress: Progress
) -> list[str]:
    """Remove units for good, in place: narrower layers, and stand-ins for what lost all of its units.

    Args:
        network: the denoiser.
        found: what was masked.
        gone: units of each to remove, ascending.
        options: those that they were found with.
        progress: one unit per layer cut.

    Returns:
        Paths of the branches that went whole.
    """
    narrower: dict[str, list[int]] = {}
    emptied = []
    for item, units in zip(found, gone, strict=True):
        path = item.layer.path
        if len(units) == item.layer.units:
            emptied.append(path)
        elif units and item.layer.part == MODULATIONS:
            kept = tuple(unit for unit in range(item.layer.units) if unit not in set(units))
            _replace(network, path, stand_in("gather", network.get_submodule(path), positions=kept))
        elif units:
            narrower[path] = units
    if narrower:
        remove_units(network, options, narrower, progress=progress)
    for path in emptied:
        module = network.get_submodule(path)
        returns_input = isinstance(module, Attention) and module.residual_connection
        _replace(network, path, stand_in("bypass" if returns_input else "zero", module))
    return emptied


def _replace(network: nn.Module, path: str, module: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    network.get_submodule(parent).register_module(name, module)


def kept_by_part(found: Sequence[Maskable], gone: Sequence[list[int]]) -> Mapping[str, dict[str, int]]:
    """Return how many units of each part there were and how many stay."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"of": 0, "kept": 0})
    for item, units in zip(found, gone, strict=True):
        counts[item.layer.part]["of"] += item.layer.units
        counts[item.layer.part]["kept"] += item.layer.units - len(units)
    return dict(counts)

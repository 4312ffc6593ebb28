"""A quantized component as a torch network: weights as they were rounded, and inputs that are rounded as they come."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from calibration.rounded import RoundedLayer, rounded_layers
from calibration.schemes import FLOAT, unit_of
from exporter.errors import ComponentFailed
from exporter.networks.quantization import Quantization


def take_weights(component: str, network: nn.Module, told: Quantization, graph: Path) -> dict[str, RoundedLayer]:
    """Give a network the weights and biases of its rounded graph, in place.

    Args:
        component: its name, for messages.
        network: in float, with the modules that the graph was exported from.
        told: how it is quantized.
        graph: its rounded ONNX file.

    Returns:
        Module path -> its layer, of those that are quantized.

    Raises:
        ComponentFailed: the graph is of another network.
    """
    layers = rounded_layers(graph)
    found = {path: layer for path, layer in layers.items() if scheme_of(path, told) != FLOAT}
    modules = dict(network.named_modules())
    for path, layer in found.items():
        module = cast("Any", modules.get(path))
        weight = torch.from_numpy(layer.weight)
        if module is None or getattr(module, "weight", None) is None or module.weight.shape != weight.shape:
            got = "nothing" if module is None else f"{type(module).__name__}"
            raise ComponentFailed(
                f"{component}: {path}: got {got} in the network, expected a layer of weights {tuple(weight.shape)}, as "
                "the quantized graph has it. Quantize again."
            )
        with torch.no_grad():
            module.weight.copy_(weight)
            if layer.bias is not None and module.bias is not None:
                module.bias.copy_(torch.from_numpy(layer.bias))
    return found


def round_inputs(network: nn.Module, layers: Mapping[str, RoundedLayer]) -> None:
    """Let layers round what they are given, in place, as the quantized graph does it.

    Args:
        network: with modules at the layers' paths, linear or convolutions of channels first.
        layers: as `take_weights` returns them.
    """
    modules = dict(network.named_modules())
    for path, layer in layers.items():
        if layer.scale is not None:
            modules[path].register_forward_pre_hook(_Rounding(modules[path], layer))


class _Rounding:
    """Rounds the input of a layer to 8 bits, evened out by channel where that is part of the fit."""

    def __init__(self, module: nn.Module, layer: RoundedLayer) -> None:
        self._scale, self._factor = float(layer.scale or 0.0), None
        if layer.divisor is not None:
            factor = torch.from_numpy(1.0 / layer.divisor)
            self._factor = factor if isinstance(module, nn.Linear) else factor[None, :, None, None]

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value = given[0] if self._factor is None else given[0] * self._factor
        return (torch.quantize_per_tensor(value, self._scale, 0, torch.qint8).dequantize(), *given[1:])


def scheme_of(path: str, told: Quantization) -> str:
    """Return the scheme of a module."""
    unit = unit_of(path, told.plan)
    return FLOAT if unit is None else told.plan[unit]

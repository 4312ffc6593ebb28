"""A rounded graph read back: what became of each layer, for runtimes that are not given the graph itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calibration.errors import CalibrationError
from calibration.statistics import SMOOTHING, Floats

_LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class RoundedLayer:
    """A convolution or linear layer as a rounded graph computes it.

    Attributes:
        weight: what its codes stand for, outputs first, as torch has it; to be multiplied with inputs after `divisor`.
        bias: None where it has none.
        divisor: (inputs,) what its input is divided by before it is rounded; None where it is not.
        scale: width of a level of 8 bits of its input; None where that is not rounded.
    """

    weight: Floats
    bias: Floats | None
    divisor: Floats | None
    scale: float | None


def rounded_layers(graph: Path) -> dict[str, RoundedLayer]:
    """Return module path -> its layer, of a graph that `calibration.qdq.write_quantized` wrote.

    Raises:
        CalibrationError: a module is called twice with ranges of its own.
    """
    found: dict[str, RoundedLayer] = {}
    for node in ir.load(graph).graph:
        weight = _weight(node) if node.op_type in _LAYERS else None
        if weight is None:
            continue
        path = (node.name or "").rpartition("/")[0]
        scale, divisor = _input(node.inputs[0])
        layer = RoundedLayer(weight, _bias(node), divisor, scale)
        if path in found and found[path].scale != layer.scale:
            raise CalibrationError(
                f"{graph}: {path}: called twice, with ranges of its own each time; got {found[path].scale} and "
                f"{layer.scale}, expected one. Leave this module in float."
            )
        found[path] = layer
    return found


def _weight(node: ir.Node) -> Floats | None:
    values = _constant(node.inputs[1])
    if values is None or (node.op_type == "MatMul" and values.ndim != 2):
        return None
    turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0))
    return np.ascontiguousarray(values.T) if turned else values


def _bias(node: ir.Node) -> Floats | None:
    if len(node.inputs) > 2:
        return _constant(node.inputs[2])
    uses = list(node.outputs[0].uses())
    if node.op_type == "MatMul" and len(uses) == 1 and uses[0][0].op_type == "Add":
        adding, index = uses[0]
        values = _constant(adding.inputs[1 - index])
        return values if values is not None and values.ndim == 1 else None
    return None


def _input(value: ir.Value | None) -> tuple[float | None, Floats | None]:
    """Return the width of a level of a rounded input, and what it was divided by before."""
    wide = None if value is None else value.producer()
    if wide is None or wide.op_type != "DequantizeLinear":
        return None, None
    narrow = None if wide.inputs[0] is None else wide.inputs[0].producer()
    scale = _constant(wide.inputs[1])
    if narrow is None or narrow.op_type != "QuantizeLinear" or scale is None:
        return None, None
    even = None if narrow.inputs[0] is None else narrow.inputs[0].producer()
    given = even.inputs[1] if even is not None and even.op_type == "Mul" else None
    factor = _constant(given) if given is not None and (given.name or "").endswith(SMOOTHING) else None
    return float(scale.reshape(-1)[0]), None if factor is None else 1.0 / factor.reshape(-1)


def _constant(value: ir.Value | None) -> Floats | None:
    """Return the numbers of an initializer, or of one that is stored as codes; None for what is computed."""
    if value is None:
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy(), np.float32)
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    codes, scale = (_constant(given) for given in node.inputs[:2])
    if codes is None or scale is None:
        return None
    block, axis = node.attributes.get_int("block_size", 0), node.attributes.get_int("axis", 1)
    if block:
        return codes * np.repeat(scale, block, axis=axis)
    return codes * (scale if scale.ndim == 0 else scale.reshape([-1 if i == axis else 1 for i in range(codes.ndim)]))

"""A float graph in 16 bits, but for the modules that overflow there on what was recorded.

The largest number of fp16 is 65,504; bf16 reaches as far as float and needs no exceptions for size. What overflows is
found by looking: every value of the graph, on recorded calls, and whoever computes or reads one that comes near stays
in float. A graph keeps its inputs and outputs in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from calibration.errors import CalibrationError
from calibration.schemes import BF16, FP16
from calibration.statistics import Study, largest_of_nodes

LARGEST = 65504.0
NEAR = LARGEST / 2
"""From here on a value counts as overflowing: other inputs may reach twice as far as the recorded ones."""

_TYPES = {FP16: ir.DataType.FLOAT16, BF16: ir.DataType.BFLOAT16}
_NUMPY: Mapping[str, Any] = {FP16: np.float16, BF16: ml_dtypes.bfloat16}
_BF16_OPSET = 22  # the first whose convolutions know it
_WIDE = ("QuantizeLinear", "DequantizeLinear", "Range")
"""Operators that stay in float: scales of integers are too small for 16 bits."""
_KEPT_INPUTS = {"Resize": (1, 2)}
"""Inputs that the standard wants in float."""


def overflowing(study: Study) -> dict[str, float]:
    """Return module path -> the largest magnitude that it computes or reads, of those that come near fp16's end.

    Raises:
        CalibrationError: a value is not finite in float.
    """
    found: dict[str, float] = {}
    for name, largest in largest_of_nodes(study).items():
        if largest > NEAR:
            path = module_of(name)
            found[path] = max(largest, found.get(path, 0.0))
    return found


def module_of(node: str) -> str:
    """Return the path of the module that a node stands in."""
    return node.rpartition("/")[0]


def narrow(model: ir.Model, type_of: Callable[[str], str]) -> dict[str, int]:
    """Let a graph compute in 16 bits where it is asked to; in place.

    Args:
        model: in float, weights as initializers.
        type_of: module path -> `FP16`, `BF16` or anything else for float.

    Returns:
        type -> how many operators with a floating-point result have it; ``float`` the others.
    """
    return _Narrower(model.graph).convert(model, type_of)


class _Narrower:
    """Converts one graph; every value is cast at most once to each type."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._stored = dict.fromkeys(graph.inputs, "float")
        self._forms: dict[tuple[ir.Value, str], ir.Value] = {}

    def convert(self, model: ir.Model, type_of: Callable[[str], str]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for node in list(self._graph):
            wanted = "float" if node.op_type in _WIDE else type_of(module_of(node.name or ""))
            wanted = wanted if wanted in _TYPES else "float"
            floats = [value for value in node.outputs if value.dtype == ir.DataType.FLOAT]
            self._read(node, wanted)
            if wanted != "float":
                _attributes(node, wanted)
            for value in floats:
                self._stored[value] = wanted
                counts[wanted] = counts.get(wanted, 0) + 1
                if wanted != "float":
                    value.dtype = _TYPES[wanted]
        if BF16 in counts:
            model.opset_imports[""] = max(model.opset_imports.get("", 0), _BF16_OPSET)
        for index, value in enumerate(self._graph.outputs):
            if self._stored.get(value, "float") != "float":
                self._answer(index, value)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]
        return counts

    def _read(self, node: ir.Node, wanted: str) -> None:
        """Give a node its inputs in the type that it computes in."""
        for index, value in enumerate(node.inputs):
            if value is None or index in _KEPT_INPUTS.get(node.op_type, ()):
                continue
            known = self._stored.get(value)
            if known is None and (value.is_initializer() and value.dtype == ir.DataType.FLOAT):
                known = "float"
            if known is not None and known != wanted:
                node.replace_input_with(index, self._form(value, wanted))

    def _form(self, value: ir.Value, wanted: str) -> ir.Value:
        if (value, wanted) not in self._forms:
            self._forms[value, wanted] = (
                self._weight(value, wanted) if value.is_initializer() else self._cast(value, wanted)
            )
        return self._forms[value, wanted]

    def _weight(self, value: ir.Value, wanted: str) -> ir.Value:
        held, name = value.const_value, f"{value.name}.{wanted}"
        assert held is not None
        source = held

        def converted() -> ir.TensorProtocol:  # when it is written, one at a time
            values = source.numpy()
            if wanted == FP16 and not np.abs(values, dtype=np.float32).max(initial=0.0) <= LARGEST:
                raise CalibrationError(
                    f"quantize: {value.name}: got weights beyond {LARGEST:,.0f}, expected numbers that fp16 has. Let "
                    "the plan keep what reads them in float."
                )
            return ir.tensor(values.astype(_NUMPY[wanted]), name=name)

        lazy = ir.LazyTensor(converted, dtype=_TYPES[wanted], shape=held.shape, name=name)  # type: ignore[arg-type]
        narrow_one = ir.Value(name=name, const_value=lazy, shape=value.shape, type=ir.TensorType(_TYPES[wanted]))
        self._graph.initializers[name] = narrow_one
        return narrow_one

    def _cast(self, value: ir.Value, wanted: str) -> ir.Value:
        dtype = _TYPES.get(wanted, ir.DataType.FLOAT)
        node = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}/Cast.{wanted}")
        node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(dtype)
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return node.outputs[0]

    def _answer(self, index: int, value: ir.Value) -> None:
        name, value.name = value.name, f"{value.name}.narrow"
        wide = self._form(value, "float")
        wide.name = name
        self._graph.outputs[index] = wide


def _attributes(node: ir.Node, wanted: str) -> None:
    """Change what a node says of types itself."""
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(_TYPES[wanted]))
    attribute = node.attributes.get("value")
    if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.dtype == ir.DataType.FLOAT:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(_NUMPY[wanted])))

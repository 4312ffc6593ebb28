"""An ONNX file as torch reads it: inputs and outputs, nodes, and what is constant whatever it is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from targets.base import Array, TargetError, TensorSpec
from targets.onnx_file import external_files, values_of
from targets.semi_structured import has_pattern, refusal
from targets.torch_operators import DTYPES, OPERATORS, Call, Unsupported

Found = TypeVar("Found")
PLACE = "target torch-cuda"
PRODUCTS = ("MatMul", "Gemm")
_LAYERS = (*PRODUCTS, "Conv")
_KNOWN = {*OPERATORS, "Gemm", "Shape"}
_SMALL = 1 << 16
"""Constants of up to this many numbers are computed at once; larger ones when they are loaded."""
_SAME_BITS = {
    ml_dtypes.bfloat16: (np.uint16, torch.bfloat16),
    ml_dtypes.float8_e4m3fn: (np.uint8, torch.float8_e4m3fn),
}


@dataclass(frozen=True)
class Grid:
    """Integers that a constant was made of, with a scale for every place of an axis.

    Attributes:
        codes: int8.
        scales: one per place.
        dim: the axis.
    """

    codes: Held
    scales: Held
    dim: int


@dataclass(frozen=True)
class Held:
    """A value that is known before a call.

    Attributes:
        name: in the graph.
        like: of its shape and type, without numbers.
        load: returns it, in main memory.
        fixed: whether it is the same for all shapes of the inputs.
        grid: the integers it stands for, if any.
    """

    name: str
    like: Tensor
    load: Callable[[], Tensor]
    fixed: bool = True
    grid: Grid | None = None


@dataclass(frozen=True)
class Weighted:
    """A product or convolution with a constant weight.

    Attributes:
        node: its name.
        operator: its type.
        shape: outputs, inputs and a kernel's sides.
        pattern: whether the weight has two zeros in every four inputs.
        reason: why it is not stored semi-structured; empty where it can be.
    """

    node: str
    operator: str
    shape: tuple[int, ...]
    pattern: bool
    reason: str


class Question:
    """A node and what is known of its inputs, as `OPERATORS` ask it."""

    def __init__(self, node: ir.Node, inputs: Sequence[Any]) -> None:
        self.attributes: Mapping[str, Any] = {name: item.value for name, item in node.attributes.items()}
        likes = [None if value is None else value.like for value in inputs]
        self.shapes: Sequence[tuple[int, ...]] = [() if like is None else tuple(like.shape) for like in likes]
        self.dtypes: Sequence[torch.dtype] = [torch.float32 if like is None else like.dtype for like in likes]
        self._inputs = inputs

    def given(self, index: int) -> bool:
        """Return whether the node has such an input."""
        return index < len(self._inputs) and self._inputs[index] is not None

    def numbers(self, index: int) -> list[Any] | None:
        """Return the numbers of an input; raises Unsupported where they are computed from values."""
        if not self.given(index):
            return None
        value = self._inputs[index]
        if not isinstance(value, Held):
            raise Unsupported(f"input {index}: got one that is computed from values, expected a constant")
        found: list[Any] = value.load().reshape(-1).tolist()
        return found


class OnnxGraph:
    """A graph, and all of it that is constant.

    Args:
        path: the ONNX file, external data beside it.

    Attributes:
        inputs: of the graph.
        outputs: of the graph.
        nodes: in the order of the file, without those that only make constants.
        fixed: name -> constant.

    Raises:
        TargetError: it is no ONNX file, or has operators that are not here; the message names all of them.
    """

    def __init__(self, path: Path) -> None:
        external_files(path, PLACE)
        self.path = path
        graph = ir.load(path).graph
        if not graph.outputs:
            raise TargetError(f"{PLACE}: {path}: got a graph without outputs, expected an ONNX file. Export it again.")
        operators = {f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph}
        if unknown := sorted(operators - _KNOWN):
            raise TargetError(
                f"{PLACE}: {path}: operators that it has not; got {', '.join(unknown)}, expected some of "
                f"{', '.join(sorted(_KNOWN))}. Use another target for this network."
            )
        self.inputs = tuple(self._spec(value) for value in graph.inputs)
        self.outputs = tuple(self._spec(value) for value in graph.outputs)
        self.fixed = {name: _initializer(name, value) for name, value in graph.initializers.items()}
        self.nodes: list[ir.Node] = []
        for node in graph:
            inputs = [None if value is None else self.fixed.get(str(value.name)) for value in node.inputs]
            given = [value is not None for value in node.inputs]
            if node.op_type in _KNOWN - {"Shape", "Gemm"} and given == [value is not None for value in inputs]:
                self.fixed |= {item.name: item for item in self.folded(node, inputs)}
            else:
                self.nodes.append(node)

    def folded(self, node: ir.Node, inputs: Sequence[Held | None]) -> list[Held]:
        """Return what a node makes of constants."""
        call = self.called(node, inputs)
        operands = [value for value in picked(call, inputs) if value is not None]
        fixed = all(value.fixed for value in inputs if value is not None)
        results = self.tried(node, lambda: _folded(call, operands))
        names = [str(value.name) for value in node.outputs]
        grid = _grid(node, call, operands) if node.op_type == "DequantizeLinear" else None
        return [Held(name, like, load, fixed, grid) for name, (like, load) in zip(names, results, strict=True)]

    def called(self, node: ir.Node, inputs: Sequence[Any]) -> Call:
        """Return which function a node is.

        Raises:
            TargetError: in this form it is not here.
        """
        return self.tried(node, lambda: OPERATORS[node.op_type](Question(node, inputs)))

    def tried(self, node: ir.Node, work: Callable[[], Found]) -> Found:
        """Do what a node asks for.

        Raises:
            TargetError: it cannot be done; the message names the node.
        """
        try:
            return work()
        except (Unsupported, RuntimeError, ValueError, IndexError, KeyError, NotImplementedError) as error:
            raise TargetError(
                f"{PLACE}: {self.path}: {name_of(node)} ({node.op_type}): not in a form that it has; {error}. Use "
                "another target for this network."
            ) from error

    def weighted(self) -> Iterator[Weighted]:
        """Yield every product and convolution with a constant weight; one weight at a time is read."""
        for node in self.nodes:
            weight = self.weight_of(node)
            if weight is None:
                continue
            values, by_rows = weight.load(), is_by_rows(node)
            values = values if by_rows else values.t()
            shape = tuple(values.shape)
            alone = node.op_type != "Conv" or node.attributes.get_int("group", 1) == 1
            pattern = alone and has_pattern(values)
            reason = (
                refusal(node.op_type, shape, weight.like.dtype) if pattern else "not two zeros in every four inputs"
            )
            yield Weighted(name_of(node), node.op_type, shape, pattern, reason)

    def weight_of(self, node: ir.Node) -> Held | None:
        """Return the constant weight of a product or convolution, None where it has none."""
        if node.op_type not in _LAYERS or node.inputs[1] is None:
            return None
        held = self.fixed.get(str(node.inputs[1].name))
        rank = 2 if node.op_type in PRODUCTS else 4
        return held if held is not None and held.like.ndim == rank else None

    def _spec(self, value: ir.Value) -> TensorSpec:
        dtype, name = value.dtype, str(value.name)
        if dtype is None or value.shape is None or dtype not in DTYPES or dtype.numpy().kind == "V":
            raise TargetError(
                f"{PLACE}: {self.path}: '{name}': got {dtype} {value.shape}, expected a type that numpy has and a "
                "shape. Export it again."
            )
        sides = (side if isinstance(side, int) else -1 for side in value.shape)
        return TensorSpec(name, dtype.numpy().name, tuple(sides))


def picked(call: Call, inputs: Sequence[Any]) -> list[Any]:
    """Return the inputs that a function takes; those that the node leaves out at its end are gone."""
    found = [inputs[index] for index in call.operands] if call.operands is not None else list(inputs)
    while found and found[-1] is None:
        found.pop()
    return found


def is_by_rows(node: ir.Node) -> bool:
    """Return whether the weight of a product or convolution has its outputs first."""
    return node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1)


def name_of(node: ir.Node) -> str:
    """Return the name of a node, or that of its first output."""
    return node.name or str(node.outputs[0].name)


def results_of(found: Any) -> tuple[Tensor, ...]:
    """Return the tensors that a function returned."""
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _folded(call: Call, operands: Sequence[Held]) -> list[tuple[Tensor, Callable[[], Tensor]]]:
    """Return what a function makes of constants: of small ones at once, of large ones when it is asked for."""
    if all(value.like.numel() <= _SMALL for value in operands):
        made = results_of(call.function(*(value.load() for value in operands), **call.facts))
        return [(tensor.to("meta"), lambda tensor=tensor: tensor) for tensor in made]  # type: ignore[misc]
    likes = results_of(call.function(*(value.like for value in operands), **call.facts))

    def load(index: int) -> Tensor:
        return results_of(call.function(*(value.load() for value in operands), **call.facts))[index]

    return [(like, lambda index=index: load(index)) for index, like in enumerate(likes)]  # type: ignore[misc]


def _grid(node: ir.Node, call: Call, operands: Sequence[Held]) -> Grid | None:
    """Return the integers behind a constant, where torch can multiply with them: signed, around zero, not in groups."""
    codes, scales, *zero = operands
    even = not zero or not bool(zero[0].load().any())
    if codes.like.dtype != torch.int8 or scales.like.ndim != 1 or call.facts["block"] or not even:
        return None
    return Grid(codes, scales, call.facts["dim"])


def _initializer(name: str, value: ir.Value) -> Held:
    tensor = value.const_value
    if tensor is None or tensor.dtype not in DTYPES:
        kind = None if tensor is None else tensor.dtype.name
        raise TargetError(f"{PLACE}: '{name}': got a constant of {kind}, which torch has not. Export it again.")
    like = torch.empty(tuple(tensor.shape.numpy()), dtype=DTYPES[tensor.dtype], device="meta")
    return Held(name, like, lambda: _tensor(values_of(tensor)))


def _tensor(values: Array) -> Tensor:
    for kind, (bits, dtype) in _SAME_BITS.items():
        if values.dtype == np.dtype(kind):
            return torch.from_numpy(values.view(bits)).view(dtype)
    if values.dtype == np.dtype(ml_dtypes.int4):
        return torch.from_numpy(values.astype(np.int8))
    return torch.from_numpy(values)

"""A graph for one set of input shapes as a torch program: straight code that can be run, compiled and recorded."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from targets import torch_functions as functions
from targets.base import Layer, TargetError
from targets.semi_structured import backend_of, semi_structured
from targets.torch_graph import (
    PLACE,
    PRODUCTS,
    Held,
    OnnxGraph,
    is_by_rows,
    name_of,
    picked,
    results_of,
)

Shapes = tuple[tuple[int, ...], ...]
"""Of the inputs, in their order."""
_FEWEST_ROWS, _WIDTH = 17, 8
"""Torch multiplies integers on a GPU from so many rows on, and with both sides in multiples of this."""
_ORIGIN = "origin"
_PRECISIONS = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
    torch.float8_e4m3fn: "f8e4m3",
}


@dataclass(frozen=True)
class Origin:
    """Where a call comes from.

    Attributes:
        nodes: names in the graph.
        operator: the first one's type.
        precision: what it computes in.
    """

    nodes: tuple[str, ...]
    operator: str
    precision: str


class Weights:
    """Constants on the device that uses them, each once for all programs of a session.

    Args:
        device: such as ``cuda``.
        stored: names of the nodes whose weights are stored semi-structured.

    Attributes:
        kept: attribute of the programs -> constant.
    """

    def __init__(self, device: str, stored: Collection[str] = ()) -> None:
        self.device, self.stored = device, frozenset(stored)
        self.kept: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}

    def keep(self, key: str, load: Callable[[], Tensor]) -> str:
        """Return the attribute of a constant, which is loaded where it is not there yet."""
        if key not in self._names:
            name = f"constant_{len(self._names)}"
            self.kept[name] = load()
            self._names[key] = name
        return self._names[key]


@dataclass(frozen=True)
class _Made:
    """A value of the program.

    Attributes:
        node: that makes it.
        like: its shape and type.
        codes: the 8-bit integers that it was widened from, if torch can multiply with them.
        scale: of these.
    """

    node: fx.Node
    like: Tensor
    codes: fx.Node | None = None
    scale: Held | None = None


class Program:
    """A torch program, and what it is made of.

    Attributes:
        module: takes the inputs in their order and returns a tuple of the outputs.
    """

    def __init__(self, graph: OnnxGraph, shapes: Shapes, weights: Weights) -> None:
        self.module: fx.GraphModule = _Builder(graph, shapes, weights).build()

    def calls(self) -> list[fx.Node]:
        """Return the calls of the program in their order."""
        return [node for node in self.module.graph.nodes if _ORIGIN in node.meta]

    def layers(self, device: str) -> tuple[Layer, ...]:
        """Return what every call is; the kernel of a product is the library of its semi-structured weight."""
        return tuple(self._layer(node, device) for node in self.calls())

    def _layer(self, node: fx.Node, device: str) -> Layer:
        origin: Origin = node.meta[_ORIGIN]
        kernel = ""
        if node.target is functions.semi_structured_linear:
            kernel = backend_of(getattr(self.module, str(node.args[1])))
        return Layer(origin.nodes[0], origin.operator, origin.precision, kernel, device, ", ".join(origin.nodes))


class _Builder:
    """Makes one program."""

    def __init__(self, graph: OnnxGraph, shapes: Shapes, weights: Weights) -> None:
        self._graph, self._shapes, self._weights = graph, shapes, weights
        self._code = fx.Graph()
        self._values: dict[str, Held | _Made] = dict(graph.fixed)

    def build(self) -> fx.GraphModule:
        for index, (spec, shape) in enumerate(zip(self._graph.inputs, self._shapes, strict=True)):
            like = torch.empty(shape, dtype=getattr(torch, spec.dtype), device="meta")
            self._values[spec.name] = _Made(self._code.placeholder(f"input_{index}"), like)
        for node in self._graph.nodes:
            self._add(node)
        for spec in self._graph.outputs:
            if spec.name not in self._values:
                raise TargetError(f"{PLACE}: {self._graph.path}: nothing makes its output '{spec.name}'. Export again.")
        self._code.output(tuple(self._operand(self._values[spec.name]) for spec in self._graph.outputs))
        self._code.eliminate_dead_code()
        return fx.GraphModule(self._weights.kept, self._code)

    def _add(self, node: ir.Node) -> None:
        names = [None if value is None else str(value.name) for value in node.inputs]
        for name in names:
            if name is not None and name not in self._values:
                raise TargetError(
                    f"{PLACE}: {self._graph.path}: {name_of(node)}: nothing makes its input '{name}'. Export again."
                )
        inputs = [None if name is None else self._values[name] for name in names]
        if node.op_type == "Shape":
            self._keep([self._shape(node, inputs)])
        elif all(value is None or isinstance(value, Held) for value in inputs) and node.op_type != "Gemm":
            held = [value if isinstance(value, Held) else None for value in inputs]
            self._keep(self._graph.folded(node, held))
        elif self._graph.weight_of(node) is not None and node.op_type in PRODUCTS:
            self._product(node, inputs)
        elif node.op_type == "Gemm":
            raise TargetError(
                f"{PLACE}: {self._graph.path}: {name_of(node)} (Gemm): not in a form that it has; got two computed "
                "matrices, expected a constant weight. Use another target for this network."
            )
        elif not self._is_bias(node, inputs):
            self._call(node, inputs)

    def _keep(self, values: Sequence[Held]) -> None:
        self._values |= {value.name: value for value in values}

    def _shape(self, node: ir.Node, inputs: Sequence[Any]) -> Held:
        sides = tuple(inputs[0].like.shape)
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(sides))
        numbers = torch.tensor(sides[start:end], dtype=torch.int64)
        return Held(str(node.outputs[0].name), numbers.to("meta"), lambda: numbers, fixed=False)

    def _call(self, node: ir.Node, inputs: Sequence[Any]) -> None:
        """Emit what the table says a node is."""
        call = self._graph.called(node, inputs)
        operands = picked(call, inputs)
        likes = [None if value is None else value.like for value in operands]
        results = self._graph.tried(node, lambda: results_of(call.function(*likes, **call.facts)))
        arguments = tuple(None if value is None else self._operand(value) for value in operands)
        made = self._emit(node, call.function, arguments, results[0], call.facts)
        if call.results == 1:
            made = _widened(node, made, inputs) if node.op_type == "DequantizeLinear" else made
            self._values[str(node.outputs[0].name)] = made
            return
        for index, (value, like) in enumerate(zip(node.outputs, results, strict=True)):
            part = self._code.call_function(operator.getitem, (made.node, index))
            self._values[str(value.name)] = _Made(part, like)

    def _product(self, node: ir.Node, inputs: Sequence[Any]) -> None:
        """Emit a product with a constant weight: of 8-bit integers, semi-structured, or plain."""
        rows, weight, *bias = inputs
        for name, expected in {"alpha": 1.0, "beta": 1.0, "transA": 0}.items():
            found = node.attributes[name].value if name in node.attributes else expected
            if node.op_type == "Gemm" and found != expected:
                raise TargetError(
                    f"{PLACE}: {self._graph.path}: {name_of(node)} (Gemm): {name}: got {found}, expected {expected:g}. "
                    "Use another target for this network."
                )
        by_rows, name = is_by_rows(node), name_of(node)
        like = functions.linear(rows.like, _turned(weight.like, by_rows))
        integers = self._integers(rows, weight, by_rows)
        beside = tuple(self._operand(value) for value in bias if value is not None)
        if integers is not None:
            made = self._emit(node, functions.integer_linear, (*integers, *beside), like, precision="i8")
        else:
            stored = name in self._weights.stored
            kept = self._weights.keep(
                f"{weight.name} {'by rows' if by_rows else 'by columns'}{' semi-structured' if stored else ''}",
                lambda: self._loaded(node, _turned(weight.load(), by_rows), stored=stored),
            )
            function = functions.semi_structured_linear if stored else functions.linear
            made = self._emit(node, function, (self._operand(rows), self._code.get_attr(kept), *beside), like)
        self._values[str(node.outputs[0].name)] = made

    def _loaded(self, node: ir.Node, weight: Tensor, *, stored: bool) -> Tensor:
        there = weight.contiguous().to(self._weights.device)
        return self._graph.tried(node, lambda: semi_structured(there)) if stored else there

    def _integers(self, rows: Any, weight: Held, by_rows: bool) -> tuple[fx.Node, fx.Node, fx.Node] | None:
        """Return codes of rows and weight and the scale of their products, where torch multiplies integers."""
        grid = weight.grid
        if grid is None or not isinstance(rows, _Made) or rows.codes is None or rows.scale is None:
            return None
        outputs = 0 if by_rows else 1
        width, count = rows.like.shape[-1], rows.like.numel() // rows.like.shape[-1]
        fits = not (width % _WIDTH or weight.like.shape[outputs] % _WIDTH) and count >= _FEWEST_ROWS
        if grid.dim != outputs or not fits:
            return None
        codes, scales, scale = grid.codes, grid.scales, rows.scale
        held = self._weights.keep(
            f"{codes.name} {'by rows' if by_rows else 'by columns'}",
            lambda: _turned(codes.load(), by_rows).contiguous().to(self._weights.device),
        )
        both = self._weights.keep(
            f"{scales.name} times {scale.name}", lambda: (scales.load() * scale.load()).to(self._weights.device)
        )
        return rows.codes, self._code.get_attr(held), self._code.get_attr(both)

    def _is_bias(self, node: ir.Node, inputs: Sequence[Any]) -> bool:
        """Give a sum with a constant to the product before it as its bias, where nothing else reads the product."""
        if node.op_type != "Add":
            return False
        for index, (value, other) in enumerate(((inputs[0], inputs[1]), (inputs[1], inputs[0]))):
            product = node.inputs[index]
            if not isinstance(value, _Made) or not isinstance(other, Held) or product is None:
                continue
            linear = value.node.target in (functions.linear, functions.semi_structured_linear)
            alone = len(list(product.uses())) == 1 and not product.is_graph_output()
            if not linear or not alone or len(value.node.args) > 2 or tuple(other.like.shape) != value.like.shape[-1:]:
                continue
            with self._code.inserting_before(value.node):
                bias = self._operand(other)
            value.node.args = (*value.node.args, bias)
            origin: Origin = value.node.meta[_ORIGIN]
            value.node.meta[_ORIGIN] = Origin((*origin.nodes, name_of(node)), origin.operator, origin.precision)
            self._values[str(node.outputs[0].name)] = value
            return True
        return False

    def _operand(self, value: Held | _Made) -> fx.Node:
        """Return a value as an argument; constants go to the device."""
        if isinstance(value, _Made):
            return value.node
        key = value.name if value.fixed else f"{value.name} {self._shapes}"
        return self._code.get_attr(self._weights.keep(key, lambda: value.load().contiguous().to(self._weights.device)))

    def _emit(
        self,
        node: ir.Node,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        like: Tensor,
        facts: Mapping[str, Any] | None = None,
        precision: str = "",
    ) -> _Made:
        made = self._code.call_function(function, arguments, dict(facts or {}))
        kind = like.dtype
        made.meta[_ORIGIN] = Origin((name_of(node),), node.op_type, precision or _PRECISIONS.get(kind, str(kind)))
        return _Made(made, like)


def _turned(weight: Tensor, by_rows: bool) -> Tensor:
    return weight if by_rows else weight.t()


def _widened(node: ir.Node, made: _Made, inputs: Sequence[Any]) -> _Made:
    """Return a widened value with the codes it comes from, where these are signed, around zero and have one scale."""
    codes, scale, *zero = inputs
    known = isinstance(scale, Held) and all(isinstance(value, Held) for value in zero)
    if not known or not isinstance(codes, _Made) or codes.like.dtype != torch.int8 or scale.like.ndim:
        return made
    even = not zero or not bool(zero[0].load().any())
    return _Made(made.node, made.like, codes.node, scale) if even else made

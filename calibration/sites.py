"""Where a graph can be quantized: its convolutions, linear layers and products of activations, by module path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from calibration.schemes import MIXED, PRODUCT, SCORES

Kind = Literal["conv", "linear", "product"]
_SHAPELESS = ("Reshape", "Transpose", "Mul", "Add", "Div", "Cast", "Squeeze", "Unsqueeze", "Expand", "Slice", "Concat")
"""What may stand between a product and the softmax that tells what it is."""
_FAR = 6


@dataclass(frozen=True)
class Site:
    """One operator that can work in 8 bits.

    Attributes:
        name: its module's path, such as ``down_blocks.0.resnets.0.conv1``; of a product, the path of the attention and
            `SCORES` or `MIXED`.
        kind: which operator.
        node: the graph's node.
        activations: indices of the node's inputs that are no weights.
        axis: of the weight, that of its outputs; 0 for a product.
        features: axis of the activation that the weight sums over; -1 for the last.
    """

    name: str
    kind: Kind
    node: ir.Node
    activations: tuple[int, ...]
    axis: int = 0
    features: int = -1

    @property
    def weight(self) -> ir.Value | None:
        """The weight, an initializer; None for a product."""
        return None if self.kind == "product" else self.node.inputs[1]


def sites_of(graph: ir.Graph) -> dict[str, Site]:
    """Return what can be quantized in a graph, by name, in the order of execution.

    Args:
        graph: whose nodes are called ``<module path>/<operator>``, with transposed weights folded.
    """
    found: dict[str, Site] = {}
    for node in graph:
        site = _site(node)
        if site is not None:
            name, number = site.name, 1
            while name in found:  # a module that is called twice
                name, number = f"{site.name}_{number}", number + 1
            found[name] = Site(name, site.kind, node, site.activations, site.axis, site.features)
    return found


def _site(node: ir.Node) -> Site | None:
    path = (node.name or "").rpartition("/")[0] or "graph"
    if node.op_type == "Conv" and _is_weight(node.inputs[1]):
        return Site(path, "conv", node, (0,), features=1)
    if node.op_type == "Gemm" and _is_weight(node.inputs[1]):
        transposed = node.attributes.get_int("transB", 0)
        return Site(path, "linear", node, (0,), axis=0 if transposed else 1)
    if node.op_type != "MatMul":
        return None
    left, right = node.inputs
    if _is_weight(right) and right is not None and right.shape is not None and len(right.shape) == 2:
        return Site(path, "linear", node, (0,), axis=1)
    if _is_constant(left) or _is_constant(right):
        return None
    return Site(f"{path}.{_role(node)}", "product", node, (0, 1))


def _role(node: ir.Node) -> str:
    if any(near.op_type == "Softmax" for near in _after(node.outputs[0], _FAR)):
        return SCORES
    if any(near.op_type == "Softmax" for near in _before(node, _FAR)):
        return MIXED
    return PRODUCT


def _after(value: ir.Value, far: int) -> Iterator[ir.Node]:
    for node, _ in value.uses():
        yield node
        if far and node.op_type in _SHAPELESS:
            yield from _after(node.outputs[0], far - 1)


def _before(node: ir.Node, far: int) -> Iterator[ir.Node]:
    first = node.inputs[0]
    producer = None if first is None else first.producer()
    if producer is not None:
        yield producer
        if far and producer.op_type in _SHAPELESS:
            yield from _before(producer, far - 1)


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _is_constant(value: ir.Value | None) -> bool:
    return (
        value is None
        or value.is_initializer()
        or ((producer := value.producer()) is not None and producer.op_type == "Constant")
    )

"""Makes an exported graph fit to read and to repeat: names from the modules, nothing of this machine or unused."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir
from onnx_ir.passes import common as passes

_SCOPES = "pkg.torch.onnx.name_scopes"
_FOLDED = {"MatMul": ("weight", "transposed"), "Mul": ("weight", "reshaped"), "Add": ("bias", "reshaped")}
"""Operator -> the parameter that the exporter folds for it, and how: linear layers, and the scale of group norms."""


def tidy(model: ir.Model, *, prefix: str, weights: Mapping[str, int]) -> None:
    """Rename, strip and prune a graph in place.

    Nodes are called ``<module path>/<Operator>`` and initializers as in the state dict; a weight that the exporter
    transposed is ``<module path>.weight_transposed``. What the exporter leaves behind (stack traces with paths of this
    machine, scopes, signatures) goes, and so does what no node uses.

    Args:
        model: straight from the exporter.
        prefix: what the wrapper put before every path, such as ``net.``.
        weights: the state dict's names, without the prefix -> number of elements.
    """
    _drop_idle_squeezes(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    graph = model.graph
    names = _Names(value.name or "" for value in (*graph.inputs, *graph.outputs))
    held = _name_weights(graph, prefix, names)
    _name_nodes(graph, prefix, names)
    _name_constants(graph, held, weights, names)
    _strip(model)


def _drop_idle_squeezes(graph: ir.Graph) -> None:
    """Take out what ONNX refuses and torch means nothing by: the squeeze of an axis that is not of size 1."""
    for node in list(graph):
        if node.op_type != "Squeeze" or len(node.inputs) != 2 or node.inputs[0] is None or node.inputs[1] is None:
            continue
        shape, axes = node.inputs[0].shape, ir.convenience.get_const_tensor(node.inputs[1])
        if shape is None or axes is None:
            continue
        if all(shape[int(axis)] != 1 for axis in axes.numpy().reshape(-1)):
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


def unused_initializers(model: ir.Model) -> list[str]:
    """Return the names of initializers that no node reads."""
    outputs = {id(value) for value in model.graph.outputs}
    return [name for name, value in model.graph.initializers.items() if not value.uses() and id(value) not in outputs]


class _Names:
    """Hands out names, each once: the second ``a`` is ``a_1``."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._seen: dict[str, int] = dict.fromkeys(taken, 0)

    def take(self, wanted: str) -> str:
        """Return `wanted`, or `wanted` with the next free number."""
        name = wanted
        while name in self._seen:
            self._seen[wanted] += 1
            name = f"{wanted}_{self._seen[wanted]}"
        self._seen[name] = 0
        return name


def _name_weights(graph: ir.Graph, prefix: str, names: _Names) -> set[int]:
    """Take the prefix off the weights; return the ids of those values."""
    held = set()
    for name, value in list(graph.initializers.items()):
        if name.startswith(prefix):
            value.name = names.take(name.removeprefix(prefix))
            held.add(id(value))
    return held


def _name_nodes(graph: ir.Graph, prefix: str, names: _Names) -> None:
    kept = {id(value) for value in graph.outputs}
    for node in graph:
        scope = _scope(node, prefix)
        node.name = names.take(f"{scope}/{node.op_type}" if scope else node.op_type)
        for index, value in enumerate(node.outputs):
            if id(value) not in kept:
                value.name = names.take(f"{node.name}_output_{index}")


def _name_constants(graph: ir.Graph, held: set[int], weights: Mapping[str, int], names: _Names) -> None:
    """Name what the exporter folded or made up after the first node that reads it."""
    done = set(held)
    for node, index, value in _constants(graph):
        if id(value) not in done:
            done.add(id(value))
            value.name = names.take(_origin(node, value, weights) or f"{node.name}_constant_{index}")


def _origin(node: ir.Node, value: ir.Value, weights: Mapping[str, int]) -> str:
    """Return a name for a weight that the exporter folded into another shape, empty where it is none."""
    kind, change = _FOLDED.get(node.op_type, ("", ""))
    weight = f"{(node.name or '').rpartition('/')[0]}.{kind}"
    size = 0 if value.const_value is None else value.const_value.size
    return f"{weight}_{change}" if size > 1 and weights.get(weight) == size else ""


def _constants(graph: ir.Graph) -> Iterator[tuple[ir.Node, int, ir.Value]]:
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer():
                yield node, index, value


def _scope(node: ir.Node, prefix: str) -> str:
    """Return the path of the module whose forward made this node; empty where the exporter does not say."""
    written = node.metadata_props.get(_SCOPES)
    if written is None:
        return ""
    scopes = ast.literal_eval(written)  # the exporter writes repr(list of str): outermost first, the operation last
    path = str(scopes[-2]) if len(scopes) > 1 else ""
    return path.removeprefix(prefix) if path.startswith(prefix) else ""


def _strip(model: ir.Model) -> None:
    graph = model.graph
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            _strip_value(value)
    for value in (*graph.inputs, *graph.initializers.values()):
        _strip_value(value)
    graph.metadata_props.clear()
    model.metadata_props.clear()
    graph.doc_string = model.doc_string = None


def _strip_value(value: ir.Value) -> None:
    value.metadata_props.clear()
    value.doc_string = None

"""Whether an exported graph still has the zeros that a state claims, where the compiler will look for them.

A compiler sees neither modules nor transposes that were folded away, only an initializer and the operator that reads
it. So every operator that came from a claimed layer is followed back to the initializer of its weight, and the zeros
are counted along the axis that the operator sums over.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporter.errors import ComponentFailed
from exporter.networks.sparsity import MAX_GROUP, Claims, Pattern, broken, stated
from targets.onnx_file import values_of

OPERATORS = ("Conv", "Gemm", "MatMul")
_ELEMENTWISE = ("Cast", "DequantizeLinear")
"""What may stand between a weight and its operator and leaves zeros zero: our integers are symmetric."""


def check_zeros(paths: Iterable[Path], claims: Claims, component: str) -> dict[str, int]:
    """Check every claim on the initializers of graphs, after constant folding.

    Args:
        paths: the ONNX files of one network, external data beside them; each claimed layer is in one of them at least.
        claims: of the network that was exported.
        component: its name, for messages.

    Returns:
        ``layers`` and ``operators`` that were checked.

    Raises:
        ComponentFailed: the graph has lost a claim; the message names the layer.
    """
    if not claims:
        return {"layers": 0, "operators": 0}
    readers: dict[str, list[ir.Node]] = {}
    for path in paths:
        for node in ir.load(path).graph:
            if node.op_type in OPERATORS:
                readers.setdefault((node.name or "").rpartition("/")[0], []).append(node)
    operators = 0
    for name, pattern in claims.items():
        nodes = readers.get(name.removesuffix(".weight"), [])
        if not nodes:
            raise _lost(component, name, pattern, f"got no {', '.join(OPERATORS)} of that name in the graph")
        for node in nodes:
            if told := _told(node, pattern):
                raise _lost(component, name, pattern, f"{told}, in what {node.name} reads")
        operators += len(nodes)
    return {"layers": len(claims), "operators": operators}


def _told(node: ir.Node, pattern: Pattern) -> str:
    """Return what is wrong with the weight that an operator reads; empty where its zeros are there."""
    found = _zeros(node)
    if found is None:
        return "got no constant weight"
    kept, axis = found
    if pattern[1] > MAX_GROUP and kept.numel() != pattern[1]:
        return f"got {kept.numel()} numbers, expected {pattern[1]}"
    return broken(kept.movedim(axis, 1), pattern)  # outputs first, then the axis that is summed over


def _zeros(node: ir.Node) -> tuple[Tensor, int] | None:
    """Return where the constant weight of an operator is not zero, and which of its axes is summed over."""
    found = weight_of(node)
    return None if found is None else (torch.from_numpy(np.asarray(values_of(found[0]) != 0)), found[1])


def weight_of(node: ir.Node) -> tuple[Any, int] | None:
    """Return the constant weight of an operator, and which of its axes is summed over; None where it has none.

    Args:
        node: a Conv, Gemm or MatMul. Between it and its weight there may be roundings, casts and transposes.
    """
    rank = 4 if node.op_type == "Conv" else 2
    by_rows = node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1)
    axis, value = int(by_rows), node.inputs[1]
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type == "Transpose":
            axis = list(maker.attributes.get_ints("perm", tuple(reversed(range(rank)))))[axis]
        elif maker.op_type not in _ELEMENTWISE:
            return None
        value = maker.inputs[0]
    if value is None or value.const_value is None or len(value.const_value.shape) != rank:
        return None
    return value.const_value, axis


def _lost(component: str, name: str, pattern: Pattern, told: str) -> ComponentFailed:
    return ComponentFailed(
        f"{component}: {name}: {stated(pattern)} sparse in the state, but not in the exported graph; {told}. Name the "
        "layer in prune.protect, and report it."
    )

"""What of a graph sparse kernels could take: the pattern of every weight where compilers look for it, and the reasons.

The pattern is at most two numbers that are not zero in every four along the inputs, for every output and position of a
kernel. That a weight has it makes it eligible, no more: whether a sparse kernel is chosen, and whether it wins, only a
device tells. What is stated here as a gain is a bound: sparse units multiply twice as fast at best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from exporter.errors import SourceError
from exporter.lowering.zeros import OPERATORS, weight_of
from exporter.metrics.sparse import Weighed
from exporter.networks.sparse_kernels import PATTERN, bound, unfit
from exporter.networks.sparsity import grouped
from targets.onnx_file import values_of

_WRONG_AXIS = "two in four along the outputs, not along the inputs"


@dataclass(frozen=True)
class SparseWeight:
    """A constant weight of a product or a convolution.

    Attributes:
        node: that reads it.
        operator: the node's.
        weight: its name in the graph.
        shape: outputs, inputs, and the kernel's height and width.
        dtype: of its numbers, as ONNX says.
        zeros: share of zeros.
        pattern: whether it has two zeros in every four.
        reason: why no sparse kernel can take it; empty where one can.
        products: multiplications of a call; None where shapes are open.
    """

    node: str
    operator: str
    weight: str
    shape: tuple[int, ...]
    dtype: str
    zeros: float
    pattern: bool
    reason: str
    products: int | None


def sparse_weights(path: Path) -> list[SparseWeight]:
    """Return every constant weight of a graph, in the order of its nodes.

    Args:
        path: an ONNX file, external data beside it.

    Raises:
        SourceError: it is no ONNX file.
    """
    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf raises what it likes
        raise SourceError(f"{path}: not an ONNX file; got: {error}. Give the file that was exported.") from error
    found = ((node, weight_of(node)) for node in graph if node.op_type in OPERATORS)
    return [_looked_at(node, *weight) for node, weight in found if weight is not None]


def weigh(path: Path) -> Weighed:
    """Return what a graph shows of its weights; nothing where there is no such file, since a schedule has several."""
    found = sparse_weights(path) if path.is_file() else []
    return Weighed({item.node: item.products for item in found}, sum(not item.reason for item in found))


def report_text(weights: Sequence[SparseWeight]) -> str:
    """Return the report for people: a line for every weight, then the sum."""
    rows = [
        f"{'2:4' if item.pattern else f'{item.zeros:.0%}':>4}  {'x'.join(map(str, item.shape)):<16} {item.dtype:<8} "
        f"{item.node}{f': {item.reason}' if item.reason else ''}"
        for item in weights
    ]
    return "\n".join([*rows, "", *summary(weights)])


def summary(weights: Sequence[SparseWeight]) -> list[str]:
    """Return what the weights come to, in sentences."""
    having = [item for item in weights if item.pattern]
    taken = [item for item in weights if not item.reason]
    lines = [f"{len(having)} of {len(weights)} weights are 2:4; sparse kernels could take {len(taken)}."]
    share = product_share(weights)
    if share is None:
        return [*lines, "Shapes are open, so what they multiply is not known."]
    return [*lines, f"These do {share:.1%} of the multiplications with constant weights: {bound(share)}"]


def product_share(weights: Sequence[SparseWeight]) -> float | None:
    """Return what part of the multiplications with constant weights sparse kernels could take; None: not known."""
    counts = [item.products for item in weights]
    if not counts or None in counts:
        return None
    taken = sum(item.products or 0 for item in weights if not item.reason)
    return taken / sum(count or 0 for count in counts)


def _looked_at(node: ir.Node, tensor: Any, axis: int) -> SparseWeight:
    values = torch.from_numpy(np.asarray(values_of(tensor) != 0)).movedim(axis, 1)
    shape = tuple(values.shape)
    dtype = tensor.dtype
    broken = _broken(values)
    turned = broken != 0 and _broken(values.transpose(0, 1)) == 0
    groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
    reason = _reason(shape, broken, groups, int(dtype.itemsize))
    return SparseWeight(
        node=node.name or "",
        operator=node.op_type,
        weight=tensor.name or "",
        shape=shape,
        dtype=dtype.name,
        zeros=1 - float(values.double().mean()),
        pattern=broken == 0,
        reason=f"{_WRONG_AXIS}: {reason}" if turned else reason,
        products=_products(node, shape),
    )


def _broken(values: torch.Tensor) -> int | None:
    """Return how many groups of four have more than two numbers that are not zero; None where fours do not fit."""
    n, m = PATTERN
    if values.shape[1] % m:
        return None
    return int((grouped(values, m).sum(-1) > n).sum())


def _reason(shape: tuple[int, ...], broken: int | None, groups: int, size: int) -> str:
    outputs, inputs = shape[:2]
    if groups > 1:
        return f"a convolution of {groups} groups"
    if told := unfit(inputs, outputs, size=size):
        return told
    return f"{broken} of {math.prod(shape) // PATTERN[1]} groups of four have more than two numbers" if broken else ""


def _products(node: ir.Node, shape: tuple[int, ...]) -> int | None:
    """Return the multiplications of an operator: its answers, each a sum over inputs and kernel."""
    answer = node.outputs[0].shape
    if answer is None or not all(isinstance(side, int) for side in answer):
        return None
    return math.prod(answer.numpy()) * math.prod(shape[1:])

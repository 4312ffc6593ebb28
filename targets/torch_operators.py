"""What each ONNX operator of our graphs is in torch: a function of tensors, and arguments that are known beforehand.

Shapes are known when a program is made, so everything that ONNX computes from shapes is an argument here, and a program
holds nothing that a CUDA graph could not record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import onnx_ir as ir
import torch
import torch.nn.functional as F

from targets import torch_functions as functions

DTYPES: Mapping[ir.DataType, torch.dtype] = MappingProxyType(
    {
        ir.DataType.FLOAT: torch.float32,
        ir.DataType.FLOAT16: torch.float16,
        ir.DataType.BFLOAT16: torch.bfloat16,
        ir.DataType.DOUBLE: torch.float64,
        ir.DataType.INT64: torch.int64,
        ir.DataType.INT32: torch.int32,
        ir.DataType.INT8: torch.int8,
        ir.DataType.UINT8: torch.uint8,
        ir.DataType.BOOL: torch.bool,
        ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
        ir.DataType.INT4: torch.int8,  # torch has no numbers of 4 bits
    }
)


class Unsupported(Exception):  # noqa: N818 - reads as what it is
    """A form of an operator that is not here; the message says which, and what is."""


class Asked(Protocol):
    """A node, and what is known of its inputs."""

    attributes: Mapping[str, Any]
    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[torch.dtype]

    def numbers(self, index: int) -> list[Any] | None:
        """Return the numbers of an input that is known beforehand, flat; None where the node has no such input."""

    def given(self, index: int) -> bool:
        """Return whether the node has such an input."""


@dataclass(frozen=True)
class Call:
    """A call of a torch function.

    Attributes:
        function: takes the operands, then the facts by name.
        operands: which inputs of the node it takes; None for all of them.
        facts: known beforehand.
        results: how many tensors it returns, as a tuple where there are several.
    """

    function: Callable[..., Any]
    operands: tuple[int, ...] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    results: int = 1


def _plain(function: Callable[..., Any]) -> Callable[[Asked], Call]:
    return lambda asked: Call(function)


def _cast(asked: Asked) -> Call:
    wanted = ir.DataType(asked.attributes["to"])
    if wanted not in DTYPES:
        raise Unsupported(f"to: got {wanted.name}, which torch has not")
    return Call(functions.cast, facts={"dtype": DTYPES[wanted]})


def _reshaped(shape: Sequence[int]) -> Call:
    return Call(torch.reshape, (0,), {"shape": tuple(shape)})


def _reshape(asked: Asked) -> Call:
    old, wanted = asked.shapes[0], _known(asked, 1)
    if not asked.attributes.get("allowzero", 0):
        wanted = [old[index] if side == 0 else side for index, side in enumerate(wanted)]
    if -1 in wanted:
        others = math.prod(side for side in wanted if side != -1)
        wanted = [math.prod(old) // others if side == -1 else side for side in wanted]
    return _reshaped(wanted)


def _squeeze(asked: Asked) -> Call:
    shape, axes = asked.shapes[0], asked.numbers(1)
    gone = (
        {axis % len(shape) for axis in axes} if axes is not None else {i for i, side in enumerate(shape) if side == 1}
    )
    return _reshaped([side for index, side in enumerate(shape) if index not in gone])


def _unsqueeze(asked: Asked) -> Call:
    axes, shape = _known(asked, 1), list(asked.shapes[0])
    rank = len(shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return _reshaped(shape)


def _flatten(asked: Asked) -> Call:
    shape, axis = asked.shapes[0], asked.attributes.get("axis", 1)
    return _reshaped((math.prod(shape[:axis]), math.prod(shape[axis:])))


def _transpose(asked: Asked) -> Call:
    rank = len(asked.shapes[0])
    return Call(torch.permute, (0,), {"dims": tuple(asked.attributes.get("perm", range(rank - 1, -1, -1)))})


def _expand(asked: Asked) -> Call:
    shape: Sequence[int] = torch.broadcast_shapes(asked.shapes[0], tuple(_known(asked, 1)))  # type: ignore[no-untyped-call]
    return Call(torch.broadcast_to, (0,), {"size": tuple(shape)})


def _slice(asked: Asked) -> Call:
    starts, ends = _known(asked, 1), _known(asked, 2)
    axes = asked.numbers(3) or list(range(len(starts)))
    steps = asked.numbers(4) or [1] * len(starts)
    if min(steps) < 1:
        raise Unsupported(f"steps: got {min(steps)}, expected 1 or more")
    shape = asked.shapes[0]
    places = (
        (axis % len(shape), *slice(start, end, step).indices(shape[axis]))  # ends may lie far outside
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    )
    return Call(functions.cut, (0,), {"slices": tuple(places)})


def _split(asked: Asked) -> Call:
    axis = asked.attributes.get("axis", 0)
    side, sizes = asked.shapes[0][axis], asked.numbers(1)
    if sizes is None:
        count = asked.attributes["num_outputs"]
        each = -(-side // count)
        sizes = [each] * (count - 1) + [side - each * (count - 1)]
    return Call(torch.split, (0,), {"split_size_or_sections": list(sizes), "dim": axis}, len(sizes))


def _gather(asked: Asked) -> Call:
    return Call(functions.take, facts={"dim": asked.attributes.get("axis", 0) % len(asked.shapes[0])})


def _gather_nd(asked: Asked) -> Call:
    _only(asked, "batch_dims", 0)
    return Call(functions.take_each)


def _mean(asked: Asked) -> Call:
    axes = asked.numbers(1) or (None if asked.attributes.get("noop_with_empty_axes") else range(len(asked.shapes[0])))
    if axes is None:
        raise Unsupported("noop_with_empty_axes: got 1 and no axes")
    return Call(torch.mean, (0,), {"dim": tuple(axes), "keepdim": bool(asked.attributes.get("keepdims", 1))})


def _argmax(asked: Asked) -> Call:
    _only(asked, "select_last_index", 0)
    kept = bool(asked.attributes.get("keepdims", 1))
    return Call(torch.argmax, facts={"dim": asked.attributes.get("axis", 0), "keepdim": kept})


def _conv(asked: Asked) -> Call:
    if asked.attributes.get("auto_pad", "NOTSET") != "NOTSET" or len(asked.shapes[0]) not in (3, 4):
        raise Unsupported("got pads that are not written out, or other than 1 or 2 dimensions")
    rank = len(asked.shapes[0]) - 2
    pads = list(asked.attributes.get("pads", [0] * (2 * rank)))
    before, after = pads[:rank], pads[rank:]
    facts: dict[str, Any] = {
        "stride": tuple(asked.attributes.get("strides", [1] * rank)),
        "dilation": tuple(asked.attributes.get("dilations", [1] * rank)),
        "groups": asked.attributes.get("group", 1),
    }
    if before == after:
        return Call(functions.convolve, facts={**facts, "padding": tuple(before)})
    beside = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    return Call(functions.convolve, facts={**facts, "pads": tuple(beside)})


def _pad(asked: Asked) -> Call:
    if asked.attributes.get("mode", "constant") != "constant" or asked.given(3):
        raise Unsupported("got another mode than constant, or axes")
    pads, value = _known(asked, 1), asked.numbers(2)
    rank = len(pads) // 2
    beside = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[rank + axis])]
    return Call(F.pad, (0,), {"pad": tuple(beside), "value": value[0] if value else 0})


def _layer_norm(asked: Asked) -> Call:
    axis = asked.attributes.get("axis", -1) % len(asked.shapes[0])
    facts = {"shape": asked.shapes[0][axis:], "eps": asked.attributes.get("epsilon", 1e-5)}
    return Call(functions.normalize, facts=facts)


def _rms_norm(asked: Asked) -> Call:
    return Call(functions.normalize_squares, facts=_layer_norm(asked).facts)


def _group_norm(asked: Asked) -> Call:
    # A norm of every channel alone is one of groups of a channel.
    groups = asked.attributes.get("num_groups", asked.shapes[0][1])
    if asked.shapes[1] != asked.shapes[0][1:2]:
        raise Unsupported(f"scale: got {asked.shapes[1]}, expected one number for each of the channels")
    return Call(functions.normalize_groups, facts={"groups": groups, "eps": asked.attributes.get("epsilon", 1e-5)})


def _attention(asked: Asked) -> Call:
    if len(asked.shapes[0]) != 4 or len(asked.shapes) > 4 or asked.attributes.get("softcap"):
        raise Unsupported("got caches, a cap or other than 4 axes; expected (rows, heads, tokens, width) and a mask")
    causal = bool(asked.attributes.get("is_causal", 0))
    return Call(functions.attend, facts={"is_causal": causal, "scale": asked.attributes.get("scale")})


def _resize(asked: Asked) -> Call:
    for name, expected in (("mode", "nearest"), ("nearest_mode", "floor")):
        _only(asked, name, expected)
    _only(asked, "coordinate_transformation_mode", "asymmetric")
    sizes, scales = asked.numbers(3), asked.numbers(2)
    if not sizes:
        sizes = [math.floor(side * scale) for side, scale in zip(asked.shapes[0], scales or (), strict=True)]
    if tuple(sizes[:2]) != asked.shapes[0][:2]:
        raise Unsupported("got other rows or channels, expected other heights and widths")
    return Call(functions.resize, (0,), {"size": tuple(sizes[2:])})


def _quantize(asked: Asked) -> Call:
    if asked.attributes.get("block_size"):
        raise Unsupported("got groups")
    dtype = asked.dtypes[2] if asked.given(2) else torch.uint8
    return Call(functions.quantize, facts={"dim": asked.attributes.get("axis", 1), "dtype": dtype})


def _dequantize(asked: Asked) -> Call:
    axis = asked.attributes.get("axis", 1) % max(len(asked.shapes[0]), 1)
    return Call(functions.dequantize, facts={"dim": axis, "block": asked.attributes.get("block_size", 0)})


def _known(asked: Asked, index: int) -> list[Any]:
    found = asked.numbers(index)
    if found is None:
        raise Unsupported(f"got no input {index}")
    return found


def _only(asked: Asked, name: str, expected: Any) -> None:
    found = asked.attributes.get(name, expected)
    if found != expected:
        raise Unsupported(f"{name}: got {found!r}, expected {expected!r}")


_PLAIN: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "Abs": torch.abs,
        "Add": torch.add,
        "And": torch.logical_and,
        "Cos": torch.cos,
        "Div": functions.divide,
        "Equal": torch.eq,
        "Erf": torch.erf,
        "Exp": torch.exp,
        "GlobalAveragePool": functions.pool,
        "Greater": torch.gt,
        "GreaterOrEqual": torch.ge,
        "IsNaN": torch.isnan,
        "Less": torch.lt,
        "LessOrEqual": torch.le,
        "Log": torch.log,
        "MatMul": torch.matmul,
        "Max": functions.largest,
        "Min": functions.smallest,
        "Mul": torch.mul,
        "Neg": torch.neg,
        "Not": torch.logical_not,
        "Or": torch.logical_or,
        "Pow": functions.power,
        "Range": functions.count_up,
        "Reciprocal": torch.reciprocal,
        "Relu": torch.relu,
        "Sigmoid": torch.sigmoid,
        "Sin": torch.sin,
        "Sqrt": torch.sqrt,
        "Sub": torch.sub,
        "Tanh": torch.tanh,
        "Where": torch.where,
    }
)
OPERATORS: Mapping[str, Callable[[Asked], Call]] = MappingProxyType(
    {
        **{name: _plain(function) for name, function in _PLAIN.items()},
        "ArgMax": _argmax,
        "Attention": _attention,
        "Cast": _cast,
        "Concat": lambda asked: Call(functions.concat, facts={"dim": asked.attributes["axis"]}),
        "Conv": _conv,
        "DequantizeLinear": _dequantize,
        "Einsum": lambda asked: Call(functions.contract, facts={"equation": asked.attributes["equation"]}),
        "Expand": _expand,
        "Flatten": _flatten,
        "Gather": _gather,
        "GatherND": _gather_nd,
        "Gelu": lambda asked: Call(F.gelu, facts={"approximate": asked.attributes.get("approximate", "none")}),
        "GroupNormalization": _group_norm,
        "InstanceNormalization": _group_norm,
        "LayerNormalization": _layer_norm,
        "Pad": _pad,
        "QuantizeLinear": _quantize,
        "RMSNormalization": _rms_norm,
        "ReduceMean": _mean,
        "Reshape": _reshape,
        "Resize": _resize,
        "Slice": _slice,
        "Softmax": lambda asked: Call(F.softmax, facts={"dim": asked.attributes.get("axis", -1)}),
        "Split": _split,
        "Squeeze": _squeeze,
        "Transpose": _transpose,
        "Unsqueeze": _unsqueeze,
    }
)
"""Operator -> what it is called as; `Gemm`, products with constant weights and `Shape` are dealt with where programs
are made."""

"""What operators of our graphs compute: functions of tensors, and of facts that are known when a program is made."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def concat(*tensors: Tensor, dim: int) -> Tensor:
    """Join tensors along an axis."""
    return torch.cat(tensors, dim)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Divide; integers towards zero, as ONNX does."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """Raise to a power, in the type of the base."""
    return torch.pow(base, exponent).to(base.dtype)


def largest(*tensors: Tensor) -> Tensor:
    """Return the elementwise maximum."""
    return functools.reduce(torch.maximum, tensors)


def smallest(*tensors: Tensor) -> Tensor:
    """Return the elementwise minimum."""
    return functools.reduce(torch.minimum, tensors)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to another type."""
    return x.to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows (..., inputs) with a weight (outputs, inputs)."""
    return F.linear(x, weight, bias)


def semi_structured_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows with a semi-structured weight, which takes contiguous matrices only."""
    rows = F.linear(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias)
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def integer_linear(codes: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows of 8-bit integers with a weight of them (outputs, inputs), and scale every output; float32."""
    sums = torch._int_mm(codes.reshape(-1, codes.shape[-1]).contiguous(), weight.t())
    answers = sums.to(torch.float32) * scale
    return (answers if bias is None else answers + bias).reshape(*codes.shape[:-1], weight.shape[0])


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, pads: Sequence[int] | None = None, **facts: Any
) -> Tensor:
    """Convolve (rows, channels, ...) in one or two dimensions; `pads` are those that differ before and after."""
    padded = x if pads is None else F.pad(x, list(pads))
    return (F.conv2d if x.ndim == 4 else F.conv1d)(padded, weight, bias, **facts)


def cut(x: Tensor, slices: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """Take (axis, start, end, step) of several axes."""
    places = [slice(None)] * x.ndim
    for axis, start, end, step in slices:
        places[axis] = slice(start, end, step)
    return x[tuple(places)]


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Take places along an axis; negative ones count from the end."""
    size = x.shape[dim]
    flat = torch.where(index < 0, index + size, index).reshape(-1)
    return torch.index_select(x, dim, flat).reshape(*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])


def take_each(x: Tensor, index: Tensor) -> Tensor:
    """Take the places that the last axis of `index` names."""
    return x[tuple(index.unbind(-1))]


def count_up(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Return start, start + delta, ... below the limit."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def normalize(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **facts: Any) -> Tensor:
    """Normalize over the last axes."""
    return F.layer_norm(x, facts["shape"], weight, bias, facts["eps"])


def normalize_groups(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Normalize groups of channels."""
    return F.group_norm(x, groups, weight, bias, eps)


def normalize_squares(x: Tensor, weight: Tensor, shape: Sequence[int], eps: float) -> Tensor:
    """Divide by the root of the mean square over the last axes."""
    return F.rms_norm(x, list(shape), weight, eps)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **facts: Any) -> Tensor:
    """Return attention of (rows, heads, tokens, width)."""
    return F.scaled_dot_product_attention(query, key, value, mask, **facts)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat or drop pixels."""
    return F.interpolate(x, size=list(size), mode="nearest")


def pool(x: Tensor) -> Tensor:
    """Return the mean over all but rows and channels."""
    return x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)


def contract(*tensors: Tensor, equation: str) -> Tensor:
    """Sum products as an equation says."""
    return torch.einsum(equation, *tensors)


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None = None, **facts: Any) -> Tensor:
    """Round to steps of `scale`, half to even, in the type that `dtype` names."""
    dtype: torch.dtype = facts["dtype"]
    steps = x / along(scale, x, facts["dim"])
    if dtype == torch.float8_e4m3fn:
        end = torch.finfo(dtype).max
        return steps.clamp(-end, end).to(dtype)
    shifted = torch.round(steps) + (0 if zero is None else along(zero, x, facts["dim"]).to(steps.dtype))
    ends = torch.iinfo(dtype)
    return shifted.clamp(ends.min, ends.max).to(dtype)


def dequantize(x: Tensor, scale: Tensor, zero: Tensor | None = None, **facts: Any) -> Tensor:
    """Return what codes stand for, in the type of `scale`."""
    dim, block = facts["dim"], facts["block"]
    wide = x.to(scale.dtype)
    if block:
        scale = scale.repeat_interleave(block, dim)
        zero = None if zero is None else zero.repeat_interleave(block, dim)
    if zero is not None:
        wide = wide - (zero if block else along(zero, x, dim)).to(scale.dtype)
    return wide * (scale if block else along(scale, x, dim))


def along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return one number, or one for every place of an axis, in a shape that `x` can be multiplied with."""
    return values if values.ndim == 0 else values.reshape([-1 if axis == dim else 1 for axis in range(x.ndim)])

"""Products, convolutions, pools, norms and attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from targets.mil.kernels.registry import along, axes_of, kernel

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_MAX_POOL: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@kernel("linear", "x weight bias")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x (..., n) times weight (m, n), plus bias (m,)."""
    return F.linear(x, weight, bias)


@kernel("matmul", "x y")
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """Return matrix products over the last two axes."""
    x = x.transpose(-1, -2) if transpose_x and x.ndim > 1 else x
    y = y.transpose(-1, -2) if transpose_y and y.ndim > 1 else y
    return torch.matmul(x, y)


@kernel("einsum", "values*")
def einsum(values: Sequence[Tensor], equation: str) -> Tensor:
    """Return a product of two tensors, its axes named by letters."""
    return torch.einsum(equation, *values)


@kernel("scaled_dot_product_attention", "query key value attn_mask")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Return attention of query (..., l, e) to key (..., s, e) and value (..., s, v); a mask of truths keeps."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


def same_pads(sizes: Sequence[int], kernels: Sequence[int], strides: Sequence[int], *, lower: bool) -> list[int]:
    """Return (before, after) of each axis, flat, so that a result has ceil(size / stride) elements.

    Args:
        sizes: of the input's spatial axes.
        kernels: sizes, dilation included.
        strides: of the window.
        lower: the odd element goes before.
    """
    pads = []
    for size, width, stride in zip(sizes, kernels, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + width - size, 0)
        before = (total + 1) // 2 if lower else total // 2
        pads += [before, total - before]
    return pads


def pads_of(told: dict[str, Any], sizes: Sequence[int], kernels: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Return (before, after) of each spatial axis, flat, from `pad_type` and `pad` of what is told."""
    kind = str(told.get("pad_type", "valid"))
    if kind == "custom":
        return list(told.get("pad") or [0] * 2 * len(sizes))
    if kind == "valid":
        return [0] * 2 * len(sizes)
    return same_pads(sizes, kernels, strides, lower=kind == "same_lower")


def padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """Return x with its last axes padded; `pads` counts from the first of them."""
    turned = [size for axis in reversed(range(len(pads) // 2)) for size in pads[2 * axis : 2 * axis + 2]]
    return F.pad(x, turned, value=value)


@kernel("conv", "x weight bias", told="strides dilations groups pad_type pad")
def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **told: Any) -> Tensor:
    """Return a convolution.

    Args:
        x: (n, channels, ...) with one to three spatial axes.
        weight: (new channels, channels / groups, ...).
        bias: (new channels,).
        **told: strides, dilations, groups, pad_type and pad.
    """
    rank = x.ndim - 2
    strides, dilations = told.get("strides") or [1] * rank, told.get("dilations") or [1] * rank
    kernels = [(size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations, strict=True)]
    pads = pads_of(told, x.shape[2:], kernels, strides)
    even = pads[::2] == pads[1::2]
    source = x if even else padded(x, pads)
    return _CONV[rank](source, weight, bias, strides, pads[::2] if even else 0, dilations, told.get("groups", 1))


@kernel("conv_transpose", "x weight bias", told="strides dilations groups pad_type pad output_shape")
def conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None = None, **told: Any) -> Tensor:
    """Return a transposed convolution.

    Args:
        x: (n, channels, ...) with one to three spatial axes.
        weight: (channels, new channels / groups, ...).
        bias: (new channels,).
        **told: strides, dilations, groups, pad_type, pad and output_shape.
    """
    rank = x.ndim - 2
    strides, dilations = told.get("strides") or [1] * rank, told.get("dilations") or [1] * rank
    whole = _CONV_TRANSPOSE[rank](x, weight, None, strides, 0, 0, told.get("groups", 1), dilations)
    sizes, kind = list(whole.shape[2:]), str(told.get("pad_type", "valid"))
    pads = list(told.get("pad") or [0] * 2 * rank) if kind == "custom" else [0] * 2 * rank
    wanted = [size - pads[2 * axis] - pads[2 * axis + 1] for axis, size in enumerate(sizes)]
    if kind.startswith("same"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
        cut = [max(size - want, 0) for size, want in zip(sizes, wanted, strict=True)]
        pads = [part for total in cut for part in (total // 2, total - total // 2)]
    if told.get("output_shape"):
        wanted = list(told["output_shape"])[2:]
    for axis, want in enumerate(wanted, start=2):
        before = pads[2 * (axis - 2)]
        found = whole.narrow(axis, before, min(want, whole.shape[axis] - before))
        missing = [0] * (2 * (rank - (axis - 1))) + [0, want - found.shape[axis]]
        whole = F.pad(found, missing) if missing[-1] else found
    return whole if bias is None else whole + along(bias, 1, whole.ndim)


@kernel("max_pool", told="strides pad_type pad ceil_mode")
def max_pool(x: Tensor, kernel_sizes: Sequence[int], **told: Any) -> Tensor:
    """Return the largest element of every window (strides, pad_type, pad and ceil_mode are told)."""
    rank = x.ndim - 2
    strides = told.get("strides") or [1] * rank
    pads = pads_of(told, x.shape[2:], kernel_sizes, strides)
    found: Tensor = _MAX_POOL[rank](
        padded(x, pads, float("-inf")), kernel_sizes, strides, ceil_mode=told.get("ceil_mode", False)
    )
    return found


@kernel("avg_pool", told="strides pad_type pad ceil_mode")
def avg_pool(x: Tensor, kernel_sizes: Sequence[int], exclude_padding_from_average: bool = False, **told: Any) -> Tensor:
    """Return the mean of every window (strides, pad_type, pad and ceil_mode are told)."""
    rank = x.ndim - 2
    strides = told.get("strides") or [1] * rank
    pads, ceil = pads_of(told, x.shape[2:], kernel_sizes, strides), told.get("ceil_mode", False)
    pool = _AVG_POOL[rank]
    if pads[::2] == pads[1::2] and all(2 * pad <= size for pad, size in zip(pads[::2], kernel_sizes, strict=True)):
        return pool(x, kernel_sizes, strides, pads[::2], ceil, not exclude_padding_from_average)
    found = pool(padded(x, pads), kernel_sizes, strides, 0, ceil)
    if not exclude_padding_from_average:
        return found
    return found / pool(padded(torch.ones_like(x), pads), kernel_sizes, strides, 0, ceil)


@kernel("l2_pool", told="strides pad_type pad ceil_mode")
def l2_pool(x: Tensor, kernel_sizes: Sequence[int], **told: Any) -> Tensor:
    """Return the root of the sum of squares of every window (strides, pad_type, pad and ceil_mode are told)."""
    rank = x.ndim - 2
    strides = told.get("strides") or [1] * rank
    pads, count = pads_of(told, x.shape[2:], kernel_sizes, strides), 1
    for size in kernel_sizes:
        count *= size
    mean = _AVG_POOL[rank](padded(x.square(), pads), kernel_sizes, strides, 0, told.get("ceil_mode", False))
    return (mean * count).sqrt()


@kernel("batch_norm", "x mean variance gamma beta")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Return channels (axis 1) normalized with given means and variances, each (channels,)."""
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


@kernel("instance_norm", "x gamma beta")
def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """Return every channel of every row normalized over its spatial axes; gamma and beta are (channels,)."""
    axes = tuple(range(2, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    found = (x - mean) / (variance + epsilon).sqrt()
    found = found if gamma is None else found * along(gamma, 1, x.ndim)
    return found if beta is None else found + along(beta, 1, x.ndim)


@kernel("layer_norm", "x gamma beta")
def layer_norm(
    x: Tensor,
    axes: Sequence[int] | int | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Return x normalized over axes; gamma and beta have their shape."""
    over = sorted(axes_of(axes, x.ndim))
    shape = [x.shape[axis] for axis in over]
    if over == list(range(x.ndim - len(over), x.ndim)):
        return F.layer_norm(x, shape, gamma, beta, epsilon)
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    wide = [x.shape[axis] if axis in over else 1 for axis in range(x.ndim)]
    found = (x - mean) / (variance + epsilon).sqrt()
    found = found if gamma is None else found * gamma.reshape(wide)
    return found if beta is None else found + beta.reshape(wide)


@kernel("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Return x over the root of its squares' sum plus epsilon, over the last three axes."""
    return x / (x.square().sum((-3, -2, -1), keepdim=True) + epsilon).sqrt()


@kernel("local_response_norm")
def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Return x over (k + alpha / size * squares of `size` neighbouring channels) to the power of beta."""
    return F.local_response_norm(x, size, alpha, beta, k)

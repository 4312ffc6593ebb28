"""Products, convolutions, pools, norms and attention, with what their documentation says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from mil_cases import Case, _calls, floats
from mil_programs import Array


def dense() -> list[Case]:
    return [
        *_products(),
        *_convolutions(),
        *_transposed_convolutions(),
        *_pools(),
        *_norms(),
    ]


def _products() -> list[Case]:
    weight, bias = floats(5, 4), floats(5)
    attention = {"q": floats(2, 3, 4, 8), "k": floats(2, 3, 6, 8), "v": floats(2, 3, 6, 5)}
    mask, added = floats(4, 6) > 0, floats(4, 6)
    mask[:, 0] = True
    return [
        Case(
            "linear", _calls("linear", weight=weight, bias=bias), {"x": floats(2, 3, 4)}, lambda x: x @ weight.T + bias
        ),
        Case("linear plain", _calls("linear", weight=weight), {"x": floats(3, 4)}, lambda x: x @ weight.T),
        Case("matmul", _calls("matmul"), {"x": floats(2, 1, 3, 4), "y": floats(5, 4, 2)}, np.matmul),
        Case(
            "matmul transposed",
            _calls("matmul", transpose_x=True, transpose_y=True),
            {"x": floats(2, 4, 3), "y": floats(2, 5, 4)},
            lambda x, y: x.transpose(0, 2, 1) @ y.transpose(0, 2, 1),
        ),
        Case(
            "einsum",
            lambda mb, x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
            {"x": floats(1, 2, 3, 4), "y": floats(1, 4, 3, 5)},
            lambda x, y: np.einsum("nchw,nwhu->nchu", x, y),
        ),
        Case("scaled_dot_product_attention", _attention(None), attention, _attended, "iOS18"),
        Case(
            "scaled_dot_product_attention of a mask",
            _attention(mask),
            attention,
            lambda q, k, v: _attended(q, k, v, np.where(mask, 0, -np.inf)),
            "iOS18",
        ),
        Case(
            "scaled_dot_product_attention plus a mask",
            _attention(added),
            attention,
            lambda q, k, v: _attended(q, k, v, added),
            "iOS18",
        ),
    ]


def _attention(mask: Array | None) -> Callable[..., Any]:
    def build(mb: Any, q: Any, k: Any, v: Any) -> Any:
        more = {} if mask is None else {"attn_mask": mask}
        return mb.scaled_dot_product_attention(query=q, key=k, value=v, **more)

    return build


def _attended(q: Array, k: Array, v: Array, mask: Array | float = 0.0) -> Array:
    scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + mask)
    return scores / scores.sum(-1, keepdims=True) @ v


def _windows(x: Array, sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
    """Return (n, c, *out, *sizes): what each place of a window over the spatial axes sees."""
    out = [
        (x.shape[2 + axis] - (size - 1) * dilation - 1) // stride + 1
        for axis, (size, stride, dilation) in enumerate(zip(sizes, strides, dilations, strict=True))
    ]
    found = np.zeros((*x.shape[:2], *out, *sizes))
    for place in product(*(range(size) for size in sizes)):
        where = [
            slice(at * dilation, at * dilation + (count - 1) * stride + 1, stride)
            for at, count, stride, dilation in zip(place, out, strides, dilations, strict=True)
        ]
        found[(..., *place)] = x[(slice(None), slice(None), *where)]
    return found


def _convolved(x: Array, weight: Array, **told: Any) -> Array:
    rank = x.ndim - 2
    strides, dilations = told.get("strides", [1] * rank), told.get("dilations", [1] * rank)
    pads, groups = told.get("pad", [0] * 2 * rank), told.get("groups", 1)
    wide = np.pad(x, [(0, 0), (0, 0), *zip(pads[::2], pads[1::2], strict=True)])
    seen = _windows(wide, weight.shape[2:], strides, dilations)
    parts = []
    for own, part in zip(np.split(seen, groups, 1), np.split(weight, groups, 0), strict=True):
        axes = [1, *range(2 + rank, 2 + 2 * rank)], [1, *range(2, 2 + rank)]
        parts.append(np.moveaxis(np.tensordot(own, part, axes), -1, 1))
    return np.concatenate(parts, 1)


def _spread(x: Array, weight: Array, strides: Sequence[int], groups: int = 1) -> Array:
    """Return a transposed convolution without padding: each element adds a scaled kernel to the result."""
    rank, (n, channels) = x.ndim - 2, x.shape[:2]
    new, inputs = weight.shape[1], channels // groups
    sizes = [(have - 1) * s + k for have, s, k in zip(x.shape[2:], strides, weight.shape[2:], strict=True)]
    found = np.zeros((n, new * groups, *sizes))
    for channel, at in product(range(channels), product(*(range(size) for size in x.shape[2:]))):
        first = channel // inputs * new
        where = [slice(p * s, p * s + k) for p, s, k in zip(at, strides, weight.shape[2:], strict=True)]
        scale = x[(slice(None), channel, *at)].reshape(-1, *[1] * (rank + 1))
        found[(slice(None), slice(first, first + new), *where)] += scale * weight[channel]
    return found


def _convolutions() -> list[Case]:
    weight, bias, line, cube = floats(6, 2, 3, 2), floats(6), floats(3, 2, 3), floats(2, 2, 2, 2, 2)
    even = floats(3, 2, 4, 3)
    one = bias.reshape(6, 1, 1).astype(np.float64)
    image = {"x": floats(2, 4, 7, 6)}
    custom = {"strides": [2, 1], "dilations": [1, 2], "groups": 2, "pad": [1, 0, 2, 1]}
    return [
        Case(
            "conv",
            _calls("conv", weight=weight, bias=bias, pad_type="custom", **custom),
            image,
            lambda x: _convolved(x, weight, **custom) + one,
        ),
        Case(
            "conv of a line",
            _calls("conv", weight=line, pad_type="valid"),
            {"x": floats(1, 2, 8)},
            lambda x: _convolved(x, line),
        ),
        Case(
            "conv of a cube",
            _calls("conv", weight=cube, pad_type="custom", pad=[1, 1, 0, 0, 1, 1]),
            {"x": floats(1, 2, 3, 4, 3)},
            lambda x: _convolved(x, cube, pad=[1, 1, 0, 0, 1, 1]),
        ),
        Case(
            "conv same",
            _calls("conv", weight=even, pad_type="same"),
            {"x": floats(1, 2, 5, 6)},
            lambda x: _convolved(x, even, pad=[1, 2, 1, 1]),
        ),
        Case(
            "conv same_lower",
            _calls("conv", weight=even, pad_type="same_lower"),
            {"x": floats(1, 2, 5, 6)},
            lambda x: _convolved(x, even, pad=[2, 1, 1, 1]),
        ),
        Case(
            "conv with computed weights",
            lambda mb, x, w: mb.conv(x=x, weight=w, pad_type="valid"),
            {"x": floats(1, 2, 5, 5), "w": floats(3, 2, 2, 2)},
            lambda x, w: _convolved(x, w),
        ),
    ]


def _transposed_convolutions() -> list[Case]:
    bias, spread = floats(6), floats(4, 3, 3, 2)
    one = bias.reshape(6, 1, 1).astype(np.float64)
    return [
        Case(
            "conv_transpose",
            _calls("conv_transpose", weight=spread, strides=[2, 3], bias=bias, groups=2, pad_type="valid"),
            {"x": floats(1, 4, 3, 4)},
            lambda x: _spread(x, spread, [2, 3], 2) + one,
        ),
        Case(
            "conv_transpose custom",
            _calls("conv_transpose", weight=spread, strides=[2, 1], pad_type="custom", pad=[1, 0, 0, 1]),
            {"x": floats(2, 4, 3, 4)},
            lambda x: _spread(x, spread, [2, 1])[:, :, 1:, :-1],
        ),
        Case(
            "conv_transpose of a shape",
            _calls(
                "conv_transpose",
                weight=spread,
                strides=[2, 2],
                pad_type="custom",
                pad=[1, 1, 0, 0],
                output_shape=[1, 3, 6, 8],
            ),
            {"x": floats(1, 4, 3, 4)},
            lambda x: _spread(x, spread, [2, 2])[:, :, 1:7, :8],
        ),
    ]


def _pooled(x: Array, how: Any, **told: Any) -> Array:
    rank = x.ndim - 2
    pads = told.get("pad", [0] * 2 * rank)
    fill = told.get("fill", 0.0)
    wide = np.pad(x, [(0, 0), (0, 0), *zip(pads[::2], pads[1::2], strict=True)], constant_values=fill)
    seen = _windows(wide, told["sizes"], told.get("strides", [1] * rank), [1] * rank)
    found: Array = how(seen, axis=tuple(range(2 + rank, 2 + 2 * rank)))
    return found


def _pools() -> list[Case]:
    image = {"x": floats(1, 2, 7, 6)}
    sizes, strides, pad = [3, 2], [2, 2], [1, 0, 1, 1]
    own = {"kernel_sizes": sizes, "strides": strides, "pad_type": "custom", "pad": pad}
    told = {"sizes": sizes, "strides": strides, "pad": pad}

    def norm(x: Array, axis: Any) -> Array:
        return np.sqrt((x**2).sum(axis))

    return [
        Case("max_pool", _calls("max_pool", **own), image, lambda x: _pooled(x, np.max, fill=-np.inf, **told)),
        Case(
            "max_pool of a line",
            _calls("max_pool", kernel_sizes=[3], pad_type="valid"),
            {"x": floats(1, 2, 9)},
            lambda x: _pooled(x, np.max, sizes=[3]),
        ),
        Case("avg_pool", _calls("avg_pool", **own), image, lambda x: _pooled(x, np.mean, **told)),
        Case(
            "avg_pool without padding",
            _calls("avg_pool", exclude_padding_from_average=True, **own),
            image,
            lambda x: _pooled(x, np.sum, **told) / _pooled(np.ones_like(x), np.sum, **told),
        ),
        Case(
            "avg_pool same",
            _calls("avg_pool", kernel_sizes=[3, 3], strides=[1, 1], pad_type="same"),
            image,
            lambda x: _pooled(x, np.mean, sizes=[3, 3], pad=[1, 1, 1, 1]),
        ),
        Case(
            "max_pool ceil",
            _calls("max_pool", kernel_sizes=[3, 3], strides=[2, 2], pad_type="valid", ceil_mode=True),
            {"x": floats(1, 2, 6, 6)},
            lambda x: _pooled(x, np.max, sizes=[3, 3], strides=[2, 2], pad=[0, 1, 0, 1], fill=-np.inf),
        ),
        Case("l2_pool", _calls("l2_pool", **own), image, lambda x: _pooled(x, norm, **told)),
    ]


def _normal(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def _norms() -> list[Case]:
    gamma, beta = floats(4), floats(4)
    mean, variance = floats(4), floats(4, low=0.2, high=2)
    wide = [item.reshape(4, 1, 1).astype(np.float64) for item in (gamma, beta, mean, variance)]
    image, table = {"x": floats(2, 4, 3, 5)}, floats(3, 5)
    middle = floats(4, 3)
    return [
        Case(
            "batch_norm",
            _calls("batch_norm", mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=1e-2),
            image,
            lambda x: (x - wide[2]) / np.sqrt(wide[3] + 1e-2) * wide[0] + wide[1],
        ),
        Case(
            "batch_norm plain",
            _calls("batch_norm", mean=mean, variance=variance),
            image,
            lambda x: (x - wide[2]) / np.sqrt(wide[3] + 1e-5),
        ),
        Case(
            "instance_norm",
            _calls("instance_norm", gamma=gamma, beta=beta, epsilon=1e-2),
            image,
            lambda x: _normal(x, (2, 3), 1e-2) * wide[0] + wide[1],
        ),
        Case(
            "layer_norm",
            _calls("layer_norm", axes=[2, -1], gamma=table, beta=-table, epsilon=1e-2),
            image,
            lambda x: _normal(x, (2, 3), 1e-2) * table - table,
        ),
        Case("layer_norm default", _calls("layer_norm", axes=[-1]), image, lambda x: _normal(x, (3,), 1e-5)),
        Case(
            "layer_norm inside",
            _calls("layer_norm", axes=[1, 2], gamma=middle, beta=middle, epsilon=1e-2),
            image,
            lambda x: _normal(x, (1, 2), 1e-2) * middle[:, :, None] + middle[:, :, None],
        ),
        Case(
            "l2_norm",
            _calls("l2_norm", epsilon=1e-2),
            image,
            lambda x: x / np.sqrt((x**2).sum((1, 2, 3), keepdims=True) + 1e-2),
        ),
        Case(
            "local_response_norm",
            _calls("local_response_norm", size=3, alpha=0.5, beta=0.75, k=2.0),
            image,
            _local,
        ),
    ]


def _local(x: Array) -> Array:
    squares = np.pad(x**2, ((0, 0), (1, 1), (0, 0), (0, 0)))
    near = sum(squares[:, at : at + 4] for at in range(3))
    return x / (2.0 + 0.5 / 3 * near) ** 0.75

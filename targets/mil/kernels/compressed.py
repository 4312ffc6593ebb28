"""Decompression of weights, and integers that stand for floats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from targets.mil.constants import unpack
from targets.mil.kernels.registry import along, kernel

_LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}


@kernel("quantize", "input zero_point scale")
def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int = 0,
) -> Tensor:
    """Return round(input / scale) + zero point, halves to the even neighbour, clipped to the type."""
    found = torch.round(input / along(scale, axis, input.ndim))
    if zero_point is not None:
        found = found + along(zero_point, axis, input.ndim)
    return found.clamp(*_LIMITS[output_dtype])


@kernel("dequantize", "input zero_point scale")
def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int = 0,
) -> Tensor:
    """Return scale * (input - zero point)."""
    found = input.float()
    if zero_point is not None:
        found = found - along(zero_point, axis, input.ndim)
    return found * along(scale, axis, input.ndim)


@kernel("constexpr_affine_dequantize", "quantized_data zero_point scale")
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Return scale * (data - zero point), both scalars or one for each place along an axis."""
    return dequantize(quantized_data, scale, zero_point, axis)


@kernel("constexpr_cast", "source_val", exact=True)
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    """Return the value; what is declared of the result says the type."""
    return source_val


@kernel("constexpr_lut_to_dense", "indices lut", exact=True)
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Sequence[int] | None = None, vector_axis: int | None = None
) -> Tensor:
    """Return values of palettes.

    Args:
        indices: uint8: one for each element, or packed bits (bytes,) where `shape` is told (iOS 16).
        lut: (..., entries, values): as many palettes along each axis of the indices, or one (entries,).
        shape: of the result.
        vector_axis: along which the values of an entry stand.
    """
    if shape is not None:
        bits = int(lut.numel()).bit_length() - 1
        places = torch.from_numpy(unpack(indices.numpy(), bits, int(np.prod(shape))))
        return lut.index_select(0, places.int()).reshape(tuple(shape))
    groups, entries, values = lut.shape[:-2], lut.shape[-2], lut.shape[-1]
    number = torch.zeros([1] * indices.ndim, dtype=torch.int32)
    for axis, count in enumerate(groups):  # the palette of every index, counted through all axes
        own = torch.arange(indices.shape[axis], dtype=torch.int32) // (indices.shape[axis] // count)
        number = number * count + along(own, axis, indices.ndim)
    places = (number * entries + indices.int()).reshape(-1)
    found = lut.reshape(-1, values).index_select(0, places).reshape(*indices.shape, values)
    if values == 1:
        return found.squeeze(-1)
    axis = int(vector_axis or 0) % indices.ndim
    return found.movedim(-1, axis + 1).flatten(axis, axis + 1)


@kernel("constexpr_sparse_to_dense", "nonzero_data mask", exact=True)
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return values where a mask says so, and zeros.

    Args:
        nonzero_data: (count,), in the order of the mask's ones.
        mask: uint8: one for each element, or packed bits (bytes,) where `shape` is told (iOS 16).
        shape: of the result.
    """
    if shape is not None:
        mask = torch.from_numpy(unpack(mask.numpy(), 1, int(np.prod(shape)))).reshape(tuple(shape))
    return torch.zeros(mask.shape, dtype=nonzero_data.dtype).masked_scatter_(mask.bool(), nonzero_data)


@kernel("constexpr_blockwise_shift_scale", "data scale offset")
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return scale * (data - offset), each scale and offset for a block of elements."""
    blocks, shape = [], []
    for size, count in zip(data.shape, scale.shape, strict=True):
        blocks += [count, size // count]
        shape += [count, 1]
    found = data.float().reshape(blocks)
    if offset is not None:
        found = found - offset.reshape(shape)
    return (found * scale.reshape(shape)).reshape(data.shape)


@kernel("constexpr_lut_to_sparse", "indices_mask indices_nonzero_data lut", exact=True)
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return a mask and the palettes' values where it is one; vectors make both larger along an axis."""
    indices = constexpr_sparse_to_dense(indices_nonzero_data, indices_mask)
    dense = constexpr_lut_to_dense(indices, lut, vector_axis=vector_axis)
    mask, values = indices_mask, lut.shape[-1]
    if values > 1:
        mask = mask.repeat_interleave(values, dim=int(vector_axis or 0))
    return mask, dense[mask.bool()]


@kernel("constexpr_sparse_blockwise_shift_scale", "data_mask nonzero_data scale offset")
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return a mask and scale * (data - offset) where it is one."""
    data = constexpr_sparse_to_dense(nonzero_data, data_mask)
    return data_mask, constexpr_blockwise_shift_scale(data, scale, offset)[data_mask.bool()]

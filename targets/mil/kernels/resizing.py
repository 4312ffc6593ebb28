"""Changing the size of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from targets.mil.kernels.registry import kernel


def _grid(have: int, want: int, mode: str) -> Tensor:
    """Return where each of `want` samples lies among `have` ones, in 64 bits."""
    place = torch.arange(want, dtype=torch.float64)
    if mode == "UNALIGN_CORNERS":
        found = (place + 0.5) * (have / want) - 0.5
    elif mode == "OFFSET_CORNERS":
        found = (place + 0.5) * (max(1, have - 1) / want)
    elif mode == "DEFAULT":
        found = place * (have / want)
    elif want > 1:
        found = place * ((have - 1) / (want - 1))
    else:
        found = torch.full((1,), (have - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0, dtype=torch.float64)
    return found.clamp(0, have - 1)


def _line(x: Tensor, axis: int, want: int, mode: str) -> Tensor:
    """Return x with one axis of another size, by linear interpolation."""
    have = x.shape[axis]
    if have == want and mode != "OFFSET_CORNERS":
        return x
    grid = _grid(have, want, mode)
    low = grid.floor().long()
    shape = [1] * x.ndim
    shape[axis] = -1
    share = (grid - low).to(x.dtype).reshape(shape)
    first, second = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=have - 1))
    return first + (second - first) * share


def _bilinear(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    return _line(_line(x, x.ndim - 2, height, mode), x.ndim - 1, width, mode)


def _nearest(x: Tensor, axis: int, want: int) -> Tensor:
    """Return x with one axis of another size; each element is the one at or before its place."""
    have = x.shape[axis]
    if want % have == 0:
        return x.repeat_interleave(want // have, dim=axis)
    places = torch.arange(want) * have // want
    return x.index_select(axis, places)


@kernel("upsample_nearest_neighbor", exact=True)
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    """Return the last two axes scaled, elements repeated."""
    height, width = (
        math.floor(size * scale)
        for size, scale in zip(x.shape[-2:], (scale_factor_height, scale_factor_width), strict=True)
    )
    return _nearest(_nearest(x, x.ndim - 1, width), x.ndim - 2, height)


@kernel("resize_nearest_neighbor", exact=True)
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    """Return the last two axes in another size, elements repeated or left out."""
    return _nearest(_nearest(x, x.ndim - 1, target_size_width), x.ndim - 2, target_size_height)


@kernel("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """Return the last two axes scaled, by linear interpolation."""
    height, width = math.floor(x.shape[-2] * scale_factor_height), math.floor(x.shape[-1] * scale_factor_width)
    centers = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if centers else "DEFAULT"
    return _bilinear(x, height, width, mode)


@kernel("resize_bilinear")
def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    """Return the last two axes in another size, by linear interpolation."""
    return _bilinear(x, target_size_height, target_size_width, sampling_mode)


@kernel("resize")
def resize(
    x: Tensor,
    shape: Sequence[int],
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """Return the last `resized_dims` axes in the last sizes of a shape; 0 keeps one."""
    for index in range(-resized_dims, 0):
        axis, want = x.ndim + index, shape[index] or x.shape[index]
        x = _nearest(x, axis, want) if interpolation_mode == "NEAREST_NEIGHBOR" else _line(x, axis, want, sampling_mode)
    return x


@kernel("crop", exact=True)
def crop(x: Tensor, crop_height: Sequence[int], crop_width: Sequence[int]) -> Tensor:
    """Return the last two axes without (before, after) elements of each."""
    height, width = x.shape[-2:]
    return x[..., crop_height[0] : height - crop_height[1], crop_width[0] : width - crop_width[1]]

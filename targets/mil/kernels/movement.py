"""Operations that only move, repeat or make elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from targets.mil.kernels.registry import axes_of, kernel

_PAD_MODES = {"reflect": "reflect", "replicate": "replicate"}


@kernel("reshape", exact=True)
def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return x in a shape: -1 takes what is left, 0 keeps the axis where both have as many."""
    if len(shape) == x.ndim:
        shape = [want or have for want, have in zip(shape, x.shape, strict=True)]
    return x.reshape(tuple(shape))


@kernel("reshape_like", "x ref_tensors*", exact=True)
def reshape_like(
    x: Tensor,
    ref_tensors: Sequence[Tensor],
    begins: Sequence[int],
    ends: Sequence[int],
    end_masks: Sequence[bool],
) -> Tensor:
    """Return x in a shape put together from pieces of other shapes."""
    shape: list[int] = []
    for other, begin, end, whole in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += other.shape[begin:] if whole else other.shape[begin:end]
    return x.reshape(shape)


@kernel("transpose", exact=True)
def transpose(x: Tensor, perm: Sequence[int]) -> Tensor:
    """Return x with its axes in another order."""
    return x.permute(tuple(perm))


@kernel("expand_dims", exact=True)
def expand_dims(x: Tensor, axes: Sequence[int] | int) -> Tensor:
    """Return x with new axes of size 1, counted in the result."""
    listed = [axes] if isinstance(axes, int) else axes
    for axis in sorted(axes_of(listed, x.ndim + len(listed))):
        x = x.unsqueeze(axis)
    return x


@kernel("squeeze", exact=True)
def squeeze(x: Tensor, axes: Sequence[int] | int | None = None) -> Tensor:
    """Return x without axes of size 1."""
    return x.squeeze() if axes is None else x.squeeze(axes_of(axes, x.ndim))


@kernel("flatten2d", exact=True)
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    """Return a matrix: the axes before one, and the rest."""
    cut = axis + x.ndim if axis < 0 else axis
    rows = 1
    for size in x.shape[:cut]:
        rows *= size
    return x.reshape(rows, -1)


@kernel("concat", "values*", exact=True)
def concat(values: Sequence[Tensor], axis: int, interleave: bool = False) -> Tensor:
    """Return tensors one after the other along an axis; in turns where interleaved; single numbers as one axis."""
    parts = [value.reshape(1) if value.ndim == 0 else value for value in values]
    if not interleave:
        return torch.cat(parts, dim=axis)
    place = axis % parts[0].ndim
    return torch.stack(parts, dim=place + 1).flatten(place, place + 1)


@kernel("stack", "values*", exact=True)
def stack(values: Sequence[Tensor], axis: int) -> Tensor:
    """Return tensors along a new axis."""
    return torch.stack(list(values), dim=axis)


@kernel("split", exact=True)
def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """Return pieces of x along an axis: of given sizes, or as many as asked for."""
    if split_sizes is None:
        split_sizes = [x.shape[axis] // int(num_splits or 1)] * int(num_splits or 1)
    return torch.split(x, list(split_sizes), dim=axis)


@kernel("tile", exact=True)
def tile(x: Tensor, reps: Sequence[int]) -> Tensor:
    """Return x repeated along every axis."""
    return x.repeat(tuple(reps))


@kernel("pad", exact=True)
def pad(x: Tensor, pad: Sequence[int], mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """Return x with its last axes padded: (before, after) of each, from the first of them."""
    count = len(pad) // 2
    if mode == "constant":
        turned = [size for axis in reversed(range(count)) for size in pad[2 * axis : 2 * axis + 2]]
        return F.pad(x, turned, value=constant_val)
    for index in range(count):
        axis = x.ndim - count + index
        places = torch.arange(-pad[2 * index], x.shape[axis] + pad[2 * index + 1])
        if _PAD_MODES[mode] == "reflect":
            places = (x.shape[axis] - 1) - (places.abs() - (x.shape[axis] - 1)).abs()
        x = x.index_select(axis, places.clamp(0, x.shape[axis] - 1))
    return x


@kernel("reverse", exact=True)
def reverse(x: Tensor, axes: Sequence[int] | int | None = None) -> Tensor:
    """Return x from the end along axes."""
    return x.flip(axes_of(axes, x.ndim))


@kernel("reverse_sequence", "x lengths", exact=True)
def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """Return x with the first `lengths` elements along one axis from the end, for every place of another."""
    rows = []
    axis, row_axis = seq_axis % x.ndim, batch_axis % x.ndim
    inner = axis - (row_axis < axis)
    for row, length in zip(x.unbind(row_axis), lengths.tolist(), strict=True):
        first, rest = row.narrow(inner, 0, length), row.narrow(inner, length, row.shape[inner] - length)
        rows.append(torch.cat((first.flip(inner), rest), dim=inner))
    return torch.stack(rows, dim=row_axis)


@kernel("depth_to_space", exact=True)
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Return (n, c / b^2, h b, w b); a channel's place in the block is the slower part of its number."""
    n, c, h, w = x.shape
    b = block_size
    blocks = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c // (b * b), h * b, w * b)


@kernel("space_to_depth", exact=True)
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """Undo `depth_to_space`."""
    n, c, h, w = x.shape
    b = block_size
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@kernel("pixel_shuffle", exact=True)
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """Return (n, c / f^2, h f, w f); a channel's place in the block is the faster part of its number."""
    return F.pixel_shuffle(x, upscale_factor)


@kernel("pixel_unshuffle", exact=True)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    """Undo `pixel_shuffle`."""
    return F.pixel_unshuffle(x, downscale_factor)


@kernel("space_to_batch", exact=True)
def space_to_batch(x: Tensor, block_shape: Sequence[int], paddings: Sequence[Sequence[int]]) -> Tensor:
    """Return (n bh bw, c, h / bh, w / bw) of the padded x; the place in the block is the slower part of the row."""
    wide = F.pad(x, (*paddings[1], *paddings[0]))
    n, c, h, w = wide.shape
    bh, bw = block_shape
    blocks = wide.reshape(n, c, h // bh, bh, w // bw, bw).permute(3, 5, 0, 1, 2, 4)
    return blocks.reshape(n * bh * bw, c, h // bh, w // bw)


@kernel("batch_to_space", exact=True)
def batch_to_space(x: Tensor, block_shape: Sequence[int], crops: Sequence[Sequence[int]]) -> Tensor:
    """Undo `space_to_batch`, its padding cropped."""
    n, c, h, w = x.shape
    bh, bw = block_shape
    whole = x.reshape(bh, bw, n // (bh * bw), c, h, w).permute(2, 3, 4, 0, 5, 1).reshape(-1, c, h * bh, w * bw)
    (top, bottom), (left, right) = crops
    return whole[:, :, top : h * bh - bottom, left : w * bw - right]


@kernel("sliding_windows", exact=True)
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """Return all windows along an axis: their number, then their size behind it."""
    place = axis % x.ndim
    return x.unfold(place, size, stride).movedim(-1, place + 1)


@kernel("band_part", exact=True)
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Return x with zeros outside of a band of its last two axes' matrices."""
    found = x if upper < 0 else x.tril(upper)
    return found if lower < 0 else found.triu(-lower)


@kernel("shape", exact=True)
def shape(x: Tensor) -> Tensor:
    """Return the shape (rank,)."""
    return torch.tensor(x.shape, dtype=torch.int32)


@kernel("fill", "value", exact=True)
def fill(shape: Sequence[int], value: Tensor | None = None) -> Tensor:
    """Return a tensor of one value."""
    return _filled(shape, value)


@kernel("fill_like", "ref_tensor value", exact=True)
def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    """Return a tensor of one value, as large as another."""
    return _filled(ref_tensor.shape, value)


def _filled(shape: Sequence[int], value: Tensor | None) -> Tensor:
    one = torch.zeros(()) if value is None else value.reshape(())
    return one.expand(tuple(shape)).clone()


@kernel("range_1d", "start end step")
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """Return numbers from start up to end, which is not among them."""
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@kernel("one_hot", "indices on_value off_value", exact=True)
def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    """Return vectors with one value at an index and another elsewhere, along a new axis."""
    on = torch.tensor(1, dtype=torch.int32) if on_value is None else on_value
    off = torch.tensor(0, dtype=torch.int32) if off_value is None else off_value
    hit = indices.unsqueeze(axis) == torch.arange(one_hot_vector_size).reshape(
        [-1 if place == axis % (indices.ndim + 1) else 1 for place in range(indices.ndim + 1)]
    )
    return torch.where(hit, on, off)

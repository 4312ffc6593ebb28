"""Slices, gathers and scatters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from targets.mil.kernels.registry import kernel

_REDUCE = {"add": "sum", "sub": "sum", "mul": "prod", "div": "prod", "max": "amax", "min": "amin"}
_Flags = Sequence[bool] | None


def _ranges(
    shape: Sequence[int], begin: Sequence[int], end: Sequence[int], **told: Sequence[int] | None
) -> list[range]:
    """Return the places that a slice takes of each axis, one place where the axis is squeezed."""
    none = [False] * len(shape)
    stride = told.get("stride") or [1] * len(shape)
    free, open_end, one = (told.get(key) or none for key in ("begin_mask", "end_mask", "squeeze_mask"))
    found = []
    for axis, size in enumerate(shape):
        start = None if free[axis] else begin[axis]
        if one[axis]:
            place = 0 if start is None else start % size
            found.append(range(place, place + 1))
        else:
            stop = None if open_end[axis] else end[axis]
            found.append(range(*slice(start, stop, stride[axis]).indices(size)))
    return found


def _taken(x: Tensor, places: Sequence[range]) -> Tensor:
    for axis, where in enumerate(places):
        if where.step > 0:
            x = x[(slice(None),) * axis + (slice(where.start, where.stop, where.step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(where), dtype=torch.int64))
    return x


def _squeezed(x: Tensor, squeeze_mask: _Flags) -> Tensor:
    return x.squeeze(tuple(axis for axis, one in enumerate(squeeze_mask or ()) if one)) if squeeze_mask else x


@kernel("slice_by_index", told="begin_mask end_mask squeeze_mask", exact=True)
def slice_by_index(
    x: Tensor, begin: Sequence[int], end: Sequence[int], stride: Sequence[int] | None = None, **masks: _Flags
) -> Tensor:
    """Return a slice: begin, end and stride of each axis, and masks of which of them to ignore."""
    places = _ranges(x.shape, begin, end, stride=stride, **masks)
    return _squeezed(_taken(x, places), masks.get("squeeze_mask"))


@kernel("slice_by_size", exact=True)
def slice_by_size(x: Tensor, begin: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return a slice of a size; -1 for all the rest of an axis."""
    for axis, (start, count) in enumerate(zip(begin, size, strict=True)):
        first = start % x.shape[axis] if start < 0 else start
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


@kernel("slice_update", "x update", told="begin_mask end_mask squeeze_mask", exact=True)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    **masks: _Flags,
) -> Tensor:
    """Return x with a slice of it replaced."""
    places = _ranges(x.shape, begin, end, stride=stride, **masks)
    found = x.clone()
    where = torch.meshgrid(*(torch.tensor(list(item), dtype=torch.int64) for item in places), indexing="ij")
    found[where] = update.reshape([len(item) for item in places])
    return found


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Return indices counted from the front, as 64-bit integers."""
    wide = indices.long()
    return torch.where(wide < 0, wide + size, wide)


@kernel("gather", "x indices", exact=True)
def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """Return slices of x along an axis, in the order of the indices; the first `batch_dims` axes go together."""
    place = axis % x.ndim
    where = _wrapped(indices, x.shape[place])
    if batch_dims == 0:
        shape = (*x.shape[:place], *where.shape, *x.shape[place + 1 :])
        return x.index_select(place, where.reshape(-1)).reshape(shape)
    together = x.shape[:batch_dims]
    rows = x.flatten(0, batch_dims - 1).unbind(0)
    each = where.flatten(0, batch_dims - 1).unbind(0)
    found = [gather(row, own, place - batch_dims) for row, own in zip(rows, each, strict=True)]
    stacked = torch.stack(found)
    return stacked.reshape(*together, *stacked.shape[1:])


@kernel("gather_nd", "x indices", exact=True)
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """Return elements or slices of x at places: the last axis of the indices holds one place."""
    if batch_dims:
        together = x.shape[:batch_dims]
        rows = x.flatten(0, batch_dims - 1).unbind(0)
        each = indices.flatten(0, batch_dims - 1).unbind(0)
        stacked = torch.stack([gather_nd(row, own) for row, own in zip(rows, each, strict=True)])
        return stacked.reshape(*together, *stacked.shape[1:])
    return x[tuple(_wrapped(one, x.shape[axis]) for axis, one in enumerate(indices.unbind(-1)))]


@kernel("gather_along_axis", "x indices", exact=True)
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    """Return the elements at indices along an axis; all other places are the same in both."""
    place = axis % x.ndim
    return torch.gather(x, place, _wrapped(indices, x.shape[place]))


def _merged(data: Tensor, updates: Tensor, mode: str, assign: Callable[[Tensor, Tensor, str | None], Tensor]) -> Tensor:
    """Return data with updates put in: in place of what was there, or together with it.

    Args:
        data: is not changed.
        updates: of its type.
        mode: how elements meet.
        assign: puts updates into a tensor: (tensor, updates, torch's name of the reduction or None).
    """
    if mode == "update":
        return assign(data.clone(), updates, None)
    own = {"sub": torch.neg, "div": torch.reciprocal}.get(mode, torch.positive)(updates)
    return assign(data.clone(), own, _REDUCE[mode])


@kernel("scatter_along_axis", "data indices updates")
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Return data with elements put in at indices along an axis."""
    place = axis % data.ndim
    where = _wrapped(indices, data.shape[place])

    def assign(target: Tensor, values: Tensor, reduction: str | None) -> Tensor:
        if reduction is None:
            return target.scatter(place, where, values)
        return target.scatter_reduce(place, where, values, reduction)

    return _merged(data, updates, mode, assign)


@kernel("scatter", "data indices updates")
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Return data with slices along an axis put in at indices (count,)."""
    place = axis % data.ndim
    shape = [1] * data.ndim
    shape[place] = -1
    wide = indices.reshape(shape).expand(updates.shape)
    return scatter_along_axis(data, wide, updates, axis=place, mode=mode)


@kernel("scatter_nd", "data indices updates")
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """Return data with elements or slices put in at places: the last axis of the indices holds one place."""
    depth = indices.shape[-1]
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for axis in range(depth):
        flat = flat * data.shape[axis] + _wrapped(indices[..., axis], data.shape[axis])
    slices = data.reshape(-1, *data.shape[depth:])
    found = scatter(slices, flat.reshape(-1), updates.reshape(-1, *data.shape[depth:]), axis=0, mode=mode)
    return found.reshape(data.shape)

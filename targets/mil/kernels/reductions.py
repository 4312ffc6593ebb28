"""Reductions, sums along an axis and what sorts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from targets.mil.kernels.registry import axes_of, kernel

_Axes = Sequence[int] | int | None
_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "reduce_log_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "reduce_log_sum_exp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
    "reduce_max": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "reduce_mean": lambda x, axes, keep: (x if x.is_floating_point() else x.double()).mean(axes, keepdim=keep),
    "reduce_min": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
}


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, axes: _Axes = None, keep_dims: bool = False) -> Tensor:
        return function(x, axes_of(axes, x.ndim), keep_dims)

    return run


for _name, _function in _REDUCTIONS.items():
    kernel(_name)(_reduction(_function))


@kernel("reduce_prod")
def reduce_prod(x: Tensor, axes: _Axes = None, keep_dims: bool = False) -> Tensor:
    """Return products along axes."""
    for axis in sorted(axes_of(axes, x.ndim), reverse=True):
        x = x.prod(axis, keepdim=keep_dims)
    return x


@kernel("reduce_argmax", exact=True)
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Return the place of the first largest element along an axis."""
    return x.argmax(axis, keepdim=keep_dims)


@kernel("reduce_argmin", exact=True)
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Return the place of the first smallest element along an axis."""
    return x.argmin(axis, keepdim=keep_dims)


@kernel("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Return running sums along an axis, without the element itself where exclusive, from the end where reverse."""
    turned = x.flip(axis) if reverse else x
    found = turned.cumsum(axis)
    if exclusive:
        found = found - turned
    return found.flip(axis) if reverse else found


@kernel("argsort", exact=True)
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    """Return the order of elements along an axis; equal ones keep theirs."""
    return x.argsort(dim=axis, descending=not ascending, stable=True)


@kernel("topk", told="sort return_indices output_indices_dtype", exact=True)
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    **told: bool | str,
) -> tuple[Tensor, ...]:
    """Return the k largest elements along an axis (smallest where ascending), sorted, and their places.

    Args:
        x: any shape.
        k: how many; -1 for all.
        axis: along which.
        ascending: the smallest ones.
        **told: `return_indices` leaves the places out where false; `sort` and `output_indices_dtype` change nothing:
            an order is allowed where none is asked for, and the type is declared.
    """
    count = x.shape[axis] if k == -1 else k
    values, places = x.sort(dim=axis, descending=not ascending, stable=True)
    values, places = values.narrow(axis, 0, count), places.narrow(axis, 0, count)
    return (values, places) if told.get("return_indices", True) else (values,)


@kernel("non_zero", exact=True)
def non_zero(x: Tensor) -> Tensor:
    """Return (count, rank) places of elements that are not zero."""
    return torch.nonzero(x)

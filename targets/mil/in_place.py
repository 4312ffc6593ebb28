"""Tables of attention scores, turned into their softmax where they lie: they are the largest tensors of a network."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from targets.mil.plan import TORCH_TYPES, Step

_LARGE = 1 << 22
"""Elements from which a second table is worth avoiding."""


def softmax_in_place(
    step: Step, values: Mapping[str, Tensor], spent: Collection[str], wide: torch.dtype
) -> Tensor | None:
    """Return the softmax of a large table that nothing takes afterwards, written over it.

    Its rows know nothing of each other, so that the values are those of the kernel, bit by bit; the kernel's way has
    the table, the table in `wide`, its softmax, and that rounded beside each other.

    Args:
        step: about to be run.
        values: name -> what was computed so far.
        spent: names that nothing takes after this step.
        wide: the floats that it computes in.

    Returns:
        None where it is no such step, or where the table is small, of another type than its softmax, or no memory of
        its own.
    """
    if step.operation.type != "softmax" or step.computed:
        return None
    source = step.tensors["x"][0]
    if not isinstance(source, str) or source not in spent:
        return None
    table, spec = values[source], step.operation.outputs[0]
    axis = int(step.fixed.get("axis", -1))
    fits = tuple(table.shape) == spec.shape and table.dtype == TORCH_TYPES[spec.dtype]
    if not fits or table.ndim < 2 or axis not in (-1, table.ndim - 1) or table.numel() < _LARGE:
        return None
    if not table.is_contiguous() or _shares(table, source, values):
        return None
    for rows in table.view(-1, *table.shape[-2:]):
        rows.copy_(torch.softmax(rows.to(wide), -1))
    return table


def _shares(table: Tensor, name: str, values: Mapping[str, Tensor]) -> bool:
    """Tell whether another value lies in the same memory, as after a reshape."""
    place = table.untyped_storage().data_ptr()
    return any(other.untyped_storage().data_ptr() == place for key, other in values.items() if key != name)

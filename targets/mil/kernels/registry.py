"""What computes an operation, and how each gets its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

from torch import Tensor

Run = TypeVar("Run", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kernel:
    """Computes one type of operation.

    Attributes:
        run: takes the operation's parameters by name; returns a tensor, or a tuple of them.
        tensors: parameters that come as tensors. All others come as Python's numbers, strings, truth values and lists
            of these.
        lists: those of `tensors` that come as lists of tensors.
        parameters: all that it takes.
        exact: it copies or compares elements and rounds nothing, so it takes 16-bit floats as they are; others get
            them widened to 32 bits.
    """

    run: Callable[..., Any]
    tensors: frozenset[str]
    lists: frozenset[str]
    parameters: frozenset[str]
    exact: bool


KERNELS: dict[str, Kernel] = {}
"""Type of operation -> what computes it."""


def kernel(name: str, tensors: str = "x", *, told: str = "", exact: bool = False) -> Callable[[Run], Run]:
    """Register a function as the kernel of an operation.

    Args:
        name: the operation's type.
        tensors: parameters that come as tensors, separated by spaces; a star behind one that comes as a list of them.
        told: parameters that the function takes without naming them.
        exact: see `Kernel`.
    """

    def register(run: Run) -> Run:
        listed = tensors.split()
        named = [item.name for item in signature(run).parameters.values() if item.kind is not item.VAR_KEYWORD]
        KERNELS[name] = Kernel(
            run=run,
            tensors=frozenset(item.rstrip("*") for item in listed),
            lists=frozenset(item[:-1] for item in listed if item.endswith("*")),
            parameters=frozenset((*named, *told.split())),
            exact=exact,
        )
        return run

    return register


def axes_of(axes: Sequence[int] | int | None, rank: int) -> tuple[int, ...]:
    """Return axes counted from the front; all of them for None."""
    if axes is None:
        return tuple(range(rank))
    listed = [axes] if isinstance(axes, int) else axes
    return tuple(axis % rank for axis in listed)


def along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """Return (n,) as a tensor of a rank whose axis of n is `axis` and whose others are 1; a scalar as it is."""
    if vector.ndim == 0:
        return vector
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)

"""What computes an operation, and how each gets its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Run = TypeVar("Run", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kernel:
    """Computes one type of operation.

    Attributes:
        run: takes the operation's parameters by name; returns a tensor, or a tuple of them.
        tensors: parameters that come as tensors, or as lists of them where a program gives several. All others come as
            Python's numbers, strings, truth values and lists of these.
        exact: it copies or compares elements and rounds nothing, so it takes 16-bit floats as they are; others get
            them widened to 32 bits.
    """

    run: Callable[..., Any]
    tensors: frozenset[str]
    exact: bool = False


KERNELS: dict[str, Kernel] = {}
"""Type of operation -> what computes it."""


def kernel(name: str, tensors: str = "x", *, exact: bool = False) -> Callable[[Run], Run]:
    """Register a function as the kernel of an operation.

    Args:
        name: the operation's type.
        tensors: parameters that come as tensors, separated by spaces.
        exact: see `Kernel`.
    """

    def register(run: Run) -> Run:
        KERNELS[name] = Kernel(run, frozenset(tensors.split()), exact)
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

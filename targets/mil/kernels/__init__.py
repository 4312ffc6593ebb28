"""What computes each type of operation, with torch."""

from targets.mil.kernels import compressed, dense, elementwise, indexing, movement, reductions, resizing
from targets.mil.kernels.registry import KERNELS, Kernel

__all__ = ["KERNELS", "Kernel", "compressed", "dense", "elementwise", "indexing", "movement", "reductions", "resizing"]

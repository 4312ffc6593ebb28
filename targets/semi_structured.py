"""PyTorch's semi-structured tensors: which weights have the pattern, which of them torch stores so, and storing them.

The pattern is at most two numbers that are not zero in every four along the inputs. Compressing a weight that does not
have it drops numbers without a word, so it is counted before.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLE = 16
"""Both sides of a 16-bit weight have to be multiples of this for cuSPARSELt (torch.sparse.semi_structured)."""
_KEPT, _GROUP = 2, 4
_DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}


def has_pattern(weight: Tensor) -> bool:
    """Return whether a weight (outputs, inputs, ...) has two zeros in every four inputs."""
    if weight.ndim < 2 or weight.shape[1] % _GROUP:
        return False
    rows = weight.movedim(1, -1)
    return bool(((rows.reshape(*rows.shape[:-1], -1, _GROUP) != 0).sum(-1) <= _KEPT).all())


def refusal(operator: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    """Return why torch cannot store a weight that has the pattern semi-structured; empty where it can.

    Args:
        operator: ``Conv``, ``Gemm`` or ``MatMul``, which reads it.
        shape: outputs, inputs and a kernel's sides.
        dtype: that its product is computed in.
    """
    if operator == "Conv":
        return f"a convolution of {shape[2]} x {shape[3]}: torch has semi-structured products only"
    if dtype not in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"{name}: torch has semi-structured products of {' and '.join(_DTYPES.values())}"
    if any(side % MULTIPLE for side in shape):
        return f"{shape[0]} outputs and {shape[1]} inputs are not multiples of {MULTIPLE}"
    return ""


def semi_structured(weight: Tensor) -> Tensor:
    """Return a weight (outputs, inputs) on a GPU in torch's semi-structured form.

    Raises:
        ValueError: it has no such pattern.
    """
    if not has_pattern(weight):
        raise ValueError("more than two numbers in four are not zero")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")  # is a prototype
        stored: Tensor = torch.sparse.to_sparse_semi_structured(weight)
    return stored


def backend_of(weight: Tensor) -> str:
    """Return the library that multiplies with a semi-structured weight, such as ``cusparselt``; empty for others."""
    return weight.BACKEND if isinstance(weight, torch.sparse.SparseSemiStructuredTensor) else ""

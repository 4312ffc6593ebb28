"""Operations of torch that coremltools' converter does not know or gets wrong, written with those that it gets right.

New ones are told to it by its own registration, in the process that converts, and only where it has none itself. What
it gets wrong is kept out of what it is given.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DTYPES = {0: "uint8", 1: "int8", 2: "int32", 3: "int32", 4: "int32", 5: "fp16", 6: "fp32", 7: "fp32", 11: "bool"}
"""Torch's numbers of types, as a trace has them, to the nearest that ML Programs compute with."""


@cache
def register_operators() -> None:
    """Make the operations known to the converter, once in a process; its own, where it has one, stays."""
    from coremltools.converters.mil import register_torch_op

    for operation in (new_ones,):
        try:
            register_torch_op(operation)
        except ValueError:  # a later version has its own
            continue


def new_ones(context: Any, node: Any) -> None:
    """Convert ``tensor.new_ones(size, dtype)``: T5 makes its mask of tokens so."""
    from coremltools.converters.mil import Builder

    given: list[Any] = [context[name] if name is not None else None for name in node.inputs[:3]]
    like, size, dtype = given
    if isinstance(size, list):  # of numbers that are computed one by one
        size = Builder.concat(values=size, axis=0)
    is_scalar = size.val is not None and size.val.size == 0  # which `fill` makes none of
    ones = Builder.const(val=1.0) if is_scalar else Builder.fill(shape=size, value=1.0)
    wanted = _word(like) if dtype is None else _DTYPES[int(dtype.val)]
    context.add(Builder.cast(x=ones, dtype=wanted, name=node.name))


def _word(value: Any) -> str:
    from coremltools.converters.mil.mil import types

    return str(types.builtin_to_string(value.dtype))


class TrueQuotients(TorchFunctionMode):
    """Within it, reciprocals are traced as quotients.

    The converter writes ``1 / x`` as ``inverse``, whose default epsilon makes it 1 / (x + 0.0001): a frequency of
    0.9999 instead of 1, and with it places in a latent that are wrong by one part in ten thousand.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or divide."""
        if func in (torch.reciprocal, Tensor.reciprocal):
            return _quotient(1.0, args[0])
        if func is Tensor.__rdiv__ or func is Tensor.__rtruediv__:
            return _quotient(args[1], args[0])
        return func(*args, **(kwargs or {}))


def _quotient(above: Any, below: Tensor) -> Tensor:
    dtype = below.dtype if below.is_floating_point() else torch.get_default_dtype()
    return torch.as_tensor(above, dtype=dtype, device=below.device) / below

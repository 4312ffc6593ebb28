"""Operations of torch that coremltools' converter does not know, written with those that it does.

They are told to it by its own registration, in the process that converts, and only where it has none itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

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

    like, size, dtype = (context[name] if name is not None else None for name in node.inputs[:3])
    if isinstance(size, list):  # of numbers that are computed one by one
        size = Builder.concat(values=size, axis=0)
    is_scalar = size.val is not None and size.val.size == 0  # which `fill` makes none of
    ones = Builder.const(val=1.0) if is_scalar else Builder.fill(shape=size, value=1.0)
    wanted = _word(like) if dtype is None else _DTYPES[int(dtype.val)]
    context.add(Builder.cast(x=ones, dtype=wanted, name=node.name))


def _word(value: Any) -> str:
    from coremltools.converters.mil.mil import types

    return str(types.builtin_to_string(value.dtype))

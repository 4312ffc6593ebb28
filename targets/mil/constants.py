"""Constants of an ML Program: those that stand in the program itself, and where those in a file of weights lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from targets.base import Array, TargetError

NUMPY_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "bool": "bool",
        "float16": "float16",
        "float32": "float32",
        "float64": "float64",
        "int8": "int8",
        "int16": "int16",
        "int32": "int32",
        "int64": "int64",
        "uint8": "uint8",
        "uint16": "uint16",
        "uint32": "uint32",
        "uint64": "uint64",
    }
)
"""Types of whole bytes -> numpy's names of them."""
PACKED_BITS: Mapping[str, int] = MappingProxyType(
    {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
)
"""Types below a byte -> their bits; elements follow each other from the lowest bit on, across borders of bytes."""


@dataclass(frozen=True, eq=False)
class Constant:
    """A value that the program states.

    Attributes:
        name: in the program; made up where the value stands in an argument.
        dtype: element type, such as ``float16``, ``uint4``, ``bool`` or ``string``.
        shape: of the value; () for a scalar.
        value: where the program holds it: an array of the shape, types below a byte widened to 8 bits, or a string.
            None where it lies in a file.
        file: of weights, as the program names it; empty where there is none.
        offset: of the weights' entry in the file, in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    value: Array | str | None = None
    file: str = ""
    offset: int = 0

    def plain(self) -> Any:
        """Return what the program holds as Python's own numbers, strings and lists; None where it lies in a file."""
        return self.value.tolist() if isinstance(self.value, np.ndarray) else self.value


def unpack(packed: Array, bits: int, count: int, *, signed: bool = False) -> Array:
    """Return elements of a few bits each, one byte for each.

    Args:
        packed: (bytes,) uint8; the first element is in the lowest bits of the first byte, and one may lie across two.
        bits: of an element, at most 8.
        count: of elements.
        signed: the highest bit is a sign.

    Returns:
        (count,) uint8, or int8 where signed.
    """
    if bits == 8:
        found = packed[:count]
    elif 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        found = ((packed[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)[:count]
    else:
        flat = np.unpackbits(packed, bitorder="little", count=bits * count).reshape(count, bits)
        found = np.packbits(flat, axis=1, bitorder="little").reshape(-1)
    if not signed:
        return found
    spare = np.uint8(8 - bits)
    return (found << spare).view(np.int8) >> np.int8(spare)


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return how many bytes a value takes in a file."""
    count = int(np.prod(shape, dtype=np.int64))
    if dtype in PACKED_BITS:
        return (count * PACKED_BITS[dtype] + 7) // 8
    return count * np.dtype(NUMPY_TYPES[dtype]).itemsize


def from_bytes(data: Any, dtype: str, shape: tuple[int, ...]) -> Array:
    """Return an array over bytes; it shares their memory unless the type is below a byte.

    Args:
        data: a buffer of `stored_bytes` bytes.
        dtype: of an element.
        shape: of the array.
    """
    if dtype not in PACKED_BITS:
        return np.frombuffer(data, NUMPY_TYPES[dtype]).reshape(shape)
    count = int(np.prod(shape, dtype=np.int64))
    packed = np.frombuffer(data, np.uint8)
    return unpack(packed, PACKED_BITS[dtype], count, signed=not dtype.startswith("u")).reshape(shape)


def immediate(tensor: Any, dtype: str, shape: tuple[int, ...], place: str) -> Array | str:
    """Return what the program itself holds.

    Args:
        tensor: the message of the value.
        dtype: its type.
        shape: its shape.
        place: how errors begin.

    Raises:
        TargetError: fewer or more elements than the shape, or a type that cannot be.
    """
    kind = tensor.WhichOneof("value")
    held: Any = getattr(tensor, kind).values if kind else ()
    if dtype == "string":
        if shape or len(held) != 1:
            raise TargetError(f"{place}: strings; got {len(held)} of shape {shape}, expected one. Convert it again.")
        return str(held[0])
    if dtype not in NUMPY_TYPES and dtype not in PACKED_BITS:
        expected = ", ".join((*NUMPY_TYPES, *PACKED_BITS))
        raise TargetError(f"{place}: type of a constant; got {dtype}, expected one of {expected}. Convert it anew.")
    count = int(np.prod(shape, dtype=np.int64))
    if isinstance(held, bytes):
        if len(held) != stored_bytes(dtype, shape):
            msg = f"{place}: a damaged constant; got {len(held)} bytes, expected {stored_bytes(dtype, shape)} for "
            raise TargetError(f"{msg}{dtype} of shape {shape}. Convert the model again.")
        return from_bytes(held, dtype, shape)
    wide = NUMPY_TYPES.get(dtype, "int8" if dtype == "int4" else "uint8")
    found = np.array(held, dtype=wide)
    if found.size == 1 and count != 1 and count:
        found = np.broadcast_to(found, (count,)).copy()
    if found.size != count:
        msg = f"{place}: a damaged constant; got {found.size} elements, expected {count} for shape {shape}."
        raise TargetError(f"{msg} Convert the model again.")
    return found.reshape(shape)

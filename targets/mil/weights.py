"""Weights of a saved ML Program: a file with an entry for each, mapped into memory, never copied as a whole."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from pathlib import Path

from targets.base import Array, TargetError
from targets.mil.constants import NUMPY_TYPES, PACKED_BITS, Constant, from_bytes, stored_bytes

_MODEL_PATH = "@model_path/"
_HEADER, _ENTRY = struct.Struct("<II56x"), struct.Struct("<IIQQQ32x")
_VERSION, _SENTINEL = 2, 0xDEADBEEF
_TYPES = {
    1: "float16",
    2: "float32",
    3: "uint8",
    4: "int8",
    5: "bfloat16",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}
_SAME_BITS = {"bool": "uint8"}
_AGAIN = "Save or copy the package again."


class Weights:
    """Files of weights beside a program.

    A file begins with 64 bytes: the number of entries and the format's version. An entry is 64 bytes where a constant
    points to (a sentinel, the type, the size and the place of the data), and the data elsewhere. All little-endian.
    """

    def __init__(self, folder: Path, package: Path) -> None:
        """Look at nothing yet.

        Args:
            folder: of the program, which the names of files are relative to.
            package: which no file may lie outside of.
        """
        self._folder, self._package = folder, package
        self._maps: dict[str, mmap.mmap] = {}

    def check(self, constants: Iterable[Constant]) -> None:
        """Raise TargetError unless every constant's entry is whole and of its type and size; reads entries only."""
        for constant in constants:
            if constant.file:
                self._extent(constant)

    def read(self, constant: Constant) -> Array:
        """Return a constant's data, mapped; types below a byte are unpacked to one byte each.

        Raises:
            TargetError: the file is missing, damaged or not what the constant says.
        """
        start, size = self._extent(constant)
        return from_bytes(memoryview(self._map(constant))[start : start + size], constant.dtype, constant.shape)

    def file_of(self, constant: Constant) -> Path:
        """Return the file that holds a constant.

        Raises:
            TargetError: it is missing or outside of the package.
        """
        name = constant.file.removeprefix(_MODEL_PATH)
        path = self._folder / name
        place = f"{self._package}: weights of '{constant.name}'"
        if not path.resolve().is_relative_to(self._package.resolve()):
            raise TargetError(f"{place}: outside of the package; got {constant.file}, expected a file in it. {_AGAIN}")
        if not path.is_file():
            raise TargetError(f"{place}: a missing file; got nothing at {path}, expected the weights. {_AGAIN}")
        return path

    def _map(self, constant: Constant) -> mmap.mmap:
        if constant.file not in self._maps:
            path = self.file_of(constant)
            if path.stat().st_size < _HEADER.size:
                msg = f"{path}: truncated; got {path.stat().st_size} bytes, expected a header of {_HEADER.size}."
                raise TargetError(f"{msg} {_AGAIN}")
            with path.open("rb") as file:
                # A private map is writable, which torch wants, and no write could reach the file.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            version = _HEADER.unpack_from(mapped)[1]
            if version != _VERSION:
                mapped.close()
                msg = f"{path}: not a file of weights; got version {version}, expected {_VERSION}."
                raise TargetError(f"{msg} {_AGAIN}")
            self._maps[constant.file] = mapped
        return self._maps[constant.file]

    def _extent(self, constant: Constant) -> tuple[int, int]:
        """Return where the data begins and its size in bytes, both checked."""
        mapped = self._map(constant)
        place = f"{self._package}: {constant.file}: weights of '{constant.name}'"
        if constant.dtype not in NUMPY_TYPES and constant.dtype not in PACKED_BITS:
            expected = ", ".join((*NUMPY_TYPES, *PACKED_BITS))
            raise TargetError(f"{place}: type; got {constant.dtype}, expected one of {expected}. Convert it anew.")
        if constant.offset + _ENTRY.size > len(mapped):
            msg = f"{place}: truncated; got {len(mapped)} bytes, expected an entry at {constant.offset}."
            raise TargetError(f"{msg} {_AGAIN}")
        sentinel, code, size, start, _ = _ENTRY.unpack_from(mapped, constant.offset)
        if sentinel != _SENTINEL:
            msg = f"{place}: no entry at {constant.offset}; got {sentinel:#x}, expected {_SENTINEL:#x}."
            raise TargetError(f"{msg} {_AGAIN}")
        stored = _TYPES.get(code, f"type {code}")
        if stored != _SAME_BITS.get(constant.dtype, constant.dtype):
            msg = f"{place}: type; got {stored} in the file, expected {constant.dtype} as the program says."
            raise TargetError(f"{msg} {_AGAIN}")
        wanted = stored_bytes(constant.dtype, constant.shape)
        if size != wanted:
            msg = f"{place}: size; got {size} bytes, expected {wanted} for {constant.dtype} of shape {constant.shape}."
            raise TargetError(f"{msg} {_AGAIN}")
        if start + size > len(mapped):
            msg = f"{place}: truncated; got {len(mapped)} bytes, expected {start + size} at least."
            raise TargetError(f"{msg} {_AGAIN}")
        return start, size

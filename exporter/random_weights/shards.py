"""Safetensors files written number by number, so that a network of any size needs memory for one piece of a tensor.

The format is eight bytes of header length, a JSON header, then the tensors without gaps; the safetensors library itself
wants all tensors of a file in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """One tensor to write.

    Attributes:
        name: in the file.
        shape: of the tensor.
        dtype: a key of `DTYPES`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Its bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def split(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """Return the entries as shards of at most `limit` bytes each; a larger tensor is a shard of its own."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.size
    return shards


def write_shards(
    folder: Path,
    stem: str,
    shards: Sequence[Sequence[Entry]],
    values: Callable[[Entry], Iterable[Tensor]],
) -> None:
    """Write shards, and the index that libraries look for where there are several.

    Args:
        folder: an existing folder.
        stem: name of the file without its ending, as the library names it.
        shards: from `split`.
        values: yields the numbers of an entry, flat and in order.
    """
    count = len(shards)
    names = [f"{stem}-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, values)
    if count > 1:
        total = sum(entry.size for shard in shards for entry in shard)
        places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _write(path: Path, entries: Sequence[Entry], values: Callable[[Entry], Iterable[Tensor]]) -> None:
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # wide numbers first: all of them stay aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        start, end = end, end + entry.size
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            _stream(stream, entry, values(entry))


def _stream(stream: BinaryIO, entry: Entry, pieces: Iterable[Tensor]) -> None:
    written = 0
    for piece in pieces:
        written += stream.write(piece.contiguous().view(torch.uint8).numpy().data)
    assert written == entry.size, f"{entry.name}: {written} bytes for {entry.size}"

"""ONNX files as they lie on a disk: what the graph says, and the numbers of one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from targets.base import Array, TargetError


def graph_of(path: Path, place: str) -> Any:
    """Return what an ONNX file says, the tensors beside it unread.

    Args:
        path: the file.
        place: how messages begin, such as ``target onnxruntime``.

    Raises:
        TargetError: it is no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no stubs

    try:
        return onnx.load(str(path), load_external_data=False).graph
    except (DecodeError, OSError, ValueError) as error:
        raise TargetError(f"{place}: {path}: not an ONNX file; got: {error}. Export it again.") from error


def external_files(source: Path, place: str) -> list[str]:
    """Return the names of the files beside `source` that hold its large tensors.

    Raises:
        TargetError: one is missing, or lies elsewhere.
    """
    graph = graph_of(source, place)
    found = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    for name in sorted(found):
        if Path(name).name != name or name in (".", ".."):
            raise TargetError(
                f"{place}: {source}: external data outside its folder; got {name!r}, expected a plain file name. "
                "Export it again; do not use files from elsewhere unread."
            )
        if not (source.parent / name).is_file():
            raise TargetError(f"{place}: {source}: its external data is missing; expected {name!r} beside it.")
    return sorted(found)


def values_of(tensor: Any) -> Array:
    """Return the numbers of a tensor of `onnx_ir`; types that numpy has not are those of ``ml_dtypes``.

    Those outside of the graph are read here, since onnx refuses files with several links.

    Raises:
        TargetError: its file is missing or too short.
    """
    import onnx_ir as ir

    if not isinstance(tensor, ir.ExternalTensor):
        return np.array(tensor.numpy())
    path = Path(tensor.path)
    try:
        raw = np.fromfile(path, dtype=np.uint8, count=tensor.length or -1, offset=tensor.offset or 0)
    except OSError as error:
        raise TargetError(f"{path}: external data cannot be read: {error.strerror}. Export it again.") from error
    shape, dtype = tensor.shape.numpy(), tensor.dtype
    numbers = int(np.prod(shape, dtype=np.int64))
    if raw.nbytes != -(-numbers * dtype.bitwidth // 8):
        raise TargetError(
            f"{path}: external data of {tensor.name} has another size; got {raw.nbytes} bytes, expected {numbers} "
            f"numbers of {dtype.bitwidth} bits. Export it again."
        )
    if dtype.bitwidth == 4:  # two to a byte, the first in the lower half
        raw = np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1)[:numbers]
        signed = raw.astype(np.int8)
        raw = (signed - 16 * (signed > 7) if dtype == ir.DataType.INT4 else signed).astype(dtype.numpy())
        return raw.reshape(shape)
    return raw.view(dtype.numpy()).reshape(shape)

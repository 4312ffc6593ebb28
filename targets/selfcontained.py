"""An ONNX graph whose weights lie in a foreign file, as a folder of its own: copied, in f32, transposes folded.

Runtimes read a graph that points into a safetensors file. Tools that refuse files with several links (``onnx.load``),
or that look for a weight as the very input of its product (quantizers), get this form. One tensor at a time is in
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from targets.base import Array, TargetError

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
_ALIGNMENT = 64
_FLOAT, _FLOAT16, _BFLOAT16 = 1, 10, 16
"""Element types as ``onnx.TensorProto`` numbers them."""


def write_self_contained(source: Path, out: Path) -> None:
    """Write ``model.onnx`` and ``model.onnx_data`` into `out`.

    What is done to a weight before its first use and would be done at every load (a cast to f32, a transpose) is done
    here; a transposed weight is called ``<name>_transposed``.

    Args:
        source: an ONNX file; its external data, in whatever files, beside it.
        out: an existing folder, not the source's.

    Raises:
        TargetError: a weight's file is missing or too short.
    """
    import onnx

    model = onnx.load(str(source), load_external_data=False)
    graph = model.graph
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    renamed: dict[str, str] = {}
    gone: set[int] = set()
    with (out / DATA_FILE).open("wb") as stream:
        for tensor in graph.initializer:
            if not tensor.external_data:
                continue
            values, first = _read(tensor, source.parent), tensor.name
            last, name = first, first
            for node in _done_at_load(first, readers):
                values, name = _apply(node, values, name)
                gone.add(id(node))
                last = node.output[0]
            if last != first:
                renamed[last] = name
            _store(tensor, name, values, stream)
    kept = [node for node in graph.node if id(node) not in gone]
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    left = [type(node).FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(left)
    known = [info for info in graph.value_info if info.name not in renamed]
    del graph.value_info[:]
    graph.value_info.extend(known)
    (out / MODEL_FILE).write_bytes(model.SerializeToString())


def _done_at_load(name: str, readers: dict[str, list[Any]]) -> Iterator[Any]:
    """Yield the casts to f32 and transposes that stand between a weight and whatever uses it."""
    while len(found := readers.get(name, [])) == 1:
        node = found[0]
        to_f32 = node.op_type == "Cast" and any(item.name == "to" and item.i == _FLOAT for item in node.attribute)
        if not to_f32 and node.op_type != "Transpose":
            return
        yield node
        name = node.output[0]


def _apply(node: Any, values: Array, name: str) -> tuple[Array, str]:
    if node.op_type == "Cast":
        return values.astype(np.float32), name
    axes = next((list(item.ints) for item in node.attribute if item.name == "perm"), None)
    return np.ascontiguousarray(values.transpose(axes)), f"{name}_transposed"


def _read(tensor: Any, folder: Path) -> Array:
    """Return an external tensor's values; bfloat16, which numpy has not, as the f32 of the same value."""
    import onnx

    facts = {entry.key: entry.value for entry in tensor.external_data}
    path, length = folder / facts["location"], int(facts["length"])
    if path.parent != folder:
        raise TargetError(f"{path}: external data outside its folder; expected a plain file name. Export it again.")
    wide = tensor.data_type == _BFLOAT16
    dtype = np.dtype(np.uint16) if wide else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    try:
        values = np.fromfile(path, dtype=dtype, count=length // dtype.itemsize, offset=int(facts.get("offset", 0)))
    except OSError as error:
        raise TargetError(f"{path}: external data cannot be read: {error.strerror}. Export it again.") from error
    if values.nbytes != length:
        raise TargetError(f"{path}: external data too short; got {values.nbytes} bytes, expected {length}.")
    if wide:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(tuple(tensor.dims))


def _store(tensor: Any, name: str, values: Array, stream: BinaryIO) -> None:
    import onnx

    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
    place = {"location": DATA_FILE, "offset": str(stream.tell()), "length": str(values.nbytes)}
    values.tofile(stream)
    tensor.name = name
    # A bfloat16 weight that something other than a cast reads keeps its type in the graph; none of ours does.
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    del tensor.dims[:]
    tensor.dims.extend(values.shape)
    del tensor.external_data[:]
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)

"""A state's own weight files as the external data of its graph: no weights in memory, no second copy on disk.

ONNX external data is a file name, an offset and a length, and a safetensors file is a header and plain bytes, so a
graph can point into it. A weight stored in 16 bits is read through a Cast, which runtimes fold when they load: exact,
and the engine stays as small as the state.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporter.artifact import link_file
from exporter.errors import ComponentFailed
from exporter.networks.storage import Bare
from exporter.networks.weights import read_spans
from targets.selfcontained import write_self_contained

_TYPES: Mapping[str, tuple[ir.DataType, torch.dtype]] = MappingProxyType(
    {
        "BF16": (ir.DataType.BFLOAT16, torch.bfloat16),
        "F16": (ir.DataType.FLOAT16, torch.float16),
        "F32": (ir.DataType.FLOAT, torch.float32),
        "F64": (ir.DataType.DOUBLE, torch.float64),
        "I32": (ir.DataType.INT32, torch.int32),
        "I64": (ir.DataType.INT64, torch.int64),
    }
)
INLINE = 65_536  # bytes; norms and biases, which the export reshapes and folds, are no reason for a file
_SHARE = 0.9


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a state dict lies on disk.

    Attributes:
        file: the safetensors file.
        offset: its first byte in that file.
        length: in bytes.
        dtype: safetensors' name of the element type, such as ``F16``.
        shape: its axes.
    """

    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> NDArray[np.generic]:
        """Return the values: float32 where they are of any floating type. Read, not mapped, so that they can go."""
        raw = torch.from_numpy(np.fromfile(self.file, dtype=np.uint8, count=self.length, offset=self.offset))
        values = raw.view(_TYPES[self.dtype][1]).reshape(self.shape)
        return (values.float() if values.is_floating_point() else values).numpy()


@dataclass(frozen=True)
class StoredWeights:
    """Everything a network without weights lacks.

    Attributes:
        tensors: name in the state dict -> where it is; tied names lead to the same place.
        constants: buffers that the class builds and no file holds.
        digest: sha256 of the component's folder in its state.
    """

    tensors: Mapping[str, StoredTensor]
    constants: Mapping[str, Tensor]
    digest: str


@dataclass(frozen=True)
class Held:
    """Weights that a graph points at instead of holding them.

    Attributes:
        values: initializers that were left empty, so that no pass reads or folds them -> where their values are.
        used_bytes: of the state's files, all that the graph uses.
    """

    values: Mapping[ir.Value, StoredTensor] = field(default_factory=dict)
    used_bytes: int = 0


def stored_weights(bare: Bare, digest: str) -> tuple[nn.Module, StoredWeights]:
    """Return a network wholly on the meta device, in float32 and evaluation mode, and what was left behind.

    Raises:
        ComponentFailed: a weight has an element type that ONNX graphs of ours do not carry.
    """
    spans = {path: read_spans(path) for path in {fact.file for fact in bare.facts.values()}}
    tensors = {}
    for name, fact in bare.facts.items():
        if fact.dtype not in _TYPES:
            raise ComponentFailed(
                f"{fact.file}: {name}: element type; got {fact.dtype}, expected one of {', '.join(_TYPES)}. Save the "
                "weights in one of these."
            )
        tensors[name] = StoredTensor(fact.file, *spans[fact.file][fact.stored], fact.dtype, fact.shape)
    tensors |= {alias: tensors[name] for alias, name in bare.tied.items()}
    constants = {name: buffer for name, buffer in bare.module.named_buffers() if name not in tensors}
    module = nn.Module.to(bare.module, torch.device("meta"), torch.float32)
    return module.eval(), StoredWeights(tensors, constants, digest)


def give_values(
    model: ir.Model, weights: StoredWeights, *, prefix: str, external_bytes: int, inline: int = INLINE
) -> Held:
    """Give the initializers of a graph that was traced without values their values.

    Args:
        model: straight from the exporter.
        weights: of the network.
        prefix: what the wrapper put before every name.
        external_bytes: up to this many bytes in all, every weight is read into the graph.
        inline: beyond that, weights of up to this many bytes.

    Raises:
        ComponentFailed: an initializer that is neither a weight nor a constant.
    """
    found = {name.removeprefix(prefix): value for name, value in model.graph.initializers.items()}
    stored = {name: weights.tensors[name] for name in found if name in weights.tensors}
    whole = sum(_float32_bytes(item) for item in stored.values()) <= external_bytes
    held = {}
    for name, value in found.items():
        if name in stored and not whole and stored[name].length > inline:
            value.const_value = None
            held[value] = stored[name]
        elif name in stored:
            value.const_value = ir.tensor(stored[name].read(), name=value.name)
        elif name in weights.constants:
            value.const_value = ir.tensor(weights.constants[name].numpy(), name=value.name)
        elif getattr(getattr(value.const_value, "raw", None), "is_meta", False):
            raise ComponentFailed(
                f"export: {name}: a constant that the network makes while it runs has no values on the meta device; "
                "expected weights and buffers only. This is a bug: report it."
            )
    return Held(held, sum(item.length for item in set(stored.values())))


def write_pointing(model: ir.Model, path: Path, held: Held, *, whole: bool = False) -> None:
    """Write a graph whose held-back weights stay in the state's files, which are linked beside it.

    Where the graph uses only part of those files, as a decoder does of its VAE, its part is copied into
    ``model.onnx_data`` instead: an engine ships what it uses.

    Args:
        model: tidied.
        path: the ONNX file to write, in an existing folder.
        held: from `give_values`.
        whole: link those files however little of them the graph uses; it may stand beside others that use them.
    """
    used = {value: stored for value, stored in held.values.items() if value.is_initializer() and value.uses()}
    files = sorted({stored.file for stored in used.values()})
    linked = whole or held.used_bytes >= _SHARE * sum(file.stat().st_size for file in files)
    folder = path.parent if linked else path.parent / "pointing"
    folder.mkdir(exist_ok=True)
    for file in files:
        if not (folder / file.name).exists():
            link_file(file, folder / file.name)
    for value, stored in used.items():
        _point(model.graph, value, stored, folder)
    ir.save(model, folder / path.name)
    if not linked:
        write_self_contained(folder / path.name, path.parent)
        shutil.rmtree(folder)


def _float32_bytes(stored: StoredTensor) -> int:
    return 4 * math.prod(stored.shape)


def _point(graph: ir.Graph, value: ir.Value, stored: StoredTensor, folder: Path) -> None:
    kind, name, shape = _TYPES[stored.dtype][0], value.name or "", ir.Shape(stored.shape)
    tensor = ir.ExternalTensor(
        stored.file.name, stored.offset, stored.length, kind, shape=shape, name=name, base_dir=folder
    )
    if value.dtype == kind:
        value.const_value = tensor
        return
    narrow = ir.Value(name=name, shape=shape, type=ir.TensorType(kind), const_value=tensor)
    wide = ir.node("Cast", [narrow], {"to": int(value.dtype or ir.DataType.FLOAT)}, name=f"{_module_of(name)}/Cast")
    wide.outputs[0].name = f"{name}_wide"
    wide.outputs[0].type, wide.outputs[0].shape = value.type, value.shape
    del graph.initializers[name]
    ir.convenience.replace_all_uses_with(value, wide.outputs[0])
    graph.initializers[name] = narrow
    graph.insert_before(graph[0], wide)


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]

"""How an ML Program stores its weights: read from its description, which names every stored tensor and its type."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from targets.base import require

MlModel = Any
"""An ``MLModel`` of coremltools, which has no types."""
INSTALL = "pip install 'diffusion-exporter[coreml]'"

_WEIGHTS = {"conv": "weight", "conv_transpose": "weight", "linear": "weight", "matmul": "y", "gather": "x"}
"""Operation -> which of its inputs is its weight, where that is a constant."""


@dataclass(frozen=True)
class Stored:
    """A weight as a program stores it.

    Attributes:
        op: the operation that reads it; the first of several.
        kind: of that operation, such as ``conv``.
        value: the operation that makes what it reads.
        readers: all operations that read it as their weight.
        others: operations that read it as something else.
        shape: of the weight.
        form: ``float``, ``palette-6``, ``int8``, ``int4``, ``sparse`` or a joint form, such as ``sparse-palette-4``.
        tables: of its palette; 0 where it has none.
        nbytes: of all that it is stored as, without what the file adds to align it.
    """

    op: str
    kind: str
    value: str
    readers: tuple[str, ...]
    others: tuple[str, ...]
    shape: tuple[int, ...]
    form: str
    tables: int
    nbytes: int


def stored_weights(model: MlModel) -> tuple[Stored, ...]:
    """Return the constant weights of convolutions, linear layers and embeddings, in the order of execution."""
    operations = operations_of(model)
    makers = {output.name: operation for operation in operations for output in operation.outputs}
    owners: dict[str, list[Any]] = {}
    reads: dict[str, list[str]] = {}
    for operation in operations:
        value = _weight_of(operation)
        if value in makers and _constant(makers[value]):
            owners.setdefault(value, []).append(operation)
        for name in _read(operation):
            reads.setdefault(name, []).append(name_of(operation))
    found = []
    for value, own in owners.items():
        kind = next(output.type for output in makers[value].outputs if output.name == value)
        if kind.tensorType.rank > 1 and _type_name(kind).startswith("FLOAT"):
            names = tuple(name_of(operation) for operation in own)
            others = tuple(name for name in reads[value] if name not in names)
            size = sum(_nbytes(leaf) for leaf in _leaves(value, makers))
            at = (names[0], own[0].type, name_of(makers[value]), names, others, _dimensions(kind))
            found.append(Stored(*at, *_form(value, makers), size))
    return tuple(found)


def operations_of(model: MlModel) -> list[Any]:
    """Return the operations of a program, as its description has them, in the order of execution."""
    program = model.get_spec().mlProgram
    function = next(iter(program.functions.values()))
    return list(function.block_specializations[function.opset].operations)


def name_of(operation: Any) -> str:
    """Return the name of an operation, or of what it makes where it has none of its own."""
    if "name" in operation.attributes:
        return str(operation.attributes["name"].immediateValue.tensor.strings.values[0])
    return str(operation.outputs[0].name)


def _weight_of(operation: Any) -> str:
    """Return the name of what an operation reads as its weight; empty where it has none."""
    key = _WEIGHTS.get(operation.type, "")
    arguments = operation.inputs[key].arguments if key in operation.inputs else ()
    return str(arguments[0].name) if arguments else ""


def _constant(operation: Any) -> bool:
    return str(operation.type).startswith("const")


def _read(operation: Any) -> Iterator[str]:
    for given in operation.inputs.values():
        for argument in given.arguments:
            if argument.name:
                yield argument.name


def _chain(value: str, makers: Mapping[str, Any]) -> Iterator[Any]:
    """Return the operations that a weight is unpacked by, the last one first, each once."""
    seen, left = set(), [value]
    while left:
        maker = makers[left.pop(0)]
        if maker.outputs[0].name not in seen:
            seen.add(maker.outputs[0].name)
            yield maker
            left.extend(_read(maker))


def _leaves(value: str, makers: Mapping[str, Any]) -> Iterator[Any]:
    """Return the types of the tensors that a weight is stored as."""
    for maker in _chain(value, makers):
        for name, held in maker.attributes.items():
            if name != "name":
                yield held.type
        for given in maker.inputs.values():
            yield from (argument.value.type for argument in given.arguments if not argument.name)


def _form(value: str, makers: Mapping[str, Any]) -> tuple[str, int]:
    """Return what a weight is stored as, and how many tables it has."""
    words, tables = [], 0
    for maker in _chain(value, makers):
        if maker.type == "constexpr_sparse_to_dense":
            words.append("sparse")
        elif maker.type in ("constexpr_lut_to_dense", "constexpr_lut_to_sparse"):
            sizes = _dimensions(_type_of(maker, "lut", makers))
            entries = sizes[-2] if len(sizes) > 1 else sizes[0]
            tables = math.prod(sizes) // entries
            words.append(f"palette-{entries.bit_length() - 1}")
        elif maker.type == "constexpr_affine_dequantize":
            words.append("int8")
        elif maker.type in ("constexpr_blockwise_shift_scale", "constexpr_sparse_blockwise_shift_scale"):
            data = "data" if maker.type == "constexpr_blockwise_shift_scale" else "nonzero_data"
            words.append(f"int{_bits(_type_of(maker, data, makers))}")
    return "-".join(words) or "float", tables


def _type_of(operation: Any, key: str, makers: Mapping[str, Any]) -> Any:
    """Return the type of what an operation is given by this name, as an attribute, a value or another's output."""
    if key in operation.attributes:
        return operation.attributes[key].type
    argument = operation.inputs[key].arguments[0]
    if not argument.name:
        return argument.value.type
    return next(output.type for output in makers[argument.name].outputs if output.name == argument.name)


def _dimensions(kind: Any) -> tuple[int, ...]:
    return tuple(int(axis.constant.size) for axis in kind.tensorType.dimensions)


def _type_name(kind: Any) -> str:
    library: Any = require("coremltools.proto.MIL_pb2", "target coreml", INSTALL)
    return str(library.DataType.Name(kind.tensorType.dataType))


def _bits(kind: Any) -> int:
    digits = re.search(r"\d+$", _type_name(kind))
    return int(digits[0]) if digits else 8  # a truth value takes a byte


def _nbytes(kind: Any) -> int:
    return math.ceil(math.prod(_dimensions(kind)) * _bits(kind) / 8)

"""What TensorRT tells of an engine: lines of its log, and descriptions of layers in the log and in the inspector.

Nothing here needs the library. Three forms of layers are read: the inspector's JSON (TensorRT 10 and 11), and the lines
that a builder with detailed verbosity logs under ``Layers:``, which need no GPU. What a form does not say is
``unknown`` or None, never 0: a missing line about sparsity is no line, and kernels that a compiler hides behind a
placeholder are not dense ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from targets.base import Layer, Sparse

_TYPES = {
    "float": "f32",
    "fp32": "f32",
    "half": "f16",
    "fp16": "f16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "int8": "i8",
    "fp8": "f8e4m3",
    "int4": "i4",
    "fp4": "f4e2m1",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "bool": "bool",
}
_HEAVY = ("gemm", "correlation", "conv", "matrixmultiply", "fullyconnected", "fmha", "mha", "attention")
"""Words in the type of a layer whose operands decide what it computes in."""
_SPARSE_TACTIC = re.compile(r"sparse|spmma|sp_?gemm", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\A(__myelin_CASK_STUB|)\Z")
_COUNTS = {
    "eligible": re.compile(r"\(Sparsity\) Found (\d+) layer\(s\) eligible to use sparse tactics"),
    "chosen": re.compile(r"\(Sparsity\) Chose (\d+) layer\(s\) using sparse tactics"),
}
_NAMED = {
    "eligible": re.compile(r"\(Sparsity\) Layers eligible for sparse math:(.*)"),
    "chosen": re.compile(r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(.*)"),
}
"""TensorRT 8 named the layers and did not count them."""
_SKIPPED = re.compile(r"skipping tactic|tactic .* (?:requested|device has)|insufficient memory", re.IGNORECASE)
_FIELD = re.compile(r"(?:\A|, )([A-Z][A-Za-z]*): ")
_OF_ONNX = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TENSOR_TYPE = re.compile(r"(?:Datatype|DataType): ([A-Za-z0-9]+)")


def sparse_of_log(messages: Iterable[str]) -> Sparse:
    """Return what a build's log says about sparsity; of several selections of tactics the last is the engine's."""
    found: dict[str, int | None] = {"eligible": None, "chosen": None}
    for line in _lines(messages):
        for name, pattern in _COUNTS.items():
            if told := pattern.search(line):
                found[name] = int(told.group(1))
        for name, pattern in _NAMED.items():
            if told := pattern.search(line):
                found[name] = len([word for word in told.group(1).split(",") if word.strip()])
    return Sparse(found["eligible"], found["chosen"])


def skipped_for_memory(messages: Iterable[str]) -> list[str]:
    """Return the lines that tell of kernels that were not tried because memory was short."""
    return [line.strip() for line in _lines(messages) if _SKIPPED.search(line) and "memor" in line.lower()]


def layers_of_log(messages: Iterable[str], device: str) -> tuple[Layer, ...]:
    """Return the layers that a build's log lists under ``Layers:``, the last list it has; empty where it has none."""
    lists = [text for text in messages if text.lstrip().startswith("Layers:")]
    if not lists:
        return ()
    lines = [line.strip() for line in lists[-1].splitlines()[1:]]
    entries = (_fields(line) for line in lines if line.startswith("Name: "))
    return tuple(_layer(entry, device) for entry in entries if "LayerType" in entry)  # the engine's own inputs follow


def layers_of_inspector(text: str, device: str) -> tuple[Layer, ...]:
    """Return the layers of an engine inspector's JSON.

    Args:
        text: from ``get_engine_information(LayerInformationFormat.JSON)``. An engine that was built without detailed
            verbosity has names instead of layers, which then say nothing else.
        device: for the layers.

    Raises:
        ValueError: it is no such JSON.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or not isinstance(found.get("Layers"), list):
        raise ValueError("no list of layers in what the inspector said")  # noqa: TRY004 - of the text, not of a type
    return tuple(_layer({"Name": entry} if isinstance(entry, str) else entry, device) for entry in found["Layers"])


def runs_sparse(layer: Layer) -> bool | None:
    """Return whether a layer's kernel is a sparse one; None where its name does not say."""
    if _PLACEHOLDER.match(layer.kernel) or layer.kernel.startswith("__myl_"):
        return None
    return bool(_SPARSE_TACTIC.search(layer.kernel))


def sparse_nodes(layers: Iterable[Layer]) -> tuple[str, ...] | None:
    """Return the nodes of the graph that run on sparse kernels; None where a heavy layer does not show its kernel.

    Args:
        layers: of an engine.
    """
    found: list[str] = []
    for layer in (layer for layer in layers if _is_heavy(layer.type)):
        sparse = runs_sparse(layer)
        if sparse is None or (sparse and not layer.origin):
            return None
        found += [name for name in layer.origin.split(",") if sparse]
    return tuple(found)


def _is_heavy(kind: str) -> bool:
    return any(word in kind.lower() for word in _HEAVY)


def _lines(messages: Iterable[str]) -> Iterable[str]:
    for message in messages:
        yield from message.splitlines()


def _fields(line: str) -> dict[str, Any]:
    """Split ``Name: a, LayerType: b, Inputs: [ {...} ], ...`` at the commas outside of brackets."""
    found: dict[str, Any] = {}
    name, start, depth, index = "", 0, 0, 0
    while index < len(line):
        depth += (line[index] in "[{") - (line[index] in "]}")
        told = _FIELD.match(line, index) if depth == 0 and (index == 0 or line[index] == ",") else None
        if told:
            if name:
                found[name] = line[start:index]
            name, start = told.group(1), told.end()
            index = told.end()
            continue
        index += 1
    return {**found, name: line[start:]} if name else found


def _layer(entry: Mapping[str, Any], device: str) -> Layer:
    kind = str(entry.get("LayerType", "unknown"))
    fed, given = _tensor_types(entry.get("Inputs")), _tensor_types(entry.get("Outputs"))
    deciding = fed if _is_heavy(kind) else given or fed
    origins = _OF_ONNX.findall(str(entry.get("Metadata", "")))
    return Layer(
        name=str(entry.get("Name", "")),
        type=kind,
        precision=deciding[0] if deciding else "unknown",
        kernel=str(entry.get("TacticName", "")),
        device=device,
        origin=",".join(origins),
    )


def _tensor_types(told: Any) -> list[str]:
    """Return the types of tensors: from a log's text, or JSON of TensorRT 10 (one string) or 11 (an entry)."""
    if isinstance(told, str):
        words: Sequence[str] = _TENSOR_TYPE.findall(told)
    elif isinstance(told, list):
        words = [_word(tensor) for tensor in told if isinstance(tensor, dict)]
    else:
        words = []
    return [_TYPES.get(word.lower(), "unknown") for word in words]


def _word(tensor: Mapping[str, Any]) -> str:
    """Return the name of a tensor's type; older forms say it behind the layout: ``Row major linear FP16 format``."""
    for key in ("Datatype", "DataType", "Format/Datatype", "Format/DataType", "Format"):
        for word in re.findall(r"[A-Za-z]+[0-9]*", str(tensor.get(key, ""))):
            if word.lower() in _TYPES:
                return str(word)
    return ""

"""What ONNX Runtime executed, read from the profile that it writes: kernels, types and times."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from targets.base import Array, Layer, Timed

OpenSession = Callable[[Any], Any]
"""Loads the engine with some session options."""

_PRECISIONS = {
    "float": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "double": "f64",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
    "bool": "bool",
}
_CONVERTERS = ("QuantizeLinear", "DequantizeLinear", "Cast")
_KERNEL_TIME = "_kernel_time"


def planned(settings: Any, opened: OpenSession, folder: Path) -> Iterator[Layer]:
    """Yield the nodes of the optimised graph, which was not run.

    Args:
        settings: fresh session options.
        opened: loads the engine with them.
        folder: takes the optimised graph.
    """
    opened(_recording(settings, folder))
    for node in _optimised_nodes(folder / "optimised.onnx").values():
        yield Layer(node.name, node.op_type, "unknown", _kernel(node), "CPUExecutionProvider")


def executed(
    settings: Any, opened: OpenSession, feeds: Mapping[str, Array], folder: Path, *, written: bool, calls: int = 1
) -> list[Timed]:
    """Run an engine with the profiler on and return its nodes in the order of their first execution.

    Args:
        settings: fresh session options.
        opened: loads the engine with them.
        feeds: what it is asked.
        folder: takes the optimised graph and the profile.
        written: whether the optimised graph can be written as ONNX and read for its kernels; a graph in the runtime's
            own format is as optimised as it will be.
        calls: how many are timed; where there are several, one more comes first.
    """
    if written:
        _recording(settings, folder)
    settings.enable_profiling = True
    settings.profile_file_prefix = str(folder / "profile")
    session = opened(settings)
    runs = calls + (calls > 1)
    for _ in range(runs):
        session.run(None, dict(feeds))
    profile = Path(session.end_profiling())
    nodes = _optimised_nodes(folder / "optimised.onnx") if written else {}
    layers: dict[str, Layer] = {}
    times: dict[str, list[float]] = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        arguments = event.get("args", {})
        if event.get("cat") != "Node" or "provider" not in arguments:
            continue
        name = event["name"].removesuffix(_KERNEL_TIME)
        kernel = _kernel(nodes[name]) if name in nodes else ""
        layers.setdefault(
            name, Layer(name, arguments["op_name"], _precision(arguments), kernel, arguments["provider"], name)
        )
        times.setdefault(name, []).append(event["dur"] / 1000)
    return [Timed(layer, sum(times[name][runs - calls :]) / calls) for name, layer in layers.items()]


def _recording(settings: Any, folder: Path) -> Any:
    """Have the optimised graph written into `folder`; its weights, which nobody reads, nowhere."""
    if os.name == "posix":
        (folder / "optimised.data").symlink_to(os.devnull)
    settings.optimized_model_filepath = str(folder / "optimised.onnx")
    settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
    return settings


def _optimised_nodes(path: Path) -> dict[str, Any]:
    import onnx

    return {node.name: node for node in onnx.load(str(path), load_external_data=False).graph.node}


def _kernel(node: Any) -> str:
    """Return the operator with its domain: ``com.microsoft`` marks the runtime's own fused kernels."""
    return f"{node.domain or 'ai.onnx'}.{node.op_type}"


def _precision(arguments: Mapping[str, Any]) -> str:
    """Return the type a kernel works in: an integer kernel is one that reads 8-bit values, converters apart."""
    reads = [kind for entry in arguments.get("input_type_shape", []) for kind in entry]
    writes = [kind for entry in arguments.get("output_type_shape", []) for kind in entry]
    narrow = [kind for kind in reads if kind in ("int8", "uint8")]
    if narrow and arguments["op_name"] not in _CONVERTERS:
        return _PRECISIONS[narrow[0]]
    kind = next(iter(writes or reads), "unknown")
    return _PRECISIONS.get(kind, kind)

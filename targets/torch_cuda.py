"""PyTorch on an NVIDIA GPU: the ONNX file as a torch program, its weights semi-structured where they can be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from targets.base import (
    Capabilities,
    Profiled,
    TargetError,
    TargetMissing,
    graph_path,
    installed_version,
    place_file,
    require,
)
from targets.joined import join_files
from targets.nvidia import find_gpu
from targets.onnx_file import external_files

_PLACE = "target torch-cuda"
_INSTALL = "pip install --force-reinstall torch"
_MODES = ("eager", "cuda-graph", "compile")
_SPARSE_CAPABILITY = (8, 0)
_FORMAT = 1


@dataclass(frozen=True)
class TorchCudaOptions:
    """Options of the target ``torch-cuda``. Types are the graph's: quantize with fp16 or bf16 for a fast program.

    Torch has semi-structured products of 16-bit numbers. Export with opset 23 for fused attention.

    Attributes:
        sparse: store weights that have two zeros in every four inputs semi-structured, for cuSPARSELt. A second target
            of the recipe with ``sparse: false`` is the dense twin: the same program, the same zeros, dense products.
        mode: record the call as a CUDA graph and replay it, compile it with torch.compile, or run it step by step.
    """

    sparse: bool = True
    mode: Literal["cuda-graph", "compile", "eager"] = "cuda-graph"


class TorchCuda:
    """Runs ONNX files as torch programs on the NVIDIA device of this machine."""

    type = "torch-cuda"
    options = TorchCudaOptions
    engine_file = "model.onnx"
    needs = ("torch", "onnx", "onnx-ir", "ml-dtypes")
    schemes = ("int8", "int8-weights", "int4-weights", "fp16", "bf16")
    rounds_results = False

    def capabilities(self) -> Capabilities:
        """Say what this machine can do; torch, which takes seconds to load, is loaded only where there is a GPU."""
        version, gpu = installed_version("torch"), find_gpu()
        if version is None:
            return Capabilities(False, False, None, "", (), _INSTALL, "'torch' is not installed.")
        reason = gpu if isinstance(gpu, str) else _refusal()
        if version.endswith("+cpu"):
            reason = f"torch {version} is a build without CUDA" + (f", and {gpu}" if isinstance(gpu, str) else ".")
        if reason or isinstance(gpu, str):
            return Capabilities(False, False, version, "", (), _INSTALL, reason)
        return Capabilities(True, True, version, gpu.name, ("f32", "bf16", "f16"), _INSTALL)

    def check(self, options: TorchCudaOptions) -> None:
        """Raise TargetMissing or TargetError when these options cannot be honoured on this machine."""
        if options.mode not in _MODES:
            raise TargetError(f"{_PLACE}: mode: got {options.mode!r}, expected one of {', '.join(_MODES)}.")
        here = self.capabilities()
        if not here.available:
            raise TargetMissing(
                f"{_PLACE}: {here.reason} It needs an NVIDIA GPU and a build of torch with CUDA, as PyPI has for "
                f"Linux. Run: {_INSTALL}"
            )
        if not options.sparse:
            return
        torch = require("torch", _PLACE, _INSTALL)
        capability = torch.cuda.get_device_capability()
        if capability < _SPARSE_CAPABILITY:
            raise TargetMissing(
                f"{_PLACE}: sparse: {here.device} has compute capability {'.'.join(map(str, capability))}, and sparse "
                "kernels need 8.0. Write sparse: false, or use another device."
            )
        if not torch.backends.cusparselt.is_available():
            raise TargetMissing(
                f"{_PLACE}: sparse: torch {here.version} is a build without cuSPARSELt. Write sparse: false, or run: "
                f"{_INSTALL}"
            )

    def compile(self, source: Path, out: Path, options: TorchCudaOptions) -> None:
        """Put the ONNX file, its external data and what its weights are into `out`, and prove that it loads.

        Raises:
            TargetMissing: torch has no CUDA here, or there is no GPU.
            TargetError: the options are refused, or the file is damaged or has an operator that is not here.
        """
        self.check(options)
        write_program(source, out)
        self.open(out, options).close()

    def join(self, parts: Sequence[Path], out: Path, options: TorchCudaOptions) -> None:
        """Put several compiled graphs into one folder, which read one file of weights."""
        for part in parts:
            facts_path(part / self.engine_file).rename(part / f"{part.name}.json")
        join_files(parts, out, self.engine_file)

    def open(self, engine: Path, options: TorchCudaOptions) -> Profiled:
        """Load an engine folder, or one of the graphs that were joined in it."""
        self.check(options)
        from targets.torch_session import TorchSession

        path, name = graph_path(engine, self.engine_file), self.capabilities().device
        return TorchSession(path, read_facts(path), mode=options.mode, sparse=options.sparse, device=("cuda", name))


def facts_path(graph: Path) -> Path:
    """Return where it is written what the weights of a compiled graph are."""
    return graph.with_suffix(".json")


def write_program(source: Path, out: Path) -> None:
    """Write a compiled graph: the ONNX file, the files that it points into, and which weights are semi-structured.

    Raises:
        TargetError: the file is damaged, or has an operator that is not here.
    """
    from targets.torch_graph import OnnxGraph

    beside = external_files(source, _PLACE)
    weighted = [asdict(item) for item in OnnxGraph(source).weighted()]
    for name in (source.name, *beside):
        place_file(source.parent / name, out / (TorchCuda.engine_file if name == source.name else name))
    facts = json.dumps({"format": _FORMAT, "weights": weighted}, indent=1)
    facts_path(out / TorchCuda.engine_file).write_text(facts + "\n", encoding="utf-8")


def read_facts(graph: Path) -> list[Any]:
    """Return what `write_program` found the weights of a graph to be.

    Raises:
        TargetError: the file is missing or damaged.
    """
    from targets.torch_graph import Weighted

    path = facts_path(graph)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        found = [Weighted(**{**item, "shape": tuple(item["shape"])}) for item in held["weights"]]
        known = held["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"{_PLACE}: {path}: it does not say what the weights of {graph.name} are; got: {error}. Compile again."
        ) from error
    if known != _FORMAT:
        raise TargetError(
            f"{_PLACE}: {path}: of another version; got format {known}, expected {_FORMAT}. Compile again."
        )
    return found


def _refusal() -> str:
    """Return why torch cannot use the GPU that is here; empty where it can."""
    torch = require("torch", _PLACE, _INSTALL)
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA."
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} cannot use the GPU; is its driver too old?"

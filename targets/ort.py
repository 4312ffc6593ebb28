"""ONNX Runtime on the CPU: the ONNX file is the engine, optimised when it is opened."""

from __future__ import annotations

import mmap
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from targets.base import (
    Array,
    Capabilities,
    Evidence,
    Profiled,
    Session,
    TargetError,
    TensorSpec,
    Timed,
    check_feeds,
    check_threads,
    graph_path,
    installed_version,
    place_file,
    require,
)
from targets.joined import join_files
from targets.onnx_file import external_files, graph_of
from targets.ort_format import MODEL_FILE, write_ort
from targets.ort_profile import executed, planned
from targets.selfcontained import write_self_contained

_INSTALL = "pip install 'diffusion-exporter'"
_PLACE = "target onnxruntime"
_PROVIDER = "CPUExecutionProvider"
_LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_DTYPES = {
    "float": "float32",
    "float16": "float16",
    "double": "float64",
    "int64": "int64",
    "int32": "int32",
    "int8": "int8",
    "uint8": "uint8",
    "bool": "bool",
}
_ERRORS_ONLY = 3


@dataclass(frozen=True)
class OrtOptions:
    """Options of the target ``onnxruntime``.

    Attributes:
        threads: threads inside one operator; None leaves it to the runtime, which takes one per core.
        precision: of floating-point layers. The CPU provider computes in ``f32`` only; the others are refused.
        optimization: how far the runtime rewrites the graph when it opens it.
        weights: ``linked`` leaves them in the state's own file, which other folders share; ``own`` copies them, in f32
            and transposed as their products read them, for tools that refuse a file with several links.
        format: ``onnx``, or ``ort`` for a reduced build of the runtime on a phone: ``model.ort``, optimised here, with
            the weights in it, and the list of operators that such a build needs.
    """

    threads: int | None = field(default=None, metadata={"minimum": 1})
    precision: Literal["f32", "bf16", "f16"] = "f32"
    optimization: Literal["disabled", "basic", "extended", "all"] = "all"
    weights: Literal["linked", "own"] = "linked"
    format: Literal["onnx", "ort"] = "onnx"

    @property
    def engine_file(self) -> str:
        """Name of the file that is opened."""
        return MODEL_FILE if self.format == "ort" else OnnxRuntime.engine_file


class OnnxRuntime:
    """Runs ONNX files on the CPU provider."""

    type = "onnxruntime"
    options = OrtOptions
    engine_file = "model.onnx"
    needs = ("onnxruntime", "onnx")
    schemes = ("int8", "int8-weights", "int4-weights", "fp16")
    rounds_results = True

    def capabilities(self) -> Capabilities:
        """Say what this machine can do."""
        version = installed_version("onnxruntime")
        if version is None:
            reason = "'onnxruntime' is not installed."
            return Capabilities(False, False, None, "", (), _INSTALL, reason)
        return Capabilities(True, True, version, _processor(), ("f32",), _INSTALL)

    def check(self, options: OrtOptions) -> None:
        """Raise TargetMissing or TargetError when these options cannot be honoured on this machine."""
        check_threads(options.threads, _PLACE)
        if options.optimization not in _LEVELS:
            expected = ", ".join(_LEVELS)
            raise TargetError(f"{_PLACE}: optimization: got {options.optimization!r}, expected one of {expected}.")
        if options.weights not in ("linked", "own"):
            raise TargetError(f"{_PLACE}: weights: got {options.weights!r}, expected linked or own.")
        if options.format not in ("onnx", "ort"):
            raise TargetError(f"{_PLACE}: format: got {options.format!r}, expected onnx or ort.")
        if options.precision != "f32":
            raise TargetError(
                f"{_PLACE}: precision: got {options.precision!r}, expected 'f32'. The CPU provider would convert "
                f"{options.precision} layers back to f32 and be slower. Write precision: f32, or use target openvino."
            )
        _library()

    def compile(self, source: Path, out: Path, options: OrtOptions) -> None:
        """Link or copy the ONNX file and its external data into `out` and prove that the runtime takes them.

        Raises:
            TargetMissing: onnxruntime is not installed.
            TargetError: the options are refused, or the file is damaged or has an operator that the runtime lacks.
        """
        self.check(options)
        beside = external_files(source, _PLACE)
        if options.format == "ort":
            tools = require("onnxruntime.tools.ort_format_model", _PLACE, _INSTALL)
            write_ort(source, out, partial(_save_ort, source, options), tools)
        elif beside and options.weights == "own":
            write_self_contained(source, out)
        else:
            for name in (source.name, *beside):
                place_file(source.parent / name, out / (self.engine_file if name == source.name else name))
        self.open(out, options).close()

    def join(self, parts: Sequence[Path], out: Path, options: OrtOptions) -> None:
        """Put several compiled graphs into one folder, which read one file of weights.

        Raises:
            TargetError: the options give every graph weights of its own.
        """
        for key, value, wanted in (("format", options.format, "onnx"), ("weights", options.weights, "linked")):
            if value != wanted:
                raise TargetError(
                    f"{_PLACE}: {key}: got {value!r}, expected {wanted!r}: the graphs of a scheduled denoiser share "
                    f"one file of weights. Write {key}: {wanted}."
                )
        join_files(parts, out, self.engine_file)

    def open(self, engine: Path, options: OrtOptions) -> Profiled:
        """Load an engine folder, or one of the graphs that were joined in it."""
        self.check(options)
        return _OrtSession(graph_path(engine, options.engine_file), options)

    def open_as_written(self, path: Path) -> Session:
        """Load an ONNX file unoptimised, for a few calls: memory goes back after every operator.

        The arena that keeps it for the next call took 22 GB for one call of SDXL's U-Net, 8 GB without. Planning which
        operator may write into whose memory pays where shapes are fixed (70 s to fit SD 1.5's U-Net, 96 s without)
        and not where they are open (47 s for a graph of 13,000 operators, 1 s without).
        """
        return _OrtSession(path, OrtOptions(optimization="disabled"), arena=False)


class _OrtSession:
    """A loaded ONNX file. Calls from several threads may run at the same time."""

    def __init__(self, path: Path, options: OrtOptions, *, arena: bool = True) -> None:
        self._path, self._settings = path, options
        self._closed = False
        settings = _library().SessionOptions()
        settings.enable_cpu_mem_arena = arena
        settings.enable_mem_reuse = arena or not _has_open_shapes(path)
        self._session: Any = _session(path, options, settings)
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())
        self._names = [spec.name for spec in self.outputs]
        self._shapes = {spec.name: spec.shape for spec in self.inputs}

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""
        if self._closed:
            raise TargetError(f"{_PLACE}: {self._path}: the session is closed. Open the engine again.")
        check_feeds(self.inputs, feeds, _PLACE)
        self._session = self._session or _session(self._path, self._settings)
        self._shapes = {name: array.shape for name, array in feeds.items()}
        try:
            found = self._session.run(self._names, dict(feeds))
        except _errors() as error:
            raise TargetError(f"{_PLACE}: {self._path}: failed while running: {error}") from error
        return dict(zip(self._names, found, strict=True))

    def evidence(self) -> Evidence:
        """Run once on zeros with the profiler on and return what was executed, where and in which types.

        The profiler needs a session of its own; this one frees the engine meanwhile and loads it at the next call.
        """
        self._session = None
        shapes = dict(self._shapes)
        unknown = sorted(name for name, shape in shapes.items() if -1 in shape)
        notes = ["layers, types and placement: from the profile of one run on zeros"]
        with tempfile.TemporaryDirectory(prefix="exporter-evidence-") as folder:
            if unknown:
                notes = [f"not run, since {', '.join(unknown)} has dynamic axes and no call said their size: no types"]
                layers = () if self._settings.format == "ort" else tuple(planned(_fresh(), self._opened, Path(folder)))
            else:
                feeds = {spec.name: np.zeros(shapes[spec.name], dtype=np.dtype(spec.dtype)) for spec in self.inputs}
                layers = tuple(timed.layer for timed in self._run_profiled(feeds, Path(folder), calls=1))
        return Evidence(
            runtime=f"onnxruntime {_library().__version__}",
            device=_processor(),
            requested_precision=self._settings.precision,
            layers=layers,
            notes=tuple(notes),
        )

    def profile(self, feeds: Mapping[str, Array], calls: int) -> tuple[Timed, ...]:
        """Return what every node took in some calls; as with `evidence`, in a session of its own."""
        self._session = None
        with tempfile.TemporaryDirectory(prefix="exporter-profile-") as folder:
            return tuple(self._run_profiled(feeds, Path(folder), calls))

    def _run_profiled(self, feeds: Mapping[str, Array], folder: Path, calls: int) -> list[Timed]:
        written = self._settings.format == "onnx"
        try:
            return executed(_fresh(), self._opened, feeds, folder, written=written, calls=calls)
        except _errors() as error:
            raise TargetError(f"{_PLACE}: {self._path}: failed while it was profiled: {error}") from error

    def _opened(self, settings: Any) -> Any:
        return _session(self._path, self._settings, settings)

    def close(self) -> None:
        """Free the session."""
        self._session, self._closed = None, True


def _fresh() -> Any:
    return _library().SessionOptions()


def _library() -> Any:
    return require("onnxruntime", _PLACE, _INSTALL)


def _errors() -> tuple[type[Exception], ...]:
    """Return what the runtime raises; its classes have no common base of their own."""
    state = _library().capi.onnxruntime_pybind11_state
    names = (
        "EPFail",
        "EngineError",
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoModel",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
    return (RuntimeError, ValueError, *(getattr(state, name) for name in names))


def _save_ort(source: Path, options: OrtOptions, path: Path, left_out: str) -> None:
    """Optimise an ONNX file as far as the options say, one optimiser left out, and write it in the runtime's format."""
    settings = _library().SessionOptions()
    settings.optimized_model_filepath = str(path)
    settings.add_session_config_entry("session.save_model_format", "ORT")
    _session(source, options, settings, (left_out,))


def _session(path: Path, options: OrtOptions, settings: Any = None, left_out: tuple[str, ...] = ()) -> Any:
    library = _library()
    settings = settings or library.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    settings.graph_optimization_level = getattr(library.GraphOptimizationLevel, _LEVELS[options.optimization])
    settings.intra_op_num_threads = options.threads or 0
    settings.inter_op_num_threads = 1
    # Threads that go on spinning after a call slow down whatever runs next: another component, or the engine that this
    # one is timed against (measured: a U-Net pruned to 0.83 of dense read 1.28).
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return library.InferenceSession(
            str(path), settings, providers=[_PROVIDER], disabled_optimizers=[*left_out, *_hindering(path)] or None
        )
    except _errors() as error:
        raise TargetError(
            f"{_PLACE}: {path}: not an ONNX model that the runtime takes; got: {str(error).strip()} Export it again."
        ) from error


def _has_open_shapes(path: Path) -> bool:
    """Return whether an ONNX file takes inputs of several shapes."""
    sides = [side for value in graph_of(path, _PLACE).input for side in value.type.tensor_type.shape.dim]
    return any(not side.HasField("dim_value") for side in sides)


def _hindering(path: Path) -> tuple[str, ...]:
    """Return the optimisers that keep a graph from the runtime's integer kernels.

    A product and the sum after it become one Gemm before the runtime looks for products of integers, and a Gemm with a
    bias in floating point is none (measured on a U-Net's quantized linear layers: 21 ms in floats, 12 ms in integers).
    """
    quantized = path.suffix == ".onnx" and path.is_file() and _graph_bytes(path).find(b"QuantizeLinear") >= 0
    return ("MatMulAddFusion",) if quantized else ()


def _graph_bytes(path: Path) -> Any:
    """Return a file as something that can be searched without being read whole."""
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _spec(value: Any) -> TensorSpec:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    if kind not in _DTYPES:
        raise TargetError(
            f"{_PLACE}: '{value.name}': a type that numpy has not; got {value.type}, expected one of "
            f"{', '.join(_DTYPES)}. Export with 32-bit inputs and outputs."
        )
    return TensorSpec(value.name, _DTYPES[kind], tuple(d if isinstance(d, int) else -1 for d in value.shape))


def _processor() -> str:
    """Return the processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

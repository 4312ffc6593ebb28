"""OpenVINO: ONNX to its own format, compiled for the device when it is opened."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from targets.base import (
    Array,
    Capabilities,
    Evidence,
    Layer,
    Profiled,
    TargetError,
    TargetMissing,
    TensorSpec,
    Timed,
    check_feeds,
    check_threads,
    graph_path,
    installed_version,
    require,
)
from targets.joined import IR_WEIGHTS, join_ir

_INSTALL = "pip install 'diffusion-exporter[openvino]'"
_PLACE = "target openvino"
_CACHE = "cache"
_CAPABILITY = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
_SPEED_ORDER = ("f32", "f16", "bf16")
_QUANTIZED = ("i8", "u8")
_COMPUTE = (
    "Convolution",
    "Deconvolution",
    "FullyConnected",
    "GroupConvolution",
    "MHA",
    "MatMul",
    "ScaledDotProductAttention",
    "Subgraph",
)
_NOT_EXECUTED = ("Const", "Input", "Output")


@dataclass(frozen=True)
class OvOptions:
    """Options of the target ``openvino``.

    Attributes:
        threads: threads of one call; None leaves it to the runtime, which takes one per core.
        precision: of floating-point layers; refused where the device cannot execute it. Layers of a quantized
            component stay in 8 bits.
        cache: keep the compiled program in the engine folder, so that opening it is faster on the same machine.
        device: OpenVINO's name of the device.
        f16_weights: store weights in 16 bits: half the size, and weights rounded to 11 bits.

    The device's CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE is not offered: it packs zeros of 8-bit linear layers with widths
    in multiples of 64 on processors with AMX, and changes no layer of a model in floating point, whatever its zeros.
    """

    threads: int | None = field(default=None, metadata={"minimum": 1})
    precision: Literal["f32", "bf16", "f16"] = "f32"
    cache: bool = False
    device: str = "CPU"
    f16_weights: bool = False


class OpenVino:
    """Runs models on the devices of OpenVINO."""

    type = "openvino"
    options = OvOptions
    engine_file = "openvino_model.xml"
    needs = ("openvino",)
    schemes = ("int8", "int8-weights", "int4-weights", "fp16")
    rounds_results = False

    def capabilities(self) -> Capabilities:
        """Say what this machine's CPU can do."""
        version = installed_version("openvino")
        if version is None:
            return Capabilities(False, False, None, "", (), _INSTALL, "'openvino' is not installed.")
        try:
            core = _core()
            device, precisions = _device_name(core, "CPU"), _precisions(core, "CPU")
        except (TargetError, RuntimeError) as error:
            return Capabilities(False, False, version, "", (), _INSTALL, f"'openvino' does not start: {error}.")
        return Capabilities(True, True, version, device, precisions, _INSTALL)

    def check(self, options: OvOptions) -> None:
        """Raise TargetMissing or TargetError when these options cannot be honoured on this machine."""
        check_threads(options.threads, _PLACE)
        if options.precision not in _CAPABILITY:
            expected = ", ".join(_CAPABILITY)
            raise TargetError(f"{_PLACE}: precision: got {options.precision!r}, expected one of {expected}.")
        core = _core()
        present = list(core.available_devices)
        if options.device not in present:
            raise TargetMissing(
                f"{_PLACE}: device: got {options.device!r}, expected one of {', '.join(present)}, which are on this "
                "machine. Write one of these, or install the device's driver."
            )
        offered = _precisions(core, options.device)
        if options.precision not in offered:
            raise TargetMissing(
                f"{_PLACE}: precision: {_device_name(core, options.device)} does not execute {options.precision}; got "
                f"{options.precision!r}, expected one of {', '.join(offered)}. Write precision: {offered[-1]}, or run "
                "on a device that has it; the runtime would compute in f32 without a word."
            )

    def compile(self, source: Path, out: Path, options: OvOptions) -> None:
        """Convert an ONNX file into `out`, compile it once and check the precision that was really chosen.

        Raises:
            TargetMissing: openvino or the device is not here, or the device lacks the precision.
            TargetError: the model is refused, or most of its heavy layers run in another precision than asked for.
        """
        self.check(options)
        library = _library()
        try:
            model = _core().read_model(source)
            library.save_model(model, out / self.engine_file, compress_to_fp16=options.f16_weights)
        except RuntimeError as error:
            raise _refused(source, error) from error
        del model
        if options.cache:
            (out / _CACHE).mkdir()
        session = self.open(out, options)
        try:
            check_executed(session.evidence())
        finally:
            session.close()

    def join(self, parts: Sequence[Path], out: Path, options: OvOptions) -> None:
        """Put several compiled graphs into one folder, with one file of weights."""
        join_ir(parts, out, self.engine_file)
        if options.cache:
            (out / _CACHE).mkdir()

    def open(self, engine: Path, options: OvOptions) -> Profiled:
        """Load an engine folder, or one of the graphs that were joined in it."""
        self.check(options)
        return _OvSession(graph_path(engine, self.engine_file), options)


class _OvSession:
    """A compiled model with one request; calls from several threads wait for each other."""

    def __init__(self, path: Path, options: OvOptions) -> None:
        self._path, self._settings = path, options
        self._lock = threading.Lock()
        model = _read(path)
        # Taken before compiling: optimisation merges tensors and with them their names.
        self.inputs = tuple(_spec(port) for port in model.inputs)
        self.outputs = tuple(_spec(port) for port in model.outputs)
        self._compiled: Any = _compiled(model, path, options)
        self._request: Any = self._compiled.create_infer_request()
        self._ports = [(spec.name, index) for index, spec in enumerate(self.outputs)]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Inputs are read in place; outputs are copies that the next call does not touch."""
        check_feeds(self.inputs, feeds, _PLACE)
        with self._lock:
            if self._request is None:
                raise TargetError(f"{_PLACE}: {self._path}: the session is closed. Open the engine again.")
            try:
                found = self._request.infer(_shareable(feeds), share_inputs=True, share_outputs=False)
            except RuntimeError as error:
                raise TargetError(f"{_PLACE}: {self._path}: failed while running: {error}") from error
            return {name: found[index] for name, index in self._ports}

    def evidence(self) -> Evidence:
        """Return the layers of the compiled program as the device reports them."""
        with self._lock:
            if self._compiled is None:
                raise TargetError(f"{_PLACE}: {self._path}: the session is closed. Open the engine again.")
            layers = tuple(_layers(self._compiled.get_runtime_model(), self._settings.device))
            hint = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
            threads = self._compiled.get_property("INFERENCE_NUM_THREADS") if self._settings.device == "CPU" else None
        notes = [f"precision in force: {hint}"]
        if threads is not None:
            notes.append(f"threads in force: {threads}")
        return Evidence(
            runtime=f"openvino {installed_version('openvino')}",
            device=_device_name(_core(), self._settings.device),
            requested_precision=self._settings.precision,
            layers=layers,
            notes=tuple(notes),
        )

    def profile(self, feeds: Mapping[str, Array], calls: int) -> tuple[Timed, ...]:
        """Return what every layer takes, in a program of its own that is compiled with the counters on."""
        check_feeds(self.inputs, feeds, _PLACE)
        counting = _compiled(_read(self._path), self._path, self._settings, counting=True)
        layers = {layer.name: layer for layer in _layers(counting.get_runtime_model(), self._settings.device)}
        request, times = counting.create_infer_request(), dict.fromkeys(layers, 0.0)
        for call in range(calls + 1):  # the first one warms up
            request.infer(_shareable(feeds), share_inputs=True)
            for told in request.profiling_info if call else ():
                if told.node_name in times:
                    times[told.node_name] += 1000 * told.real_time.total_seconds() / calls
        return tuple(Timed(layer, times[name]) for name, layer in layers.items())

    def close(self) -> None:
        """Free the compiled program."""
        with self._lock:
            self._request = self._compiled = None


def check_executed(evidence: Evidence) -> None:
    """Raise TargetError unless most heavy layers run in the precision asked for; 8-bit layers count as asked for.

    Args:
        evidence: of the compiled engine; `requested_precision` is what was asked for.
    """
    heavy = [layer for layer in evidence.layers if layer.type in _COMPUTE]
    wanted = (evidence.requested_precision, *_QUANTIZED)
    right = sum(layer.precision in wanted for layer in heavy)
    if 2 * right < len(heavy):
        counts: dict[str, int] = {}
        for layer in heavy:
            counts[layer.precision] = counts.get(layer.precision, 0) + 1
        raise TargetError(
            f"{_PLACE}: the device compiled another precision; got {counts} for {len(heavy)} heavy layers, expected "
            f"most in {evidence.requested_precision}. Write the precision that it really executes."
        )


def _shareable(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return the feeds with read-only scalars copied: the library shares only what it could write to."""
    return {name: array if array.ndim or array.flags.writeable else array.copy() for name, array in feeds.items()}


def _library() -> Any:
    return require("openvino", _PLACE, _INSTALL)


def _core() -> Any:
    return _only_core(_library())


@functools.cache
def _only_core(library: Any) -> Any:
    """Return the one core of this process.

    Every core with the CPU plugin gives the thread that makes it a stack for signals. Where several come and go, the
    thread ends up with one that was freed, and the next signal (Ctrl-C) is a crash. One that stays cannot do that.
    """
    return library.Core()


def _device_name(core: Any, device: str) -> str:
    return str(core.get_property(device, "FULL_DEVICE_NAME"))


def _precisions(core: Any, device: str) -> tuple[str, ...]:
    offered = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    return tuple(name for name in _SPEED_ORDER if _CAPABILITY[name] in offered)


def _refused(path: Path, error: Exception) -> TargetError:
    reason = " ".join(line.strip() for line in str(error).splitlines() if not line.startswith("Exception from"))
    return TargetError(f"{_PLACE}: {path}: not a model that the runtime takes; got: {reason} Export it again.")


def _read(path: Path) -> Any:
    own = path.with_suffix(".bin")
    try:
        return _core().read_model(path, own if own.exists() else path.with_name(IR_WEIGHTS))
    except RuntimeError as error:
        raise _refused(path, error) from error


def _compiled(model: Any, path: Path, options: OvOptions, *, counting: bool = False) -> Any:
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": options.precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    if counting:
        settings["PERF_COUNT"] = True
    if options.threads is not None:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    cache = path.parent / _CACHE
    if options.cache and cache.is_dir():
        settings["CACHE_DIR"] = str(cache)
    try:
        # A model read first makes the cache's key its content, so the cache survives a move of the folder.
        return _core().compile_model(model, options.device, settings)
    except RuntimeError as error:
        raise _refused(path, error) from error


def _spec(port: Any) -> TensorSpec:
    shape = tuple(-1 if axis.is_dynamic else axis.get_length() for axis in port.get_partial_shape())
    return TensorSpec(port.get_any_name(), port.get_element_type().to_dtype().name, shape)


def _precision(facts: Mapping[str, str]) -> str:
    """Return what a layer computes in: a layer with 16-bit weights calls itself f16, its kernel's name ends in f32."""
    stated = facts.get("runtimePrecision", "unknown")
    kernel = facts.get("primitiveType", "").rpartition("_")[2]
    return kernel if kernel in _CAPABILITY and stated in _CAPABILITY else stated


def _layers(model: Any, device: str) -> Iterator[Layer]:
    for operation in model.get_ordered_ops():
        facts = {name: str(value.value) for name, value in operation.get_rt_info().items()}
        kind = facts.get("layerType", operation.get_type_name())
        if kind not in _NOT_EXECUTED:
            yield Layer(
                name=operation.get_friendly_name(),
                type=kind,
                precision=_precision(facts),
                kernel=facts.get("primitiveType", ""),
                device=device,
                origin=facts.get("originalLayersNames", ""),
            )

"""A plan on an NVIDIA GPU: buffers, one stream, events of the device for times, and a CUDA graph on request."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from targets.base import Array, Evidence, TargetError, TensorSpec, Timed, check_feeds, require
from targets.trt_build import PLAN, Log, Told, logger_of
from targets.trt_told import layers_of_inspector

_INSTALL = "pip install cuda-bindings"


class CudaSession:
    """A deserialized engine with one execution context; calls from several threads wait for each other.

    Args:
        library: the module of TensorRT or TensorRT-RTX.
        engine: folder that a build wrote.
        device: name of the GPU, for the evidence.
        place: how messages begin.
        graph: record the call once and replay it; shapes have to be fixed.

    Raises:
        TargetError: the library refuses the plan, or the device has too little memory.
    """

    def __init__(self, library: Any, engine: Path, device: str, place: str, *, graph: bool = False) -> None:
        self._library: Any = library
        self._path, self._device, self._place = engine, device, place
        self._lock, self._log = threading.Lock(), Log()
        self._driver: Any = require("cuda.bindings.driver", place, _INSTALL)
        self._told = Told.load(engine)
        self._context = self._owned()
        self._logger = logger_of(library, self._log)
        try:
            self._runtime = library.Runtime(self._logger)
        except (RuntimeError, TypeError) as error:
            raise TargetError(f"{place}: its runtime does not start: {error}. {self._log.last_error()}") from error
        self._engine = self._runtime.deserialize_cuda_engine((engine / PLAN).read_bytes())
        if self._engine is None:
            raise TargetError(f"{place}: {engine}: the plan was refused; got: {self._log.last_error()} Compile again.")
        self._execution = self._engine.create_execution_context()
        if self._execution is None:
            raise TargetError(f"{place}: {engine}: no memory for it on {device}; got: {self._log.last_error()}")
        self._stream = self._ok(self._driver.cuStreamCreate(0))
        self._events = [self._ok(self._driver.cuEventCreate(0)) for _ in range(2)]
        self._buffers: dict[str, tuple[Any, int]] = {}
        self._recorded: Any = None
        self._records, self._closed = graph, False
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        given = [name for name in names if self._engine.get_tensor_mode(name) == library.TensorIOMode.INPUT]
        self.inputs = tuple(self._spec(name) for name in given)
        self.outputs = tuple(self._spec(name) for name in names if name not in given)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; transfers to the device and back are part of the call."""
        return self.timed(feeds)[0]

    def timed(self, feeds: Mapping[str, Array]) -> tuple[dict[str, Array], float]:
        """Run once; return the answers, and what the device took for the network alone, in ms between its events."""
        check_feeds(self.inputs, feeds, self._place)
        with self._lock:
            self._check_open()
            self._ok(self._driver.cuCtxSetCurrent(self._context))
            moved = self._bind(feeds)
            self._ok(self._driver.cuEventRecord(self._events[0], self._stream))
            self._enqueue(new_addresses=moved)
            self._ok(self._driver.cuEventRecord(self._events[1], self._stream))
            answers = self._fetched()
            took = self._ok(self._driver.cuEventElapsedTime(*self._events))
            return answers, float(took)

    def evidence(self) -> Evidence:
        """Return the layers as the engine's inspector lists them, and what the builder told."""
        with self._lock:
            self._check_open()
            inspector = self._engine.create_engine_inspector()
            text = inspector.get_engine_information(self._library.LayerInformationFormat.JSON)
        try:
            layers = layers_of_inspector(text, self._device)
        except ValueError as error:
            raise TargetError(
                f"{self._place}: {self._path}: the inspector's answer cannot be read: {error}."
            ) from error
        return self._told.evidence(self._device, layers)

    def profile(self, feeds: Mapping[str, Array], calls: int) -> tuple[Timed, ...]:
        """Return what every layer takes, from the library's own profiler."""
        took: dict[str, float] = {}
        layers = self.evidence().layers
        self(feeds)
        with self._lock:
            self._check_open()
            self._execution.profiler = _profiler_of(self._library, took)
            try:
                for _ in range(calls):
                    self._bind(feeds)
                    self._run()
                    self._ok(self._driver.cuStreamSynchronize(self._stream))
            finally:
                self._execution.profiler = None
        return tuple(Timed(layer, took.get(layer.name, 0.0) / calls) for layer in layers)

    def close(self) -> None:
        """Free the engine and its buffers."""
        with self._lock:
            if self._closed:
                return
            self._ok(self._driver.cuCtxSetCurrent(self._context))
            for address, _ in self._buffers.values():
                self._driver.cuMemFree(address)
            for event in self._events:
                self._driver.cuEventDestroy(event)
            self._driver.cuStreamDestroy(self._stream)
            self._buffers, self._recorded, self._closed = {}, None, True
            del self._execution, self._engine, self._runtime  # in this order
            self._driver.cuDevicePrimaryCtxRelease(self._ok(self._driver.cuDeviceGet(0)))

    def _check_open(self) -> None:
        if self._closed:
            raise TargetError(f"{self._place}: {self._path}: the session is closed. Open the engine again.")

    def _owned(self) -> Any:
        self._ok(self._driver.cuInit(0))
        context = self._ok(self._driver.cuDevicePrimaryCtxRetain(self._ok(self._driver.cuDeviceGet(0))))
        self._ok(self._driver.cuCtxSetCurrent(context))
        return context

    def _spec(self, name: str) -> TensorSpec:
        kind = self._engine.get_tensor_dtype(name)
        try:
            dtype = np.dtype(self._library.nptype(kind)).name
        except TypeError as error:
            raise TargetError(
                f"{self._place}: {self._path}: '{name}' cannot be fed or fetched; got {kind.name}, expected a type "
                "that numpy has. Export the graph with another type at its ends."
            ) from error
        return TensorSpec(name, dtype, tuple(self._engine.get_tensor_shape(name)))

    def _bind(self, feeds: Mapping[str, Array]) -> bool:
        """Put inputs onto the device and give every tensor its memory; return whether any has moved."""
        moved = False
        for name, array in feeds.items():
            moved |= self._hold(name, array.nbytes)
            self._execution.set_input_shape(name, array.shape)
            self._ok(
                self._driver.cuMemcpyHtoDAsync(self._buffers[name][0], array.ctypes.data, array.nbytes, self._stream)
            )
        for spec in self.outputs:
            moved |= self._hold(spec.name, self._size(spec)[1])
        return moved

    def _size(self, spec: TensorSpec) -> tuple[Sequence[int], int]:
        shape = tuple(self._execution.get_tensor_shape(spec.name))
        return shape, int(np.prod(shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize

    def _hold(self, name: str, size: int) -> bool:
        held = self._buffers.get(name)
        if held is not None and held[1] >= size:
            return False
        if held is not None:
            self._ok(self._driver.cuMemFree(held[0]))
        address = self._ok(self._driver.cuMemAlloc(max(size, 1)))
        self._buffers[name] = (address, size)
        self._execution.set_tensor_address(name, int(address))
        return True

    def _enqueue(self, *, new_addresses: bool) -> None:
        """Run the network on the stream, from a recorded graph where one was asked for."""
        if not self._records:
            self._run()
            return
        if self._recorded is None or new_addresses:
            self._run()  # the first run of a context allocates, which cannot be recorded
            self._ok(self._driver.cuStreamSynchronize(self._stream))
            mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            self._ok(self._driver.cuStreamBeginCapture(self._stream, mode))
            self._run()
            graph = self._ok(self._driver.cuStreamEndCapture(self._stream))
            self._recorded = self._ok(self._driver.cuGraphInstantiate(graph, 0))
        self._ok(self._driver.cuGraphLaunch(self._recorded, self._stream))

    def _run(self) -> None:
        if not self._execution.execute_async_v3(int(self._stream)):
            raise TargetError(f"{self._place}: {self._path}: failed while running: {self._log.last_error()}")

    def _fetched(self) -> dict[str, Array]:
        answers = {}
        for spec in self.outputs:
            shape, size = self._size(spec)
            answers[spec.name] = np.empty(shape, spec.dtype)
            address = self._buffers[spec.name][0]
            self._ok(self._driver.cuMemcpyDtoHAsync(answers[spec.name].ctypes.data, address, size, self._stream))
        self._ok(self._driver.cuStreamSynchronize(self._stream))
        return answers

    def _ok(self, told: tuple[Any, ...]) -> Any:
        """Return what a call of the driver found; its first answer is how it went."""
        status, *found = told
        if int(status):
            _, name = self._driver.cuGetErrorString(status)
            said = name.decode() if isinstance(name, bytes) else str(name)
            raise TargetError(f"{self._place}: {self._path}: the GPU's driver refused: {said}.")
        return found[0] if found else None


def _profiler_of(library: Any, took: dict[str, float]) -> Any:
    """Return a profiler of the library that adds up in `took` what each layer takes, in ms by name."""

    class Profiler(library.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            took[layer_name] = took.get(layer_name, 0.0) + ms

    return Profiler()

"""A torch program on a device: run step by step, compiled, or recorded as a CUDA graph and replayed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from targets.base import Array, Evidence, Layer, Sparse, TargetError, TensorSpec, Timed, check_feeds
from targets.torch_graph import PLACE, OnnxGraph, Weighted, name_of
from targets.torch_program import Program, Shapes, Weights

_WARMUPS = 3
"""Calls before one is recorded: they choose kernels and take memory, which a recording cannot."""
_MOST_SHAPES = 4
"""Sets of input shapes that a session keeps programs for; each recording has memory of its own."""
Run = Callable[[], Sequence[Tensor]]


class TorchSession:
    """An ONNX graph as a torch program; calls from several threads wait for each other.

    Args:
        path: the ONNX file.
        weighted: what its weights are.
        mode: ``eager``, ``cuda-graph`` or ``compile``.
        sparse: whether weights that can be are stored semi-structured; without, it is the dense twin.
        device: of torch; its name for the evidence.

    Raises:
        TargetError: the graph is refused, or the device has too little memory.
    """

    def __init__(
        self, path: Path, weighted: Sequence[Weighted], *, mode: str, sparse: bool, device: tuple[str, str]
    ) -> None:
        self._path, self._weighted, self._mode, self._sparse = path, tuple(weighted), mode, sparse
        self._device, self._device_name = device
        self._lock = threading.Lock()
        stored = [item.node for item in weighted if item.pattern and not item.reason] if sparse else []
        self._graph: OnnxGraph | None = OnnxGraph(path)
        self._weights = Weights(self._device, stored)
        self._programs: dict[Shapes, _Ready] = {}
        self.inputs, self.outputs = self._graph.inputs, self._graph.outputs
        if not any(-1 in spec.shape for spec in self.inputs):
            self._ready(tuple(spec.shape for spec in self.inputs))

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; transfers to the device and back are part of the call."""
        return self.timed(feeds)[0]

    def timed(self, feeds: Mapping[str, Array]) -> tuple[dict[str, Array], float]:
        """Run once; return the answers, and what the device took for the network alone, in ms between its events."""
        check_feeds(self.inputs, feeds, PLACE)
        with self._lock:
            ready = self._ready(tuple(feeds[spec.name].shape for spec in self.inputs))
            told: tuple[dict[str, Array], float] = self._tried(lambda: self._run(ready, feeds))
            return told

    def evidence(self) -> Evidence:
        """Return every call of the program last used, and which weights really are semi-structured."""
        with self._lock:
            self._open_graph()
            notes = [self._said()]
            if self._programs:
                program = list(self._programs.values())[-1].program
                layers = program.layers(self._device_name)
            else:
                layers = tuple(self._planned())
                notes.append("shapes are open and no call said their size: layers as in the graph, no types")
        sparse_layers = [layer for layer in layers if layer.kernel]
        chosen = len(sparse_layers)
        known = bool(self._programs) or not self._weights.stored
        eligible = [item for item in self._weighted if item.pattern]
        backends = sorted({layer.kernel for layer in sparse_layers})
        notes.append(
            f"weights with two zeros in four: {len(eligible)} of {len(self._weighted)}; semi-structured: "
            + (str(chosen) if known else "not known before the first call")
            + (f" ({', '.join(backends)})" if backends else "")
        )
        if self._sparse:
            notes += _why_dense(eligible)
        else:
            notes.append("the dense twin: weights with zeros are stored and multiplied as any other (sparse: false)")
        nodes = tuple(layer.name for layer in sparse_layers)
        sparse = Sparse(len(eligible), chosen if known else None, nodes if known else None)
        return Evidence(
            f"torch {torch.__version__}", self._device_name, "as in the graph", layers, tuple(notes), sparse
        )

    def profile(self, feeds: Mapping[str, Array], calls: int) -> tuple[Timed, ...]:
        """Return what every call of the program takes, run one by one: no recording, nothing compiled."""
        check_feeds(self.inputs, feeds, PLACE)
        with self._lock:
            ready = self._ready(tuple(feeds[spec.name].shape for spec in self.inputs))
            told: tuple[Timed, ...] = self._tried(lambda: self._profiled(ready, feeds, calls))
            return told

    def close(self) -> None:
        """Free the programs, their weights and recordings."""
        with self._lock:
            self._graph = None
            self._programs.clear()
            self._weights = Weights(self._device)
            if self._device == "cuda":
                torch.cuda.empty_cache()

    def _said(self) -> str:
        how = {"eager": "run step by step", "compile": "compiled by torch.compile", "cuda-graph": "one CUDA graph"}
        return f"program: {how[self._mode]}"

    def _open_graph(self) -> OnnxGraph:
        if self._graph is None:
            raise TargetError(f"{PLACE}: {self._path}: the session is closed. Open the engine again.")
        return self._graph

    def _planned(self) -> list[Layer]:
        nodes = self._open_graph().nodes
        return [Layer(name_of(node), node.op_type, "unknown", "", self._device_name, name_of(node)) for node in nodes]

    def _ready(self, shapes: Shapes) -> _Ready:
        """Return the program for these shapes, made where it is not there; the oldest of many goes."""
        graph = self._open_graph()
        found = self._programs.pop(shapes, None)
        if found is None:
            if len(self._programs) >= _MOST_SHAPES:
                del self._programs[next(iter(self._programs))]
            program = self._tried(lambda: Program(graph, shapes, self._weights))
            found = _Ready(
                program,
                self._mode,
                self._device,
                [self._empty(spec, shape) for spec, shape in zip(self.inputs, shapes, strict=True)],
            )
        self._programs[shapes] = found
        return found

    def _empty(self, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=self._device)

    def _run(self, ready: _Ready, feeds: Mapping[str, Array]) -> tuple[dict[str, Array], float]:
        self._feed(ready, feeds)
        found, took = ready.timed()
        answers = {
            spec.name: tensor.to("cpu", copy=True).contiguous().numpy()
            for spec, tensor in zip(self.outputs, found, strict=True)
        }
        return answers, took

    def _feed(self, ready: _Ready, feeds: Mapping[str, Array]) -> None:
        for spec, place in zip(self.inputs, ready.inputs, strict=True):
            array = feeds[spec.name]
            place.copy_(torch.from_numpy(array if array.flags.writeable else array.copy()))

    def _profiled(self, ready: _Ready, feeds: Mapping[str, Array], calls: int) -> tuple[Timed, ...]:
        self._feed(ready, feeds)
        watch = _Watch(ready.program.module, self._device)
        layers = ready.program.layers(self._device_name)
        with torch.no_grad(), exact():
            for index in range(calls + 1):  # the first one warms up
                watch.counting = index > 0
                watch.run(*ready.inputs)
        times = watch.ms()
        return tuple(
            Timed(layer, times[node.name] / calls) for layer, node in zip(layers, ready.program.calls(), strict=True)
        )

    def _tried(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (RuntimeError, NotImplementedError, torch.OutOfMemoryError) as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TargetError(f"{PLACE}: {self._path}: failed on {self._device_name}: {said}") from error


class _Ready:
    """A program with its inputs' memory, ready to run.

    Attributes:
        program: what runs.
        inputs: tensors that calls write to.
    """

    def __init__(self, program: Program, mode: str, device: str, inputs: list[Tensor]) -> None:
        self.program, self.inputs = program, inputs
        self._mode, self._device = mode, device
        self._run: Run | None = None

    def timed(self) -> tuple[Sequence[Tensor], float]:
        """Run once on the inputs as they are; return the outputs, which the next call may overwrite, and ms."""
        with torch.no_grad(), exact():
            run = self._run = self._run or self._made()
            if self._device != "cuda":
                started = time.perf_counter()
                return run(), 1e3 * (time.perf_counter() - started)
            first, last = event(), event()
            first.record()
            found = run()
            last.record()
            last.synchronize()
            return found, float(first.elapsed_time(last))

    def _made(self) -> Run:
        module: Callable[..., Sequence[Tensor]] = self.program.module
        if self._mode == "compile":
            module(*self.inputs)  # the first semi-structured product registers its operator, which tracing cannot
            module = torch.compile(module, dynamic=False)
            module(*self.inputs)  # compiles, which is no part of a call's time
        if self._mode == "cuda-graph":
            return recorded(lambda: module(*self.inputs))
        return lambda: module(*self.inputs)


class _Watch(fx.Interpreter):
    """Runs a program call by call and takes the time of each, with the device's events where it is a GPU."""

    def __init__(self, module: fx.GraphModule, device: str) -> None:
        super().__init__(module)
        self._device = device
        self._marks: list[tuple[str, Any, Any]] = []
        self.counting = False

    def run_node(self, n: fx.Node) -> Any:
        """Run one call."""
        if not self.counting or n.op != "call_function":
            return super().run_node(n)
        first = self._mark()
        found = super().run_node(n)
        self._marks.append((n.name, first, self._mark()))
        return found

    def ms(self) -> dict[str, float]:
        """Return call -> ms, over all runs."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        times: dict[str, float] = {}
        for name, first, last in self._marks:
            took = first.elapsed_time(last) if self._device == "cuda" else 1e3 * (last - first)
            times[name] = times.get(name, 0.0) + took
        return times

    def _mark(self) -> Any:
        if self._device != "cuda":
            return time.perf_counter()
        mark = event()
        mark.record()
        return mark


def recorded(call: Run) -> Run:
    """Record a call as a CUDA graph; return what replays it and gives the outputs, always the same tensors."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on with the device
        outputs = call()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return outputs

    return replay


def _why_dense(eligible: Sequence[Weighted]) -> list[str]:
    """Return for every reason how many weights with the pattern stay dense, and which the first of them is."""
    nodes: dict[str, list[str]] = {}
    for item in eligible:
        if item.reason:
            nodes.setdefault(item.reason, []).append(item.node)
    return [
        f"dense: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
        for reason, names in nodes.items()
    ]


def event() -> Any:
    """Return an event of the device that knows when it happened."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def exact() -> AbstractContextManager[None]:
    """Let 32-bit convolutions be 32-bit ones, not ones of 19 bits, and have the fastest kernel chosen by trying."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
    return flags

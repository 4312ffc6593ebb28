"""What every runtime offers: capabilities, compile, open; and what crosses the border to it: files, specs and numpy.

A target never imports ``exporter`` or ``calibration`` and loads its own library only when it is used.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from targets.placement import Placement

Array = NDArray[Any]
OptionsClass = type[Any]
RANGES = "shapes.json"
"""Beside a graph with open shapes: input -> its smallest, usual and largest shape, where the recipe has named them."""


class TargetError(Exception):
    """A runtime refused, failed or is not what was asked for. The message says what to do."""


class TargetMissing(TargetError):  # noqa: N818 - reads as what it is
    """The library or the device of a target is not on this machine; the message holds the install command."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a session.

    Attributes:
        name: the name in the graph.
        dtype: numpy's name of the element type, such as ``float32``.
        shape: one entry per axis; -1 where the axis is dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """What one layer of a compiled engine really is.

    Attributes:
        name: the runtime's own name of the layer.
        type: the operation, such as ``Convolution``.
        precision: the element type it executes in, such as ``f32``; ``unknown`` where the runtime does not say.
        kernel: the implementation chosen, such as ``brgconv_avx512``; empty where the runtime does not say.
        device: where it was placed, such as ``CPU`` or an execution provider.
        origin: names of the graph's nodes that were fused into it, comma-separated; empty where the runtime made it up.
    """

    name: str
    type: str
    precision: str
    kernel: str
    device: str
    origin: str = ""


@dataclass(frozen=True)
class Timed:
    """A layer, and how long it takes.

    Attributes:
        layer: of a compiled engine.
        ms: mean over the calls that were profiled, in milliseconds; the profiler's own work is in it.
    """

    layer: Layer
    ms: float


@dataclass(frozen=True)
class Sparse:
    """What a compiler said about kernels for weights with two zeros in four.

    Attributes:
        eligible: layers whose weights have the pattern; None where it did not say.
        chosen: layers that got a sparse kernel; None likewise.
        nodes: of the graph, that run on one; None where not every kernel shows whether it is one.
    """

    eligible: int | None
    chosen: int | None
    nodes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Evidence:
    """What the compiler did, read back from the built engine, never inferred from the options that were passed.

    Attributes:
        runtime: library and version, such as ``openvino 2026.4.1``.
        device: the device's full name.
        requested_precision: what the options asked for.
        layers: every executed layer, in execution order.
        notes: anything a reader of the report must know.
        sparse: about sparse kernels; None for runtimes that have none.
        placement: what a lint found; None for targets without one.
    """

    runtime: str
    device: str
    requested_precision: str
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()
    sparse: Sparse | None = None
    placement: Placement | None = None

    def count(self, attribute: str) -> dict[str, int]:
        """Return how many layers have each value of ``precision``, ``type``, ``kernel`` or ``device``, most first."""
        found: dict[str, int] = {}
        for layer in self.layers:
            value = str(getattr(layer, attribute))
            found[value] = found.get(value, 0) + 1
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Capabilities:
    """What a target can do on this machine.

    Attributes:
        available: whether engines can be compiled here.
        runs: whether engines can be executed here.
        version: the library's version, None when it is not installed.
        device: the device's full name, empty when unknown.
        precisions: precisions that really execute on this device, fastest last.
        install: the command that installs the library.
        reason: why it is not available or does not run; empty when both are fine.
        untimed: why times taken here say nothing about the device, and what takes them; empty where they do.
    """

    available: bool
    runs: bool
    version: str | None
    device: str
    precisions: tuple[str, ...]
    install: str
    reason: str = ""
    untimed: str = ""


class Session(Protocol):
    """A loaded engine."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Feeds are C-contiguous arrays whose names, dtypes and shapes follow ``inputs``.

        The answers are the caller's: no later call touches their memory.
        """

    def evidence(self) -> Evidence:
        """Read back what the compiler did."""

    def close(self) -> None:
        """Free the engine; the session must not be used afterwards."""


class Profiled(Session, Protocol):
    """A loaded engine of a single graph, as targets open it."""

    def profile(self, feeds: Mapping[str, Array], calls: int) -> tuple[Timed, ...]:
        """Return what every layer takes in calls with these feeds, measured by the runtime itself."""


@runtime_checkable
class DeviceTimed(Protocol):
    """A session whose device has a clock of its own."""

    def timed(self, feeds: Mapping[str, Array]) -> tuple[dict[str, Array], float]:
        """Run once; return the answers, and what the device took for the network alone, in ms."""


@runtime_checkable
class BuildsElsewhere(Protocol):
    """A target that compiles on machines which cannot run its engines."""

    def built(self, engine: Path) -> Evidence:
        """Return what is known of a compiled engine without running it.

        Raises:
            TargetError: the engine's folder is damaged.
        """


@runtime_checkable
class TellsProgress(Protocol):
    """A target whose compiler says how far it is."""

    def compile_telling(self, source: Path, out: Path, options: Any, progress: Callable[[float], None]) -> None:
        """Compile as `Target.compile` does; `progress` is called with the done fraction, from any thread."""


@runtime_checkable
class RefusesSchemes(Protocol):
    """A target whose schemes depend on its options, such as the devices that engines are for."""

    def refused(self, options: Any) -> Mapping[str, str]:
        """Return the schemes that it does not take with these options, and why."""


class Target(Protocol):
    """A runtime and device family. Stateless: one object serves any number of engines.

    Attributes:
        type: the name recipes use.
        options: the frozen dataclass of this target's options; its fields are the recipe's keys.
        engine_file: name of the file that the loaders of the runtime's own ecosystem expect in a component folder.
        needs: distributions that compiling and running take, numpy left out.
        schemes: of quantization, whose graphs it runs.
        rounds_results: whether it computes convolutions in integers only where their results are rounded to 8 bits too.
    """

    type: str
    options: OptionsClass
    engine_file: str
    needs: tuple[str, ...]
    schemes: tuple[str, ...]
    rounds_results: bool

    def capabilities(self) -> Capabilities:
        """Say what this machine can do, without raising and without loading the library when it is missing."""

    def check(self, options: Any) -> None:
        """Raise TargetMissing or TargetError when these options cannot be honoured on this machine."""

    def compile(self, source: Path, out: Path, options: Any) -> None:
        """Build an engine from one ONNX file.

        Args:
            source: ``model.onnx``, its external data beside it.
            out: an existing, empty folder; the engine's files are written into it, `engine_file` among them.
            options: an instance of ``self.options``.

        Raises:
            TargetMissing: the library or device is not here.
            TargetError: the runtime refused the model.
        """

    def join(self, parts: Sequence[Path], out: Path, options: Any) -> None:
        """Put several compiled graphs of one network into one folder, with the weights that they share stored once.

        Args:
            parts: folders inside of `out` that `compile` filled, which go.
            out: gets ``<name of the part><ending of the engine file>`` for each of them.
            options: as they were compiled with.

        Raises:
            TargetError: with these options every graph holds weights of its own.
        """

    def open(self, engine: Path, options: Any) -> Profiled:
        """Load what `compile` wrote: its folder, or one of the files that `join` wrote.

        Options that matter at run time (threads, precision) are honoured here.
        """


def graph_path(engine: Path, engine_file: str) -> Path:
    """Return the file of an engine: the one in its folder, or the engine itself where it is one of several joined."""
    return engine if engine.is_file() else engine / engine_file


def engine_file_of(target: Target, options: Any) -> str:
    """Return the name of the file that an engine has with these options, which may choose another format."""
    return str(getattr(options, "engine_file", target.engine_file))


def require(module: str, place: str, install: str) -> ModuleType:
    """Import a target's library.

    Args:
        module: what to import.
        place: how the message begins, such as ``target openvino``.
        install: the command that installs it.

    Raises:
        TargetMissing: it is not installed, or does not load.
    """
    try:
        return import_module(module)
    except ImportError as error:
        msg = f"{place}: '{module}' is not installed or does not load ({error}). Run: {install}"
        raise TargetMissing(msg) from error


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution without importing it, None when it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def check_threads(threads: int | None, place: str) -> None:
    """Raise TargetError unless `threads` is None (the runtime's own choice) or a number of threads."""
    if threads is not None and (isinstance(threads, bool) or threads < 1):
        msg = f"{place}: threads: got {threads}, expected at least 1. Leave it out for one thread per core."
        raise TargetError(msg)


def place_file(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link where the file system can, else a copy."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)


def check_feeds(inputs: tuple[TensorSpec, ...], feeds: Mapping[str, Array], place: str) -> None:
    """Raise TargetError unless the feeds match the specs by name, dtype and shape."""
    wanted, given = {spec.name for spec in inputs}, set(feeds)
    if wanted != given:
        msg = f"{place}: wrong inputs; got {sorted(given)}, expected {sorted(wanted)}. Feed exactly these names."
        raise TargetError(msg)
    for spec in inputs:
        array = feeds[spec.name]
        if array.dtype != np.dtype(spec.dtype):
            msg = f"{place}: input '{spec.name}': wrong type; got {array.dtype}, expected {spec.dtype}. Cast it."
            raise TargetError(msg)
        fits = len(array.shape) == len(spec.shape) and all(
            want in (-1, have) for have, want in zip(array.shape, spec.shape, strict=True)
        )
        if not fits:
            msg = (
                f"{place}: input '{spec.name}': wrong shape; got {tuple(array.shape)}, expected {spec.shape} "
                "(-1 is any size). Feed that shape, or export with dynamic axes."
            )
            raise TargetError(msg)

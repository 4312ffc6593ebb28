"""Builds an engine with TensorRT 10, TensorRT 11 or TensorRT-RTX: the same calls, found by what the library offers.

Networks are strongly typed: types and roundings are those of the ONNX graph, and no flag of the builder changes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from targets.base import RANGES, Evidence, Layer, Sparse, TargetError
from targets.trt_told import layers_of_log, runs_sparse, skipped_for_memory, sparse_nodes, sparse_of_log

if TYPE_CHECKING:
    import tensorrt as trt  # stands for TensorRT-RTX too

PLAN = "engine.plan"
TOLD = "build.json"
_MIB = 2**20
_KEPT_LINES = 20
_LEVELS = {"ampere": "AMPERE_PLUS", "same-capability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class Order:
    """What is asked of a builder, whatever the product.

    Attributes:
        sparse: kernels for 2:4 weights may be chosen.
        workspace_mib: scratch memory that kernels may take; None for all of the device's.
        optimization: how long the builder looks, 0 to 5.
        refit: whether weights can be put in later: ``none``, the same ones (``identical``) or any (``all``).
        strip: leave the weights out of the plan; they are put in on the device.
        timing_cache: bytes of an earlier build's, on the same version and device; None for none, ``b""`` for a new one.
        version_compatible: later versions of the library open it too.
        hardware: devices beside this one: ``this``, ``ampere`` and newer, or the ``same-capability``.
        capabilities: of the devices it is built for, such as ``8.6``; none for the device that is here.
    """

    sparse: bool = True
    workspace_mib: int | None = None
    optimization: int | None = None
    refit: str = "none"
    strip: bool = False
    timing_cache: bytes | None = None
    version_compatible: bool = False
    hardware: str = "this"
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Told:
    """What a build told, kept beside the plan.

    Attributes:
        library: name and version.
        device: that it was built on, or for.
        order: what was asked, but for the bytes of a timing cache, whose digest is in `timing_cache`.
        sparse: what the log said of sparse kernels.
        layers: of the engine, where the log lists them.
        skipped: lines of kernels that were not tried for want of memory.
        warnings: the first lines at that level.
        timing_cache: SHA-256 of the one that was given; None for none.
    """

    library: str
    device: str
    order: Order
    sparse: Sparse
    layers: tuple[Layer, ...]
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    timing_cache: str | None = None

    def save(self, folder: Path) -> None:
        """Write ``build.json``."""
        (folder / TOLD).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Told:
        """Read it.

        Raises:
            TargetError: it is missing or is no such file.
        """
        path = folder / TOLD
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                library=str(found["library"]),
                device=str(found["device"]),
                order=Order(**found["order"] | {"capabilities": tuple(found["order"]["capabilities"])}),
                sparse=Sparse(**found["sparse"]),
                layers=tuple(Layer(**layer) for layer in found["layers"]),
                skipped=tuple(map(str, found["skipped"])),
                warnings=tuple(map(str, found["warnings"])),
                timing_cache=found["timing_cache"],
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise TargetError(f"{path}: what the builder told cannot be read: {error}. Compile again.") from error

    def evidence(self, device: str, layers: tuple[Layer, ...]) -> Evidence:
        """Return it as evidence, with layers from the engine itself where it could be loaded."""
        asked = "allowed" if self.order.sparse else "not allowed"
        eligible, chosen = (_said(count) for count in (self.sparse.eligible, self.sparse.chosen))
        notes = [f"sparse kernels {asked}; the builder's log says: eligible layers {eligible}, chosen {chosen}"]
        kernels = [runs_sparse(layer) for layer in layers]
        hidden = sum(kernel is None for kernel in kernels)
        notes.append(f"by the names of their kernels {sum(map(bool, kernels))} layers are sparse; {hidden} do not say")
        if self.timing_cache:
            notes.append(f"timing cache: {self.timing_cache}")
        notes += [f"not tried for want of memory: {line}" for line in self.skipped]
        nodes = sparse_nodes(layers)
        if nodes is not None and self.sparse.chosen not in (None, sum(map(bool, kernels))):
            notes.append("the log and the names of the kernels disagree about how many are sparse")
            nodes = None
        sparse = replace(self.sparse, nodes=nodes)
        return Evidence(self.library, device, "as in the graph", layers, tuple(notes), sparse)


def build(
    library: Any, source: Path, out: Path, order: Order, device: str, progress: Callable[[float], None] | None = None
) -> Told:
    """Parse an ONNX file and build ``engine.plan``.

    Args:
        library: the module of TensorRT or TensorRT-RTX.
        source: the ONNX file, external data beside it.
        out: an existing folder; gets the plan, ``build.json`` and, where one was asked for, ``timing.cache``.
        order: what is asked.
        device: for the messages and the record.
        progress: called with the done fraction; from the builder's own threads.

    Raises:
        TargetError: the parser or the builder refuses it; with every error of the parser, and the node of each.
    """
    log = Log()
    logger = logger_of(library, log)
    place = f"{_name(library)} {library.__version__}"
    try:
        builder = library.Builder(logger)
    except (RuntimeError, TypeError) as error:
        raise TargetError(f"{place}: its builder does not start: {error}. {log.last_error()}") from error
    network = builder.create_network(_network_flags(library))
    parser = library.OnnxParser(network, logger)
    taken = parser.parse_from_file(str(source))
    if not taken or not network.num_outputs:  # bytes that are no graph at all are taken for an empty one
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [f"{error.node_name() or 'the graph'} ({error.node_operator()}): {error.desc()}" for error in errors]
        got = "; ".join(said) or "nothing that it answers"
        raise TargetError(f"{place}: {source}: not a graph that its parser takes; got: {got}. Export it again.")
    config = builder.create_builder_config()
    cache = _configure(library, config, order, place)
    _open_shapes(builder, network, config, source, place)
    watch = _monitor(library, progress) if progress else None
    if watch is not None:
        config.progress_monitor = watch
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise TargetError(f"{place}: {source}: no engine was built for {device}; got: {log.last_error()}")
    (out / PLAN).write_bytes(memoryview(plan))
    if cache is not None:
        (out / "timing.cache").write_bytes(memoryview(config.get_timing_cache().serialize()))
    told = Told(
        library=place,
        device=device,
        order=replace(order, timing_cache=None),
        sparse=sparse_of_log(log.messages),
        layers=layers_of_log(log.messages, device),
        skipped=tuple(skipped_for_memory(log.messages)[:_KEPT_LINES]),
        warnings=tuple(log.warnings[:_KEPT_LINES]),
        timing_cache=hashlib.sha256(order.timing_cache).hexdigest() if order.timing_cache else None,
    )
    told.save(out)
    return told


def _open_shapes(builder: Any, network: Any, config: Any, source: Path, place: str) -> None:
    """Tell the builder the ranges of open shapes, for which it then looks for kernels."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    opened = [tensor for tensor in inputs if -1 in tuple(tensor.shape)]
    if not opened:
        return
    try:
        ranges = json.loads((source.parent / RANGES).read_text(encoding="utf-8"))
        found = {tensor.name: [tuple(map(int, shape)) for shape in ranges[tensor.name]] for tensor in opened}
    except (OSError, ValueError, TypeError, KeyError) as error:
        names = ", ".join(tensor.name for tensor in opened)
        raise TargetError(
            f"{place}: {source}: open shapes of {names} without their ranges; got no {RANGES} beside it that has them "
            f"({error}), expected the smallest, usual and largest of each. Name them in the recipe: "
            "shapes: {batch: [1, 4], size: [512, 768]}."
        ) from error
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in found.items():
        profile.set_shape(name, least, usual, most)
    if config.add_optimization_profile(profile) < 0:
        raise TargetError(f"{place}: {source}: ranges that are none; got {found}. Give rising numbers in shapes.")


class Log:
    """Messages of the library: those that are read afterwards."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []
        self.errors: list[str] = []

    def note(self, severity: str, message: str) -> None:
        """Keep a message."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)
        elif severity == "WARNING":
            self.warnings.append(message)
        if message.lstrip().startswith("Layers:") or "(Sparsity)" in message or "memor" in message.lower():
            self.messages.append(message)

    def last_error(self) -> str:
        """Return the last error, which is the one that stopped the work."""
        return self.errors[-1] if self.errors else "it said nothing."


def logger_of(library: Any, log: Log) -> trt.ILogger:
    """Return a logger of the library that keeps its messages in `log`."""

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.note(severity.name, message)

    return Logger()


def _monitor(library: Any, progress: Callable[[float], None]) -> trt.IProgressMonitor:
    """Return a monitor that tells the done fraction of the outermost phase that counts its steps."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.outermost, self.steps = "", 1

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost, self.steps = phase, max(steps, 1)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.outermost:
                progress((step + 1) / self.steps)
            return True

        def phase_finish(self, phase: str) -> None:
            if phase == self.outermost:
                progress(1.0)

    return Monitor()


def _network_flags(library: Any) -> int:
    """Return flags for a network whose types are the graph's: TensorRT 11 knows no other, 10 has to be told."""
    flags = library.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def _configure(library: Any, config: trt.IBuilderConfig, order: Order, place: str) -> trt.ITimingCache | None:
    """Put an order into a builder's configuration; return its timing cache, which has to outlive the build."""
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    if order.workspace_mib is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, order.workspace_mib * _MIB)
    if order.optimization is not None:
        config.builder_optimization_level = order.optimization
    flags = {
        library.BuilderFlag.SPARSE_WEIGHTS: order.sparse,
        library.BuilderFlag.REFIT: order.refit == "all",
        library.BuilderFlag.REFIT_IDENTICAL: order.refit == "identical",
        library.BuilderFlag.STRIP_PLAN: order.strip,
        library.BuilderFlag.VERSION_COMPATIBLE: order.version_compatible,
    }
    for flag, wanted in flags.items():
        if wanted:
            config.set_flag(flag)
    if order.hardware != "this":
        level = _member(library.HardwareCompatibilityLevel, _LEVELS[order.hardware], place)
        config.hardware_compatibility_level = level
    if order.capabilities:
        _build_for(library, config, order.capabilities, place)
    if order.timing_cache is None:
        return None
    cache = config.create_timing_cache(order.timing_cache)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise TargetError(
            f"{place}: timing_cache: it is of another version or another device; got one that does not fit, expected "
            "one of this. Leave it out, and keep the one that the build writes."
        )
    return cache


def _build_for(library: Any, config: Any, capabilities: tuple[str, ...], place: str) -> None:
    """Build for devices that are named and not for the one that is here, which TensorRT-RTX alone can."""
    if not hasattr(library, "ComputeCapability"):
        raise TargetError(
            f"{place}: builds for the device that is here alone; got {', '.join(capabilities)}. Use the target "
            "tensorrt-rtx, or build on that device."
        )
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        name = f"SM{capability.replace('.', '')}"
        config.set_compute_capability(_member(library.ComputeCapability, name, place), index)


def _member(kind: Any, name: str, place: str) -> Any:
    """Return a member of one of the library's enumerations, whose numbers change between versions."""
    if not hasattr(kind, name):
        known = ", ".join(kind.__members__)
        raise TargetError(f"{place}: this version has no {kind.__name__}.{name}; it has {known}. Leave the option out.")
    return getattr(kind, name)


def _said(count: int | None) -> str:
    return "unknown" if count is None else str(count)


def _name(library: Any) -> str:
    return "TensorRT-RTX" if "rtx" in library.__name__ else "TensorRT"

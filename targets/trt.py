"""TensorRT and TensorRT-RTX: ONNX to a plan for NVIDIA devices, built with the same calls.

TensorRT builds and runs on the device that is here. TensorRT-RTX builds on any machine, for the RTX devices that are
named, and runs where one of them is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from targets.base import Capabilities, Evidence, Profiled, TargetError, TargetMissing, installed_version, require
from targets.nvidia import Gpu, find_gpu
from targets.trt_build import PLAN, Order, Told, build

_MAJORS, _CUDAS = (10, 11), (13, 12)
_SCHEMES = ("int8", "int8-weights", "fp16", "bf16", "fp8")
_SPARSE_CAPABILITY, _FP8_CAPABILITY = (8, 0), (8, 9)
RTX_DEVICES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX builds for; 7.5 in a build of its own."""


@dataclass(frozen=True)
class TrtOptions:
    """Options of the target ``tensorrt``. Types are the graph's: quantize with fp16, int8 or fp8 for a fast engine.

    Attributes:
        sparse: let the builder choose kernels for weights with two zeros in four.
        workspace_mib: scratch memory that a kernel may take, in MiB; None for all that the device has.
        optimization: how long the builder looks for kernels, from 0 to 5; None for its own choice.
        timing_cache: file with the times of an earlier build on the same version and device, so that the same kernels
            are chosen; its digest is in the evidence. Without one, ``timing.cache`` in the engine's folder is new.
        refit: weights can be put in later: ``identical`` ones at full speed, or ``all``, others too.
        strip: leave the weights out of the plan, to be put in from the ONNX file on the device; with ``refit``.
        version_compatible: later versions of TensorRT open the engine too; it may be slower.
        hardware: other devices that open it: none beside ``this``, ``ampere`` and newer, or of the
            ``same-capability``; it may be slower.
        cuda_graph: record the call once and replay it.
    """

    sparse: bool = True
    workspace_mib: int | None = field(default=None, metadata={"minimum": 1})
    optimization: int | None = field(default=None, metadata={"minimum": 0, "maximum": 5})
    timing_cache: str | None = None
    refit: Literal["none", "identical", "all"] = "none"
    strip: bool = False
    version_compatible: bool = False
    hardware: Literal["this", "ampere", "same-capability"] = "this"
    cuda_graph: bool = False


@dataclass(frozen=True)
class RtxOptions:
    """Options of the target ``tensorrt-rtx``. Types are the graph's: quantize with fp16, int8 or fp8.

    Attributes:
        devices: compute capabilities of the devices that the engine is for; more of them make it larger.
        sparse: tell the builder that weights may have two zeros in four. Builds with and without it were seen to be
            equal, so this is no proof of sparse kernels.
        workspace_mib: scratch memory that a kernel may take, in MiB; None for all that the device has.
    """

    devices: tuple[Literal["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"], ...] = ("8.6", "8.9", "12.0")
    sparse: bool = True
    workspace_mib: int | None = field(default=None, metadata={"minimum": 1})


class _Plans(ABC):
    """What both products share."""

    type: str
    product: str
    module: str
    distribution: str
    needs: tuple[str, ...]
    engine_file = PLAN
    schemes = _SCHEMES
    rounds_results = True
    float_rivals = ("fp16",)  # its engines compute in the graph's types, and nobody ships the one in 32 bits

    @property
    def _place(self) -> str:
        return f"target {self.type}"

    @property
    def _install(self) -> str:
        return f"pip install 'diffusion-exporter[{self.type}]'"

    def _gpu(self) -> Gpu | str:
        """Return the GPU that is here, or in one sentence why there is none that this library can use."""
        gpu = find_gpu()
        needed = next((cuda for cuda in _CUDAS if installed_version(f"{self.distribution}_cu{cuda}")), None)
        if isinstance(gpu, Gpu) and needed is not None and _major(gpu.cuda) < needed:
            return (
                f"the NVIDIA driver is too old: it serves CUDA {gpu.cuda}, expected {needed} or newer for the "
                f"{self.product} that is installed. Update the driver, or install "
                f"{self.distribution}_cu{_major(gpu.cuda)}."
            )
        return gpu

    def _library(self) -> Any:
        return require(self.module, self._place, self._install)

    def _here(self, version: str, *, builds: bool, gpu: Gpu | str) -> Capabilities:
        runs = isinstance(gpu, Gpu)
        name = gpu.name if isinstance(gpu, Gpu) else ""
        reason = "" if isinstance(gpu, Gpu) else gpu
        return Capabilities(builds, runs, version, name, ("f32", "bf16", "f16"), self._install, reason)

    def compile(self, source: Path, out: Path, options: Any) -> None:
        """Build a plan; see `compile_telling`."""
        self.compile_telling(source, out, options, None)

    @abstractmethod
    def compile_telling(self, source: Path, out: Path, options: Any, progress: Callable[[float], None] | None) -> None:
        """Build a plan and tell how far it is."""

    def join(self, parts: Sequence[Path], out: Path, options: Any) -> None:
        """Refuse: every plan holds weights of its own.

        Raises:
            TargetError: always.
        """
        raise TargetError(
            f"{self._place}: a plan holds the weights of one graph; got {len(parts)} graphs of a schedule that share "
            "theirs, expected one. Leave the schedule out for this target."
        )

    def open(self, engine: Path, options: Any) -> Profiled:
        """Load an engine's folder on the GPU that is here; refused before loading where it does not fit.

        Raises:
            TargetMissing: there is no GPU.
            TargetError: the plan is of another device or version.
        """
        gpu = self._gpu()
        if isinstance(gpu, str):
            raise TargetMissing(f"{self._place}: {engine}: built, but {gpu} Run it on a machine that has one.")
        running = f"{self.product} {installed_version(self.distribution)}"
        check_fits(Told.load(engine), gpu, f"{self._place}: {engine}", running)
        from targets.trt_session import CudaSession

        graph = bool(getattr(options, "cuda_graph", False))
        return CudaSession(self._library(), engine, named(gpu), self._place, graph=graph)

    def built(self, engine: Path) -> Evidence:
        """Return what is known of an engine without running it."""
        told = Told.load(engine)
        return told.evidence(told.device, told.layers)


class TensorRt(_Plans):
    """Builds and runs on the NVIDIA device of this machine."""

    type = "tensorrt"
    product = "TensorRT"
    module = "tensorrt"
    distribution = "tensorrt"
    needs = ("tensorrt", "cuda-bindings")
    options = TrtOptions

    def capabilities(self) -> Capabilities:
        """Say what this machine can do: engines are made of times taken on the GPU, so none are built without."""
        version, gpu = installed_version(self.distribution), self._gpu()
        if version is None:
            return Capabilities(False, False, None, "", (), self._install, "'tensorrt' is not installed.")
        if _major(version) not in _MAJORS:
            reason = f"'tensorrt' is of another major version; got {version}, expected {_majors()}."
            return Capabilities(False, False, version, "", (), "pip install 'tensorrt>=10.13,<12'", reason)
        return self._here(version, builds=isinstance(gpu, Gpu), gpu=gpu)

    def check(self, options: TrtOptions) -> None:
        """Raise TargetMissing or TargetError when these options cannot be honoured on this machine."""
        here = self.capabilities()
        if not here.available:
            raise TargetMissing(f"{self._place}: {here.reason} Run: {here.install}")
        gpu = find_gpu()
        if options.sparse and isinstance(gpu, Gpu) and _numbers(gpu.capability) < _SPARSE_CAPABILITY:
            raise TargetMissing(
                f"{self._place}: sparse: {gpu.name} has compute capability {gpu.capability}, and sparse kernels need "
                "8.0. Write sparse: false, or use another device."
            )
        if options.strip and options.refit == "none":
            raise TargetError(f"{self._place}: strip: got true without refit, expected refit: identical. Write both.")
        if options.timing_cache is not None and not Path(options.timing_cache).is_file():
            raise TargetError(
                f"{self._place}: timing_cache: got {options.timing_cache}, expected a file. Leave it out for a new one."
            )

    def refused(self, options: TrtOptions) -> dict[str, str]:
        """Return the schemes that the device which is here does not compute in."""
        del options
        gpu = find_gpu()
        return _refused((gpu.capability,)) if isinstance(gpu, Gpu) else {}

    def compile_telling(
        self, source: Path, out: Path, options: TrtOptions, progress: Callable[[float], None] | None
    ) -> None:
        """Build a plan for the device that is here.

        Raises:
            TargetMissing: TensorRT or the GPU is not here.
            TargetError: the model is refused, or memory was too short to try a kernel.
        """
        self.check(options)
        gpu = find_gpu()
        assert isinstance(gpu, Gpu)
        given = b"" if options.timing_cache is None else Path(options.timing_cache).read_bytes()
        order = Order(
            sparse=options.sparse,
            workspace_mib=options.workspace_mib,
            optimization=options.optimization,
            refit=options.refit,
            strip=options.strip,
            timing_cache=given,
            version_compatible=options.version_compatible,
            hardware=options.hardware,
        )
        build(self._library(), source, out, order, named(gpu), progress)


class TensorRtRtx(_Plans):
    """Builds for RTX devices on any machine, and runs where one of them is."""

    type = "tensorrt-rtx"
    product = "TensorRT-RTX"
    module = "tensorrt_rtx"
    distribution = "tensorrt_rtx"
    needs = ("tensorrt_rtx", "cuda-bindings")
    options = RtxOptions

    def capabilities(self) -> Capabilities:
        """Say what this machine can do: build always, run on an RTX device."""
        version, gpu = installed_version(self.distribution), self._gpu()
        if version is None:
            return Capabilities(False, False, None, "", (), self._install, "'tensorrt_rtx' is not installed.")
        if isinstance(gpu, Gpu) and gpu.capability not in RTX_DEVICES:
            gpu = f"TensorRT-RTX does not run on {gpu.name} (compute capability {gpu.capability})."
        return self._here(version, builds=True, gpu=gpu)

    def check(self, options: RtxOptions) -> None:
        """Raise TargetMissing or TargetError when these options cannot be honoured on this machine."""
        self._library()
        unknown = [device for device in options.devices if device not in RTX_DEVICES]
        if unknown or not options.devices:
            got = ", ".join(unknown) or "none"
            raise TargetError(f"{self._place}: devices: got {got}, expected some of {', '.join(RTX_DEVICES)}.")
        if "7.5" in options.devices and len(set(options.devices)) > 1:
            raise TargetError(
                f"{self._place}: devices: got {', '.join(options.devices)}, expected 7.5 alone: its engines are of "
                "another kind. Make a second target for it."
            )

    def refused(self, options: RtxOptions) -> dict[str, str]:
        """Return the schemes that a named device does not compute in."""
        return _refused(options.devices)

    def compile_telling(
        self, source: Path, out: Path, options: RtxOptions, progress: Callable[[float], None] | None
    ) -> None:
        """Build a plan for the named devices; none of them has to be here.

        Raises:
            TargetMissing: TensorRT-RTX is not here.
            TargetError: the model is refused.
        """
        self.check(options)
        order = Order(sparse=options.sparse, workspace_mib=options.workspace_mib, capabilities=options.devices)
        build(self._library(), source, out, order, f"RTX devices {', '.join(options.devices)}", progress)


def check_fits(told: Told, gpu: Gpu, place: str, running: str) -> None:
    """Refuse a plan of another version or another device before it is loaded.

    Args:
        told: of its build.
        gpu: that is here.
        place: how the message begins.
        running: the library that would open it, with its version.

    Raises:
        TargetError: saying what would help.
    """
    order = told.order
    if told.library != running and not order.version_compatible:
        raise TargetError(
            f"{place}: an engine of another version; got one of {told.library}, expected {running}. Compile it here, "
            "from the ONNX file, or with version_compatible: true."
        )
    if order.capabilities and gpu.capability not in order.capabilities:
        raise TargetError(
            f"{place}: an engine for other devices; got one for {', '.join(order.capabilities)}, expected "
            f"{gpu.capability} ({gpu.name}). Compile it with devices: [{gpu.capability}], on any machine."
        )
    old = order.hardware == "ampere" and _numbers(gpu.capability) < _SPARSE_CAPABILITY
    other = order.hardware == "same-capability" and not told.device.endswith(f"({gpu.capability})")
    own = not order.capabilities and order.hardware == "this" and told.device != named(gpu)
    if old or other or own:
        raise TargetError(
            f"{place}: an engine of another device; got one of {told.device}, expected {named(gpu)}. Compile it here, "
            "from the ONNX file, or with hardware: ampere or same-capability."
        )


def _refused(capabilities: Sequence[str]) -> dict[str, str]:
    """Return the schemes that one of these compute capabilities has no units for."""
    old = [capability for capability in capabilities if _numbers(capability) < _FP8_CAPABILITY]
    return {"fp8": f"compute capability {old[0]} has no units for it, 8.9 and newer have"} if old else {}


def named(gpu: Gpu) -> str:
    """Return how a device is written down in an engine."""
    return f"{gpu.name} ({gpu.capability})"


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _majors() -> str:
    return " or ".join(map(str, _MAJORS))


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))

"""A package that Core ML runs, and what its compute plan says of every operation; on macOS only.

What crosses the border to Core ML, by the sources of coremltools' bindings: arrays of int32, float32 and float64 that
are writable, since their memory is handed over as it is; 16-bit results come back as float32.
"""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from targets.base import Array, Layer, TargetError, Timed
from targets.coreml import PLACE, coremltools

if TYPE_CHECKING:
    from targets.mil.package import Operation, Package

UNITS: Mapping[str, str] = {
    "all": "ALL",
    "cpu-and-neural-engine": "CPU_AND_NE",
    "cpu-and-gpu": "CPU_AND_GPU",
    "cpu": "CPU_ONLY",
}
"""Word of the options -> name in coremltools' ``ComputeUnit``."""
NEURAL_ENGINE = "Neural Engine"
ESTIMATED = "share of a call by Core ML's own estimate"
"""Kernel of the layers of a profile, which nobody has timed one by one."""
UNKNOWN = "unknown"
_DEVICES = {
    "MLCPUComputeDevice": "CPU",
    "MLGPUComputeDevice": "GPU",
    "MLNeuralEngineComputeDevice": NEURAL_ENGINE,
}
_SYSTEMS = {"iOS16": "macOS 13", "iOS17": "macOS 14", "iOS18": "macOS 15"}
_TAKEN = ("int32", "float32", "float64")


@dataclass(frozen=True)
class Planned:
    """An operation, and what Core ML plans for it.

    Attributes:
        layer: its type and precision by the program, its device by the plan.
        supported: devices that could run it.
        cost: its share of a whole call, by Core ML's own estimate; None where it gives none.
    """

    layer: Layer
    supported: tuple[str, ...] = ()
    cost: float | None = None


class OnDevice:
    """A package that Core ML runs.

    Attributes:
        package: as our own reader has it.
        inputs: names.

    Args:
        package: as our own reader has it.
        modules: operation -> path of its torch module.
        units: which units Core ML may choose from, one of `UNITS`.

    Raises:
        TargetMissing: coremltools is not installed.
        TargetError: Core ML cannot compile or load it.
    """

    def __init__(self, package: Package, modules: Mapping[str, str], units: str) -> None:
        self.package, self._modules, self._units = package, modules, units
        self._place = f"{PLACE}: {package.path}"
        self.inputs = tuple(feature.spec.name for feature in package.inputs)
        library: Any = coremltools()
        self._library, self._chosen = library, getattr(library.ComputeUnit, UNITS[units])
        folder = tempfile.mkdtemp(prefix="exporter-coreml-")
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._compiled = str(Path(folder) / f"{package.path.stem}.mlmodelc")
        self._model = self._loaded()
        self._fed: dict[str, Array] = {}
        self._plan: tuple[Planned, ...] | None = None
        self._no_plan = ""

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run once.

        Raises:
            TargetError: Core ML fails, or answers something else than the program promises.
        """
        # Kept until the next call: Core ML lets go of its inputs at a time of its own, from a thread of its own.
        self._fed = {name: self._handed(name, array) for name, array in feeds.items()}
        try:
            answers = self._model.predict(dict(self._fed))
        except (RuntimeError, ValueError, TypeError) as error:
            raise TargetError(
                f"{self._place}: Core ML fails to run it on {self._units}; got: {_reason(error)}. Open it with "
                "compute_units: cpu to see whether a unit is the cause."
            ) from error
        return {feature.spec.name: self._answer(feature.spec.name, answers) for feature in self.package.outputs}

    def layers(self) -> tuple[Layer, ...]:
        """Return the operations of the program, with the devices that Core ML plans for them."""
        return tuple(item.layer for item in self._planned())

    def notes(self) -> tuple[str, ...]:
        """Return how many operations each device gets, and what loading took."""
        found = self._planned()
        counts = Counter(item.layer.device for item in found).most_common()
        where = ", ".join(f"{device} {count}" for device, count in counts)
        told = [f"where Core ML plans to run operations: {where}; types are those that the program declares"]
        if self._no_plan:
            told = [f"where operations run is not known: {self._no_plan}"]
        elsewhere = [item for item in found if NEURAL_ENGINE in item.supported and item.layer.device != NEURAL_ENGINE]
        if elsewhere:
            told.append(f"the {NEURAL_ENGINE} could run {len(elsewhere)} of those that are planned elsewhere")
        compiled, loaded = self._took
        told.append(
            f"Core ML compiled it in {compiled:.0f} ms and loaded it in {loaded:.0f} ms; every opening does both"
        )
        return tuple(told)

    def profile(self, feeds: Mapping[str, Array], calls: int) -> tuple[Timed, ...]:
        """Return the time of whole calls, shared out by Core ML's own estimate of what operations cost.

        Operations without an estimate are left out; only whole calls are timed.

        Raises:
            TargetError: there is no estimate.
        """
        costs = [(item.layer, item.cost) for item in self._planned() if item.cost is not None]
        total = sum(cost for _, cost in costs)
        if not total > 0:
            raise TargetError(
                f"{self._place}: got no estimate of any operation's cost from Core ML, expected some. "
                f"{self._no_plan or 'Profile whole components instead.'}"
            )
        self(feeds)
        started = time.perf_counter()
        for _ in range(calls):
            self(feeds)
        whole = 1e3 * (time.perf_counter() - started) / calls
        # Shares of a whole call; what they lack to it belongs to operations without an estimate, or to none.
        return tuple(Timed(replace(layer, kernel=ESTIMATED), whole * cost / max(total, 1.0)) for layer, cost in costs)

    def close(self) -> None:
        """Free it, and remove what was compiled."""
        self._model, self._fed, self._plan = None, {}, ()
        self._remove()

    def _loaded(self) -> Any:
        """Compile and load it; both are timed."""
        started = time.perf_counter()
        try:
            self._library.models.utils.compile_model(str(self.package.path.resolve()), self._compiled)
            compiled = time.perf_counter()
            model = self._library.models.CompiledMLModel(self._compiled, compute_units=self._chosen)
        except Exception as error:  # its Python part raises plain ones
            self._remove()
            needed = _SYSTEMS.get(self.package.deployment, "a newer macOS")
            raise TargetError(
                f"{self._place}: Core ML cannot load it for {self._units}; got: {_reason(error)}. A package for "
                f"{self.package.deployment} needs {needed} or newer; compile for an older deployment, or open it "
                "with compute_units: cpu."
            ) from error
        self._took = (1e3 * (compiled - started), 1e3 * (time.perf_counter() - compiled))
        return model

    def _handed(self, name: str, array: Array) -> Array:
        """Return an input as the bindings take it: they refuse read-only memory and 16-bit floats."""
        found = np.require(array, np.float32 if array.dtype == np.float16 else array.dtype, ["C", "W"])
        if found.dtype.name not in _TAKEN:
            raise TargetError(
                f"{self._place}: input '{name}': got {found.dtype}, expected one of {', '.join(_TAKEN)}. Cast it."
            )
        return found

    def _answer(self, name: str, answers: Mapping[str, Any]) -> Array:
        found = np.asarray(answers.get(name))
        if found.dtype.kind not in "fiub":
            got = ", ".join(sorted(answers)) or "nothing"
            raise TargetError(
                f"{self._place}: output '{name}': got {got}, expected numbers of that name. Compile the engine again."
            )
        return found

    def _planned(self) -> tuple[Planned, ...]:
        if self._plan is None:
            source: Any = self._library.models.compute_plan.MLComputePlan
            try:
                plan = source.load_from_path(path=self._compiled, compute_units=self._chosen)
            except (RuntimeError, ValueError) as error:
                self._no_plan = f"Core ML tells no plan, which it does from macOS 14.4 on ({_reason(error)})"
                plan = None
            self._plan = planned(self.package, self._modules, plan)
        return self._plan


def planned(package: Package, modules: Mapping[str, str], plan: Any) -> tuple[Planned, ...]:
    """Put together what a program declares and what Core ML plans, by the names of what operations make.

    Args:
        package: the program.
        modules: operation -> path of its torch module.
        plan: coremltools' ``MLComputePlan`` of it; None where there is none.

    Returns:
        The program's operations in their order, then those that only the plan has and gives a device.

    Raises:
        TargetError: the plan is of something else than an ML Program.
    """
    told = {} if plan is None else {item.outputs[0].name: item for item in _operations(plan, package) if item.outputs}
    found = [_joined(own, modules.get(own.name, ""), told, plan) for own in package.operations]
    added = [_planned(Layer(name, _kind(item), UNKNOWN, "", ""), item, plan) for name, item in told.items()]
    return (*found, *(item for item in added if item.layer.device != UNKNOWN and item.layer.type != "const"))


def _joined(own: Operation, module: str, told: dict[str, Any], plan: Any) -> Planned:
    """Return what is known of an operation, and take it from what the plan tells."""
    layer = Layer(own.name, own.type, own.precision, "", UNKNOWN, module)
    named = [told.pop(spec.name) for spec in own.outputs if spec.name in told]
    return _planned(layer, named[0], plan) if named else Planned(layer)


def _planned(layer: Layer, operation: Any, plan: Any) -> Planned:
    usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
    cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
    device = UNKNOWN if usage is None else _device(usage.preferred_compute_device)
    supported = () if usage is None else tuple(_device(item) for item in usage.supported_compute_devices)
    return Planned(replace(layer, device=device), supported, None if cost is None else float(cost.weight))


def _operations(plan: Any, package: Package) -> Sequence[Any]:
    program = plan.model_structure.program
    if program is None or package.function not in program.functions:
        got = "no ML Program" if program is None else f"functions {', '.join(sorted(program.functions))}"
        raise TargetError(
            f"{PLACE}: {package.path}: compute plan: got {got}, expected an ML Program with '{package.function}'. "
            "Compile the engine again."
        )
    operations: Sequence[Any] = program.functions[package.function].block.operations
    return operations


def _device(device: Any) -> str:
    name = type(device).__name__
    return _DEVICES.get(name, name) if device is not None else UNKNOWN


def _kind(operation: Any) -> str:
    """Return the type of an operation without the system that it is of, as in ``ios17.conv``."""
    return str(operation.operator_name).rpartition(".")[2]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300].rstrip(".") if lines else type(error).__name__


@functools.cache
def machine_name() -> str:
    """Return what macOS calls the processor, such as ``Apple M2``; its architecture where it does not say."""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        told = ""
    return told or platform.machine()

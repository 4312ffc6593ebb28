"""Core ML's native binding, played by our evaluator: the library's own Python runs above it, as it would on a Mac.

What it is strict about is what the sources of the binding are strict about: arrays whose memory may be written, of
int32, float32 or float64; 16-bit results come back as float32; scalars have one axis. The plan is made up.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

from targets.base import TargetError
from targets.mil.evaluator import Evaluator
from targets.mil.package import Operation, read_package

HEAVY = ("conv", "linear")
WITHOUT_COST = "cast"


class Proxy:
    """``libcoremlpython._MLModelProxy``."""

    opened: ClassVar[list[tuple[str, str]]] = []
    """File and units of all that was loaded."""
    refuses: ClassVar[str] = ""
    """What loading and the plan fail with."""
    fails: ClassVar[str] = ""
    """What predictions fail with."""
    tells_plan: ClassVar[bool] = True
    folder: ClassVar[Path]
    """Where it compiles to."""

    def __init__(self, path: str, units: str, function: str, hints: dict[str, str], asset: object) -> None:
        assert path.endswith(".mlmodelc")
        assert (function, hints, asset) == ("", {}, None)
        if type(self).refuses:
            raise RuntimeError(type(self).refuses)
        type(self).opened.append((path, units))
        self._evaluator = Evaluator(Path(path))

    @staticmethod
    def compileModel(path: str) -> str:  # noqa: N802 - its name
        return str(shutil.copytree(path, Path(tempfile.mkdtemp(dir=Proxy.folder)) / "compiled.mlmodelc"))

    @staticmethod
    def get_compute_plan(path: str, units: str) -> Any:
        from coremltools.models.compute_plan import MLComputePlan

        if not Proxy.tells_plan:
            raise RuntimeError("MLComputePlan is only available on macOS >= 14.4")
        return MLComputePlan(PlanProxy(Path(path), units))

    def predict(self, data: dict[str, np.ndarray], state: None) -> dict[str, np.ndarray]:
        assert state is None
        if type(self).fails:
            raise RuntimeError(type(self).fails)
        fed = {}
        for spec in self._evaluator.inputs:
            array = data[spec.name]
            if not array.flags.writeable or array.dtype not in (np.int32, np.float32, np.float64):
                raise RuntimeError("value type not convertible")
            fed[spec.name] = np.ascontiguousarray(array, spec.dtype)
        try:
            found = self._evaluator(fed)
        except TargetError as error:
            raise RuntimeError(str(error)) from error
        halves = {
            name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in found.items()
        }
        return {name: np.atleast_1d(array) for name, array in halves.items()}


class DeviceProxy:
    """``_MLCPUComputeDeviceProxy`` and the like."""


class PlanProxy:
    """``_MLComputePlanProxy``: layers with weights go to the fastest unit that they may, the rest to the CPU."""

    def __init__(self, path: Path, units: str) -> None:
        from coremltools.models import compute_device, compute_plan

        self._plan = compute_plan
        units = "CPU_AND_GPU_AND_NE" if units == "ALL" else units
        kinds = {"CPU": "MLCPUComputeDevice", "GPU": "MLGPUComputeDevice", "NE": "MLNeuralEngineComputeDevice"}
        self._may = [getattr(compute_device, name)(DeviceProxy()) for key, name in kinds.items() if key in units]
        operations = [self._operation(item) for item in read_package(path).operations]
        operations[:0] = [self._named("const", "weight")]
        operations.append(self._named("ios17.reshape", "made_by_the_compiler"))
        block = compute_plan.MLModelStructureProgramBlock([], operations, [])
        functions = {"main": compute_plan.MLModelStructureProgramFunction([], block)}
        program = compute_plan.MLModelStructureProgram(functions)
        self.model_structure = compute_plan.MLModelStructure(None, program, None)

    def _operation(self, item: Operation) -> Any:
        return self._named(f"ios17.{item.type}", *(spec.name for spec in item.outputs))

    def _named(self, kind: str, *names: str) -> Any:
        plan = self._plan
        outputs = [
            plan.MLModelStructureProgramNamedValueType(name, plan.MLModelStructureProgramValueType()) for name in names
        ]
        return plan.MLModelStructureProgramOperation({}, kind, outputs, [], None)

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        kind = operation.operator_name.rpartition(".")[2]
        if kind == "const" or kind.startswith("constexpr"):
            return None
        return self._plan.MLComputePlanDeviceUsage(self._may[-1 if kind in HEAVY else 0], self._may)

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        kind = operation.operator_name.rpartition(".")[2]
        if kind in ("const", WITHOUT_COST) or kind.startswith("constexpr"):
            return None
        return self._plan.MLComputePlanCost(0.2 if kind in HEAVY else 0.001)


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> type[Proxy]:
    """Put the stand-in where the library looks for its binding, and have the target take this for a Mac.

    Args:
        monkeypatch: takes it away again.
        folder: where the stand-in compiles to.
    """
    import coremltools
    from coremltools.models import _compiled_model, compute_device, compute_plan

    native = ModuleType("coremltools.libcoremlpython")
    native._MLModelProxy = Proxy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, native.__name__, native)
    for module in (_compiled_model, compute_plan, coremltools.models.utils):
        monkeypatch.setattr(module, "_MLModelProxy", Proxy, raising=False)
    for module in (_compiled_model, coremltools.models.utils):
        monkeypatch.setattr(module, "_macos_version", lambda: (15, 1))
    monkeypatch.setattr(compute_plan, "_MLComputePlanProxy", PlanProxy)
    for name in ("CPU", "GPU", "NeuralEngine"):
        monkeypatch.setattr(compute_device, f"_ML{name}ComputeDeviceProxy", DeviceProxy)
    monkeypatch.setattr("targets.coreml.runs_core_ml", lambda: True)
    fresh = {"opened": [], "refuses": "", "fails": "", "tells_plan": True, "folder": folder}
    for name, value in fresh.items():
        monkeypatch.setattr(Proxy, name, value, raising=False)
    return Proxy

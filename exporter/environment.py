"""The machine and the versions of libraries that numbers of a run belong to."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "coremltools",
    "torch-pruning",
    "torchmetrics",
    "numpy",
)


def machine() -> dict[str, Any]:
    """Return what numbers of this machine depend on, torch's own settings left out."""
    return {
        "os": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_mib": psutil.virtual_memory().total >> 20,
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
    }


def environment() -> dict[str, Any]:
    """Return what numbers of a run on this machine depend on."""
    import torch  # hosts that only measure have none

    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {**machine(), "torch_threads": torch.get_num_threads(), "cuda": cuda}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

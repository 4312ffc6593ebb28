"""Runtimes that turn an ONNX file into an engine. Nothing is imported until a target is chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from targets.base import Target

TARGETS = {
    "coreml": "targets.coreml:CoreMl",
    "onnxruntime": "targets.ort:OnnxRuntime",
    "openvino": "targets.ov:OpenVino",
    "tensorrt": "targets.trt:TensorRt",
    "tensorrt-rtx": "targets.trt:TensorRtRtx",
    "torch-cuda": "targets.torch_cuda:TorchCuda",
}
"""The registry: what a recipe calls ``type`` -> ``module:Class``."""


def target(name: str) -> Target:
    """Return the target of this type; KeyError for a name that is not in `TARGETS`."""
    module, _, attribute = TARGETS[name].partition(":")
    made: Target = getattr(import_module(module), attribute)()
    return made


__all__ = ["TARGETS", "target"]

"""ONNX Runtime's own format for phones: ``model.ort``, and which operators a reduced build of the runtime must have."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from targets.base import TargetError

MODEL_FILE = "model.ort"
CONFIG_FILE = "required_operators_and_types.config"
_LIMIT = 2**31  # bytes; offsets in the format's flat buffers are signed 32-bit numbers
_F32 = 4
_NOT_PORTABLE = "NchwcTransformer"
"""Rewrites convolutions into a layout of x86 processors; the format's own converter leaves it out too."""


def write_ort(source: Path, out: Path, save: Callable[[Path, str], None], tools: Any) -> None:
    """Write `MODEL_FILE` and `CONFIG_FILE` into a folder.

    The config is what ``build.py --include_ops_by_config`` of ONNX Runtime takes, with
    ``--enable_reduced_operator_type_support`` where unused element types shall be left out as well.

    Args:
        source: an ONNX file, its external data beside it.
        out: an existing folder.
        save: opens the source with one optimiser left out and writes the optimised graph in this format.
        tools: the module ``onnxruntime.tools.ort_format_model``.

    Raises:
        TargetError: the weights are too large for the format.
    """
    size = sum(_bytes_of_weights(source))
    if size >= _LIMIT:
        raise TargetError(
            f"target onnxruntime: {source}: too large for format: ort; got {size / 1e9:.2f} GB of weights in f32, "
            f"expected less than {_LIMIT / 1e9:.2f} GB. Keep less (keep_ratio), or write format: onnx."
        )
    path = out / MODEL_FILE
    save(path, _NOT_PORTABLE)
    config = out / CONFIG_FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the tool leaves the file it reads to the garbage collector
        tools.create_config_from_models([path], config, True)
    # Its first lines name this machine's paths: equal models must give equal files.
    lines = [line for line in config.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    config.write_text("\n".join([f"# Operators of {MODEL_FILE}", *lines, ""]), encoding="utf-8")


def _bytes_of_weights(source: Path) -> Iterator[int]:
    """Yield the bytes of each weight as the runtime will store it: 16-bit ones widened, as their casts are folded."""
    import onnx

    for tensor in onnx.load(str(source), load_external_data=False).graph.initializer:
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        floating = tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
        yield math.prod(tensor.dims) * (_F32 if floating else width)

"""What a compiling process tells its parent is raised there as the target raised it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from targets.base import TargetError, TargetMissing
from targets.build import raise_told


def built(source: Path, out: Path, options: dict[str, object]) -> str:
    words = ["targets.ort:OnnxRuntime", json.dumps(options), str(source), str(out)]
    command = [sys.executable, "-W", "ignore", "-m", "targets.build", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_an_engine_is_built_in_another_process(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Neg", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opset), tmp_path / "model.onnx")
    (tmp_path / "out").mkdir()
    raise_told(built(tmp_path / "model.onnx", tmp_path / "out", {}))
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_failures_arrive_as_they_were_raised(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(TargetError, match="Export it again"):
        raise_told(built(tmp_path / "model.onnx", tmp_path, {}))
    with pytest.raises(TargetError, match="threads: got 0"):
        raise_told(built(tmp_path / "model.onnx", tmp_path, {"threads": 0}))
    with pytest.raises(TargetMissing, match="no such device"):
        raise_told('a library said this\n{"missing": "no such device"}\n')
    with pytest.raises(OSError, match="No space left") as caught:
        raise_told('{"os": [28, "No space left on device", "/out/file"]}\n')
    assert caught.value.errno == 28

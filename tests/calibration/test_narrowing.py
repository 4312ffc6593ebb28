"""Graphs in 16 bits, held to torch's own half precision, and what stays in float because it overflows there."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import checker
from onnx.reference import ReferenceEvaluator
from torch import nn

from calibration.errors import CalibrationError
from calibration.narrowing import NEAR, narrow, overflowing
from calibration.statistics import Study
from targets.ort import OnnxRuntime

CONV = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def graph(tiny_graph: Path) -> Path:
    return tiny_graph


@pytest.fixture
def call() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(3).standard_normal
    return {
        "sample": draw((2, 4, 8, 8)).astype(np.float32),
        "timestep": np.array(501.0, np.float32),
        "encoder_hidden_states": draw((2, 32, 32)).astype(np.float32),
    }


def saved(model: ir.Model, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    ir.save(model, folder / "model.onnx", external_data="model.onnx_data")
    return folder / "model.onnx"


def answer(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = OnnxRuntime().open_as_written(path)
    try:
        return session(feeds)["out_sample"]
    finally:
        session.close()


def psnr(wanted: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10(float(np.ptp(wanted)) ** 2 / np.mean((wanted - got) ** 2)))


def loud(graph: Path, factor: float, folder: Path) -> Path:
    """The same graph, one convolution so much louder, and what follows it divided again: equal in float."""
    model = ir.load(graph)
    for name in (f"{CONV}.weight", f"{CONV}.bias"):
        held = model.graph.initializers[name]
        held.const_value = ir.tensor(held.const_value.numpy() * np.float32(factor), name=name)
    node = next(node for node in model.graph if node.name == f"{CONV}/Conv")
    readers = list(node.outputs[0].uses())
    scale = ir.Value(name="quieter", const_value=ir.tensor(np.float32(1 / factor), name="quieter"))
    scale.dtype, scale.shape = ir.DataType.FLOAT, ir.Shape(())
    model.graph.initializers["quieter"] = scale
    quieter = ir.node("Mul", [node.outputs[0], scale], name="quieter/Mul")
    quieter.outputs[0].dtype, quieter.outputs[0].shape = ir.DataType.FLOAT, node.outputs[0].shape
    model.graph.insert_after(node, quieter)
    for reader, index in readers:
        reader.replace_input_with(index, quieter.outputs[0])
    return saved(model, folder)


def test_a_graph_in_fp16_answers_in_float_with_half_the_bytes(graph, call, tmp_path):
    model = ir.load(graph)
    counts = narrow(model, lambda _: "fp16")
    path = saved(model, tmp_path / "fp16")
    assert set(counts) == {"fp16"}
    checker.check_model(str(path), full_check=True)
    size = sum(file.stat().st_size for file in graph.parent.iterdir() if not file.name.startswith("."))
    assert (path.parent / "model.onnx_data").stat().st_size < 0.55 * size
    wanted, got = answer(graph, call), answer(path, call)
    assert got.dtype == np.float32
    assert 45 < psnr(wanted, got) < 100


def test_single_modules_are_narrow_where_they_are_asked_to_be(graph, call, tmp_path):
    """One convolution in half precision is what torch computes in half precision."""
    model = ir.load(graph)
    assert narrow(model, lambda path: "fp16" if path == CONV else "float")["fp16"] == 1
    part = next(node for node in model.graph if node.name == f"{CONV}/Conv")
    assert {value.dtype for value in part.inputs} == {ir.DataType.FLOAT16}
    given = np.random.default_rng(0).standard_normal((2, part.inputs[1].shape[1], 8, 8)).astype(np.float32)
    weight, bias = (torch.from_numpy(value.const_value.numpy()) for value in part.inputs[1:])
    wanted = nn.functional.conv2d(torch.from_numpy(given).half(), weight, bias, padding=1).float()
    cut = ir.convenience.extract(model.graph, [part.inputs[0].producer().inputs[0].name], [part.outputs[0].name])
    for value in cut.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    proto = ir.to_proto(ir.Model(cut, ir_version=model.ir_version))
    (got,) = ReferenceEvaluator(proto).run(None, {cut.inputs[0].name: given})
    np.testing.assert_allclose(got.astype(np.float32), wanted.numpy(), rtol=2e-2, atol=2e-2)


def test_what_overflows_is_found_by_name_and_kept_in_float(graph, call, tmp_path):
    path = loud(graph, 1e6, tmp_path / "loud")
    np.testing.assert_allclose(answer(path, call), answer(graph, call), atol=1e-3)
    study = Study(path, [call], OnnxRuntime().open_as_written, tmp_path / "study", lambda: None)
    found = overflowing(study)
    assert set(found) == {CONV, "quieter"}
    assert min(found.values()) > NEAR
    kept = ir.load(path)
    narrow(kept, lambda path: "float" if path in found else "fp16")
    assert psnr(answer(path, call), answer(saved(kept, tmp_path / "kept"), call)) > 45


def test_without_exceptions_what_overflows_is_lost(graph, call, tmp_path):
    """The check can fail: large values out of ordinary weights turn into infinity in fp16."""
    loud_call = call | {"sample": call["sample"] * np.float32(1e6)}
    study = Study(graph, [loud_call], OnnxRuntime().open_as_written, tmp_path / "study", lambda: None)
    found = overflowing(study)
    assert "conv_in" in found
    lost, kept = ir.load(graph), ir.load(graph)
    narrow(lost, lambda _: "fp16")
    narrow(kept, lambda path: "float" if path in found else "fp16")
    assert not np.isfinite(answer(saved(lost, tmp_path / "lost"), loud_call)).all()
    assert np.isfinite(answer(saved(kept, tmp_path / "kept"), loud_call)).all()


def test_weights_that_fp16_does_not_have_are_refused_by_name(graph, tmp_path):
    model = ir.load(loud(graph, 1e8, tmp_path / "loud"))
    narrow(model, lambda _: "fp16")
    with pytest.raises(CalibrationError, match=r"conv1\.\w+: got weights beyond 65,504"):
        saved(model, tmp_path / "everywhere")


def test_bf16_weights_are_torchs(graph, tmp_path):
    model = ir.load(graph)
    wanted = torch.from_numpy(model.graph.initializers[f"{CONV}.weight"].const_value.numpy().copy()).bfloat16()
    narrow(model, lambda _: "bf16")
    path = saved(model, tmp_path / "bf16")
    checker.check_model(str(path), full_check=True)
    got = ir.load(path).graph.initializers[f"{CONV}.weight.bf16"].const_value.numpy()
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.astype(np.float32), wanted.float().numpy())

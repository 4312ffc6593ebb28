"""ONNX Runtime: what it refuses, what its evidence says, and that files are shared, not copied."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from targets.base import Evidence, TargetError
from targets.ort import OnnxRuntime, OrtOptions

F32, F16 = TensorProto.FLOAT, TensorProto.FLOAT16


@pytest.mark.parametrize(("key", "value"), [("weights", "own"), ("format", "ort")])
def test_graphs_that_hold_their_weights_are_not_joined(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(
        TargetError, match=rf"{key}: got '{value}', expected .*share one file of weights\. Write {key}: "
    ):
        OnnxRuntime().join([tmp_path / "part"], tmp_path, OrtOptions(**{key: value}))  # type: ignore[arg-type]


def attention_like(kind: int = F32) -> onnx.ModelProto:
    """Return ``softmax(a @ b * 0.125) @ b`` with two constants; ONNX Runtime fuses the scale into the product."""
    dtype = np.float32 if kind == F32 else np.float16
    held = [numpy_helper.from_array(np.array(0.125, dtype), "scale")]
    nodes = [
        helper.make_node("Transpose", ["b"], ["t"], name="turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["a", "t"], ["scores"], name="scores"),
        helper.make_node("Mul", ["scores", "scale"], ["scaled"], name="scaled"),
        helper.make_node("Softmax", ["scaled"], ["weights"], name="weights"),
        helper.make_node("MatMul", ["weights", "b"], ["mixed"], name="mixed"),
    ]
    inputs = [helper.make_tensor_value_info(name, kind, [2, 4, 8]) for name in ("a", "b")]
    outputs = [helper.make_tensor_value_info("mixed", kind, [2, 4, 8])]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def quantized() -> onnx.ModelProto:
    """Return a product of 8-bit tensors written as quantize, dequantize, MatMul, quantize, dequantize."""
    weight = np.random.default_rng(0).integers(-100, 100, (8, 8), dtype=np.int8)
    held = [
        numpy_helper.from_array(np.array(0.05, np.float32), "scale"),
        numpy_helper.from_array(np.array(128, np.uint8), "zero"),
        numpy_helper.from_array(np.array(0.01, np.float32), "weight_scale"),
        numpy_helper.from_array(np.array(0, np.int8), "weight_zero"),
        numpy_helper.from_array(weight, "weight"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"], name="dq"),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["wd"], name="wdq"),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="product"),
        helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["yq"], name="yq"),
        helper.make_node("DequantizeLinear", ["yq", "scale", "zero"], ["out"], name="ydq"),
    ]
    inputs = [helper.make_tensor_value_info("x", F32, [4, 8])]
    outputs = [helper.make_tensor_value_info("out", F32, [4, 8])]
    graph = helper.make_graph(nodes, "quantized", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def evidence_of(model: onnx.ModelProto, folder: Path, options: OrtOptions) -> Evidence:
    onnx.save(model, folder / "model.onnx")
    session = OnnxRuntime().open(folder, options)
    try:
        return session.evidence()
    finally:
        session.close()


def test_evidence_shows_what_was_fused(tmp_path: Path) -> None:
    plain = evidence_of(attention_like(), tmp_path, OrtOptions(optimization="disabled"))
    assert plain.count("type") == {"MatMul": 2, "Mul": 1, "Softmax": 1, "Transpose": 1}
    assert {layer.name for layer in plain.layers} == {"turn", "scores", "scaled", "weights", "mixed"}
    fused = evidence_of(attention_like(), tmp_path, OrtOptions(optimization="all"))
    assert fused.count("type") == {"FusedMatMul": 1, "MatMul": 1, "Softmax": 1}
    assert "com.microsoft.FusedMatMul" in fused.count("kernel")
    assert fused.count("device") == {"CPUExecutionProvider": 3}


def test_layers_are_in_execution_order(tmp_path: Path) -> None:
    found = evidence_of(attention_like(), tmp_path, OrtOptions(optimization="disabled"))
    assert [layer.name for layer in found.layers] == ["turn", "scores", "scaled", "weights", "mixed"]


def test_evidence_writes_nothing_beside_the_engine(tmp_path: Path) -> None:
    evidence_of(attention_like(), tmp_path, OrtOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_half_precision_would_not_be_executed_so_it_is_refused(tmp_path: Path) -> None:
    """The graph's products are 16 bits wide; the processor's provider computes them in 32 all the same."""
    found = evidence_of(attention_like(F16), tmp_path, OrtOptions())
    assert {layer.precision for layer in found.layers if "MatMul" in layer.type} == {"f32"}
    assert found.count("type")["Cast"] >= 2
    for precision in ("f16", "bf16"):
        with pytest.raises(TargetError, match=rf"precision: got '{precision}', expected 'f32'.*Write precision: f32"):
            OnnxRuntime().check(OrtOptions(precision=precision))


def test_eight_bit_products_are_seen_as_such(tmp_path: Path) -> None:
    found = evidence_of(quantized(), tmp_path, OrtOptions())
    products = [layer for layer in found.layers if "MatMul" in layer.type or "Gemm" in layer.type]
    assert products
    assert {layer.precision for layer in products} <= {"u8", "i8"}


def test_an_unknown_optimization_is_refused() -> None:
    with pytest.raises(TargetError, match="optimization: got 'most', expected one of disabled, basic, extended, all"):
        OnnxRuntime().check(OrtOptions(optimization="most"))  # type: ignore[arg-type]


def test_the_engine_shares_its_files_with_the_source(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    onnx.save(
        quantized(), source / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0
    )
    OnnxRuntime().compile(source / "model.onnx", out, OrtOptions())
    for name in ("model.onnx", "model.onnx_data"):
        assert (out / name).samefile(source / name)


def test_weights_of_its_own_on_request(tmp_path: Path) -> None:
    """Linked by default; copied for tools that refuse a file with several links."""
    source = tmp_path / "source"
    for name in ("source", "linked", "own"):
        (tmp_path / name).mkdir()
    onnx.save(quantized(), source / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    OnnxRuntime().compile(source / "model.onnx", tmp_path / "linked", OrtOptions())
    OnnxRuntime().compile(source / "model.onnx", tmp_path / "own", OrtOptions(weights="own"))
    assert (source / "weights.bin").samefile(tmp_path / "linked" / "weights.bin")
    assert {path.name for path in (tmp_path / "own").iterdir()} == {"model.onnx", "model.onnx_data"}
    with pytest.raises(onnx.checker.ValidationError, match="hard"):
        onnx.load(tmp_path / "linked" / "model.onnx")
    assert len(onnx.load(tmp_path / "own" / "model.onnx").graph.initializer) == len(quantized().graph.initializer)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "..", "a/b"])
def test_external_data_stays_in_its_folder(tmp_path: Path, location: str) -> None:
    model = attention_like()
    held = model.graph.initializer[0]
    held.ClearField("raw_data")
    held.data_location = TensorProto.EXTERNAL
    held.external_data.add(key="location", value=location)
    (tmp_path / "out").mkdir()
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(TargetError, match="external data outside its folder"):
        OnnxRuntime().compile(tmp_path / "model.onnx", tmp_path / "out", OrtOptions())
    assert not list((tmp_path / "out").iterdir())


def test_a_type_that_numpy_has_not_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["a"], ["b"], name="same")
    values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [2]) for name in ("a", "b")]
    graph = helper.make_graph([node], "odd", values[:1], values[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "model.onnx"
    )
    with pytest.raises(TargetError, match=r"'a': a type that numpy has not; got tensor\(bfloat16\)"):
        OnnxRuntime().open(tmp_path, OrtOptions())


def test_a_model_for_phones_is_loaded_and_lists_its_operators(tmp_path: Path) -> None:
    """The list is read with ONNX Runtime's own parser, as its build script does."""
    import onnxruntime
    from onnxruntime.tools.reduced_build_config_parser import parse_config

    onnx.save(attention_like(), tmp_path / "model.onnx")
    out = tmp_path / "out"
    out.mkdir()
    options = OrtOptions(format="ort")
    OnnxRuntime().compile(tmp_path / "model.onnx", out, options)
    assert {path.name for path in out.iterdir()} == {"model.ort", "required_operators_and_types.config"}
    assert str(tmp_path) not in (out / "required_operators_and_types.config").read_text()
    needed, types = parse_config(str(out / "required_operators_and_types.config"), enable_type_reduction=True)
    session = OnnxRuntime().open(out, options)
    evidence = session.evidence()
    listed = {name for opsets in needed.values() for names in opsets.values() for name in names}
    assert {layer.type for layer in evidence.layers} <= listed
    assert types is not None
    feeds = {name: np.random.default_rng(0).standard_normal((2, 4, 8), dtype=np.float32) for name in ("a", "b")}
    plain = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session(feeds)["mixed"], plain.run(None, feeds)[0], rtol=1e-5)
    again = tmp_path / "again"
    again.mkdir()
    OnnxRuntime().compile(tmp_path / "model.onnx", again, options)
    # The runtime orders parts of model.ort by addresses in memory; what is written about it is the same each time.
    config = "required_operators_and_types.config"
    assert (out / config).read_bytes() == (again / config).read_bytes()


def test_a_model_too_large_for_that_format_is_refused(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=F16, dims=[2**29], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "weights", "offset": "0", "length": str(2**30)}.items():
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "weights").touch()
    os.truncate(tmp_path / "weights", 2**30)  # a hole, not a gigabyte
    node = helper.make_node("Cast", ["w"], ["y"], to=F32)
    graph = helper.make_graph([node], "large", [], [helper.make_tensor_value_info("y", F32, [2**29])], [tensor])
    onnx.save(helper.make_model(graph, ir_version=10), tmp_path / "model.onnx")
    (tmp_path / "out").mkdir()
    with pytest.raises(TargetError, match=r"too large for format: ort; got 2\.15 GB .* Keep less"):
        OnnxRuntime().compile(tmp_path / "model.onnx", tmp_path / "out", OrtOptions(format="ort"))

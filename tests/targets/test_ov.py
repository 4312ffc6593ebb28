"""OpenVINO: precisions are refused or proven, never silently replaced; the cache; the format on disk."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from targets.base import Evidence, Layer, TargetError, TargetMissing
from targets.ov import OpenVino, OvOptions, check_executed

pytest.importorskip("openvino", reason="Run: pip install 'diffusion-exporter[openvino]'")


def product(scale: float = 1.0) -> onnx.ModelProto:
    """Return ``relu(x @ w)``, with weights that 16 bits cannot hold exactly."""
    weight = scale * np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Relu", ["a"], ["y"], name="relu"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 16])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 16])]
    graph = helper.make_graph(nodes, "product", inputs, outputs, [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def compiled(folder: Path, options: OvOptions, model: onnx.ModelProto | None = None) -> Path:
    folder.mkdir(parents=True)
    onnx.save(model or product(), folder / "model.onnx")
    out = folder / "engine"
    out.mkdir()
    OpenVino().compile(folder / "model.onnx", out, options)
    return out


def evidence(requested: str, *executed: str) -> Evidence:
    layers = tuple(Layer(f"layer {i}", "Convolution", kind, "", "CPU") for i, kind in enumerate(executed))
    return Evidence("openvino 1", "a device", requested, (*layers, Layer("r", "Reshape", "f32", "", "CPU")))


def test_a_precision_the_device_lacks_is_refused_with_what_it_offers(tmp_path: Path) -> None:
    offered = OpenVino().capabilities().precisions
    missing = [name for name in ("bf16", "f16") if name not in offered]
    if not missing:
        pytest.skip(f"this processor executes all of {offered}")
    for precision in missing:
        options = OvOptions(precision=precision)
        for act in (
            lambda options=options: OpenVino().check(options),
            lambda options=options: compiled(tmp_path / options.precision, options),
            lambda options=options: OpenVino().open(tmp_path, options),
        ):
            with pytest.raises(TargetMissing, match=rf"got '{precision}', expected one of f32.*Write precision: "):
                act()


def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(TargetMissing, match=r"device: got 'NPU9', expected one of .*CPU"):
        OpenVino().check(OvOptions(device="NPU9"))


def test_another_precision_than_asked_for_fails_the_compilation() -> None:
    check_executed(evidence("bf16", "bf16", "bf16", "f32"))
    check_executed(evidence("bf16"))
    with pytest.raises(TargetError, match=r"got \{'f32': 2, 'bf16': 1\} for 3 heavy layers, expected most in bf16"):
        check_executed(evidence("bf16", "f32", "f32", "bf16"))


def test_eight_bit_layers_are_what_a_quantized_component_asks_for() -> None:
    check_executed(evidence("f32", "i8", "u8", "i8", "f32"))


def test_evidence_names_kernels_and_fused_nodes(tmp_path: Path) -> None:
    session = OpenVino().open(compiled(tmp_path / "a", OvOptions(threads=1)), OvOptions(threads=1))
    found = session.evidence()
    session.close()
    heavy = [layer for layer in found.layers if layer.type == "FullyConnected"]
    assert len(heavy) == 1
    assert heavy[0].precision == "f32"
    assert heavy[0].kernel
    assert set(heavy[0].origin.split(",")) == {"product", "y"}  # the last node takes the name of its output
    assert "threads in force: 1" in found.notes
    assert not {"Const", "Input", "Output"} & set(found.count("type"))


def test_a_closed_session_has_no_evidence(tmp_path: Path) -> None:
    session = OpenVino().open(compiled(tmp_path / "a", OvOptions()), OvOptions())
    session.close()
    with pytest.raises(TargetError, match="closed"):
        session.evidence()


def test_weights_are_stored_in_full_unless_asked(tmp_path: Path) -> None:
    feeds = {"x": np.random.default_rng(1).standard_normal((4, 16), dtype=np.float32)}
    sizes, answers = {}, {}
    for half in (False, True):
        engine = compiled(tmp_path / str(half), OvOptions(f16_weights=half))
        sizes[half] = (engine / "openvino_model.bin").stat().st_size
        session = OpenVino().open(engine, OvOptions())
        answers[half] = session(feeds)["y"]
        session.close()
    assert sizes == {False: 4 * 256, True: 2 * 256}
    weight = numpy_helper.to_array(product().graph.initializer[0])
    np.testing.assert_allclose(answers[False], np.maximum(feeds["x"] @ weight, 0), rtol=1e-5, atol=1e-5)
    rounded = weight.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(answers[True], np.maximum(feeds["x"] @ rounded, 0), rtol=1e-5, atol=1e-5)


def test_the_cache_is_made_once_and_survives_a_move(tmp_path: Path) -> None:
    options = OvOptions(cache=True, threads=1)
    engine = compiled(tmp_path / "a", options).rename(tmp_path / "moved")
    kept = {path.name: path.stat().st_mtime_ns for path in (engine / "cache").iterdir()}
    assert kept
    session = OpenVino().open(engine, options)
    feeds = {"x": np.ones((4, 16), np.float32)}
    cached = session(feeds)["y"]
    assert session.evidence().layers
    session.close()
    assert {path.name: path.stat().st_mtime_ns for path in (engine / "cache").iterdir()} == kept
    plain = OpenVino().open(engine, replace(options, cache=False))
    np.testing.assert_array_equal(plain(feeds)["y"], cached)
    plain.close()


def test_there_is_no_cache_unless_asked(tmp_path: Path) -> None:
    engine = compiled(tmp_path / "a", OvOptions())
    assert sorted(path.name for path in engine.iterdir()) == ["openvino_model.bin", "openvino_model.xml"]
    OpenVino().open(engine, OvOptions(cache=True)).close()
    assert sorted(path.name for path in engine.iterdir()) == ["openvino_model.bin", "openvino_model.xml"]


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    engine = compiled(tmp_path / "a", OvOptions())
    (engine / "openvino_model.bin").unlink()
    with pytest.raises(TargetError, match=r"openvino_model"):
        OpenVino().open(engine, OvOptions())


def test_a_signal_after_sessions_were_closed_is_no_crash(tmp_path: Path) -> None:
    first, second = (compiled(tmp_path / name, OvOptions(threads=1)) for name in ("a", "b"))
    code = (
        "import os, pathlib, signal, sys\n"
        "from targets.ov import OpenVino, OvOptions\n"
        "options = OvOptions(threads=1)\n"
        "opened = [OpenVino().open(pathlib.Path(folder), options) for folder in sys.argv[1:]]\n"
        "for session in opened:\n"
        "    session.close()\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('not interrupted')\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(first), str(second)]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, "interrupted"), ended.stderr

"""TensorRT and TensorRT-RTX without a GPU: what is built for real, what is refused, and what opens an engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import targets
from targets.base import RANGES, Layer, Sparse, TargetError, TargetMissing
from targets.nvidia import Gpu, find_gpu
from targets.trt import RtxOptions, TensorRt, TensorRtRtx, TrtOptions, check_fits, named
from targets.trt_build import PLAN, TOLD, Order, Told

RTX = TensorRtRtx()
LAPTOP = Gpu("NVIDIA RTX 4070", "8.9", "13.0")
builds = pytest.mark.skipif(not RTX.capabilities().available, reason="needs the extra tensorrt-rtx")


def model(folder: Path, kind: str = "MatMul") -> Path:
    """A product with a constant, 64 x 64, as ONNX."""
    weight = numpy_helper.from_array(np.ones((64, 64), np.float16), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [8, 64]) for name in ("x", "y")]
    node = helper.make_node(kind, ["x", "w"], ["y"], name="only", domain="" if kind == "MatMul" else "elsewhere")
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    opset = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opset), folder / "model.onnx")
    return folder / "model.onnx"


def told(**changes: object) -> Told:
    order = Order(**{name: changes.pop(name) for name in list(changes) if name in Order.__dataclass_fields__})
    of = Told("TensorRT-RTX 1.7.1", "RTX devices", order, Sparse(3, None), (Layer("a", "gemm", "f16", "", ""),))
    return dataclasses.replace(of, **changes)


@builds
def test_an_engine_is_built_for_devices_that_are_not_here(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    out.mkdir()
    RTX.compile(model(tmp_path), out, RtxOptions())
    assert (out / PLAN).stat().st_size > 64 * 64 * 2
    found = RTX.built(out)
    assert found.runtime.startswith("TensorRT-RTX 1.")
    assert found.device == "RTX devices 8.6, 8.9, 12.0"
    assert {layer.precision for layer in found.layers if layer.type == "gemm"} == {"f16"}
    assert any("only" in layer.origin for layer in found.layers)
    assert found.sparse == Sparse(None, None)  # its log says nothing, which is not none
    assert any("eligible layers unknown, chosen unknown" in note for note in found.notes)


@builds
def test_a_graph_that_the_parser_does_not_take_is_refused_with_its_nodes(tmp_path: Path) -> None:
    with pytest.raises(
        TargetError, match=r"not a graph that its parser takes; got: only \(Oddity\): .*Export it again"
    ):
        RTX.compile(model(tmp_path, "Oddity"), tmp_path, RtxOptions())
    assert not (tmp_path / PLAN).exists()
    (tmp_path / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(TargetError, match="not a graph that its parser takes"):
        RTX.compile(tmp_path / "model.onnx", tmp_path, RtxOptions())


@builds
def test_a_type_that_a_device_does_not_compute_in_is_refused_by_its_builder(tmp_path: Path) -> None:
    """Turing has no products in 32 bits there; the types are the graph's, and nothing is narrowed in silence."""
    path = model(tmp_path)
    graph = onnx.load(path)
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((64, 64), np.float32), "w"))
    for value in (graph.graph.input[0], graph.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(graph, path)
    with pytest.raises(TargetError, match=r"no engine was built for RTX devices 7\.5; got: .*FP32 GEMM"):
        RTX.compile(path, tmp_path, RtxOptions(devices=("7.5",)))


@builds
@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (("9.0",), r"devices: got 9\.0, expected some of 7\.5, 8\.0, .*12\.1\."),
        ((), "devices: got none"),
        (("7.5", "8.6"), r"got 7\.5, 8\.6, expected 7\.5 alone"),
    ],
)
def test_devices_that_cannot_be_built_for_are_refused(devices: tuple[str, ...], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        RTX.check(dataclasses.replace(RtxOptions(), devices=devices))


@builds
@pytest.mark.skipif(isinstance(find_gpu(), Gpu), reason="this machine has a GPU")
def test_without_a_gpu_an_engine_is_built_and_not_run(tmp_path: Path) -> None:
    here = RTX.capabilities()
    assert here.available
    assert not here.runs
    assert here.reason == find_gpu()
    with pytest.raises(TargetMissing, match=r"target tensorrt-rtx: .*: built, but this machine has no NVIDIA driver\."):
        RTX.open(tmp_path, RtxOptions())


def test_tensorrt_says_what_is_missing() -> None:
    here = targets.target("tensorrt").capabilities()
    if here.available:
        pytest.skip("this machine has TensorRT")
    assert here.install == "pip install 'diffusion-exporter[tensorrt]'" or "major version" in here.reason
    with pytest.raises(TargetMissing, match=r"target tensorrt: .* Run: pip install"):
        TensorRt().check(TrtOptions())


def test_another_major_version_has_a_message_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("targets.trt.installed_version", lambda name: "8.6.1")
    here = TensorRt().capabilities()
    assert here.reason == "'tensorrt' is of another major version; got 8.6.1, expected 10 or 11."
    assert here.install == "pip install 'tensorrt>=10.13,<12'"


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (told(library="TensorRT 10.9"), r"got one of TensorRT 10\.9, expected TensorRT-RTX 1\.7\.1\. Compile it here"),
        (told(capabilities=("8.6", "12.0")), r"got one for 8\.6, 12\.0, expected 8\.9 .*with devices: \[8\.9\]"),
        (told(device="NVIDIA A100 (8.0)"), r"got one of NVIDIA A100 \(8\.0\), expected NVIDIA RTX 4070 \(8\.9\)"),
        (told(device="NVIDIA A100 (8.0)", hardware="same-capability"), "an engine of another device"),
    ],
)
def test_an_engine_of_something_else_is_refused_before_it_is_loaded(engine: Told, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        check_fits(engine, LAPTOP, "here", "TensorRT-RTX 1.7.1")


@pytest.mark.parametrize(
    "engine",
    [
        told(device=named(LAPTOP)),
        told(capabilities=("8.6", "8.9")),
        told(device="NVIDIA A100 (8.0)", hardware="ampere"),
        told(device="NVIDIA RTX 4090 (8.9)", hardware="same-capability"),
        told(device=named(LAPTOP), library="TensorRT 10.9", version_compatible=True),
    ],
)
def test_an_engine_that_fits_is_not_refused(engine: Told) -> None:
    check_fits(engine, LAPTOP, "here", "TensorRT-RTX 1.7.1")


def test_what_a_builder_told_is_the_same_after_it_was_stored(tmp_path: Path) -> None:
    wanted = told(capabilities=("8.6", "8.9"), warnings=("a", "b"), timing_cache="0" * 64)
    wanted.save(tmp_path)
    assert Told.load(tmp_path) == wanted
    content = json.loads((tmp_path / TOLD).read_text())
    del content["order"]
    (tmp_path / TOLD).write_text(json.dumps(content))
    with pytest.raises(TargetError, match=r"build\.json: what the builder told cannot be read: .*Compile again\."):
        Told.load(tmp_path)


def test_eight_bit_floats_are_refused_for_devices_that_have_none() -> None:
    assert list(RTX.refused(RtxOptions(devices=("8.9", "12.0")))) == []
    assert "8.6" in RTX.refused(RtxOptions(devices=("8.6", "8.9")))["fp8"]


def open_model(folder: Path) -> Path:
    """A product of as many rows as one likes."""
    path = model(folder)
    found = onnx.load(path)
    for tensor in (*found.graph.input, *found.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_param = "rows"
    onnx.save(found, path)
    return path


@builds
def test_open_shapes_are_built_for_the_ranges_beside_the_graph(tmp_path: Path) -> None:
    source, out = open_model(tmp_path), tmp_path / "engine"
    out.mkdir()
    with pytest.raises(
        TargetError, match=r"open shapes of x without their ranges; .* Name them in the recipe: shapes:"
    ):
        RTX.compile(source, out, RtxOptions(devices=("8.6",)))
    (tmp_path / RANGES).write_text(json.dumps({"x": [[8, 64], [4, 64], [2, 64]]}))
    with pytest.raises(TargetError, match="ranges that are none"):
        RTX.compile(source, out, RtxOptions(devices=("8.6",)))
    (tmp_path / RANGES).write_text(json.dumps({"x": [[2, 64], [4, 64], [8, 64]]}))
    RTX.compile(source, out, RtxOptions(devices=("8.6",)))
    assert (out / PLAN).is_file()


@builds
def test_a_build_tells_how_far_it_is(tmp_path: Path) -> None:
    told_of: list[float] = []
    RTX.compile_telling(model(tmp_path), tmp_path, RtxOptions(devices=("8.6",)), told_of.append)
    assert told_of
    assert all(0 < done <= 1 for done in told_of)
    assert told_of[-1] == 1


def test_what_multiplies_sparsely_is_known_only_where_all_kernels_show_it() -> None:
    sparse = Layer("a", "gemm", "f16", "sm80_xmma_sparse_gemm_f16", "", "node_a,node_cast")
    dense = Layer("b", "gemm", "f16", "sm80_xmma_gemm_f16", "", "node_b")
    hidden = Layer("c", "gemm", "f16", "__myelin_CASK_STUB", "", "node_c")
    pointwise = Layer("d", "pointwise", "f16", "", "", "node_d")
    of = told(sparse=Sparse(2, 1))
    assert of.evidence("gpu", (sparse, dense, pointwise)).sparse == Sparse(2, 1, ("node_a", "node_cast"))
    assert of.evidence("gpu", (sparse, hidden)).sparse == Sparse(2, 1, None)
    disagreeing = told(sparse=Sparse(2, 2)).evidence("gpu", (sparse, dense))
    assert disagreeing.sparse == Sparse(2, 2, None)
    assert any("disagree" in note for note in disagreeing.notes)

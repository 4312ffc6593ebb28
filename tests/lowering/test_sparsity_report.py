"""The sparsity report on graphs made by hand, beside what NVIDIA's own inspector says of the same files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.cli import main
from exporter.errors import SourceError
from exporter.lowering.sparsity_report import product_share, report_text, sparse_weights, summary, weigh

DRAW = np.random.default_rng(0)


def two_of_four(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Return float32 numbers whose second and fourth of every four along an axis are zero."""
    values = DRAW.uniform(1, 2, shape).astype(np.float32)
    places = np.arange(shape[axis]) % 2 == 1
    return np.where(places.reshape([-1 if index == axis else 1 for index in range(len(shape))]), 0, values)


WEIGHTS = {
    "right": two_of_four((64, 32, 3, 3), 1),
    "dense": DRAW.uniform(1, 2, (64, 64, 3, 3)).astype(np.float32),
    "wrong_axis": two_of_four((64, 64, 3, 3), 0),
    "grouped": two_of_four((64, 16, 1, 1), 1),
    "odd": np.zeros((62, 64, 1, 1), np.float32),
    "six": two_of_four((64, 62, 1, 1), 1),
    "small": two_of_four((8, 64, 1, 1), 1),
    "columns": two_of_four((8, 64), 0),
    "rows": two_of_four((64, 64), 1),
    "turned": two_of_four((32, 64), 1),
}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolutions one after the other, then a product, a Gemm with transposed weights, and a transposed weight."""
    convolutions = ["right", "dense", "wrong_axis", "grouped", "odd", "six", "small"]
    nodes, last = [], "x"
    for name in convolutions:
        extra: dict[str, Any] = {"group": 4} if name == "grouped" else {}
        pads = [1, 1, 1, 1] if WEIGHTS[name].shape[2] == 3 else [0, 0, 0, 0]
        nodes.append(helper.make_node("Conv", [last, name], [f"{name}.out"], name=f"{name}/Conv", pads=pads, **extra))
        last = f"{name}.out"
    nodes += [
        helper.make_node("ReduceMean", [last, "places"], ["flat"], keepdims=0),
        helper.make_node("MatMul", ["flat", "columns"], ["a"], name="columns/MatMul"),
        helper.make_node("Gemm", ["a", "rows"], ["b"], name="rows/Gemm", transB=1),
        helper.make_node("Transpose", ["turned"], ["turned.t"], perm=[1, 0]),
        helper.make_node("MatMul", ["b", "turned.t"], ["y"], name="turned/MatMul"),
    ]
    tensors = [numpy_helper.from_array(values, name) for name, values in WEIGHTS.items()]
    tensors.append(numpy_helper.from_array(np.array([2, 3]), "places"))
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 32, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 32])],
        tensors,
    )
    path = tmp_path_factory.mktemp("sparse") / "model.onnx"
    model = helper.make_model(made, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def test_the_pattern_is_looked_for_along_the_inputs_and_refusals_say_why(graph: Path) -> None:
    found = {item.node.partition("/")[0]: item for item in sparse_weights(graph)}
    assert {name for name, item in found.items() if item.pattern} == {
        "right", "grouped", "odd", "small", "columns", "rows", "turned"
    }  # fmt: skip
    assert {name for name, item in found.items() if not item.reason} == {"right", "rows", "turned"}
    assert found["dense"].reason == "9216 of 9216 groups of four have more than two numbers"
    assert found["wrong_axis"].reason == (
        "two in four along the outputs, not along the inputs: 4608 of 9216 groups of four have more than two numbers"
    )
    assert found["grouped"].reason == "a convolution of 4 groups"
    assert found["six"].reason == "62 inputs, no multiple of 16 as sparse kernels need"
    assert found["odd"].reason == "62 outputs, no multiple of 8 as sparse kernels need"
    assert found["small"].reason == "smaller than the 16 inputs and 16 outputs of one sparse instruction"
    assert found["columns"].shape == (64, 8)
    assert found["turned"].shape == (32, 64)
    assert found["right"].zeros == pytest.approx(0.5)
    assert found["right"].products == 2 * 64 * 8 * 8 * 32 * 9
    assert found["rows"].products == 2 * 64 * 64


def test_nvidias_inspector_says_the_same_of_the_same_file(graph: Path) -> None:
    """Its exit status means nothing, so its text is read; it tells of tensors, we of nodes."""
    command = [str(Path(sys.executable).with_name("polygraphy")), "inspect", "sparsity", str(graph)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    theirs = set(re.findall(r"Found sparse tensor: (\S+)", done.stdout + done.stderr))
    assert theirs == {item.weight for item in sparse_weights(graph) if item.pattern}
    dense = set(re.findall(r"Found non-sparse tensor: (\S+)", done.stdout + done.stderr))
    assert dense == {"dense", "wrong_axis"}


def test_the_gain_is_a_bound_with_its_basis(graph: Path) -> None:
    weights = sparse_weights(graph)
    taken = sum(item.products or 0 for item in weights if not item.reason)
    share = taken / sum(item.products or 0 for item in weights)
    assert product_share(weights) == pytest.approx(share)
    first, second = summary(weights)
    assert first == "7 of 10 weights are 2:4; sparse kernels could take 3."
    assert f"{1 / (1 - share / 2):.2f} times as fast at the very most" in second
    assert "wrong_axis/Conv: two in four along the outputs" in report_text(weights)


def test_the_command_prints_it_and_refuses_what_is_no_graph(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["exporter", "sparsity", str(graph.parent), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert len(told["weights"]) == 10
    assert 0 < told["product_share"] < 1
    (tmp_path / "model.onnx").write_text("no graph")
    with pytest.raises(SourceError, match=r"model\.onnx: not an ONNX file; got: .*exported\.$"):
        sparse_weights(tmp_path / "model.onnx")


def test_a_graph_is_weighed_by_its_products_and_by_what_could_be_taken(graph: Path, tmp_path: Path) -> None:
    found = weigh(graph)
    assert found.products == {item.node: item.products for item in sparse_weights(graph)}
    assert found.taken == 3
    assert weigh(tmp_path / "none.onnx").products == {}

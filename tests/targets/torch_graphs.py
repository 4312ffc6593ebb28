"""Small graphs in 16 bits whose weights have two zeros in every four inputs, or have not."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

KINDS = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def two_of_four(weight: np.ndarray, axis: int) -> np.ndarray:
    """Set the two smallest of every four numbers along an axis to zero."""
    rows = np.moveaxis(weight.copy(), axis, -1)
    groups = rows.reshape(*rows.shape[:-1], -1, 4)
    np.put_along_axis(groups, np.argsort(np.abs(groups), axis=-1)[..., :2], 0, axis=-1)
    return np.moveaxis(groups.reshape(rows.shape), -1, axis)


def linear_graph(
    folder: Path, widths: tuple[int, ...] = (64, 128, 64), *, kind: str = "float16", rows: int | str = 40
) -> Path:
    """Products with 2:4 weights (inputs, outputs), each with a bias and followed by Gelu; inputs and outputs in f32."""
    nodes = [helper.make_node("Cast", ["x"], ["y0"], name="narrow", to=KINDS[kind])]
    held = []
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        weight = two_of_four(drawn(inputs, outputs, seed=index) / inputs**0.5, 0)
        held.append(numpy_helper.from_array(weight.astype(kind), f"w{index}"))
        held.append(numpy_helper.from_array(drawn(outputs, seed=50 + index).astype(kind), f"b{index}"))
        nodes.append(
            helper.make_node("MatMul", [f"y{index}", f"w{index}"], [f"p{index}"], name=f"layer.{index}/MatMul")
        )
        nodes.append(helper.make_node("Add", [f"p{index}", f"b{index}"], [f"s{index}"], name=f"layer.{index}/Add"))
        nodes.append(helper.make_node("Gelu", [f"s{index}"], [f"y{index + 1}"], name=f"layer.{index}/Gelu"))
    nodes.append(helper.make_node("Cast", [f"y{len(widths) - 1}"], ["answer"], name="wide", to=TensorProto.FLOAT))
    inputs_, outputs_ = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, rows, width])]
        for name, width in (("x", widths[0]), ("answer", widths[-1]))
    )
    graph = helper.make_graph(nodes, "linear", inputs_, outputs_, held)
    return _saved(graph, folder)


def mixed_graph(folder: Path) -> Path:
    """Weights of every fate: stored, a convolution, in 32 bits, of odd sides, without the pattern."""
    f16 = {
        "stored": two_of_four(drawn(64, 32), 0),
        "odd": two_of_four(drawn(32, 24), 0),
        "full": drawn(24, 32),
        "kernel": two_of_four(drawn(8, 8, 3, 3), 1),
    }
    wide = {"wide": two_of_four(drawn(32, 32), 1)}
    held = [numpy_helper.from_array(value.astype(np.float16), name) for name, value in f16.items()]
    held += [numpy_helper.from_array(value, name) for name, value in wide.items()]
    held.append(numpy_helper.from_array(np.array([1, 8, 8, 8]), "shape"))
    held.append(numpy_helper.from_array(np.array([16, 32]), "rows"))
    nodes = [
        helper.make_node("MatMul", ["x", "stored"], ["a"], name="stored/MatMul"),
        helper.make_node("MatMul", ["a", "odd"], ["b"], name="odd/MatMul"),
        helper.make_node("MatMul", ["b", "full"], ["c"], name="full/MatMul"),
        helper.make_node("Reshape", ["c", "shape"], ["d"], name="reshape"),
        helper.make_node("Conv", ["d", "kernel"], ["e"], name="kernel/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["e", "rows"], ["f"], name="back"),
        helper.make_node("Cast", ["f"], ["g"], name="widen", to=TensorProto.FLOAT),
        helper.make_node("Gemm", ["g", "wide"], ["answer"], name="wide/Gemm", transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [16, 64])
    answer = helper.make_tensor_value_info("answer", TensorProto.FLOAT, [16, 32])
    return _saved(helper.make_graph(nodes, "mixed", [x], [answer], held), folder)


def _saved(graph: onnx.GraphProto, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"

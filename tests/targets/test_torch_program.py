"""ONNX graphs as torch programs, on the processor: they answer as ONNX Runtime does and as the standard's reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from calibration.fitting import Fit, fit
from calibration.qdq import Manner, write_quantized
from calibration.schemes import NARROW
from calibration.sites import sites_of
from calibration.statistics import Study
from targets.base import TargetError
from targets.ort import OnnxRuntime
from targets.torch_cuda import TorchCuda, TorchCudaOptions, read_facts, write_program
from targets.torch_graph import OnnxGraph
from targets.torch_program import Program, Weights
from targets.torch_session import TorchSession

HERE = ("cpu", "this processor")


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def call(seed: int) -> dict[str, np.ndarray]:
    return {
        "sample": values(2, 4, 8, 8, seed=seed),
        "timestep": np.array(501.0, np.float32),
        "encoder_hidden_states": values(2, 32, 32, seed=seed + 1),
    }


def opened(source: Path, folder: Path, *, mode: str = "eager") -> TorchSession:
    """Compile as the target does, and open on the processor."""
    folder.mkdir()
    write_program(source, folder)
    path = folder / "model.onnx"
    return TorchSession(path, read_facts(path), mode=mode, sparse=False, device=HERE)


def psnr(wanted: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10(float(np.ptp(wanted)) ** 2 / max(float(np.mean((wanted - got) ** 2)), 1e-30)))


@pytest.fixture(scope="module")
def fitted(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    opener = OnnxRuntime().open_as_written
    return fit(Study(tiny_graph, [call(0), call(1)], opener, tmp_path_factory.mktemp("fit"), lambda: None))


class TestUNet:
    def test_it_answers_as_onnx_runtime_does(self, tiny_graph: Path, tmp_path: Path) -> None:
        session, runtime = opened(tiny_graph, tmp_path / "engine"), OnnxRuntime().open_as_written(tiny_graph)
        for seed in range(2):
            wanted = runtime(call(seed))["out_sample"]
            np.testing.assert_allclose(session(call(seed))["out_sample"], wanted, rtol=1e-3, atol=1e-4)
        found = session.evidence()
        assert {layer.precision for layer in found.layers if layer.type in ("MatMul", "Conv")} == {"f32"}
        assert found.runtime == f"torch {torch.__version__}"

    def test_biases_are_part_of_their_products(self, tiny_graph: Path, tmp_path: Path) -> None:
        layers = opened(tiny_graph, tmp_path / "engine").evidence().layers
        together = [layer for layer in layers if layer.type == "MatMul" and ", " in layer.origin]
        graph = onnx.load(tiny_graph).graph
        assert len(together) > 10
        assert sum(len(layer.origin.split(", ")) for layer in layers) <= len(graph.node)

    @pytest.mark.parametrize("scheme", ["fp16", "bf16", "int8", "int8-weights", "int4-weights", "fp8"])
    def test_every_scheme_is_taken_at_its_word(
        self, tiny_graph: Path, fitted: Fit, tmp_path: Path, scheme: str
    ) -> None:
        """Rounded activations fall to one side or the other; sums of 16-bit numbers differ in their last places."""
        (tmp_path / "source").mkdir()
        everything = dict.fromkeys(sites_of(ir.load(tiny_graph).graph), scheme)
        kinds: Callable[[str], str] | None = (lambda path: scheme) if scheme in NARROW else None
        write_quantized(tiny_graph, tmp_path / "source", everything, fitted, Manner(type_of=kinds))
        session = opened(tmp_path / "source/model.onnx", tmp_path / "engine")
        plain = OnnxRuntime().open_as_written(tiny_graph)(call(5))["out_sample"]
        if scheme in ("bf16",):  # which ONNX Runtime has no convolutions of on a processor
            wanted, limit = plain, 30.0
        else:
            wanted = OnnxRuntime().open_as_written(tmp_path / "source/model.onnx")(call(5))["out_sample"]
            limit = {"int8": 25.0, "fp8": 25.0, "fp16": 50.0}.get(scheme, 80.0)
        found = session(call(5))["out_sample"]
        assert found.dtype == np.float32
        assert psnr(wanted, found) > limit
        assert psnr(plain, found) < 100  # it is not the graph in float
        heavy = {layer.precision for layer in session.evidence().layers if layer.type in ("MatMul", "Gemm", "Conv")}
        expected = {"fp16": {"f16"}, "bf16": {"bf16"}, "int8": {"i8", "f32"}}.get(scheme, {"f32"})
        assert heavy == expected

    def test_integers_are_multiplied_as_integers(self, tiny_graph: Path, fitted: Fit, tmp_path: Path) -> None:
        """Every linear layer of enough rows; torch has no convolutions of integers."""
        (tmp_path / "source").mkdir()
        everything = dict.fromkeys(sites_of(ir.load(tiny_graph).graph), "int8")
        write_quantized(tiny_graph, tmp_path / "source", everything, fitted, Manner())
        layers = opened(tmp_path / "source/model.onnx", tmp_path / "engine").evidence().layers
        kinds = {layer.type: {other.precision for other in layers if other.type == layer.type} for layer in layers}
        assert kinds["Conv"] == {"f32"}
        integers = [layer for layer in layers if layer.type == "MatMul" and layer.precision == "i8"]
        assert len(integers) > 20

    def test_dynamo_takes_it_whole(self, tiny_graph: Path) -> None:
        """What torch.compile does before it writes kernels: a break in the graph would be an error."""
        graph = OnnxGraph(tiny_graph)
        module = Program(graph, tuple(spec.shape for spec in graph.inputs), Weights("cpu")).module
        given = [torch.from_numpy(call(3)[spec.name]) for spec in graph.inputs]
        with torch.no_grad():
            compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=False)
            torch.testing.assert_close(compiled(*given)[0], module(*given)[0])

    def test_open_axes_have_a_program_each(self, open_graph: Path, tmp_path: Path) -> None:
        session, runtime = opened(open_graph, tmp_path / "engine"), OnnxRuntime().open_as_written(open_graph)
        assert {layer.precision for layer in session.evidence().layers} == {"unknown"}
        assert session.evidence().sparse is not None
        for rows, side in ((1, 8), (3, 16), (1, 8)):
            given = {**call(1), "sample": values(rows, 4, side, 8), "encoder_hidden_states": values(rows, 32, 32)}
            wanted = runtime(given)["out_sample"]
            np.testing.assert_allclose(session(given)["out_sample"], wanted, rtol=1e-3, atol=1e-4)
        assert "unknown" not in {layer.precision for layer in session.evidence().layers}

    def test_the_profile_has_every_call(self, tiny_graph: Path, tmp_path: Path) -> None:
        session = opened(tiny_graph, tmp_path / "engine")
        found = session.profile(call(1), 2)
        assert tuple(timed.layer for timed in found) == session.evidence().layers
        assert all(timed.ms > 0 for timed in found)
        answers, took = session.timed(call(1))
        assert set(answers) == {"out_sample"}
        assert took > 0


def one(operator: str, inputs: dict[str, Any], held: dict[str, Any], count: int = 1, **attributes: Any) -> Any:
    """A model of one node; `inputs` are fed, `held` are constants, in the order in which they are named; '' is none."""
    opset = attributes.pop("opset", 20)
    order = attributes.pop("order", [*inputs, *held])
    node = helper.make_node(operator, order, [f"y{index}" for index in range(count)], name="only", **attributes)
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    answers = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in node.output]
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in held.items()]
    graph = helper.make_graph([node], "one", given, answers, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    for value, array in zip(model.graph.output, ReferenceEvaluator(model).run(None, inputs), strict=True):
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, array.shape))
    return model


IMAGE, ROWS, INTEGERS = values(2, 6, 5, 4), values(3, 8), np.array([[7, -7], [3, 5]], np.int64)
CASES: dict[str, tuple[Any, ...]] = {
    "a convolution with uneven pads": (
        "Conv",
        {"x": IMAGE},
        {"w": values(4, 3, 3, 3)},
        1,
        {"group": 2, "pads": [0, 1, 2, 1], "strides": [2, 1]},
    ),
    "a convolution of one dimension": ("Conv", {"x": values(2, 6, 9)}, {"w": values(4, 6, 3), "b": values(4)}, 1, {}),
    "a part from the end": (
        "Slice",
        {"x": IMAGE},
        {"s": np.array([-3, 1]), "e": np.array([2**62, -1]), "a": np.array([2, -1]), "t": np.array([2, 1])},
        1,
        {},
    ),
    "parts of given sizes": ("Split", {"x": ROWS}, {"s": np.array([3, 5])}, 2, {"axis": 1}),
    "parts with a smaller last": ("Split", {"x": ROWS}, {}, 3, {"axis": 1, "num_outputs": 3}),
    "all axes of one": ("Squeeze", {"x": values(1, 3, 1)}, {}, 1, {}),
    "two new axes": ("Unsqueeze", {"x": ROWS}, {"a": np.array([-1, 0])}, 1, {}),
    "a shape with a zero and a rest": ("Reshape", {"x": IMAGE}, {"s": np.array([0, -1, 2])}, 1, {}),
    "integers divided": ("Div", {"x": INTEGERS}, {"d": np.array(2)}, 1, {}),
    "places from the end": ("Gather", {"x": ROWS}, {"i": np.array([[-1, 0]])}, 1, {"axis": 1}),
    "places of several axes": ("GatherND", {"x": IMAGE}, {"i": np.array([[1, 2], [0, 5]])}, 1, {}),
    "a mean": ("ReduceMean", {"x": IMAGE}, {"a": np.array([1, -1])}, 1, {"keepdims": 0}),
    "a mean of everything": ("ReduceMean", {"x": IMAGE}, {}, 1, {}),
    "padding": ("Pad", {"x": ROWS}, {"p": np.array([0, 1, 2, 0]), "v": np.float32(3)}, 1, {}),
    "pixels repeated": (
        "Resize",
        {"x": IMAGE},
        {"r": np.zeros(0, np.float32), "s": np.array([1, 1, 2, 3], np.float32)},
        1,
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    "pixels to a size": (
        "Resize",
        {"x": IMAGE},
        {"s": np.array([2, 6, 10, 12])},
        1,
        {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
            "order": ["x", "", "", "s"],
        },
    ),
    "a norm over two axes": (
        "LayerNormalization",
        {"x": IMAGE},
        {"w": values(5, 4), "b": values(5, 4)},
        1,
        {"axis": 2, "epsilon": 0.1},
    ),
    "a norm of channels": ("InstanceNormalization", {"x": IMAGE}, {"w": values(6), "b": values(6)}, 1, {}),
    "a norm of groups": (
        "GroupNormalization",
        {"x": IMAGE},
        {"w": values(6), "b": values(6)},
        1,
        {"num_groups": 3, "opset": 21},
    ),
    "a norm of squares": ("RMSNormalization", {"x": ROWS}, {"w": values(8)}, 1, {"opset": 23}),
    "attention with a mask": (
        "Attention",
        {"q": values(1, 2, 3, 4), "k": values(1, 2, 5, 4), "v": values(1, 2, 5, 4)},
        {"m": values(1, 1, 3, 5)},
        1,
        {"opset": 23, "scale": 0.3},
    ),
    "8-bit codes": ("QuantizeLinear", {"x": 9 * ROWS}, {"s": np.float32(0.1), "z": np.int8(3)}, 1, {}),
    "8-bit codes of channels": (
        "QuantizeLinear",
        {"x": 9 * IMAGE},
        {"s": np.abs(values(6)) + 0.1, "z": np.arange(6).astype(np.uint8)},
        1,
        {"axis": 1},
    ),
    "codes widened by groups": (
        "DequantizeLinear",
        {"x": ROWS},
        {"c": np.arange(-8, 8).reshape(4, 4).astype(ml_dtypes.int4), "s": np.abs(values(2, 4)) + 0.1},
        1,
        {"axis": 0, "block_size": 2, "opset": 21, "order": ["c", "s"]},
    ),
    "a product of a wide weight": ("Gemm", {"x": ROWS}, {"w": values(8, 5), "c": values(5)}, 1, {}),
}


OTHER = {"o": np.sort(ROWS, axis=1)}
PLAIN = {
    **{
        name: {}
        for name in ("Abs", "Cos", "Erf", "Exp", "IsNaN", "Neg", "Reciprocal", "Relu", "Sigmoid", "Sin", "Tanh")
    },
    **dict.fromkeys(("Add", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min"), OTHER),
    **{name: {"o": values(8)} for name in ("Mul", "Sub")},
    "Pow": {"o": np.float32(2)},
}


@pytest.mark.parametrize("operator", PLAIN)
def test_an_operator_on_every_number_answers_as_the_standard_says(operator: str, tmp_path: Path) -> None:
    check(one(operator, {"x": ROWS}, PLAIN[operator]), {"x": ROWS}, tmp_path)


@pytest.mark.parametrize("operator", ["Log", "Sqrt"])
def test_an_operator_on_positive_numbers_answers_as_the_standard_says(operator: str, tmp_path: Path) -> None:
    check(one(operator, {"x": np.abs(ROWS)}, {}), {"x": np.abs(ROWS)}, tmp_path)


@pytest.mark.parametrize("operator", ["And", "Or", "Not"])
def test_an_operator_on_truths_answers_as_the_standard_says(operator: str, tmp_path: Path) -> None:
    held = {} if operator == "Not" else {"o": ROWS > 0.3}
    check(one(operator, {"x": ROWS > 0}, held), {"x": ROWS > 0}, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_a_form_of_an_operator_answers_as_the_standard_says(name: str, tmp_path: Path) -> None:
    operator, inputs, held, count, attributes = CASES[name]
    assert len(check(one(operator, inputs, held, count, **attributes), inputs, tmp_path)) == count


def check(model: onnx.ModelProto, inputs: dict[str, np.ndarray], folder: Path) -> tuple[torch.Tensor, ...]:
    """Hold a program to the standard's reference, types and all; return what it answers."""
    onnx.save(model, folder / "model.onnx")
    graph = OnnxGraph(folder / "model.onnx")
    module = Program(graph, tuple(spec.shape for spec in graph.inputs), Weights("cpu")).module
    found: tuple[torch.Tensor, ...] = module(*(torch.from_numpy(np.array(array)) for array in inputs.values()))
    for got, expected in zip(found, ReferenceEvaluator(model).run(None, inputs), strict=True):
        assert got.numpy().dtype == expected.dtype
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize(
    ("operator", "held", "attributes", "message"),
    [
        (
            "Slice",
            {"s": np.array([3]), "e": np.array([0]), "a": np.array([1]), "t": np.array([-1])},
            {},
            "steps: got -1",
        ),
        ("Gemm", {"w": values(8, 5)}, {"alpha": 0.5}, r"alpha: got 0\.5, expected 1"),
        ("ArgMax", {}, {"select_last_index": 1}, "select_last_index: got 1, expected 0"),
    ],
)
def test_a_form_that_is_not_here_is_refused_with_its_node(
    operator: str, held: dict[str, Any], attributes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    onnx.save(one(operator, {"x": ROWS}, held, **attributes), tmp_path / "model.onnx")
    graph = OnnxGraph(tmp_path / "model.onnx")
    with pytest.raises(TargetError, match=rf"only \({operator}\): .*{message}"):
        Program(graph, tuple(spec.shape for spec in graph.inputs), Weights("cpu"))


def test_all_unknown_operators_are_named_at_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Celu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Oddity", ["b"], ["y"], domain="elsewhere"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 8]) for name in "xy"]
    graph = helper.make_graph(nodes, "unknown", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(TargetError, match=r"got Celu, elsewhere::Oddity, expected some of Abs, Add"):
        write_program(tmp_path / "model.onnx", tmp_path)


def test_without_a_gpu_it_says_so_and_nothing_is_compiled(tmp_path: Path) -> None:
    here = TorchCuda().capabilities()
    if here.available:
        pytest.skip("this machine has a GPU that torch can use")
    assert not here.runs
    assert here.version == torch.__version__
    assert "build without CUDA" in here.reason or "NVIDIA" in here.reason
    for act in (
        lambda: TorchCuda().check(TorchCudaOptions()),
        lambda: TorchCuda().compile(tmp_path / "model.onnx", tmp_path, TorchCudaOptions()),
        lambda: TorchCuda().open(tmp_path, TorchCudaOptions()),
    ):
        with pytest.raises(TargetError, match=r"target torch-cuda: .* Run: pip install"):
            act()
    with pytest.raises(TargetError, match="mode: got 'fast', expected one of eager, cuda-graph, compile"):
        TorchCuda().check(TorchCudaOptions(mode="fast"))  # type: ignore[arg-type]

"""What every registered target promises, tried on a 1 kB ONNX file. A new target is picked up by itself."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from targets import TARGETS, target
from targets.base import Evidence, Session, Target, TargetError
from targets.torch_source import FromTorch, TorchProgram

pytestmark = pytest.mark.parametrize("name", sorted(TARGETS))


def small_model(rows: int | str = 2) -> onnx.ModelProto:
    """Convolution, activation, pooling and a matrix product, plus a scalar that is added: about 1 kB."""
    values = np.random.default_rng(0)
    weights = {
        "kernel": values.standard_normal((4, 3, 3, 3), dtype=np.float32),
        "matrix": values.standard_normal((4, 5), dtype=np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("GlobalAveragePool", ["b"], ["c"], name="pool"),
        helper.make_node("Flatten", ["c"], ["d"], name="flatten"),
        helper.make_node("MatMul", ["d", "matrix"], ["e"], name="product"),
        helper.make_node("Add", ["e", "shift"], ["answer"], name="sum"),
    ]
    inputs = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, [rows, 3, 8, 8]),
        helper.make_tensor_value_info("shift", TensorProto.FLOAT, []),
    ]
    outputs = [helper.make_tensor_value_info("answer", TensorProto.FLOAT, [rows, 5])]
    held = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def feeds(rows: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    values = np.random.default_rng(seed)
    return {
        "image": values.standard_normal((rows, 3, 8, 8), dtype=np.float32),
        "shift": np.array(values.standard_normal(), dtype=np.float32),
    }


def expected(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> np.ndarray:
    return ReferenceEvaluator(model).run(None, given)[0]


@pytest.fixture
def runtime(name: str) -> Target:
    made = target(name)
    here = made.capabilities()
    if not (here.available and here.runs):
        pytest.skip(f"{name}: {here.reason} {here.install}")
    return made


class Twin(torch.nn.Module):
    """The small model as a torch network, for targets that are not compiled from ONNX."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        held = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in model.graph.initializer}
        self.kernel, self.matrix = held["kernel"], held["matrix"]

    def forward(self, image: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        seen = torch.relu(torch.nn.functional.conv2d(image, self.kernel, padding=1))
        return seen.mean(dim=(2, 3)) @ self.matrix + shift


def options_of(runtime: Target) -> Any:
    """Options under which an engine computes in 32 bits."""
    options = runtime.options()
    return dataclasses.replace(options, precision="f32") if isinstance(runtime, FromTorch) else options


def graphs_only(runtime: Target) -> None:
    if isinstance(runtime, FromTorch):
        pytest.skip(f"{runtime.type}: takes torch networks, no ONNX files")


def engine_of(runtime: Target, folder: Path, model: onnx.ModelProto) -> Path:
    source, out = folder / "source", folder / "engine"
    source.mkdir()
    out.mkdir()
    onnx.save(model, source / "model.onnx")
    if isinstance(runtime, FromTorch):
        is_open = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param != ""
        shapes = tuple(((rows, 3, 8, 8), ()) for rows in (2, 1, 3)) if is_open else ()
        runtime.convert(
            TorchProgram("small", Twin(model), feeds(), ("answer",), shapes=shapes), out, options_of(runtime)
        )
    else:
        runtime.compile(source / "model.onnx", out, options_of(runtime))
    return out


@pytest.fixture
def session(runtime: Target, tmp_path: Path) -> typing.Iterator[Session]:
    made = runtime.open(engine_of(runtime, tmp_path, small_model()), options_of(runtime))
    yield made
    made.close()


def test_it_says_what_it_is(name: str) -> None:
    made = target(name)
    assert made.type == name
    assert dataclasses.is_dataclass(made.options)
    assert made.options.__dataclass_params__.frozen
    assert hash(made.options()) == hash(made.options())


def test_capabilities_are_complete_and_never_raise(name: str) -> None:
    here = target(name).capabilities()
    assert here.install.startswith("pip install")
    if here.available:
        assert here.version
        assert here.precisions
        assert here.device or not here.runs
        assert not here.reason or not here.runs
    else:
        assert here.reason


def test_the_engine_holds_the_file_that_loaders_expect(runtime: Target, tmp_path: Path) -> None:
    assert (engine_of(runtime, tmp_path, small_model()) / runtime.engine_file).is_file()


def test_the_source_is_not_needed_afterwards(runtime: Target, tmp_path: Path) -> None:
    model, given = small_model(), feeds()
    engine = engine_of(runtime, tmp_path, model)
    (tmp_path / "source/model.onnx").unlink()
    moved = engine.rename(tmp_path / "elsewhere")
    made = runtime.open(moved, options_of(runtime))
    np.testing.assert_allclose(made(given)["answer"], expected(model, given), rtol=1e-4, atol=1e-5)
    made.close()


def test_it_answers_as_the_reference_does(session: Session) -> None:
    for seed in range(3):
        given = feeds(seed=seed)
        found = session(given)
        assert set(found) == {"answer"}
        assert found["answer"].dtype == np.float32
        np.testing.assert_allclose(found["answer"], expected(small_model(), given), rtol=1e-4, atol=1e-5)


def test_specs_describe_the_graph(session: Session) -> None:
    assert {spec.name: (spec.dtype, spec.shape) for spec in session.inputs} == {
        "image": ("float32", (2, 3, 8, 8)),
        "shift": ("float32", ()),
    }
    assert [(spec.name, spec.shape) for spec in session.outputs] == [("answer", (2, 5))]


def test_an_answer_is_not_touched_by_the_next_call(session: Session) -> None:
    first = session(feeds(seed=1))["answer"]
    kept = first.copy()
    session(feeds(seed=2))
    np.testing.assert_array_equal(first, kept)


def test_it_does_not_change_its_feeds_and_takes_read_only_ones(session: Session) -> None:
    given = feeds()
    kept = {key: value.copy() for key, value in given.items()}
    for value in given.values():
        value.flags.writeable = False
    session(given)
    for key, value in given.items():
        np.testing.assert_array_equal(value, kept[key])


def test_dynamic_axes_take_any_size(runtime: Target, tmp_path: Path) -> None:
    model = small_model("rows")
    made = runtime.open(engine_of(runtime, tmp_path, model), options_of(runtime))
    assert made.inputs[0].shape == (-1, 3, 8, 8)
    assert made.evidence().layers
    for rows in (1, 3):
        given = feeds(rows)
        np.testing.assert_allclose(made(given)["answer"], expected(model, given), rtol=1e-4, atol=1e-5)
    assert made.evidence().layers
    made.close()


def test_threads_may_share_a_session(session: Session) -> None:
    given = [feeds(seed=seed) for seed in range(8)]
    found: dict[int, Any] = {}
    threads = [Thread(target=lambda i=i: found.update({i: session(given[i])["answer"]})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, value in found.items():
        np.testing.assert_allclose(value, expected(small_model(), given[index]), rtol=1e-4, atol=1e-5)
    assert len(found) == 8


def test_evidence_is_read_back_and_json_ready(session: Session) -> None:
    found = session.evidence()
    assert isinstance(found, Evidence)
    assert any("conv" in layer.type.lower() for layer in found.layers)
    assert {layer.precision for layer in found.layers if "conv" in layer.type.lower()} == {"f32"}
    assert all(layer.device for layer in found.layers)
    assert found.runtime.split()[1][0].isdigit()
    assert found.device
    assert json.loads(json.dumps(found.to_json()))["layers"]
    assert session.evidence().layers == found.layers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda given: given.pop("shift"), "wrong inputs"),
        (lambda given: given.update(more=given["shift"]), "wrong inputs"),
        (lambda given: given.update(image=given["image"].astype(np.float64)), "wrong type"),
        (lambda given: given.update(image=given["image"][:1]), "wrong shape"),
        (lambda given: given.update(image=given["image"][0]), "wrong shape"),
        (lambda given: given.update(shift=given["shift"].reshape(1)), "wrong shape"),
    ],
)
def test_wrong_feeds_are_refused(session: Session, change: typing.Callable[[dict], Any], words: str) -> None:
    given = feeds()
    change(given)
    with pytest.raises(TargetError, match=words):
        session(given)


def test_a_closed_session_says_so(session: Session) -> None:
    session.close()
    with pytest.raises(TargetError, match="closed"):
        session(feeds())
    session.close()


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_damaged_file_is_refused(runtime: Target, tmp_path: Path, content: bytes | None) -> None:
    whole = small_model().SerializeToString()
    source = tmp_path / "model.onnx"
    source.write_bytes(whole[: len(whole) // 2] if content is None else content)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(TargetError, match=r"model\.onnx"):
        runtime.compile(source, out, runtime.options())


def test_a_damaged_engine_is_refused(runtime: Target, tmp_path: Path) -> None:
    engine = engine_of(runtime, tmp_path, small_model())
    file = engine / runtime.engine_file
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(TargetError, match=runtime.engine_file):
        runtime.open(engine, runtime.options())


def test_a_missing_file_is_refused(runtime: Target, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="model"):
        runtime.open(tmp_path, runtime.options())
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(TargetError, match=r"model\.onnx"):
        runtime.compile(tmp_path / "model.onnx", out, runtime.options())


def test_an_unknown_operator_is_refused(runtime: Target, tmp_path: Path) -> None:
    graphs_only(runtime)
    model = small_model()
    model.graph.node[1].op_type = "Unheard"
    with pytest.raises(TargetError, match="Unheard"):
        engine_of(runtime, tmp_path, model)


def test_external_data_is_found(runtime: Target, tmp_path: Path) -> None:
    graphs_only(runtime)
    model, given = small_model(), feeds()
    want = expected(model, given)
    out = tmp_path / "out"
    out.mkdir()
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    runtime.compile(tmp_path / "model.onnx", out, runtime.options())
    for file in tmp_path.glob("model.onnx*"):
        file.unlink()
    made = runtime.open(out, runtime.options())
    np.testing.assert_allclose(made(given)["answer"], want, rtol=1e-4, atol=1e-5)
    made.close()


def test_missing_external_data_is_refused(runtime: Target, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    onnx.save(
        small_model(), tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0
    )
    (tmp_path / "model.onnx_data").unlink()
    with pytest.raises(TargetError, match=r"model\.onnx"):
        runtime.compile(tmp_path / "model.onnx", out, runtime.options())


def test_options_that_cannot_be_honoured_are_refused(runtime: Target) -> None:
    offered = {field.name for field in dataclasses.fields(runtime.options)}
    for option, value in (("threads", 0), ("precision", "f7"), ("mode", "fast")):
        if option in offered:
            with pytest.raises(TargetError, match=option):
                runtime.check(dataclasses.replace(runtime.options(), **{option: value}))
    runtime.check(runtime.options())


def test_every_precision_offered_is_accepted_and_every_other_refused(runtime: Target) -> None:
    offered = runtime.capabilities().precisions
    hints = typing.get_type_hints(runtime.options)
    if "precision" not in hints:
        pytest.skip(f"{runtime.type}: types are the graph's")
    for precision in typing.get_args(hints["precision"]):
        options = dataclasses.replace(runtime.options(), precision=precision)
        if precision in offered:
            runtime.check(options)
        else:
            with pytest.raises(TargetError, match=precision):
                runtime.check(options)


def test_a_missing_library_names_the_command(runtime: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = {"onnxruntime": "onnxruntime", "openvino": "openvino"}.get(runtime.type)
    if module is None:
        pytest.skip(f"{runtime.type}: not known which module to hide")
    monkeypatch.setitem(__import__("sys").modules, module, None)
    for act in (
        lambda: runtime.check(runtime.options()),
        lambda: runtime.compile(tmp_path / "model.onnx", tmp_path, runtime.options()),
        lambda: runtime.open(tmp_path, runtime.options()),
    ):
        with pytest.raises(TargetError, match=r"Run: pip install 'diffusion-exporter"):
            act()
    runtime.capabilities()


def test_graphs_of_one_network_are_joined_with_their_weights_stored_once(runtime, name, tmp_path):
    """Two graphs that share a large matrix: side by side in one folder, answering as before."""
    graphs_only(runtime)
    matrix = np.random.default_rng(2).standard_normal((64, 256), dtype=np.float32)
    stored = tmp_path / "weights.bin"
    stored.write_bytes(matrix.tobytes())
    out = tmp_path / "out"
    parts = [out / "pattern-0", out / "pattern-1"]
    for part, kind in zip(parts, ("Relu", "Neg"), strict=True):
        source = tmp_path / kind
        source.mkdir()
        part.mkdir(parents=True)
        (source / "weights.bin").hardlink_to(stored)
        runtime.compile(_sharing(source, kind, matrix.shape), part, runtime.options())
    runtime.join(parts, out, runtime.options())
    ending = Path(runtime.engine_file).suffix
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {f"pattern-0{ending}", f"pattern-1{ending}"}
    assert sum(path.stat().st_size for path in files) < 1.5 * matrix.nbytes
    given = np.random.default_rng(3).standard_normal((2, 64), dtype=np.float32)
    for index, wanted in enumerate((np.maximum(given @ matrix, 0), -(given @ matrix))):
        session = runtime.open(out / f"pattern-{index}{ending}", runtime.options())
        np.testing.assert_allclose(session({"rows": given})["answer"], wanted, atol=1e-4)
        session.close()


def _sharing(folder: Path, kind: str, shape: tuple[int, int]) -> Path:
    """Write a product with a matrix that lies in ``weights.bin``, and an operator of this kind behind it."""
    held = TensorProto(name="matrix", data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    facts = {"location": "weights.bin", "offset": 0, "length": 4 * shape[0] * shape[1]}
    for key, value in facts.items():
        held.external_data.add(key=key, value=str(value))
    nodes = [helper.make_node("MatMul", ["rows", "matrix"], ["a"]), helper.make_node(kind, ["a"], ["answer"])]
    inputs = [helper.make_tensor_value_info("rows", TensorProto.FLOAT, [2, shape[0]])]
    outputs = [helper.make_tensor_value_info("answer", TensorProto.FLOAT, [2, shape[1]])]
    graph = helper.make_graph(nodes, "sharing", inputs, outputs, [held])
    path = folder / "model.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )
    return path

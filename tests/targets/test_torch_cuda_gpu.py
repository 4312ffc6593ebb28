"""The target torch-cuda on a GPU (ci/gpu.sh): sparse against its dense twin, recorded against step by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch_graphs import drawn, linear_graph, mixed_graph

from targets.base import Sparse, TargetError
from targets.ort import OnnxRuntime
from targets.torch_cuda import TorchCuda, TorchCudaOptions

pytestmark = pytest.mark.gpu

TARGET = TorchCuda()
WIDTHS = (256, 1024, 256)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    here = TARGET.capabilities()
    assert here.runs, here.reason  # ci/gpu.sh has looked
    out = tmp_path / "engine"
    out.mkdir()
    TARGET.compile(linear_graph(tmp_path / "source", WIDTHS), out, TorchCudaOptions())
    return out


@pytest.fixture
def opened(engine: Path) -> Iterator[Any]:
    """Return a function that opens the engine with options."""
    sessions = []

    def make(**options: Any) -> Any:
        sessions.append(TARGET.open(engine, TorchCudaOptions(**options)))
        return sessions[-1]

    yield make
    for session in sessions:
        session.close()


def feeds(seed: int = 0, rows: int = 40) -> dict[str, np.ndarray]:
    return {"x": drawn(2, rows, WIDTHS[0], seed=seed)}


def test_the_sparse_program_answers_as_its_dense_twin(opened: Any) -> None:
    sparse, dense = opened(), opened(sparse=False)
    for seed in range(3):
        np.testing.assert_allclose(sparse(feeds(seed))["answer"], dense(feeds(seed))["answer"], atol=0.02)


def test_both_answer_as_onnx_runtime_does_on_the_processor(opened: Any, engine: Path) -> None:
    wanted = OnnxRuntime().open_as_written(engine / "model.onnx")(feeds())["answer"]
    for sparse in (True, False):
        np.testing.assert_allclose(opened(sparse=sparse)(feeds())["answer"], wanted, atol=0.02)


def test_the_evidence_counts_tensors_that_are_semi_structured(opened: Any) -> None:
    found = opened().evidence()
    assert found.sparse == Sparse(2, 2, ("layer.0/MatMul", "layer.1/MatMul"))
    assert [layer.kernel for layer in found.layers if layer.type == "MatMul"] == ["cusparselt"] * 2
    assert {layer.precision for layer in found.layers if layer.type == "MatMul"} == {"f16"}
    assert found.device == TARGET.capabilities().device
    twin = opened(sparse=False).evidence()
    assert twin.sparse == Sparse(2, 0, ())
    assert any("the dense twin" in note for note in twin.notes)


@pytest.mark.parametrize("mode", ["cuda-graph", "compile"])
@pytest.mark.parametrize("sparse", [True, False])
def test_every_mode_answers_as_step_by_step(opened: Any, mode: str, sparse: bool) -> None:
    made, eager = opened(mode=mode, sparse=sparse), opened(mode="eager", sparse=sparse)
    for seed in range(3):
        np.testing.assert_allclose(made(feeds(seed))["answer"], eager(feeds(seed))["answer"], atol=0.02)


def test_a_replay_answers_what_it_is_fed_and_keeps_no_answer(opened: Any) -> None:
    session = opened()
    first = session(feeds(0))["answer"]
    kept = first.copy()
    assert np.abs(session(feeds(1))["answer"] - kept).max() > 0.1
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(session(feeds(0))["answer"], kept)


def test_weights_of_every_fate_in_one_program(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    out.mkdir()
    source = mixed_graph(tmp_path / "source")
    TARGET.compile(source, out, TorchCudaOptions())
    session = TARGET.open(out, TorchCudaOptions())
    given = {"x": drawn(16, 64).astype(np.float16)}
    wanted = OnnxRuntime().open_as_written(source)(given)["answer"]
    np.testing.assert_allclose(session(given)["answer"], wanted, rtol=0.02, atol=0.02 * float(np.abs(wanted).max()))
    found = session.evidence()
    assert found.sparse == Sparse(4, 1, ("stored/MatMul",))
    assert any("kernel/Conv: a convolution of 3 x 3" in note for note in found.notes)
    session.close()


def test_rows_that_fill_no_tile_are_padded(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    out.mkdir()
    source = linear_graph(tmp_path / "source", WIDTHS, rows="rows")
    TARGET.compile(source, out, TorchCudaOptions())
    sparse, dense = TARGET.open(out, TorchCudaOptions()), TARGET.open(out, TorchCudaOptions(sparse=False))
    for rows in (1, 3, 77):
        np.testing.assert_allclose(sparse(feeds(rows=rows))["answer"], dense(feeds(rows=rows))["answer"], atol=0.02)
    sparse.close()
    dense.close()


def test_times_are_those_of_the_device(opened: Any) -> None:
    session = opened()
    answers, took = session.timed(feeds())
    assert set(answers) == {"answer"}
    assert 0 < took < 1000
    found = session.profile(feeds(), 3)
    assert tuple(timed.layer for timed in found) == session.evidence().layers
    assert all(timed.ms > 0 for timed in found)


def test_a_weight_that_lost_its_zeros_is_refused_when_it_is_opened(engine: Path) -> None:
    model = onnx.load(engine / "model.onnx")
    full = drawn(WIDTHS[0], WIDTHS[1]).astype(np.float16)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(full, "w0"))
    (engine / "model.onnx").unlink()
    onnx.save(model, engine / "model.onnx")
    with pytest.raises(TargetError, match=r"layer\.0/MatMul .*more than two numbers in four are not zero"):
        TARGET.open(engine, TorchCudaOptions())
    TARGET.open(engine, TorchCudaOptions(sparse=False)).close()


def test_a_closed_session_refuses(opened: Any) -> None:
    session = opened()
    session(feeds())
    session.close()
    with pytest.raises(TargetError, match="closed"):
        session(feeds())

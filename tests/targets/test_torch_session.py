"""What a compiled torch program says of its weights, refuses and survives; on the processor, where none is sparse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
import onnx
import pytest
import torch
from torch_graphs import drawn, linear_graph, mixed_graph, two_of_four

from exporter.lowering.sparsity_report import sparse_weights
from targets.base import Sparse, TargetError
from targets.ort import OnnxRuntime
from targets.semi_structured import MULTIPLE, has_pattern, refusal, semi_structured
from targets.torch_cuda import TorchCuda, TorchCudaOptions, read_facts, write_program
from targets.torch_session import TorchSession

HERE = ("cpu", "this processor")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    out = tmp_path / "engine"
    out.mkdir()
    write_program(linear_graph(tmp_path / "source"), out)
    return out


def opened(engine: Path, *, mode: str = "eager", sparse: bool = False) -> TorchSession:
    path = engine if engine.is_file() else engine / "model.onnx"
    return TorchSession(path, read_facts(path), mode=mode, sparse=sparse, device=HERE)


def feeds(seed: int = 0, rows: int = 40) -> dict[str, np.ndarray]:
    return {"x": drawn(2, rows, 64, seed=seed)}


class TestWeights:
    def test_each_has_its_fate_and_the_reason(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        write_program(mixed_graph(tmp_path), tmp_path / "out")
        found = {item.node: item for item in read_facts(tmp_path / "out/model.onnx")}
        assert found["stored/MatMul"].shape == (32, 64)
        assert found["stored/MatMul"].pattern
        assert not found["stored/MatMul"].reason
        assert {name: (item.pattern, item.reason) for name, item in found.items() if item.reason} == {
            "odd/MatMul": (True, "24 outputs and 32 inputs are not multiples of 16"),
            "full/MatMul": (False, "not two zeros in every four inputs"),
            "kernel/Conv": (True, "a convolution of 3 x 3: torch has semi-structured products only"),
            "wide/Gemm": (True, "float32: torch has semi-structured products of f16 and bf16"),
        }

    def test_the_pattern_is_where_the_exporter_sees_it(self, tmp_path: Path) -> None:
        source = mixed_graph(tmp_path)
        (tmp_path / "out").mkdir()
        write_program(source, tmp_path / "out")
        found = {item.node: item.pattern for item in read_facts(tmp_path / "out/model.onnx")}
        assert found == {item.node: item.pattern for item in sparse_weights(source)}

    def test_sides_are_those_that_torch_takes(self) -> None:
        table = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
        for dtype in (torch.float16, torch.bfloat16):
            assert (table[dtype].sparse_min_rows, table[dtype].sparse_min_cols) == (MULTIPLE, MULTIPLE)
            assert not refusal("MatMul", (MULTIPLE, 2 * MULTIPLE), dtype)
        assert torch.float32 not in table

    def test_the_pattern_is_along_the_inputs(self) -> None:
        weight = torch.from_numpy(two_of_four(drawn(32, 32), 1))
        assert has_pattern(weight)
        assert not has_pattern(weight.t())
        assert has_pattern(torch.zeros(4, 8))
        assert not has_pattern(torch.zeros(4, 6))
        weight[3, 4:8] = torch.tensor([1.0, 0.0, 2.0, 3.0])
        assert not has_pattern(weight)

    def test_a_weight_without_the_pattern_is_never_compressed(self) -> None:
        with pytest.raises(ValueError, match="more than two numbers in four are not zero"):
            semi_structured(torch.ones(32, 32, dtype=torch.float16))

    def test_the_dense_twin_says_what_it_is(self, engine: Path) -> None:
        found = opened(engine).evidence()
        assert found.sparse == Sparse(2, 0, ())
        assert any("the dense twin" in note for note in found.notes)
        assert any("2 of 2; semi-structured: 0" in note for note in found.notes)

    def test_why_weights_stay_dense_is_said_once_for_each_reason(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        write_program(linear_graph(tmp_path / "source", kind="float32"), tmp_path / "out")
        found = opened(tmp_path / "out", sparse=True).evidence()
        assert found.sparse == Sparse(2, 0, ())
        dense = [note for note in found.notes if note.startswith("dense: ")]
        reason = "float32: torch has semi-structured products of f16 and bf16"
        assert dense == [f"dense: layer.0/MatMul and 1 more: {reason}"]

    def test_what_torch_does_not_store_is_an_error_and_no_silent_dense(self, engine: Path) -> None:
        """A processor has no semi-structured products."""
        with pytest.raises(TargetError, match=r"layer\.0/MatMul.*Only CUDA tensors"):
            opened(engine, sparse=True)


class TestSession:
    def test_it_answers_in_16_bits_as_onnx_runtime_does(self, engine: Path) -> None:
        session, runtime = opened(engine), OnnxRuntime().open_as_written(engine / "model.onnx")
        np.testing.assert_allclose(session(feeds())["answer"], runtime(feeds())["answer"], atol=0.01)
        assert {layer.precision for layer in session.evidence().layers if layer.type == "MatMul"} == {"f16"}

    def test_answers_stay_and_feeds_too(self, engine: Path) -> None:
        session, given = opened(engine), feeds()
        given["x"].flags.writeable = False
        first = session(given)["answer"]
        kept = first.copy()
        session(feeds(seed=1))
        np.testing.assert_array_equal(first, kept)
        np.testing.assert_array_equal(given["x"], feeds()["x"])

    def test_threads_may_share_it(self, engine: Path) -> None:
        session = opened(engine)
        wanted = {seed: session(feeds(seed))["answer"] for seed in range(4)}
        found: dict[int, np.ndarray] = {}
        threads = [Thread(target=lambda i=i: found.update({i: session(feeds(i))["answer"]})) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, answer in wanted.items():
            np.testing.assert_array_equal(found[seed], answer)

    def test_before_a_call_with_open_shapes_it_is_not_known_what_is_sparse(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        write_program(linear_graph(tmp_path / "source", rows="rows"), tmp_path / "out")
        found = opened(tmp_path / "out", sparse=True).evidence()
        assert found.sparse == Sparse(2, None, None)
        assert any("semi-structured: not known before the first call" in note for note in found.notes)

    def test_many_shapes_do_not_pile_up(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        write_program(linear_graph(tmp_path / "source", rows="rows"), tmp_path / "out")
        session = opened(tmp_path / "out")
        wanted = session(feeds(rows=3))["answer"]
        for rows in range(4, 12):
            assert session(feeds(rows=rows))["answer"].shape == (2, rows, 64)
        assert len(session._programs) <= 4
        np.testing.assert_array_equal(session(feeds(rows=3))["answer"], wanted)

    @pytest.mark.parametrize("act", [lambda session: session(feeds()), lambda session: session.evidence()])
    def test_a_closed_one_refuses(self, engine: Path, act: Callable[[TorchSession], object]) -> None:
        session = opened(engine)
        session.close()
        session.close()
        with pytest.raises(TargetError, match=r"model\.onnx: the session is closed"):
            act(session)

    def test_wrong_feeds_are_refused(self, engine: Path) -> None:
        with pytest.raises(TargetError, match="wrong shape"):
            opened(engine)(feeds(rows=41))


class TestEngine:
    def test_the_source_is_not_needed_afterwards(self, engine: Path, tmp_path: Path) -> None:
        wanted = opened(engine)(feeds())["answer"]
        (tmp_path / "source/model.onnx").unlink()
        np.testing.assert_array_equal(opened(engine.rename(tmp_path / "elsewhere"))(feeds())["answer"], wanted)

    def test_external_data_comes_along(self, engine: Path, tmp_path: Path) -> None:
        wanted, out = opened(engine)(feeds())["answer"], tmp_path / "external"
        out.mkdir()
        (tmp_path / "large").mkdir()
        onnx.save(
            onnx.load(engine / "model.onnx"),
            tmp_path / "large/model.onnx",
            save_as_external_data=True,
            location="weights.bin",
            size_threshold=0,
        )
        write_program(tmp_path / "large/model.onnx", out)
        np.testing.assert_array_equal(opened(out)(feeds())["answer"], wanted)
        file = out / "weights.bin"
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(TargetError, match=r"external data is missing; expected 'weights\.bin'"):
            opened(out)
        file.write_bytes(content[:-10])
        with pytest.raises(TargetError, match=r"weights\.bin: external data of b1 has another size"):
            opened(out)

    @pytest.mark.parametrize("content", [b"", b"not a model", None])
    def test_a_damaged_graph_is_refused(self, engine: Path, tmp_path: Path, content: bytes | None) -> None:
        whole = (engine / "model.onnx").read_bytes()
        broken = whole[: len(whole) // 2] if content is None else content
        (engine / "model.onnx").unlink()
        (engine / "model.onnx").write_bytes(broken)
        with pytest.raises(TargetError, match=r"model\.onnx"):
            opened(engine)
        with pytest.raises(TargetError, match=r"model\.onnx"):
            write_program(engine / "model.onnx", tmp_path)

    def test_without_what_its_weights_are_it_is_refused(self, engine: Path) -> None:
        facts = json.loads((engine / "model.json").read_text())
        (engine / "model.json").write_text(json.dumps({**facts, "format": 2}))
        with pytest.raises(TargetError, match=r"model\.json: of another version; got format 2, expected 1"):
            opened(engine)
        for content in ("{}", "[]", "nothing", '{"format": 1, "weights": [{"node": 3}]}'):
            (engine / "model.json").write_text(content)
            with pytest.raises(TargetError, match=r"model\.json: it does not say what the weights"):
                opened(engine)
        (engine / "model.json").unlink()
        with pytest.raises(TargetError, match=r"model\.json: it does not say"):
            opened(engine)

    def test_graphs_of_one_network_are_joined(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        for index, widths in enumerate(((64, 32), (64, 48))):
            part = out / f"pattern-{index}"
            part.mkdir(parents=True)
            write_program(linear_graph(tmp_path / f"source-{index}", widths), part)
        wanted = [opened(out / f"pattern-{index}")(feeds())["answer"] for index in range(2)]
        TorchCuda().join([out / "pattern-0", out / "pattern-1"], out, TorchCudaOptions())
        assert sorted(path.name for path in out.iterdir()) == [
            "pattern-0.json",
            "pattern-0.onnx",
            "pattern-1.json",
            "pattern-1.onnx",
        ]
        for index, answer in enumerate(wanted):
            session = opened(out / f"pattern-{index}.onnx")
            np.testing.assert_array_equal(session(feeds())["answer"], answer)
            assert session.evidence().sparse == Sparse(1, 0, ())

"""Our 8 bits beside those of NNCF, which quantizes the same graph from the same calls."""

from __future__ import annotations

from pathlib import Path

import nncf
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from calibration.fitting import fit
from calibration.qdq import write_quantized
from calibration.sites import sites_of
from calibration.statistics import Study
from targets.ort import OnnxRuntime

pytestmark = pytest.mark.slow


def call(seed: int, timestep: float) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal
    return {
        "sample": draw((2, 4, 8, 8)).astype(np.float32),
        "timestep": np.array(timestep, np.float32),
        "encoder_hidden_states": draw((2, 32, 32)).astype(np.float32),
    }


CALLS = [call(0, 901.0), call(1, 501.0), call(2, 1.0)]
UNSEEN = [call(5, 701.0), call(6, 201.0)]


def answers(path: Path) -> list[np.ndarray]:
    session = OnnxRuntime().open_as_written(path)
    try:
        return [session(feeds)["out_sample"] for feeds in UNSEEN]
    finally:
        session.close()


def worst_db(wanted: list[np.ndarray], got: list[np.ndarray]) -> float:
    errors = [float(np.mean((a - b) ** 2)) / float(np.ptp(a)) ** 2 for a, b in zip(wanted, got, strict=True)]
    return -10 * float(np.log10(max(errors)))


@pytest.mark.timeout(600)
def test_all_layers_in_8_bits_are_as_exact_as_nncfs(tiny_graph: Path, tmp_path: Path) -> None:
    graph = tiny_graph
    theirs = nncf.quantize(
        onnx.load(graph),
        nncf.Dataset(CALLS),
        subset_size=len(CALLS),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.PERFORMANCE,
    )
    onnx.save(theirs, tmp_path / "nncf.onnx")
    ours = tmp_path / "ours"
    ours.mkdir()
    found = fit(Study(graph, CALLS, OnnxRuntime().open_as_written, tmp_path / "fit", lambda: None))
    write_quantized(graph, ours, dict.fromkeys(sites_of(ir.load(graph).graph), "int8"), found)
    wanted = answers(graph)
    mine, nncfs = (worst_db(wanted, answers(path)) for path in (ours / "model.onnx", tmp_path / "nncf.onnx"))
    layers = {node.op_type for node in ir.load(tmp_path / "nncf.onnx").graph}
    assert "QuantizeLinear" in layers
    assert mine > nncfs - 0.5, f"ours {mine:.1f} dB, NNCF's {nncfs:.1f} dB"

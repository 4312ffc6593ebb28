"""Every scheme of every target that runs here: the engine answers as its graph says, and works in what was asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import targets
from calibration.fitting import Fit, fit
from calibration.qdq import Manner, write_quantized
from calibration.schemes import NARROW
from calibration.sites import sites_of
from calibration.statistics import Study
from targets.base import BuildsElsewhere, TargetError, TargetMissing
from targets.ort import OnnxRuntime
from targets.torch_source import FromTorch

RUNNING = [name for name in targets.TARGETS if targets.target(name).capabilities().runs]
BUILDING = [
    name
    for name, here in ((name, targets.target(name).capabilities()) for name in targets.TARGETS)
    if here.available and not here.runs
]
BUILT = [(name, scheme) for name in BUILDING for scheme in targets.target(name).schemes]
KINDS = {"int8": "i8", "int8-weights": "f32", "fp16": "f16", "bf16": "bf16", "fp8": "f8e4m3"}
"""What products and convolutions are fed in each scheme."""
GRAPHS = [name for name in RUNNING if not isinstance(targets.target(name), FromTorch)]
"""Others are given no graph: what they make of quantized states is in tests/run/test_coreml_run.py."""
PAIRS = [(name, scheme) for name in GRAPHS for scheme in targets.target(name).schemes]


def call(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal
    return {
        "sample": draw((2, 4, 8, 8)).astype(np.float32),
        "timestep": np.array(501.0, np.float32),
        "encoder_hidden_states": draw((2, 32, 32)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def graph(tiny_graph: Path) -> Path:
    return tiny_graph


@pytest.fixture(scope="module")
def fitted(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    opener = OnnxRuntime().open_as_written
    return fit(Study(graph, [call(0), call(1)], opener, tmp_path_factory.mktemp("fit"), lambda: None))


def psnr(wanted: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10(float(np.ptp(wanted)) ** 2 / np.mean((wanted - got) ** 2)))


def test_there_are_schemes_to_try():
    assert {"int8", "int8-weights", "int4-weights"} <= {scheme for _, scheme in PAIRS}


def rounded(graph: Path, out: Path, scheme: str, fitted: Fit, *, results: bool) -> Path:
    out.mkdir()
    everything = dict.fromkeys(sites_of(ir.load(graph).graph), scheme)
    kinds = (lambda path: scheme) if scheme in NARROW else None
    write_quantized(graph, out, everything, fitted, Manner(results=results, type_of=kinds))
    return out / "model.onnx"


@pytest.mark.parametrize(("name", "scheme"), BUILT)
def test_what_is_built_for_other_devices_works_in_what_was_asked(graph, fitted, tmp_path, name, scheme):
    target, engine = targets.target(name), tmp_path / "engine"
    engine.mkdir()
    source = rounded(graph, tmp_path / "source", scheme, fitted, results=target.rounds_results)
    newest = target.options(devices=("8.9", "12.0"))
    if scheme == "fp8":
        with pytest.raises(TargetError, match=r"no engine was built for .*8\.6.*: .*fp8_e4m3"):
            target.compile(source, engine, target.options())
    target.compile(source, engine, newest)
    assert isinstance(target, BuildsElsewhere)
    heavy = [layer.precision for layer in target.built(engine).layers if layer.type in ("gemm", "correlation")]
    assert heavy.count(KINDS[scheme]) > 0.9 * len(heavy) > 0
    with pytest.raises(TargetMissing, match="no NVIDIA driver"):
        target.open(engine, target.options())


@pytest.mark.parametrize(("name", "scheme"), PAIRS)
def test_an_engine_answers_as_its_graph_says(graph, fitted, tmp_path, name, scheme):
    target = targets.target(name)
    engine = tmp_path / "engine"
    engine.mkdir()
    source = rounded(graph, tmp_path / "source", scheme, fitted, results=target.rounds_results)
    target.compile(source, engine, target.options())
    # Of bfloat16, ONNX Runtime has no convolutions on a processor: then the graph in float is the reference.
    reference = graph if scheme == "bf16" else source
    session, written = target.open(engine, target.options()), OnnxRuntime().open_as_written(reference)
    try:
        got, wanted = session(call(5))["out_sample"], written(call(5))["out_sample"]
        # Rounded activations fall to one side or the other; where weights alone are integers, runtimes round the
        # activations of linear layers too, row by row, when they are called.
        assert psnr(wanted, got) > (25 if scheme in ("int8", "bf16") else 45)
        kinds = {timed.layer.precision for timed in session.profile(call(5), 1)}
        assert bool(kinds & {"i8", "u8"}) or scheme != "int8"
    finally:
        session.close()
        written.close()

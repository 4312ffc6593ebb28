"""A recipe with Core ML columns: what is measured where no Core ML is, quantized states, what Swift loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'diffusion-exporter[coreml]'")

from exporter.metrics.measurement import Measurement
from exporter.recipe import read_recipe
from exporter.report.record import RunRecord
from exporter.report.writing import read_record
from exporter.run import run_recipe
from targets.coreml import CoreMl
from targets.coreml.package import MANIFEST, Manifest
from targets.mil.package import read_package

pytestmark = pytest.mark.slow


def carried_out(folder: Path, source: Path, **content: Any) -> RunRecord:
    (folder / "prompts.txt").write_text("a cat\na dog\na hat\na car\n")
    prompts = str(folder / "prompts.txt")
    for stage in content.get("stages", []):
        if "quantize" in stage:
            stage["quantize"]["calibration"] = {"prompts": prompts, "samples": 2, "calls": 3}
    whole = {
        "name": "apple",
        "source": {"path": str(source)},
        "sampling": {"scheduler": "ddim", "steps": 2, "guidance": 3.0, "size": 64, "batch": 2},
        "measure": {"prompts": prompts, "images": 2, "calls": 2, "latency_seconds": 0.5},
        "on_miss": "continue",
        **content,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(whole))
    return run_recipe(read_recipe(folder / "recipe.yaml"), folder / "run")


@pytest.fixture(scope="module")
def run(tiny_pipeline_folder: Path, made_once: Callable[..., Path]) -> tuple[RunRecord, Path]:
    def make(folder: Path) -> None:
        carried_out(
            folder,
            tiny_pipeline_folder,
            stages=[
                {"prune": {"method": "magnitude", "keep_ratio": 0.75}},
                {"quantize": {"scheme": "palette-4"}},
                {"quantize": {"scheme": "int8"}},
            ],
            targets={"exact": {"type": "coreml", "precision": "f32"}},
            gates=[
                {"metric": "lowering.psnr_db", "min": 100, "state": "1-pruned"},
                {"metric": "neural_engine.at_risk", "max": 1.0, "state": "1-pruned"},
                {"metric": "latency.median_ms", "max": 1000, "state": "1-pruned"},
            ],
        )

    folder = made_once("coreml-run", make) / "run"
    return read_record(folder), folder


def found(record: RunRecord, state: str, name: str, component: str | None = "unet") -> Measurement:
    cell = next(cell for cell in record.cells if cell.state == state)
    return next(item for item in cell.measurements if (item.name, item.component) == (name, component))


def test_packages_are_measured_for_fidelity_and_not_for_time(run):
    record, _ = run
    assert [cell.status for cell in record.cells] == ["ok"] * 4
    for state in ("0-dense", "1-pruned"):
        for component in ("text_encoder", "unet", "vae_decoder"):
            assert found(record, state, "lowering.psnr_db", component).value >= 100
        latency = found(record, state, "latency.median_ms")
        assert latency.value is None
        assert "not run by Core ML" in latency.note
        assert found(record, state, "load_ms", None).value is None
        assert found(record, state, "peak_rss_mib", None).value is None
        assert found(record, state, "size_bytes").value > 10_000
        risk = found(record, state, "neural_engine.at_risk")
        assert 0 < risk.value <= 1
        assert "certifies nothing" in risk.note
    told = {gate.metric: gate.status for gate in record.gates if gate.component in (None, "unet")}
    assert told["lowering.psnr_db"] == "passed"
    assert told["latency.median_ms"] == "not measured"
    assert record.exit_code == 0


def test_palettes_of_a_state_are_stored_as_they_are(run):
    record, folder = run
    # The network of the state is the graph with these very values: nothing but rounding in 32 bits may differ.
    assert found(record, "2-quantized", "lowering.psnr_db").value >= 100
    package = read_package(folder / "engines/2-quantized/exact/unet/model.mlpackage")
    tables = [item for item in package.operations if item.type == "constexpr_lut_to_dense"]
    assert len(tables) > 10
    dense = found(record, "1-pruned", "size_bytes").value
    assert found(record, "2-quantized", "size_bytes").value < 0.6 * dense
    evidence = next(cell for cell in record.cells if cell.state == "2-quantized").evidence["unet"]
    assert any("weights as its state says" in note and "palette-4" in note for note in evidence["notes"])


def test_another_quantization_replaces_the_one_before_and_rounds_inputs(run):
    record, folder = run
    package = read_package(folder / "engines/3-quantized/exact/unet/model.mlpackage")
    kinds = [item.type for item in package.operations]
    assert "constexpr_lut_to_dense" not in kinds
    assert kinds.count("quantize") == kinds.count("dequantize") > 10
    assert kinds.count("constexpr_affine_dequantize") > 10
    # Products of two activations stay in floating point here, and are rounded in the state's own graph.
    assert found(record, "3-quantized", "lowering.psnr_db").value >= 25
    assert "2-quantized" in {state.id for state in record.states}


def test_apples_layout_has_its_names_and_shapes_and_a_failing_column_is_alone(tiny_pipeline_folder, tmp_path):
    record = carried_out(
        tmp_path,
        tiny_pipeline_folder,
        sampling={"scheduler": "ddim", "steps": 2, "guidance": 3.0, "size": 64, "batch": 1},
        shapes={"batch": [1], "size": [64, 96]},
        targets={
            "open": {"type": "coreml", "precision": "f32"},
            "swift": {"type": "coreml", "neural_engine": True, "layout": "swift"},
        },
    )
    told = {cell.target: cell for cell in record.cells}
    assert told["open"].status == "ok"
    assert told["swift"].status == "failed"
    assert "layout: swift: got open shapes, expected a batch of one image" in told["swift"].error
    session = CoreMl().open(tmp_path / "run/engines/0-dense/open/unet", CoreMl.options())
    assert session.inputs[0].shape[2:] == (-1, -1)


def test_what_swift_loads_is_laid_out(tiny_pipeline_folder, tmp_path):
    record = carried_out(
        tmp_path,
        tiny_pipeline_folder,
        sampling={"scheduler": "ddim", "steps": 2, "guidance": 3.0, "size": 64, "batch": 1},
        targets={
            "swift": {"type": "coreml", "neural_engine": True, "layout": "swift", "chunks": 2, "license": "mit"},
        },
        gates=[{"metric": "lowering.psnr_db", "min": 40}],
    )
    assert record.exit_code == 0
    engine = tmp_path / "run/engines/0-dense/swift"
    names = {path.name for path in (engine / "swift").iterdir()}
    assert names >= {"UnetChunk1.mlpackage", "UnetChunk2.mlpackage", "TextEncoder.mlpackage", "VAEDecoder.mlpackage"}
    assert names >= {"vocab.json", "merges.txt", "README.md"}
    text = read_package(engine / "swift/TextEncoder.mlpackage")
    assert [(item.spec.name, item.spec.dtype) for item in text.inputs] == [("input_ids", "float32")]
    assert {item.spec.name for item in text.outputs} >= {"last_hidden_state", "pooled_outputs"}
    first = {item.spec.name: item.spec.shape for item in read_package(engine / "swift/UnetChunk1.mlpackage").inputs}
    assert first["timestep"] == (2,)
    last = read_package(engine / "swift/UnetChunk2.mlpackage")
    assert [item.spec.name for item in last.outputs] == ["noise_pred"]
    width = Manifest.read(engine / "unet" / MANIFEST).inputs[2].shape[2]
    shapes = first | {item.spec.name: item.spec.shape for item in last.inputs}
    assert shapes["encoder_hidden_states"][:3] == (2, width, 1)
    decoder = read_package(engine / "swift/VAEDecoder.mlpackage")
    assert ([item.spec.name for item in decoder.inputs], [item.spec.name for item in decoder.outputs]) == (
        ["z"],
        ["image"],
    )
    assert (engine / "swift/TextEncoder.mlpackage/Manifest.json").stat().st_ino == (
        (engine / "text_encoder/model.mlpackage/Manifest.json").stat().st_ino
    ), "laid out by links, not by copies"
    assert np.isfinite([item.value for item in record.cells[0].measurements if item.value is not None]).all()

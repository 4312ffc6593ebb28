"""A recipe that quantizes: what its state holds, what its engines answer, what the report says."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import targets
from calibration.fitting import Fit
from calibration.qdq import Manner
from calibration.statistics import Feeds
from exporter.errors import RecipeError
from exporter.lowering.workshop import Column
from exporter.networks.quantization import FIT, QUANTIZATION, TABLE, read_quantization
from exporter.progress import Silent
from exporter.pruners.notes import Notes
from exporter.quantizing.plan import read_plan
from exporter.quantizing.planning import Planner
from exporter.quantizing.trial import Trial, sensitivities
from exporter.recipe import read_recipe
from exporter.report.record import RunRecord
from exporter.report.text import render_text
from exporter.report.writing import read_record
from exporter.run import run_recipe

pytestmark = pytest.mark.slow
RECOVERED, ROUNDED = "3-tuned", "4-quantized"


def recipe_of(folder: Path, source: Path, stages: list[dict[str, Any]], **extra: Any) -> Path:
    (folder / "prompts.txt").write_text("a cat\na dog\na hat\na car\n")
    prompts = str(folder / "prompts.txt")
    for stage in stages:
        if "quantize" in stage:
            stage["quantize"].setdefault("calibration", {"prompts": prompts, "samples": 2, "calls": 3})
    content = {
        "name": "rounded",
        "source": {"path": str(source)},
        "sampling": {"scheduler": "ddim", "steps": 3, "guidance": 3.0, "size": 64, "batch": 2},
        "stages": stages,
        "targets": {"ov": {"type": "openvino"}, "ort": {"type": "onnxruntime"}},
        "measure": {"prompts": prompts, "images": 2, "calls": 2, "latency_seconds": 0.5},
        **extra,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def run(tiny_pipeline_folder: Path, made_once: Callable[..., Path]) -> tuple[RunRecord, Path]:
    """Fewer channels, two zeros of four, recovered, then 8 bits; one block and one layer by hand stay in float."""
    out = made_once("rounded", partial(carry_out, tiny_pipeline_folder)) / "out"
    return read_record(out), out


def carry_out(source: Path, folder: Path) -> None:
    (folder / "plan.txt").write_text("mid_block float\nconv_in float\n")
    prompts = str(folder / "prompts.txt")
    stages = [
        {"prune": {"method": "magnitude", "keep_ratio": 0.75, "round_to": 8}},
        {"prune": {"method": "magnitude", "cut": "weights", "pattern": "2:4", "keep_ratio": 0.5}},
        {"tune": {"method": "distill", "steps": 4, "batch": 2, "samples": 2, "prompts": prompts}},
        {"quantize": {"scheme": "int8", "plan": str(folder / "plan.txt")}},
    ]
    states = {"prompts": prompts, "images": 2, "calls": 2, "latency_seconds": 0.5, "states": [RECOVERED, ROUNDED]}
    run_recipe(read_recipe(recipe_of(folder, source, stages, measure=states)), folder / "out")


def found(record: RunRecord, metric: str, target: str, state: str = ROUNDED) -> float:
    cell = next(cell for cell in record.cells if (cell.state, cell.target) == (state, target))
    assert cell.status == "ok", cell.error
    item = next(item for item in cell.measurements if item.name == metric and item.component in ("unet", None))
    assert item.value is not None
    return item.value


def test_the_state_holds_its_parents_weights_and_how_they_are_rounded(run):
    record, out = run
    before, after = (out / "states" / name / "unet" for name in (RECOVERED, ROUNDED))
    weights = "diffusion_pytorch_model.safetensors"
    assert (before / weights).stat().st_ino == (after / weights).stat().st_ino
    told = read_quantization(after)
    assert told is not None
    assert dict(told.plan) == {"": "int8", "mid_block": "float", "conv_in": "float"}
    assert told.results  # for ONNX Runtime's kernels
    assert read_plan(after / TABLE) == dict(told.plan)
    facts = record.states[4].facts
    assert facts["layers"]["float"] > 10
    assert facts["layers"]["int8"] > 50


@pytest.mark.parametrize("target", ["ov", "ort"])
def test_engines_answer_as_their_graph_says_and_near_dense(run, target):
    record, _ = run
    assert found(record, "lowering.psnr_db", target) > 25
    recovered = found(record, "fidelity.teacher_forced.psnr_db", target, RECOVERED)
    assert found(record, "fidelity.teacher_forced.psnr_db", target) > min(recovered, 40) - 3


def test_an_engine_is_timed_against_itself_in_float(run):
    record, _ = run
    for target in ("ov", "ort"):
        assert found(record, "latency.over_float", target) > 0
    slower = [item for cell in record.cells for item in cell.measurements if item.name == "latency.over_float"]
    assert len(slower) == 2
    assert {item.target: item.ratio.to for item in slower if item.ratio}["ort"] == "the same in f32"
    text = render_text(record)
    for item in slower:
        assert item.high is not None
        assert (f"{ROUNDED} on {item.target}: unet: no faster quantized" in " ".join(text.split())) == (item.high >= 1)


def test_the_plan_is_what_ran(run):
    record, _ = run
    cell = next(cell for cell in record.cells if (cell.state, cell.target) == (ROUNDED, "ov"))
    layers = cell.evidence["unet"]["layers"]
    convolutions = {
        layer["name"].partition("/")[0]: layer["precision"] for layer in layers if layer["type"] == "Convolution"
    }
    assert convolutions["mid_block.resnets.0.conv1"] == "f32"
    assert convolutions["conv_in"] == "f32"
    assert convolutions["up_blocks.0.resnets.0.conv1"] in ("i8", "u8")


def test_zeros_survive_the_integers(run):
    _, out = run
    manifests = [json.loads(path.read_text()) for path in out.glob("lowered/onnx-unet-*/manifest.json")]
    rounded = next(manifest["facts"] for manifest in manifests if "quantized" in manifest["facts"])
    assert rounded["zeros"]["layers"] > 30
    assert rounded["quantized"]["layers"]["int8"] > 50


def test_a_second_run_does_nothing_again(run):
    record, out = run
    before = {path: path.stat().st_mtime_ns for path in out.glob("lowered/*/manifest.json")}
    again = run_recipe(read_recipe(out.parent / "recipe.yaml"), out)
    assert {path: path.stat().st_mtime_ns for path in out.glob("lowered/*/manifest.json")} == before
    assert all(cell.reused for cell in again.cells)
    assert again.exit_code == record.exit_code


def test_a_unit_that_is_not_there_is_refused_before_any_work(tiny_pipeline_folder, tmp_path):
    (tmp_path / "plan.txt").write_text("mid_blok int8\n")
    stages = [{"quantize": {"scheme": "int8-weights", "plan": str(tmp_path / "plan.txt")}}]
    recipe = read_recipe(recipe_of(tmp_path, tiny_pipeline_folder, stages))
    with pytest.raises(RecipeError, match=r"stages\[0\]\.quantize\.plan: .*mid_blok: no such unit; .*'mid_block'\?"):
        run_recipe(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "states").exists()


def test_other_components_are_quantized_too(tiny_pipeline_folder, tmp_path):
    """The text encoder in 8 bits, the decoder in 16; the denoiser is as it was."""
    stages = [
        {"quantize": {"scheme": "int8", "component": "text_encoder"}},
        {"quantize": {"scheme": "fp16", "component": "vae_decoder"}},
    ]
    measure = {"prompts": str(tmp_path / "prompts.txt"), "images": 2, "calls": 2, "latency_seconds": 0.3}
    path = recipe_of(tmp_path, tiny_pipeline_folder, stages, measure=measure | {"states": "final"})
    record = run_recipe(read_recipe(path), tmp_path / "out")
    cells = {(cell.state, cell.target): cell for cell in record.cells}
    for target in ("ov", "ort"):
        cell = cells["2-quantized", target]
        assert cell.status == "ok", cell.error
        lowering = {item.component: item.value for item in cell.measurements if item.name == "lowering.psnr_db"}
        assert lowering["text_encoder"] > 25
        assert lowering["vae_decoder"] > 40
        assert lowering["unet"] > 80
        assert {item.component for item in cell.measurements if item.name == "latency.over_float"} == {
            "text_encoder",
            "vae_decoder",
        }
    assert record.states[2].facts["kept_in_float"] == {}


def test_a_plan_made_by_measurement_keeps_to_its_limit_and_another_limit_asks_no_unit_again(
    tiny_pipeline_folder, tmp_path, monkeypatch
):
    asked, errors = [], Trial.errors

    def counted(trial: Trial, schemes: Mapping[str, str]) -> list[float]:
        asked.append(len(schemes))
        return errors(trial, schemes)

    monkeypatch.setattr(Trial, "errors", counted)
    counts = []
    for limit in (55, 50):
        asked.clear()
        stages = [{"quantize": {"scheme": "int8-weights", "limit_db": limit, "objective": "bytes"}}]
        extra = {"targets": {"ort": {"type": "onnxruntime"}}}
        record = run_recipe(read_recipe(recipe_of(tmp_path, tiny_pipeline_folder, stages, **extra)), tmp_path / "out")
        told = record.states[1].facts["search"]
        assert told["worst_db"] >= limit
        assert 0 < told["quantized_units"] <= told["units"]
        table = read_plan(tmp_path / "out" / "states" / "1-quantized" / "unet" / TABLE)
        assert sum(scheme == "int8-weights" for scheme in table.values()) == told["quantized_units"]
        assert table[""] == "float"
        counts.append(len(asked))
        if limit == 55:
            assert told["quantized_units"] < told["units"]
            left = [row["alone_db"] for row in told["table"] if row["scheme"] == "float" and row["float_bytes"]]
            assert min(left) <= min(row["alone_db"] for row in told["table"] if row["scheme"] != "float")
    assert counts[0] > told["units"] > counts[1]


@pytest.fixture(scope="module")
def graph(
    run: tuple[RunRecord, Path], float_graph: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Fit]:
    """The pruned network in float, and what was fitted to it."""
    unet = run[1] / "states" / ROUNDED / "unet"
    return float_graph(unet, tmp_path_factory.mktemp("graph") / "float"), Fit.load(unet / FIT)


def call() -> Feeds:
    draw = np.random.default_rng(3).standard_normal
    return {
        "sample": draw((2, 4, 8, 8)).astype(np.float32),
        "timestep": np.array(501.0, np.float32),
        "encoder_hidden_states": draw((2, 32, 32)).astype(np.float32),
    }


def test_a_plan_for_speed_is_timed_on_the_target_against_float(graph, tmp_path):
    column = Column("ov", targets.target("openvino"), targets.target("openvino").options())
    trial = Trial(*graph, Manner(), [call()], None)
    planner = Planner(trial, "int8", column, Notes(tmp_path / "notes.json", "this network"), tmp_path, Silent())
    found = planner.plan(25.0).facts
    assert found["worst_db"] >= 25
    assert found["target"] == "ov"
    timed = found["over_float"]
    assert timed[0]["measured"] == min(item["measured"] for item in timed) > 0
    assert found["quantized_units"] == timed[0]["units"]
    promised = (
        1
        - sum(row["float_ms"] - row["int8_ms"] for row in found["table"] if row["scheme"] == "int8") / found["float_ms"]
    )
    assert timed[0]["promised"] == pytest.approx(promised, abs=0.01)
    assert all(row["int8_ms"] < row["float_ms"] for row in found["table"] if row["scheme"] == "int8")


def test_a_layer_whose_scale_is_off_stands_out_in_the_table(graph):
    path, fit = graph
    layers = [f"up_blocks.1.resnets.{index}.{name}" for index in range(3) for name in ("conv1", "conv2")]

    def worst_first(scales: Mapping[str, float]) -> list[str]:
        trial = Trial(path, dataclasses.replace(fit, scales=scales), Manner(), [call()], None)
        errors = sensitivities(trial, {name: (name,) for name in layers}, "int8", lambda name, find: find())
        return sorted(layers, key=lambda name: -errors[name][0])

    bad = worst_first(fit.scales)[2]
    assert worst_first({**fit.scales, f"{bad}#0": 8 * fit.scales[f"{bad}#0"]})[0] == bad


def test_a_quantization_that_was_tampered_with_is_refused(run, tmp_path):
    _, out = run
    folder = tmp_path / "unet"
    shutil.copytree(out / "states" / ROUNDED / "unet", folder)
    (folder / QUANTIZATION).write_text(json.dumps({"format": 1, "plan": {"": 8}}))
    from exporter.errors import ArtifactError

    with pytest.raises(ArtifactError, match=r"quantization\.json: not a quantization of format 1"):
        read_quantization(folder)

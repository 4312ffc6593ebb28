"""A whole run on a tiny random model: what it leaves, what it reuses, how it fails."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import Broken, Crashed, Killed, Missing

import exporter
import targets
from exporter.artifact import MANIFEST, open_artifact
from exporter.collection import collect
from exporter.errors import ArtifactError, RecipeError, SourceError
from exporter.inspection import inspect_folder
from exporter.progress import Silent
from exporter.report.record import CellRecord, RunRecord
from exporter.report.writing import read_record
from exporter.run import run_recipe


def go(recipe: Any, out: Path, **options: Any) -> RunRecord:
    return run_recipe(recipe, out, progress=Silent(), **options)


def value(cell: CellRecord, name: str, component: str | None = None) -> float | None:
    return next(m.value for m in cell.measurements if m.name == name and m.component == component)


def test_a_run_leaves_engines_images_and_three_reports(finished: Path) -> None:
    record = read_record(finished)
    assert [state.id for state in record.states] == ["0-dense", "1-pruned"]
    assert {(cell.state, cell.target, cell.status) for cell in record.cells} == {
        ("0-dense", "ort", "ok"),
        ("1-pruned", "ort", "ok"),
    }
    for name in ("report.json", "report.html", "junit.xml"):
        assert (finished / name).stat().st_size > 500
    for cell in record.cells:
        assert len(cell.images) == 3
        assert all(
            (finished / image.path).is_file() and (finished / image.reference).is_file() for image in cell.images
        )
        assert set(cell.evidence) == {"unet", "vae_decoder", "text_encoder"}
    assert record.states[1].parameters["unet"] < record.states[0].parameters["unet"]
    assert record.states[1].parameters["vae_decoder"] == record.states[0].parameters["vae_decoder"]


def test_every_metric_is_measured_or_says_why_not(finished: Path) -> None:
    dense, pruned = read_record(finished).cells
    for cell in (dense, pruned):
        for component in ("unet", "vae_decoder", "text_encoder"):
            assert (value(cell, "lowering.psnr_db", component) or 0) > 80
            assert (value(cell, "latency.median_ms", component) or 0) > 0
        assert (value(cell, "size_bytes") or 0) > 10_000
        assert (value(cell, "peak_rss_mib") or 0) > 10
        assert (value(cell, "load_ms") or 0) > 0
        missing = {m.name: m.note for m in cell.measurements if m.value is None}
        assert {"fidelity.judge_rate", "fidelity.image.lpips", "fidelity.kid.inception"} <= set(missing)
        assert all(missing.values())
    assert (value(dense, "fidelity.teacher_forced.psnr_db", "unet") or 0) > 80
    assert (value(pruned, "fidelity.teacher_forced.psnr_db", "unet") or 0) < 60
    latency = next(m for m in pruned.measurements if m.name == "latency.median_ms" and m.component == "unet")
    assert latency.ratio is not None
    assert latency.ratio.to == "0-dense"
    assert latency.ratio.pairs > 0


def test_what_is_the_dense_engines_own_is_not_timed_again(finished: Path) -> None:
    dense, pruned = read_record(finished).cells
    for part in ("vae_decoder", "text_encoder"):
        first, second = (
            {item.name: item for item in cell.measurements if item.component == part and "latency" in item.name}
            for cell in (dense, pruned)
        )
        assert set(first) == set(second) == {"latency.median_ms", "latency.p90_ms"}
        assert all(second[name].value == first[name].value for name in first)
        assert all(second[name].state == "1-pruned" for name in first)
        assert "not taken again" in second["latency.median_ms"].note
        ratio = second["latency.median_ms"].ratio
        assert ratio is not None
        assert (ratio.to, ratio.low, ratio.high, ratio.pairs) == ("0-dense", 1.0, 1.0, 0)
    assert value(dense, "latency.median_ms", "unet") != value(pruned, "latency.median_ms", "unet")


def test_quantizing_without_prompts_is_refused_before_any_work(tiny_recipe: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(stages=[{"quantize": {"scheme": "int8"}}])
    with pytest.raises(
        RecipeError, match=r"stages\[0\]\.quantize\.calibration\.prompts: missing; .* Write prompts: FILE"
    ):
        run_recipe(recipe, tmp_path / "out", progress=Silent())
    assert not (tmp_path / "out").exists()


def test_components_that_a_stage_did_not_touch_are_lowered_once_and_stored_once(finished: Path) -> None:
    names = [path.name.rpartition("-")[0] for path in (finished / "lowered").iterdir() if path.is_dir()]
    assert sorted(names) == [
        "onnx-text_encoder",
        "onnx-unet",
        "onnx-unet",
        "onnx-vae_decoder",
        "onnxruntime-text_encoder",
        "onnxruntime-unet",
        "onnxruntime-unet",
        "onnxruntime-vae_decoder",
    ]
    for path in ("vae_decoder/model.onnx", "text_encoder/model.onnx"):
        inodes = {(finished / "engines" / state / "ort" / path).stat().st_ino for state in ("0-dense", "1-pruned")}
        assert len(inodes) == 1
    vae = {(finished / "states" / state / "vae" / "config.json").stat().st_ino for state in ("0-dense", "1-pruned")}
    assert len(vae) == 1


def test_the_same_command_again_reuses_everything(finished: Path, tiny_recipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"**/{MANIFEST}")}
    record = go(tiny_recipe(), out)
    assert all(state.reused for state in record.states)
    assert {path: path.stat().st_mtime_ns for path in out.glob(f"**/{MANIFEST}")} == before


def test_a_changed_stage_redoes_what_follows_and_keeps_the_rest(
    finished: Path, tiny_recipe: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    stages = [{"prune": {"method": "random", "keep_ratio": 0.5, "cut": "blocks"}}]
    record = go(tiny_recipe(stages=stages), out, until="export")
    assert [state.reused for state in record.states] == [True, False]
    assert all(cell.status == "not run" for cell in record.cells)
    removed = collect(out, dry_run=True)
    assert any("onnx-unet" in item["path"] for item in removed)
    collect(out, dry_run=False)
    assert not collect(out, dry_run=False)
    inspect_folder(out)


def test_a_loaded_engine_draws_what_the_run_drew(finished: Path) -> None:
    from PIL import Image

    record = read_record(finished)
    cell = record.cells[1]
    assert cell.engine is not None
    pipeline = exporter.load(finished / cell.engine)
    for image in cell.images:
        made = pipeline(
            image.prompt,
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=torch.Generator("cpu").manual_seed(image.seed),
        ).images[0]
        drawn = np.asarray(Image.open(finished / image.path)).astype(int)
        assert np.abs(np.asarray(made).astype(int) - drawn).max() <= 1


@pytest.mark.parametrize("name", ["unet/model.onnx", "tokenizer/vocab.json", "model_index.json", MANIFEST])
def test_one_flipped_byte_of_an_engine_is_found_before_loading(finished: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "engine"
    shutil.copytree(finished / "engines" / "1-pruned" / "ort", folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"damaged|changed"):
        exporter.load(folder)


def test_an_engine_of_another_runtime_version_says_what_to_do(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from targets.ort import OnnxRuntime

    here = OnnxRuntime().capabilities()
    monkeypatch.setattr(OnnxRuntime, "capabilities", lambda self: dataclasses.replace(here, version="0.0.1"))
    with pytest.raises(ArtifactError, match=r"got 0\.0\.1 here, expected .*Install that version"):
        exporter.load(finished / "engines" / "0-dense" / "ort")


def test_a_broken_and_a_missing_target_do_not_stop_the_others(
    tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(targets.TARGETS, "broken", f"{Broken.__module__}:Broken")
    monkeypatch.setitem(targets.TARGETS, "missing", f"{Missing.__module__}:Missing")
    columns = {"a": {"type": "broken"}, "b": {"type": "missing"}, "c": {"type": "onnxruntime"}}
    record = go(tiny_recipe(targets=columns, stages=[]), tmp_path / "out")
    status = {cell.target: (cell.status, cell.error) for cell in record.cells}
    assert status["c"][0] == "ok"
    assert status["a"][0] == "failed"
    assert "no kernel for this layer" in status["a"][1]
    assert status["b"][0] == "not run"
    assert "pip install 'diffusion-exporter[missing]'" in status["b"][1]
    assert record.exit_code == 4  # of 4 (missing) and 5 (failed), 4 decides
    assert not list((tmp_path / "out").glob("**/half"))


def test_a_compiler_that_dies_takes_only_its_own_target_along(
    tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(targets.TARGETS, "killed", f"{Killed.__module__}:Killed")
    monkeypatch.setitem(targets.TARGETS, "crashed", f"{Crashed.__module__}:Crashed")
    columns = {"a": {"type": "killed"}, "b": {"type": "crashed"}, "c": {"type": "onnxruntime"}}
    record = go(tiny_recipe(targets=columns, stages=[]), tmp_path / "out", until="compile")
    status = {cell.target: (cell.status, cell.error) for cell in record.cells}
    assert status["a"][0] == status["b"][0] == "failed"
    assert "target a, text_encoder: command python" in status["a"][1]
    assert "SIGKILL, as when memory runs out" in status["a"][1]
    assert "MemoryError: std::bad_alloc" in status["b"][1]
    assert status["c"] == ("not run", "stopped by --until compile")
    assert (tmp_path / "out/engines/0-dense/c/unet/model.onnx").is_file()
    assert record.exit_code == 5
    assert not list((tmp_path / "out").glob("**/half"))


def test_a_missed_gate_is_exit_code_3_and_names_its_place(finished: Path, tiny_recipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    gates = [{"metric": "fidelity.teacher_forced.psnr_db", "min": 90, "component": "denoiser", "state": "1-pruned"}]
    record = go(tiny_recipe(gates=gates), out)
    assert record.exit_code == 3
    (gate,) = record.gates
    assert gate.status == "missed"
    assert gate.timestep is not None
    assert "state 1-pruned, target ort, component unet" in gate.message
    assert (out / "report.html").is_file()


def test_what_was_not_measured_fails_only_where_the_recipe_says_so(
    finished: Path, tiny_recipe: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    gates = [{"metric": "fidelity.judge_rate", "min": 0.5}]
    warned = go(tiny_recipe(gates=gates), out)
    assert warned.exit_code == 0
    assert {gate.status for gate in warned.gates} == {"not measured"}
    assert go(tiny_recipe(gates=gates, unmeasured="fail"), out).exit_code == 3


def test_a_missed_gate_stops_before_the_next_state_unless_told_otherwise(
    finished: Path, tiny_recipe: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    gates = [{"metric": "size_bytes", "max": 1}]
    stopped = go(tiny_recipe(gates=gates), out)
    assert [state.id for state in stopped.states] == ["0-dense"]
    assert any("on_miss" in note for note in stopped.notes)
    assert [s.id for s in go(tiny_recipe(gates=gates, on_miss="continue"), out).states] == ["0-dense", "1-pruned"]


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"source": {"path": "/nowhere"}}, SourceError, "no such folder"),
        ({"source": {"path": "reference:cats"}}, RecipeError, "reference:shapes"),
        ({"stages": [{"prune": {"method": "magnitud", "keep_ratio": 1}}]}, RecipeError, "Did you mean 'magnitude'"),
        (
            {"stages": [{"prune": {"method": "magnitude", "keep_ratio": 1.3}}]},
            RecipeError,
            r"stages\[0\]\.prune\.keep_ratio: got 1\.3",
        ),
        ({"stages": [{"prune": {"method": "magnitude"}}]}, RecipeError, r"stages\[0\]\.prune\.keep_ratio: missing"),
        (
            {"stages": [{"tune": {"method": "distill", "steps": 1}}]},
            RecipeError,
            r"stages\[0\]\.tune\.prompts: missing",
        ),
        (
            {"targets": {"x": {"type": "openvno"}}},
            RecipeError,
            r"targets\.x\.type: got 'openvno'.*Did you mean 'openvino'",
        ),
        (
            {"targets": {"x": {"type": "onnxruntime", "thread": 1}}},
            RecipeError,
            r"targets\.x\.thread: unknown key.*'threads'",
        ),
        ({"targets": {"x": {"type": "onnxruntime", "precision": "f16"}}}, RecipeError, r"targets\.x: .*precision"),
        ({"gates": [{"metric": "fidelty.judge_rate", "min": 1}]}, RecipeError, r"gates\[0\]\.metric: unknown metric"),
        ({"gates": [{"metric": "size_bytes", "max": "2 * dens"}]}, RecipeError, r"gates\[0\]\.max: not a limit"),
        ({"sampling": {"size": 60, "steps": 2}}, RecipeError, r"sampling\.size: got 60, expected a multiple of 8"),
        ({"measure": {"prompts": "nothing.txt"}}, RecipeError, r"nothing\.txt"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_before_any_work(
    tiny_recipe: Any, tmp_path: Path, changes: dict[str, Any], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        go(tiny_recipe(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_few_prompts_are_refused(tiny_recipe: Any, tmp_path: Path, finished: Path) -> None:
    measure = read_record(finished).recipe["measure"] | {"images": 5}
    with pytest.raises(RecipeError, match=r"measure\.images: got 5"):
        go(tiny_recipe(measure=measure), tmp_path / "out")


def test_nan_weights_are_refused_naming_tensor_and_file(
    tiny_pipeline_folder: Path, tiny_recipe: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(tiny_pipeline_folder, source)
    file = source / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"unet.*conv_in\.weight"):
        go(tiny_recipe(source={"path": str(source)}), tmp_path / "out")


def test_a_long_prompt_is_cut_as_diffusers_does_with_a_note(finished: Path, tmp_path: Path) -> None:
    from exporter.generation import generate_image

    notes = generate_image(finished / "engines" / "0-dense" / "ort", "a cat " * 40, tmp_path / "image.png", steps=2)
    assert (tmp_path / "image.png").is_file()
    assert any("was cut off" in note for note in notes)
    with pytest.raises(RecipeError, match=r"\.png"):
        generate_image(finished / "engines" / "0-dense" / "ort", "a cat", tmp_path / "image.jpg")


def test_inspect_finds_one_flipped_byte_in_any_artifact(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert all(item["intact"] for item in inspect_folder(out).data)
    file = out / "states" / "1-pruned" / "unet" / "surgery.json"
    file.write_bytes(file.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(ArtifactError, match=r"surgery\.json: damaged"):
        inspect_folder(out)
    with pytest.raises(ArtifactError, match="nothing to inspect"):
        inspect_folder(tmp_path)


def test_a_damaged_state_is_made_again(finished: Path, tiny_recipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    digest = open_artifact(out / "states" / "1-pruned").digest
    time.sleep(0.01)
    (out / "states" / "1-pruned" / "unet" / "config.json").write_text("{}")
    record = go(tiny_recipe(), out, until="export")
    assert [state.reused for state in record.states] == [True, False]
    assert open_artifact(out / "states" / "1-pruned").digest == digest


def test_equal_recipes_make_equal_digests(finished: Path, tiny_recipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    go(tiny_recipe(), out, until="export")
    for path in finished.glob(f"states/*/{MANIFEST}"):
        other = out / path.relative_to(finished)
        assert json.loads(other.read_text())["digest"] == json.loads(path.read_text())["digest"]

"""A scheduled denoiser from recipe to image: graphs that share weights, chained, measured, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from calibration.recording import Recording
from exporter.errors import ComponentFailed, ExporterError, RecipeError
from exporter.networks.cuts import torch_chain
from exporter.networks.schedule import Schedule, read_schedule
from exporter.networks.storage import load_network
from exporter.report.record import RunRecord
from exporter.report.writing import read_record
from exporter.runtime import load


@pytest.fixture(scope="module")
def scheduled(scheduled_run) -> tuple[Path, RunRecord]:
    """A run of 5 steps: pruned in width, then every second step cut. Read only."""
    return scheduled_run, read_record(scheduled_run)


def schedule_of(folder: Path) -> Schedule:
    found = read_schedule(folder)
    assert found is not None
    return found


def test_the_state_stores_no_weights_of_its_own_and_composes_with_pruning(scheduled):
    out, record = scheduled
    name = "diffusion_pytorch_model.safetensors"
    pruned, final = (out / "states" / state / "unet" for state in ("1-pruned", "2-pruned"))
    assert (pruned / name).samefile(final / name)
    assert (final / "surgery.json").exists()
    assert schedule_of(final).depths == (0, 1, 0, 1, 0)
    assert record.states[-1].facts["depths"] == [0, 1, 0, 1, 0]


def test_the_graphs_of_an_engine_share_one_file_of_weights(scheduled):
    out, _ = scheduled
    engine = out / "engines" / "2-pruned" / "ort" / "unet"
    graphs = sorted(path.name for path in engine.glob("*.onnx"))
    stored = out / "states" / "2-pruned" / "unet" / "diffusion_pytorch_model.safetensors"
    assert graphs == ["pattern-0.onnx", "pattern-1.onnx"]
    assert (engine / stored.name).samefile(stored)
    assert not [path for path in engine.rglob("*") if path.is_dir() or path.suffix == ".onnx_data"]
    small = [(engine / name).stat().st_size for name in graphs]
    assert sum(small) < 1.2 * stored.stat().st_size  # no graph holds the weights a second time
    assert "cannot" in (engine / "README.txt").read_text()


def test_graphs_chained_by_onnxruntime_answer_as_torch_does_at_every_step(scheduled):
    out, _ = scheduled
    folder = out / "states" / "2-pruned" / "unet"
    engine = out / "engines" / "2-pruned" / "ort" / "unet"
    schedule = schedule_of(folder)
    chain = torch_chain(load_network(folder, cls="UNet2DConditionModel"), schedule)
    graphs = [onnxruntime.InferenceSession(str(engine / f"pattern-{depth}.onnx")) for depth in (0, 1)]
    assert [value.name for value in graphs[0].get_outputs()] == ["out_sample", "fresh_1"]
    assert [value.name for value in graphs[1].get_inputs()][3:] == ["cache_1"]
    assert [value.name for value in graphs[1].get_outputs()] == ["out_sample"]
    recording = Recording.open(next((out / "recordings").glob("*/data")))
    cache = None
    for index, step in enumerate(schedule.steps):
        call = recording.calls(index, 0, 2)
        feeds: dict[str, Any] = {
            "sample": np.concatenate([call.sample, call.sample]),
            "timestep": np.array(call.timestep, np.float32),
            "encoder_hidden_states": np.concatenate(
                [call.given_uncond["encoder_hidden_states"], call.given["encoder_hidden_states"]]
            ),
        }
        wanted = chain(feeds)["out_sample"]
        if step.depth:
            (got,) = graphs[1].run(None, {**feeds, "cache_1": cache})
        else:
            got, cache = graphs[0].run(None, feeds)
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_fidelity_and_the_latency_of_the_loop_are_measured(scheduled):
    out, record = scheduled
    parity = [
        json.loads(path.read_text())["facts"].get("parity", {}) for path in (out / "lowered").glob("onnx-unet-*/*.json")
    ]
    both = next(found for found in parity if "pattern-0" in found)
    assert set(both) == {"pattern-0", "pattern-1"}
    assert {entry["output"] for entry in both["pattern-0"]["calls"]} == {"out_sample", "fresh_1"}
    assert min(found["psnr_db"] for found in both.values()) > 70
    for cell in record.cells:
        found = {m.name: m for m in cell.measurements if m.component == "unet"}
        loop, call = found["latency.loop_ms"], found["latency.median_ms"]
        assert loop.value == pytest.approx(5 * call.value)
        assert loop.detail["calls"] == 5
        if cell.state != "0-dense":
            assert {name: one["steps"] for name, one in loop.detail["patterns"].items()} == {
                "pattern-0": 3,
                "pattern-1": 2,
            }
            assert found["lowering.psnr_db"].value > 60
            assert found["fidelity.teacher_forced.psnr_db"].value < 100  # the cut steps differ from dense


def test_an_engine_draws_alone_and_refuses_other_sampling(scheduled, call, tmp_path):
    engine = scheduled[0] / "engines" / "2-pruned" / "ort"
    code, said, _ = call("generate", engine, "a cat", "--out", tmp_path / "cat.png")
    assert (code, "5 steps" in said) == (0, True)
    code, _, wrong = call("generate", engine, "a cat", "--out", tmp_path / "cat.png", "--steps", 4)
    assert code == 2
    assert "--steps: got 4, expected 5: unet follows a schedule" in wrong
    code, _, wrong = call("generate", engine, "a cat", "--out", tmp_path / "cat.png", "--guidance", 1)
    assert code == 2
    assert "schedule was made with guidance" in wrong


@pytest.mark.parametrize("rows", [1, 3])  # fewer and more than the batch that the graphs are for
def test_a_loaded_pipeline_refuses_other_sampling(scheduled, rows):
    pipeline = load(scheduled[0] / "engines" / "2-pruned" / "ort")

    def draw(steps: int = 5, guidance: float = 3.0) -> np.ndarray:
        given = {"output_type": "np", "generator": torch.Generator().manual_seed(0), "height": 64, "width": 64}
        images: np.ndarray = pipeline(
            ["a cat"] * rows, num_inference_steps=steps, guidance_scale=guidance, **given
        ).images
        return images

    first = draw()
    with pytest.raises(ComponentFailed, match="not made for this list of steps; got timestep"):
        draw(steps=3)
    with pytest.raises(RecipeError, match="got a call without guidance"):
        draw(guidance=1.0)
    assert np.array_equal(draw(), first)  # a batch that was refused leaves nothing behind
    mine = pipeline.scheduler
    for change in ({"beta_end": 0.5}, {"solver_order": 3}):
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(mine.config, **change)
        with pytest.raises(ExporterError, match="schedule was made for other settings of DPMSolverMultistepScheduler"):
            draw()

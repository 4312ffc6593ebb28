"""What preflight expects is held against what happened, and a run that would not fit does not start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from exporter.costs import Machine, cost_of
from exporter.errors import RecipeError
from exporter.forecast import Forecast, compare
from exporter.meter import Meter, Took
from exporter.networks.components import denoiser
from exporter.preflight import check_recipe
from exporter.report.writing import read_record


@pytest.fixture(scope="module")
def apart(tiny_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by the command, in a process of its own: this one's peak is that of many other tests."""
    folder = tmp_path_factory.mktemp("apart")
    recipe = tiny_recipe().model_dump(mode="json", exclude_none=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [str(Path(sys.executable).with_name("exporter")), "run", "recipe.yaml", "--out", "out"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_a_finished_run_records_what_it_took_beside_what_was_expected(apart: Path) -> None:
    found = read_record(apart).forecast
    assert set(found) == {"memory_mib", "disk_mib", "seconds", "processor_seconds"}
    for facts in found.values():
        assert facts["expected"] > 0
        assert facts["got"] > 0
        assert facts["ratio"] == pytest.approx(facts["got"] / facts["expected"], rel=0.02)


def test_the_comparison_is_got_over_expected() -> None:
    expected = Forecast(1000, 800, 100, 60, 50, "tuning")
    found = compare(expected, Took(900.0, 110.0, 75.04, 40.0))
    assert found["memory_mib"] == {"expected": 1000.0, "got": 900.0, "ratio": 0.9}
    assert found["seconds"] == {"expected": 60.0, "got": 75.0, "ratio": 1.251}


def test_memory_that_the_process_had_before_is_not_taken_for_the_run_s(tmp_path: Path) -> None:
    before = torch.ones(2 << 30, dtype=torch.uint8)  # a mark that nothing reaches here again
    del before
    assert Meter().took(tmp_path, 100.0).memory_mib is None
    meter = Meter(peak_mib=1.0)
    assert meter.took(tmp_path, 1e6).memory_mib == 1e6
    assert (meter.took(tmp_path, 1.0).memory_mib or 0) > 2000
    assert set(compare(Forecast(1000, 800, 100, 60, 50, "tuning"), Took(None, 1.0, 1.0, 1.0))) == {
        "disk_mib",
        "seconds",
        "processor_seconds",
    }


def test_more_of_everything_is_expected_to_take_more(
    tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = Machine(flops=5e10, threads=1, cores=2, share=1.0, pace=1.0)
    monkeypatch.setattr("exporter.forecast.machine", lambda: same)  # this one's speed changes from moment to moment
    small = check_recipe(tiny_recipe(), tmp_path / "out").expected
    ort, ov = {"type": "onnxruntime"}, {"type": "openvino"}
    wider = check_recipe(tiny_recipe(targets={"a": ort, "b": ov}), tmp_path / "out").expected
    assert wider.disk_mib > small.disk_mib
    assert wider.seconds > small.seconds
    tune = {"tune": {"method": "distill", "steps": 100_000, "prompts": "shapes-train"}}
    assert check_recipe(tiny_recipe(stages=[tune]), tmp_path / "out").expected.seconds > 2 * small.seconds


@pytest.mark.parametrize(
    ("stages", "fix"),
    [
        ([{"prune": {"method": "magnitude", "keep_ratio": 0.75}}], r"write sampling\.batch: 1, or cut more of unet"),
        ([{"tune": {"method": "distill", "steps": 1, "prompts": "shapes-train"}}], "tune on a larger machine"),
    ],
)
def test_a_machine_too_small_is_refused_before_any_work(
    tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: Any, fix: str
) -> None:
    here = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: here._replace(available=200 << 20))
    with pytest.raises(RecipeError, match=rf"memory: the run would not fit; got 200 MiB free, .*{fix}"):
        check_recipe(tiny_recipe(stages=stages), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_run_takes_was_expected(apart: Path) -> None:
    """Of the time only the order, and of processors alone: on the clock, others on this machine have their share."""
    found = read_record(apart).forecast
    assert 0.7 <= found["memory_mib"]["ratio"] <= 1.3
    assert 0.7 <= found["disk_mib"]["ratio"] <= 1.3
    assert 1 / 3 <= found["processor_seconds"]["ratio"] <= 3


def test_a_user_who_knows_better_goes_on_and_the_plan_says_so(
    tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: here._replace(available=200 << 20))
    with pytest.raises(RecipeError, match=r"If you know better, run it with --ignore-memory\.$"):
        check_recipe(tiny_recipe(), tmp_path / "out")
    plan = check_recipe(tiny_recipe(), tmp_path / "out", ignore_memory=True)
    assert any("memory: 200 MiB were free" in note and "--ignore-memory" in note for note in plan.notes)


def test_methods_that_look_at_the_model_say_that_their_time_is_not_in_the_estimate(
    tiny_recipe: Any, tmp_path: Path
) -> None:
    data = {"prompts": "shapes-train", "images": 2}
    stages = [
        {"prune": {"method": "magnitude", "keep_ratio": 0.9}},
        {"prune": {"method": "taylor", "keep_ratio": 0.9, **data}},
    ]
    notes = check_recipe(tiny_recipe(stages=stages), tmp_path / "out").notes
    assert [note for note in notes if "not in the estimate" in note and note.startswith("stages[1] (taylor):")]
    assert not any("magnitude" in note for note in notes)


def test_attention_that_a_runtime_writes_down_counts(tiny_pipeline_folder: Path) -> None:
    """Scores of two rows, two heads, 16 x 16 places each with each."""
    part = denoiser("StableDiffusionPipeline")
    found = cost_of(part, tiny_pipeline_folder, 1, 2, 16)
    heads = UNet2DConditionModel.from_pretrained(tiny_pipeline_folder / "unet").down_blocks[0].attentions[0]
    count = heads.transformer_blocks[0].attn1.heads
    assert found.scores_mib == pytest.approx(2 * count * 256 * 256 * 4 / 2**20)


def test_operations_are_those_of_the_real_network(tiny_pipeline_folder: Path) -> None:
    """Counted without weights as with them."""
    found = cost_of(denoiser("StableDiffusionPipeline"), tiny_pipeline_folder, 1, 2, 8)
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline_folder / "unet")
    # The counter knows the products of plain attention, not the fused kernel that the CPU would take.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 77, 32))
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert found.weights == len(unet.state_dict())

"""A pipeline folder becomes a diffusers pipeline, pruned parts included; it may name classes of our tables only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.errors import ArtifactError, SourceError
from exporter.networks.components import component, components, denoiser
from exporter.networks.pipeline import load_pipeline
from exporter.networks.storage import read_config, save_network
from exporter.networks.surgery import Snapshot, diff
from exporter.networks.wiring import drop_pair, droppable_pairs


def _latents(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red circle", num_inference_steps=2, output_type="latent", generator=generator).images


@pytest.fixture
def folder(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline"))


def test_the_pipeline_answers_as_the_stock_one(tiny_pipeline_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    ours = load_pipeline(tiny_pipeline_folder)
    stock = StableDiffusionPipeline.from_pretrained(
        tiny_pipeline_folder, local_files_only=True, safety_checker=None, requires_safety_checker=False
    )
    assert type(ours) is StableDiffusionPipeline
    assert ours.safety_checker is None
    assert not any(getattr(ours, name).training for name in ("unet", "vae", "text_encoder"))
    assert ours.scheduler.config == stock.scheduler.config
    torch.testing.assert_close(_latents(ours), _latents(stock), rtol=0, atol=1e-4)


def test_a_pruned_part_is_loaded_with_its_surgery(folder: Path) -> None:
    pipeline = load_pipeline(folder)
    config = read_config(folder / "unet", "UNet2DConditionModel")
    snapshot = Snapshot.of(pipeline.unet)
    drop_pair(pipeline.unet, droppable_pairs(pipeline.unet)[0])
    save_network(pipeline.unet, folder / "unet", surgery=diff(snapshot, pipeline.unet), original_config=config)
    again = load_pipeline(folder)
    assert torch.equal(_latents(again), _latents(pipeline))


def test_the_dtype_is_that_of_every_network(tiny_pipeline_folder: Path) -> None:
    pipeline = load_pipeline(tiny_pipeline_folder, dtype=torch.bfloat16)
    for part in components("StableDiffusionPipeline"):
        assert {p.dtype for p in getattr(pipeline, part.folder).parameters()} == {torch.bfloat16}


def _index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), ArtifactError, r"model_index\.json"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), ArtifactError, "not readable JSON"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), ArtifactError, "not a JSON object"),
    "other family": (lambda f: _index(f, _class_name="SanaPipeline"), SourceError, "expected one of StableDiffusion"),
    "no family": (lambda f: _index(f, _class_name=None), SourceError, "unsupported pipeline family"),
    "other network": (lambda f: _index(f, unet=["os", "system"]), ArtifactError, "unet: another class; got 'system'"),
    "other tokenizer": (lambda f: _index(f, tokenizer=["os", "system"]), ArtifactError, "closed list; got 'system'"),
    "other scheduler": (lambda f: _index(f, scheduler=["diffusers", "Pipe"]), ArtifactError, "closed list; got 'Pipe'"),
    "no class": (lambda f: _index(f, vae=None), ArtifactError, "vae: no class"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), ArtifactError, "tokenizer: missing"),
    "broken scheduler": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text("{"),
        ArtifactError,
        "scheduler: not a DPMSolverMultistepScheduler",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_folder_that_is_not_right_is_refused(what: str, folder: Path) -> None:
    damage, error, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(error, match=message):
        load_pipeline(folder)


def test_components_are_found_by_name_and_by_role() -> None:
    family = "StableDiffusionPipeline"
    assert [part.name for part in components(family)] == ["text_encoder", "unet", "vae_decoder"]
    assert denoiser(family) == component(family, "denoiser") == component(family, "unet")
    assert component(family, "vae_decoder").folder == "vae"
    with pytest.raises(SourceError, match="expected one of denoiser, text_encoder, unet, vae_decoder"):
        component(family, "vae")
    with pytest.raises(SourceError, match="unsupported pipeline family; got 'SanaPipeline'"):
        components("SanaPipeline")

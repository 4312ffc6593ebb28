"""Engine folders hold what optimum's loaders look for, share what did not change and name no path of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from transformers import CLIPTokenizer

from exporter.errors import ArtifactError, ComponentFailed
from exporter.lowering.layout import write_layout
from exporter.networks.pipeline import load_scheduler, load_tokenizer

FILES = {"onnxruntime": "model.onnx", "openvino": "openvino_model.xml"}
PARTS = ("unet", "vae_decoder", "text_encoder")


def compiled(folder: Path, target_type: str) -> Path:
    for name in PARTS:
        (folder / name).mkdir(parents=True)
        (folder / name / FILES[target_type]).write_text("an engine")
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def state(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "state"))


@pytest.mark.parametrize("target_type", sorted(FILES))
def test_the_folder_is_what_the_loaders_expect(state: Path, tmp_path: Path, target_type: str) -> None:
    folder = compiled(tmp_path / "engine", target_type)
    write_layout(state, folder, engine_file=FILES[target_type])
    index = read(folder / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
    assert index["safety_checker"] == index["feature_extractor"] == index["image_encoder"] == [None, None]
    assert index["requires_safety_checker"] is False
    for name, source in (("unet", "unet"), ("vae_decoder", "vae"), ("text_encoder", "text_encoder")):
        assert (folder / name / FILES[target_type]).is_file()
        want = read(state / source / "config.json")
        assert read(folder / name / "config.json") == {key: want[key] for key in want if key != "_name_or_path"}


def test_tokenizer_and_scheduler_load_back(state: Path, tmp_path: Path) -> None:
    folder = compiled(tmp_path / "engine", "onnxruntime")
    write_layout(state, folder, engine_file="model.onnx")
    text = "a red circle, left of Ä"
    assert load_tokenizer(folder)(text).input_ids == load_tokenizer(state)(text).input_ids
    assert dict(load_scheduler(folder).config) == dict(load_scheduler(state).config)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("source", DPMSolverMultistepScheduler),
        ("dpm-solver++", DPMSolverMultistepScheduler),
        ("ddim", DDIMScheduler),
        ("euler", EulerDiscreteScheduler),
    ],
)
def test_the_recipes_scheduler_is_written(state: Path, tmp_path: Path, name: str, cls: type) -> None:
    folder = compiled(tmp_path / "engine", "onnxruntime")
    write_layout(state, folder, engine_file="model.onnx", scheduler=name)
    assert read(folder / "model_index.json")["scheduler"] == ["diffusers", cls.__name__]
    assert isinstance(load_scheduler(folder), cls)
    assert load_scheduler(folder).config.beta_schedule == "scaled_linear"


def test_no_path_of_this_machine_is_written(state: Path, tmp_path: Path) -> None:
    for config in (state / "unet/config.json", state / "tokenizer/tokenizer_config.json"):
        config.write_text(json.dumps(read(config) | {"_name_or_path": str(tmp_path), "name_or_path": str(tmp_path)}))
    folder = compiled(tmp_path / "engine", "onnxruntime")
    write_layout(state, folder, engine_file="model.onnx")
    for path in folder.rglob("*"):
        if path.is_file():
            assert str(tmp_path) not in path.read_text(encoding="utf-8")


def test_unchanged_files_are_shared(state: Path, tmp_path: Path) -> None:
    folder = compiled(tmp_path / "engine", "onnxruntime")
    write_layout(state, folder, engine_file="model.onnx")
    assert (folder / "tokenizer/tokenizer.json").samefile(state / "tokenizer/tokenizer.json")


def test_older_transformers_get_their_two_files(state: Path, tmp_path: Path) -> None:
    """transformers 5 writes tokenizer.json alone; 4.57, which optimum-onnx runs with, reads vocabulary and merges."""
    for name in ("vocab.json", "merges.txt"):
        (state / "tokenizer" / name).unlink(missing_ok=True)
    fast = read(state / "tokenizer/tokenizer.json")
    fast["model"]["merges"] = [["a", "b"], ["ab", "c</w>"]]
    for extra in ("ab", "abc</w>"):
        fast["model"]["vocab"][extra] = 1000 + len(extra)
    (state / "tokenizer/tokenizer.json").write_text(json.dumps(fast))
    folder = compiled(tmp_path / "engine", "onnxruntime")
    write_layout(state, folder, engine_file="model.onnx")
    assert read(folder / "tokenizer/vocab.json") == fast["model"]["vocab"]
    merges = (folder / "tokenizer/merges.txt").read_text(encoding="utf-8")
    assert merges.splitlines() == ["#version: 0.2", "a b", "ab c</w>"]
    text = "abc cab"
    alone = CLIPTokenizer(vocab=str(folder / "tokenizer/vocab.json"), merges=str(folder / "tokenizer/merges.txt"))
    assert alone(text).input_ids == load_tokenizer(state)(text).input_ids


def test_a_component_that_was_not_compiled_is_named(state: Path, tmp_path: Path) -> None:
    folder = compiled(tmp_path / "engine", "openvino")
    (folder / "vae_decoder/openvino_model.xml").unlink()
    with pytest.raises(ComponentFailed, match=r"vae_decoder: not compiled; expected openvino_model\.xml"):
        write_layout(state, folder, engine_file="openvino_model.xml")


def test_a_damaged_state_is_named(state: Path, tmp_path: Path) -> None:
    (state / "unet/config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"unet/config\.json"):
        write_layout(state, compiled(tmp_path / "a", "onnxruntime"), engine_file="model.onnx")
    shutil.rmtree(state / "tokenizer")
    (state / "unet/config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="tokenizer: missing"):
        write_layout(state, compiled(tmp_path / "b", "onnxruntime"), engine_file="model.onnx")

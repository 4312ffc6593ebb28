"""The source keys of a recipe, from YAML to an engine that runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from exporter.errors import ArtifactError, RecipeError, SourceError
from exporter.preflight import check_recipe
from exporter.progress import Silent
from exporter.recipe import Recipe, read_recipe
from exporter.report.page import render_html
from exporter.report.text import render_text
from exporter.run import run_recipe
from exporter.runtime import load

MODULE = "unet.down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline whose weights are a variant, with a safety checker and, beside it, a LoRA and prompts."""
    from exporter.random_weights.families import family
    from exporter.random_weights.writing import write_random

    folder = tmp_path_factory.mktemp("source")
    wanted = family("sd15", tiny=True, safety_checker=True)
    made = write_random(wanted, folder / "sd15", seed=0, progress=Silent()).folder
    checker = made / "safety_checker/model.safetensors"
    state = load_file(checker)
    state["concept_embeds_weights"] = torch.full_like(state["concept_embeds_weights"], -2.0)
    save_file(state, checker, {"format": "pt"})
    for file in sorted(made.glob("*/*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    pair = {f"{MODULE}.lora_A.weight": torch.ones(2, 16, 3, 3), f"{MODULE}.lora_B.weight": torch.ones(16, 2, 1, 1)}
    save_file(pair, folder / "style.safetensors")
    (folder / "prompts.txt").write_text("a cat\n")
    return folder


def _recipe(source: Path, folder: Path, **keys: Any) -> Recipe:
    recipe = {
        "name": "sources",
        "source": {"path": str(source / "sd15"), "variant": "fp16"} | keys,
        "sampling": {"steps": 2, "guidance": 2.0, "size": 64},
        "targets": {"ort": {"type": "onnxruntime", "threads": 1}},
        "measure": {"prompts": str(source / "prompts.txt"), "images": 1, "calls": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return read_recipe(folder / "recipe.yaml")


def test_variant_lora_and_safety_checker_reach_the_engine(source: Path, tmp_path: Path) -> None:
    keys = {"safety_checker": "keep", "loras": [{"path": str(source / "style.safetensors"), "weight": 0.1}]}
    record = run_recipe(_recipe(source, tmp_path, **keys), tmp_path / "out", progress=Silent(), until="compile")
    assert record.source["safety_checker"] == "kept"
    assert record.source["variant"] == "fp16"
    for shown in (render_text(record), render_html(record, tmp_path / "out")):
        assert "the safety checker of the source is carried along" in " ".join(shown.split())
        assert "LoRA style.safetensors with weight 0.1" in " ".join(shown.split())
    engine = tmp_path / "out/engines/0-dense/ort"
    pipeline: Any = load(engine)
    made = pipeline("a cat", num_inference_steps=1, height=64, width=64)
    assert made.nsfw_content_detected == [True], "its thresholds say that every image is unsafe"
    (engine / "safety_checker/config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="damaged"):
        load(engine)


def test_by_default_the_engine_has_no_safety_checker_and_the_report_says_so(source: Path, tmp_path: Path) -> None:
    record = run_recipe(_recipe(source, tmp_path), tmp_path / "out", progress=Silent(), until="compile")
    assert record.source["safety_checker"] == "dropped"
    assert any("is left out (source.safety_checker: drop)" in note for note in record.notes)
    pipeline: Any = load(tmp_path / "out/engines/0-dense/ort")
    assert pipeline.safety_checker is None


def test_a_single_file_needs_a_local_folder_of_configs(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    names = ("model.diffusion_model.out.2.bias", "first_stage_model.a", "cond_stage_model.transformer.text_model.a")
    save_file({name: torch.zeros(4) for name in names}, file)
    alone = _recipe(source, tmp_path, path=str(file), variant=None)
    with pytest.raises(SourceError, match=r"holds weights only; expected source\.config .* Nothing is fetched"):
        check_recipe(alone, tmp_path / "out")
    with pytest.raises(SourceError, match=r"source\.config: no such folder; got /nowhere"):
        check_recipe(_recipe(source, tmp_path, path=str(file), variant=None, config="/nowhere"), tmp_path / "out")
    file.with_suffix(".ckpt").touch()
    with pytest.raises(SourceError, match=r"model\.ckpt: a single file may be pickled"):
        check_recipe(_recipe(source, tmp_path, path=str(file.with_suffix(".ckpt")), variant=None), tmp_path / "out")
    ignored = shutil.ignore_patterns("*.safetensors")
    config = shutil.copytree(source / "sd15", tmp_path / "config", ignore=ignored)
    both = _recipe(source, tmp_path, path=str(file), variant=None, config=str(config))
    plan = check_recipe(both, tmp_path / "out")
    assert plan.facts.single_file == str(file)
    with pytest.raises(SourceError, match="does not hold the networks of"):
        run_recipe(both, tmp_path / "out", progress=Silent())
    assert json.loads((tmp_path / "out/report.json").read_text())["exit_code"] == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loras": [{"pth": "a"}]}, r"source\.loras\[0\]\.pth: unknown key; expected path \| weight"),
        ({"loras": [{"path": "a", "weight": 99}]}, r"source\.loras\[0\]\.weight: got 99"),
        ({"safety_checker": "yes"}, r"source\.safety_checker: got 'yes', expected 'keep' or 'drop'"),
        ({"variant": "../x"}, r"source\.variant: got '\.\./x'"),
        ({"config": "somewhere"}, "takes 'config' only beside the 'path' of a single checkpoint file"),
    ],
)
def test_a_wrong_source_key_is_a_sentence(keys: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        _recipe(source, tmp_path, **keys)

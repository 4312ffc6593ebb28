"""`exporter init`: what it writes is commented, passes `exporter check`, and refuses what it does not know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from exporter.drafting import DEVICES
from exporter.prompts import NAMED, prompt_set
from exporter.recipe import read_recipe


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_written_passes_check(device: str, call: Any, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "my recipe.yaml"
    code, said, error = call("init", tiny_pipeline_folder, "--device", device, "--out", out)
    assert code == 0, error
    assert f"{out}: written and checked" in said
    assert sum("#" in line for line in out.read_text().splitlines()) >= 8, "commented"
    recipe = read_recipe(out)
    assert recipe.name == "my-recipe"
    assert recipe.source.path == str(tiny_pipeline_folder)
    assert recipe.sampling.size == 64
    kinds = [stage.kind for stage in recipe.stages]
    assert kinds == ([] if device == "cpu" else ["prune", "tune"])
    other = "coreml" if device == "phone" else "openvino"
    assert {spec.type for spec in recipe.targets.values()} == {"onnxruntime", other}
    assert call("check", out, "--out", tmp_path / "run")[0] == 0


def test_the_embedded_model_and_a_variant_are_recognised(call: Any, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    plan = json.loads(call("init", "reference:shapes", "--device", "cpu", "--out", tmp_path / "a.yaml", "--json")[1])
    assert plan["plan"]["states"] == ["0-dense"]
    assert read_recipe(tmp_path / "a.yaml").measure.prompts == "shapes-validation"
    source = Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "source"))
    for file in sorted(source.glob("*/*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".bf16.safetensors")))
    for words in (["--variant", "bf16"], []):
        (tmp_path / "b.yaml").unlink(missing_ok=True)
        assert call("init", source, "--device", "phone", "--out", tmp_path / "b.yaml", *words)[0] == 0
    recipe = read_recipe(tmp_path / "b.yaml")
    assert recipe.source.variant == "bf16"
    assert recipe.measure.prompts == "everyday"


def test_a_family_that_cannot_be_distilled_is_drafted_without_and_refused_with_that_stage(
    call: Any, tmp_path: Path
) -> None:
    source, out = tmp_path / "flux", tmp_path / "flux.yaml"
    assert call("random", "--family", "flux", "--tiny", source)[0] == 0
    assert call("init", source, "--device", "laptop", "--out", out)[0] == 0
    assert [stage.kind for stage in read_recipe(out).stages] == ["prune"]
    stages = "[{tune: {method: distill, steps: 1, prompts: everyday}}]"
    out.write_text(yaml.safe_dump(yaml.safe_load(out.read_text()) | {"stages": yaml.safe_load(stages)}))
    code, _, error = call("check", out, "--out", tmp_path / "run")
    assert code == 2
    assert "stages[0].tune: cannot distil this family; got FluxPipeline" in error


def test_every_commented_line_can_be_switched_on(call: Any, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    call("init", tiny_pipeline_folder, "--device", "cpu", "--out", out)
    text = out.read_text().replace("stages: []", "stages:").replace("# - ", "  - ").replace("  # loras", "  loras")
    recipe = yaml.safe_load(text)
    assert [next(iter(stage)) for stage in recipe["stages"]] == ["prune", "tune"]
    out.write_text(text.replace("style.safetensors", str(tmp_path / "style.safetensors")))
    assert [stage.kind for stage in read_recipe(out).stages] == ["prune", "tune"]


def test_the_everyday_prompts_are_there() -> None:
    prompts = prompt_set("everyday").prompts
    assert len(prompts) == len(set(prompts)) == 32
    assert "everyday" in NAMED


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["SOURCE", "--device", "phon"], "--device: got 'phon', expected cpu | laptop | phone. Did you mean 'phone'?"),
        (["SOURCE"], "Missing option '--device'"),
        (["/nowhere", "--device", "cpu"], "no such folder"),
        (["owner/name", "--device", "cpu"], "a hub id needs its commit; expected owner/name@<40 hex digits>"),
        (["owner/name@" + "0" * 40, "--device", "cpu"], "cannot be fetched and is not in the local cache"),
        (["CKPT", "--device", "cpu"], "may be pickled"),
        (["SOURCE", "--device", "cpu", "--variant", "fp8"], "no weights of variant fp8"),
        (["FILE", "--device", "cpu"], "holds weights only; expected --config beside it"),
        (["SOURCE", "--device", "cpu", "--out", "FILE"], "is there already; expected a new file"),
        (["FLUX", "--device", "cpu"], "unsupported pipeline family; got 'SomeNewPipeline'"),
    ],
)
def test_what_it_cannot_do_is_a_sentence(
    call: Any, words: list[str], expected: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.ckpt").touch()
    (tmp_path / "new").mkdir()
    (tmp_path / "new/model_index.json").write_text('{"_class_name": "SomeNewPipeline"}')
    places = {"SOURCE": tiny_pipeline_folder, "FILE": tmp_path / "model.safetensors", "FLUX": tmp_path / "new"}
    places["CKPT"] = tmp_path / "model.ckpt"
    given = [str(places.get(word, word)) for word in words]
    given += [] if "--out" in given else ["--out", str(tmp_path / "recipe.yaml")]
    code, _, said = call("init", *given)
    assert code == 2
    assert expected in said
    assert not (tmp_path / "recipe.yaml").exists()

"""The command line: exit codes, JSON, and errors as sentences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from exporter.errors import RecipeError
from exporter.inspection import schema_of
from exporter.preflight import check_recipe
from exporter.pruners import PRUNERS
from exporter.pruners.base import CutOptions
from exporter.quantizing.options import QuantizeOptions
from exporter.recipe import recipe_path
from exporter.report.writing import read_record
from exporter.tuning import TUNERS
from exporter.tuning.options import DistillOptions
from exporter.validation import options_from, options_schema


def test_help_version_and_unknown_words(call: Any) -> None:
    assert call("--version")[1].startswith("diffusion-exporter ")
    assert "Carry out a recipe" in call("--help")[1]
    code, _, said = call("runn")
    assert code == 2
    assert "No such command" in said
    code, _, said = call("run", "shapes", "--sett", "a=1")
    assert code == 2
    assert "No such option" in said


def test_lists_are_json_when_asked(call: Any) -> None:
    rows = json.loads(call("targets", "--json")[1])
    assert {"onnxruntime", "openvino"} <= {row["type"] for row in rows}
    assert all(row["state"] in ("ready", "builds only", "missing") for row in rows)
    found = json.loads(call("pruners", "--json")[1])
    assert {"random", "magnitude", "distill"} <= {row["method"] for row in found["methods"]}
    assert found["families"]["bk-sdm"]["FluxPipeline"]
    assert not found["families"]["magnitude"]["FluxPipeline"]
    said = call("pruners")[1]
    assert "keep_ratio (required)" in said
    assert "not supported: its presets remove layers of UNet2DConditionModel" in said


@pytest.mark.parametrize("method", [*PRUNERS, *TUNERS])
def test_one_method_is_told_with_the_meaning_of_every_option(call: Any, method: str) -> None:
    found = json.loads(call("pruners", method, "--json")[1])
    said = call("pruners", method)[1]
    assert found["text"][:60] in said
    for name, about in found["options"]["properties"].items():
        assert f"\n{name}: " in said
        assert about["description"]
    assert call("pruners", "taylr")[2].endswith("Did you mean 'taylor'?\n")


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            [{"prune": {"method": "taylor", "keep_ratio": 0.5, "prompts": "none.txt"}}],
            "stages[0].prune.prompts: prompts none.txt: cannot be read; got 'No such file or directory', expected",
        ),
        (
            [{"tune": {"method": "distill", "steps": 1, "prompts": "evryday"}}],
            "stages[0].tune.prompts: prompts evryday: unknown; got 'evryday', expected one of everyday",
        ),
        (
            [{"prune": {"method": "wanda", "prompts": "few.txt", "images": 3}}],
            "stages[0].prune.images: got 3, but 'few.txt' has 2 prompts, expected at most as many.",
        ),
        (
            [{"prune": {"method": "deepcache"}}, {"prune": {"method": "dip-go", "prompts": "few.txt"}}],
            "stages[1].prune.method: got dip-go after deepcache in stages[0], expected one schedule of steps.",
        ),
    ],
)
def test_what_a_stage_cannot_work_with_is_told_before_any_work(
    tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("a cat\na dog\n")
    with pytest.raises(RecipeError) as refused:
        check_recipe(tiny_recipe(stages=stages))
    assert said in str(refused.value)


def test_prompts_that_are_used_in_turn_may_be_few(tiny_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("a cat\n")
    stage = {"prune": {"method": "taylor", "keep_ratio": 0.5, "prompts": str(tmp_path / "few.txt"), "images": 3}}
    assert check_recipe(tiny_recipe(stages=[stage])).states == ("0-dense", "1-pruned")


@pytest.mark.parametrize(
    ("name", "typo"),
    [
        ("shapes", {"prune": {"keep_ration": 0.5}}),
        ("shapes-int8", {"quantize": {"schema": "int8"}}),
        ("shapes-int8", {"quantize": {"calibration": {"sample": 1}}}),
    ],
)
def test_the_recipe_schema_takes_the_shipped_recipes_and_refuses_typos(
    call: Any, name: str, typo: dict[str, Any]
) -> None:
    schema = json.loads(call("schema")[1])
    jsonschema.Draft202012Validator.check_schema(schema)
    recipe = yaml.safe_load(recipe_path(name).read_text())
    jsonschema.validate(recipe, schema)
    ((kind, wrong),) = typo.items()
    recipe["stages"][0][kind] |= wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, schema)


def test_schemas_are_of_recipes_and_reports(call: Any) -> None:
    assert schema_of("report")["title"] == "RunRecord"
    assert call("schema", "cats")[0] == 2


@pytest.mark.parametrize(
    ("options", "given", "key", "inside", "outside"),
    [
        (CutOptions, {}, "keep_ratio", [0.001, 1], [0, 1.001]),
        (CutOptions, {"keep_ratio": 0.5}, "round_to", [1], [0]),
        (CutOptions, {"keep_ratio": 0.5}, "parts", [["heads"]], [[], ["hats"]]),
        (QuantizeOptions, {"scheme": "int8"}, "smoothness", [0, 1], [-0.1, 1.1]),
        (QuantizeOptions, {"scheme": "int8"}, "group_size", [1], [0]),
        (QuantizeOptions, {"scheme": "int8"}, "require_speedup", [0.5], [0]),
        (QuantizeOptions, {"scheme": "int8"}, "calibration", [{}, {"samples": 1}], [{"samples": 0}, {"calls": 0}]),
        (DistillOptions, {"prompts": "everyday"}, "steps", [1], [0]),
        *((DistillOptions, {"prompts": "everyday", "steps": 1}, key, [1], [0]) for key in ("batch", "samples")),
        *((DistillOptions, {"prompts": "everyday", "steps": 1}, key, [0, 0.999], [-0.1, 1]) for key in ("ema",)),
        (DistillOptions, {"prompts": "everyday", "steps": 1}, "learning_rate", [1e-6], [0]),
        (DistillOptions, {"prompts": "everyday", "steps": 1}, "feature_weight", [0], [-1]),
    ],
)
def test_limits_in_the_schema_are_the_limits_of_the_options(
    options: Any, given: dict[str, Any], key: str, inside: list[Any], outside: list[Any]
) -> None:
    schema = options_schema(options)
    assert schema["properties"][key]["description"]
    checker = jsonschema.Draft202012Validator(schema)
    for value in inside:
        recipe = {**given, key: value}
        assert checker.is_valid(recipe)
        options_from(options, recipe, "stages[0].prune")
    for value in outside:
        recipe = {**given, key: value}
        assert not checker.is_valid(recipe)
        with pytest.raises(RecipeError):
            options_from(options, recipe, "stages[0].prune")


def test_the_schema_describes_every_option_of_methods_and_targets() -> None:
    definitions = schema_of("recipe")["$defs"]
    stages = definitions["StageSpec"]["properties"]
    methods = (*stages["prune"]["oneOf"], *stages["tune"]["oneOf"], stages["quantize"])
    for choice in (*methods, stages["quantize"]["properties"]["calibration"], *definitions["TargetSpec"]["oneOf"]):
        for key, facts in choice["properties"].items():
            assert "const" in facts or facts["description"], key
    chosen = {
        choice["properties"]["type"]["const"]: choice["properties"] for choice in definitions["TargetSpec"]["oneOf"]
    }
    assert {chosen[name]["threads"]["minimum"] for name in ("onnxruntime", "openvino")} == {1}
    assert {chosen[name]["workspace_mib"]["minimum"] for name in ("tensorrt", "tensorrt-rtx")} == {1}


def test_check_tells_the_plan_before_any_work(call: Any, tmp_path: Path) -> None:
    code, out, _ = call("check", "shapes-quick", "--out", tmp_path / "out", "--set", "targets={o: {type: onnxruntime}}")
    assert code == 0
    assert "0-dense -> 1-pruned -> 2-tuned" in out
    assert "Memory" in out
    assert not (tmp_path / "out").exists()
    plan = json.loads(call("run", "shapes-quick", "--dry-run", "--json", "--until", "1-pruned")[1])
    assert plan["states"] == ["0-dense", "1-pruned"]
    assert plan["disk_mib"] > 10


def test_check_names_every_problem_at_once(call: Any, tmp_path: Path) -> None:
    recipe = {
        "name": "wrong",
        "source": {"path": "/nowhere/model"},
        "sampling": {"steps": 0, "stepz": 3},
        "stages": [
            {"prune": {"method": "magnitud", "keep_ratio": 0.5}},
            {"prune": {"method": "magnitude", "keep_ratio": 1.5, "rond_to": 8}},
        ],
        "targets": {"ov": {"type": "openvin"}, "ort": {"type": "onnxruntime", "threds": 2}},
        "measure": {"prompts": "/nowhere/prompts.txt", "images": 4},
        "gates": [{"metric": "lowering.psnr", "min": 45}, {"metric": "lowering.psnr_db", "min": "many"}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, said = call("check", tmp_path / "recipe.yaml")
    assert code == 2
    lines = said.splitlines()
    for wanted in (
        "recipe.yaml: sampling.steps: got 0, expected",
        "recipe.yaml: sampling.stepz: unknown key; expected",
        "stages[0].prune.method: got 'magnitud', expected",
        "stages[1].prune.rond_to: unknown key; expected",
        "stages[1].prune.keep_ratio: got 1.5, expected",
        "targets.ov.type: got 'openvin', expected",
        "targets.ort.threds: unknown key; expected",
        "prompts /nowhere/prompts.txt: cannot be read; got",
        "/nowhere/model: no such folder; got nothing, expected",
        "gates[0].metric: unknown metric; got 'lowering.psnr', expected",
        "gates[1].min: not a limit; got 'many', expected",
    ):
        assert [line.startswith(wanted) for line in lines].count(True) == 1, wanted
    assert len(lines) == 11


def test_names_that_no_entry_has_are_all_told_beside_an_unknown_key(call: Any, tmp_path: Path) -> None:
    recipe = yaml.safe_load(recipe_path("shapes-quick").read_text())
    recipe["sampling"]["stepz"] = 3
    recipe["gates"] = [{"metric": "size_bytes", "max": 1, "targets": ["ovv"], "state": "9-pruned"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, _, said = call("check", tmp_path / "recipe.yaml")
    assert [line.split(": got ")[0].partition(";")[0].split(": ", 1)[1] for line in said.splitlines()] == [
        "sampling.stepz: unknown key",
        "recipe: gates[0].targets",
        "recipe: gates[0].state",
    ]


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["run", "nothing.yaml"], 2, "no such recipe"),
        (["run", "shapes", "--set", "sampling.stepz=3"], 2, "Did you mean 'steps'"),
        (["run", "shapes", "--dry-run", "--until", "prunee"], 2, "--until: got 'prunee'"),
        (["run", "shapes", "--dry-run", "--targets", "ortt"], 2, "Did you mean 'ort'"),
        (["run", "shapes", "--dry-run", "--states", "9"], 2, "--states: got '9'"),
        (["check", "shapes", "--set", "targets.ort.precision=f16"], 2, "precision"),
        (["inspect", "/nowhere"], 2, "nothing to inspect"),
        (["gc", "/nowhere"], 2, "not the folder of a run"),
        (["report", "/nowhere"], 2, "report.json"),
        (["generate", "/nowhere", "a cat"], 2, "not an artifact"),
    ],
)
def test_what_a_user_can_do_wrong_is_a_sentence(call: Any, words: list[str], code: int, expected: str) -> None:
    got, _, said = call(*words)
    assert got == code
    assert expected in said
    assert "Traceback" not in said


def test_generate_report_inspect_and_gc_on_a_finished_run(call: Any, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    code, said, _ = call("generate", out / "engines/1-pruned/ort", "a cat", "--out", tmp_path / "a.png", "--seed", 3)
    assert code == 0
    assert "64x64, 3 steps, guidance 3, seed 3, state 1-pruned on onnxruntime" in said
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    (out / "report.html").unlink()
    code, said, _ = call("report", out)
    assert code == 0
    assert (out / "report.html").is_file()
    assert json.loads(call("report", out, "--json")[1])["name"] == "tiny"
    assert "intact" in call("inspect", out)[1]
    assert {item["kind"] for item in json.loads(call("inspect", out, "--json")[1])} == {"state", "engine"}
    assert "Freed 0.0 MB in 0 folders" in call("gc", out)[1]


def test_inspect_reads_as_text_and_is_exact_as_json(call: Any, finished: Path) -> None:
    folder = finished / "states/1-pruned"
    said = call("inspect", folder)[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["digest"] in said
    assert "stage            prune: keep_ratio 0.75, method magnitude, round_to 8" in said
    assert "module" in said
    for python in ("{", "}", "[", "'", "None", "True", "False"):
        assert python not in said, python
    engine = call("inspect", finished / "engines/1-pruned/ort")[1]
    assert engine.startswith("engine of 1-pruned for ort: intact, ")
    assert "options          threads 1, precision f32, optimization all, weights linked, format onnx" in engine
    assert "components       text_encoder, unet, vae_decoder" in engine
    (exact,) = json.loads(call("inspect", folder, "--json")[1])
    assert exact["facts"] == manifest["facts"]
    assert exact["bytes"] == sum(fact["size"] for fact in manifest["files"].values())


def test_a_missed_gate_is_the_exit_code(call: Any, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    recipe = read_record(finished).recipe | {"gates": [{"metric": "size_bytes", "max": 1}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, said, _ = call("run", tmp_path / "recipe.yaml", "--out", out, "--quiet")
    assert code == 3
    assert "size_bytes" in said


def test_a_bug_of_ours_is_called_one(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("exporter.inspection.target_rows", broken)
    code, _, said = call("targets")
    assert code == 1
    assert "ZeroDivisionError" in said
    assert "bug of ours" in said

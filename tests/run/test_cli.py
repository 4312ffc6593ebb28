"""The command line: exit codes, JSON, and errors as sentences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from exporter.inspection import schema_of
from exporter.recipe import recipe_path
from exporter.report.writing import read_record


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
    methods = json.loads(call("pruners", "--json")[1])
    assert {"random", "magnitude", "distill"} <= {row["method"] for row in methods}
    assert "keep_ratio (required)" in call("pruners")[1]


def test_the_recipe_schema_takes_the_shipped_recipes_and_refuses_typos(call: Any) -> None:
    schema = json.loads(call("schema")[1])
    jsonschema.Draft202012Validator.check_schema(schema)
    recipe = yaml.safe_load(recipe_path("shapes").read_text())
    jsonschema.validate(recipe, schema)
    recipe["stages"][0]["prune"]["keep_ration"] = 0.5
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, schema)
    assert schema_of("report")["title"] == "RunRecord"
    assert call("schema", "cats")[0] == 2


def test_check_tells_the_plan_before_any_work(call: Any, tmp_path: Path) -> None:
    code, out, _ = call("check", "shapes-quick", "--out", tmp_path / "out", "--set", "targets={o: {type: onnxruntime}}")
    assert code == 0
    assert "0-dense -> 1-pruned -> 2-tuned" in out
    assert "Memory" in out
    assert not (tmp_path / "out").exists()
    plan = json.loads(call("run", "shapes-quick", "--dry-run", "--json", "--until", "1-pruned")[1])
    assert plan["states"] == ["0-dense", "1-pruned"]
    assert plan["disk_mib"] > 10


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

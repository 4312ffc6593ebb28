"""Recipes: what is wrong, where, and what was meant."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.errors import RecipeError
from exporter.recipe import read_recipe, recipe_names, recipe_path
from exporter.validation import options_from
from exporter.yaml_recipe import read_yaml

GOOD: dict[str, Any] = {
    "name": "shapes",
    "source": {"path": "reference:shapes"},
    "stages": [{"prune": {"method": "magnitude", "keep_ratio": 0.7}}, {"tune": {"method": "distill", "steps": 3}}],
    "targets": {"ort": {"type": "onnxruntime", "threads": 2}},
    "gates": [{"metric": "lowering.psnr_db", "min": 45, "targets": ["ort"]}],
}


def write(folder: Path, recipe: object) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return file


def changed(path: str, value: object) -> dict[str, Any]:
    recipe = yaml.safe_load(yaml.safe_dump(GOOD))
    here: Any = recipe
    *keys, last = path.split(".")
    for key in keys:
        here = here[int(key)] if key.isdigit() else here.setdefault(key, {})
    here[int(last) if last.isdigit() else last] = value
    return dict(recipe)


def test_a_good_recipe_names_its_states(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD))
    assert recipe.state_ids == ("0-dense", "1-pruned", "2-tuned")
    assert recipe.measured_states == recipe.state_ids
    assert recipe.targets["ort"].given == {"threads": 2}
    assert recipe.stages[0].options == {"keep_ratio": 0.7}


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("sampling.guidanc", 4, r"sampling\.guidanc: unknown key; .*Did you mean 'guidance'\?"),
        ("sampling.steps", 0, r"sampling\.steps: got 0, expected greater than or equal to 1"),
        ("sampling.scheduler", "ddimm", r"sampling\.scheduler: got 'ddimm', expected 'source', 'dpm-solver\+\+'"),
        ("targts", {}, r"targts: unknown key; .*Did you mean 'targets'\?"),
        ("source", {}, r"source: needs either 'path'"),
        ("source", {"hub": "a/b"}, r"source: needs 'revision', the 40 hex digits"),
        ("source", {"hub": "a/b", "revision": "main"}, r"40 hex digits"),
        ("stages.0", {"prune": {"keep_ratio": 1}}, r"stages\[0\]: prune\.method: missing"),
        (
            "stages.0",
            {"prune": {"method": "x"}, "tune": {"method": "y"}},
            r"stages\[0\]: expected exactly one of prune",
        ),
        (
            "stages.0",
            {"quantize": {"method": "int8"}},
            r"stages\[0\]: quantize\.scheme: missing; expected the name of a scheme",
        ),
        ("targets", {}, r"targets: needs at least one target"),
        ("targets", {"../x": {"type": "onnxruntime"}}, r"becomes a folder name"),
        ("name", "a/b", r"name: got 'a/b'"),
        ("gates.0.targets", ["orrt"], r"gates\[0\]\.targets: got 'orrt', expected ort"),
        ("gates.0.state", "5-tuned", r"gates\[0\]\.state: got '5-tuned', expected 0-dense \| 1-pruned"),
        ("gates.0", {"metric": "x"}, r"gates\[0\]: needs 'min' or 'max'"),
        ("measure", {"states": ["9-x"]}, r"measure\.states: got '9-x'"),
        ("measure", {"images": "many"}, r"measure\.images: got 'many', expected a valid integer"),
        ("on_miss", "stopp", r"on_miss: got 'stopp', expected 'stop' or 'continue'"),
    ],
)
def test_a_bad_recipe_is_refused_with_place_and_fix(tmp_path: Path, path: str, value: object, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected) as caught:
        read_recipe(write(tmp_path, changed(path, value)))
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("recipe.yaml: ")


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    recipe = changed("sampling.steps", 0) | {"targts": 1, "unmeasured": "no"}
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(tmp_path, recipe))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "got NoneType, expected a mapping"),
        ("[1, 2]", "got list, expected a mapping"),
        ("name: [", "not valid YAML"),
        ("name: a\nname: b\n", "key 'name' stands twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_text_that_is_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        read_recipe(write(tmp_path, text))


def test_undecodable_and_huge_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("#" * (2**20 + 1))
    with pytest.raises(RecipeError, match="too large"):
        read_recipe(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("sampling.steps", "got no '='"), ("stages[7].prune.method=x", "there is no '7'"), ("name=[", "not valid YAML")],
)
def test_bad_settings(tmp_path: Path, setting: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        read_recipe(write(tmp_path, GOOD), [setting])


def test_settings_reach_lists_and_new_keys(tmp_path: Path) -> None:
    settings = [
        "stages[0].prune.keep_ratio=0.5",
        "stages.1.tune.steps=9",
        "sampling.steps=7",
        "targets.x.type=openvino",
    ]
    recipe = read_recipe(write(tmp_path, GOOD), settings)
    assert recipe.stages[0].options["keep_ratio"] == 0.5
    assert recipe.stages[1].options["steps"] == 9
    assert recipe.sampling.steps == 7
    assert list(recipe.targets) == ["ort", "x"]


@settings(max_examples=25, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda x: st.lists(x) | st.dictionaries(st.text(max_size=5), x),
        max_leaves=8,
    )
)
def test_no_value_anywhere_crashes_the_reader(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    folder = tmp_path_factory.mktemp("r")
    for key in ("name", "source", "sampling", "stages", "targets", "measure", "gates"):
        try:
            read_recipe(write(folder, {**GOOD, key: value}))
        except RecipeError as error:
            assert str(error)  # noqa: PT017


def test_shipped_recipes_are_valid_and_found_by_name() -> None:
    assert {"shapes", "shapes-quick"} <= set(recipe_names())
    for name in recipe_names():
        assert read_recipe(recipe_path(name)).name == name
    with pytest.raises(RecipeError, match="Did you mean 'shapes'"):
        recipe_path("shaps")


@dataclasses.dataclass(frozen=True)
class Options:
    keep_ratio: float
    cut: Literal["channels", "blocks"] = "channels"
    protect: tuple[str, ...] = ()


def test_options_of_a_method() -> None:
    assert options_from(Options, {"keep_ratio": 1, "protect": ["a"]}, "p") == Options(1.0, "channels", ("a",))
    with pytest.raises(
        RecipeError, match=r"p\.keep_ration: unknown key; expected keep_ratio .*Did you mean 'keep_ratio'"
    ):
        options_from(Options, {"keep_ration": 1}, "p")
    with pytest.raises(RecipeError, match=r"p\.keep_ratio: missing"):
        options_from(Options, {}, "p")
    with pytest.raises(RecipeError, match=r"p\.cut: got 'x', expected 'channels' or 'blocks'"):
        options_from(Options, {"keep_ratio": 1, "cut": "x"}, "p")


def test_reading_a_recipe_loads_no_torch() -> None:
    code = "import sys, exporter.recipe as r; r.read_recipe(r.recipe_path('shapes')); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("text", ["pattern: 2:4", "pattern: '2:4'", "pattern: 1:16"])
def test_a_pattern_is_no_number_of_base_60(text: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 2:4 as 124."""
    path = tmp_path / "r.yaml"
    path.write_text(f"stage: {{{text}}}\n")
    expected = text.partition(": ")[2].strip("'")
    assert read_yaml(path, [])["stage"]["pattern"] == expected
    assert read_yaml(path, ["stage.pattern=3:8"])["stage"]["pattern"] == "3:8"
    assert read_yaml(path, ["stage.steps=12"])["stage"]["steps"] == 12

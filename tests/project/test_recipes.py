"""Every recipe that ships is valid; so is every JSON file."""

from __future__ import annotations

import json
from pathlib import Path

from exporter.recipe import read_recipe, recipe_names, recipe_path


def test_every_shipped_recipe_is_valid_and_named_like_its_file(root: Path) -> None:
    on_disk = {file.stem for file in (root / "exporter/recipes").glob("*.yaml")}
    assert on_disk == set(recipe_names())
    assert {"shapes", "shapes-quick"} <= on_disk
    assert {name: read_recipe(recipe_path(name)).name for name in on_disk} == {name: name for name in on_disk}


def test_every_json_file_is_valid(texts: dict[Path, str]) -> None:
    for file, text in texts.items():
        if file.suffix == ".json":
            json.loads(text)

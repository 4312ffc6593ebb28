"""`exporter random`: a folder that `exporter check` takes, and sentences for what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml


def test_a_random_pipeline_can_be_checked_at_once(call: Any, tmp_path: Path) -> None:
    code, said, _ = call("random", "--family", "sd15", "--tiny", "--seed", 3, tmp_path / "sd15")
    assert code == 0
    assert "StableDiffusionPipeline as Stable Diffusion 1.5" in said
    recipe = {"name": "r", "source": {"path": str(tmp_path / "sd15")}, "targets": {"ort": {"type": "onnxruntime"}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, said, _ = call("check", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert code == 0
    assert "StableDiffusionPipeline, 0.3 M parameters" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--family", "sd155"], "Did you mean 'sd15'"),
        (["--family", "flux", "--safety-checker"], "--safety-checker: FLUX.1 dev has none"),
        ([], "Missing option '--family'"),
        (["--family", "dit", "--tiny", "--shard-mib", "0"], "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_written_is_a_sentence(call: Any, words: list[str], expected: str, tmp_path: Path) -> None:
    code, _, said = call("random", *words, tmp_path / "out")
    assert code == 2
    assert expected in said
    assert not (tmp_path / "out").exists()

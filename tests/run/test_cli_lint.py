"""`exporter lint`: what it says of Core ML packages, and of two that should be alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'diffusion-exporter[coreml]'")

from targets.coreml import CoreMl, CoreMlOptions
from targets.torch_source import TorchProgram

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Words(nn.Module):
    """Looks words up, of which there are few, and normalizes."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 32)
        self.norm = nn.LayerNorm(32, eps=epsilon)
        self.out = nn.Linear(32, 8)

    def forward(self, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.words(tokens) + states))


def engine(folder: Path, epsilon: float = 1e-5, **options: Any) -> Path:
    inputs = {"tokens": np.zeros((1, 5), np.int64), "states": np.zeros((1, 5, 32), np.float32)}
    program = TorchProgram("text_encoder", Words(epsilon).eval(), inputs, ("out",))
    part = folder / "text_encoder"
    part.mkdir(parents=True)
    CoreMl().convert(program, part, CoreMlOptions(**options))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine(tmp_path_factory.mktemp("lint") / "engine")


def test_every_rule_is_told_with_source_fix_and_operations(call: Any, made: Path) -> None:
    code, said, _ = call("lint", made)
    assert code == 0
    assert "text_encoder: " in said
    assert "embedding lookup (reported): 1 operation" in said
    assert "source: " in said
    assert "fix: Expect one hop to the CPU" in said
    assert "(gather, words)" in said
    assert "linear or matmul (vendor): 1 operation" in said
    assert "(linear, out)" in said
    assert said.rstrip().endswith("only its compute plan, on a Mac, tells.")
    assert "diverg" not in said


def test_an_engine_a_component_and_a_package_are_all_places(call: Any, made: Path) -> None:
    found = [
        json.loads(call("lint", place, "--json")[1])
        for place in (made, made / "text_encoder", made / "text_encoder" / "model.mlpackage")
    ]
    assert found[0] == found[1]
    whole, bare = found[0]["components"][0], found[2]["components"][0]
    assert (whole["component"], bare["component"]) == ("text_encoder", "model.mlpackage")
    assert (whole["at_risk"], whole["operations"]) == (bare["at_risk"], bare["operations"])
    assert 0 < whole["at_risk"] <= whole["operations"]
    assert "certifies nothing" in found[0]["note"]
    assert {"rule", "strength", "source", "fix", "count", "examples"} == whole["findings"][0].keys()
    assert "diverges" not in whole


def test_the_first_operation_that_diverges_is_named(call: Any, made: Path, tmp_path: Path) -> None:
    again, other = engine(tmp_path / "again"), engine(tmp_path / "other", epsilon=0.1)
    code, said, _ = call("lint", made, "--against", again)
    assert code == 0
    assert "no operation diverges" in said
    assert json.loads(call("lint", made, "--against", again, "--json")[1])["components"][0]["diverges"] is None
    assert "first diverging: " in (said := call("lint", other, "--against", made)[1])
    assert "(layer_norm, norm): error 0.0" in said
    told = json.loads(call("lint", other, "--against", made, "--json")[1])["components"][0]["diverges"]
    assert (told["type"], told["module"]) == ("layer_norm", "norm")
    assert 1e-3 < told["error"] < 0.1
    single = engine(tmp_path / "single", precision="f32")
    told = json.loads(call("lint", single, "--against", made, "--json")[1])["components"][0]["diverges"]
    assert told["error"] is None
    assert "another operation" in told["told"]


def test_what_is_no_engine_or_damaged_is_a_sentence(call: Any, made: Path, tmp_path: Path) -> None:
    code, _, said = call("lint", tmp_path)
    assert code == 2
    assert "got no coreml.json, expected an engine of the target coreml" in said
    broken = shutil.copytree(made, tmp_path / "broken")
    weights = next(broken.rglob("weight.bin"))
    weights.write_bytes(weights.read_bytes()[:100])
    code, _, said = call("lint", broken, "--against", made)
    assert code == 5
    assert "truncated" in said
    next(broken.rglob("*.mlmodel")).write_bytes(b"nothing")
    code, _, said = call("lint", broken)
    assert code == 5
    assert "not a model" in said

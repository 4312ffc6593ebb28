"""A stage that cuts by latency, in a run: what it is lent, what its state is keyed by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fakes import Missing
from torch import nn

import exporter.run
import targets
from exporter.artifact import Artifact
from exporter.errors import RecipeError
from exporter.lowering.workshop import Column
from exporter.networks.standins import Bypass, Shortcut
from exporter.progress import Silent
from exporter.recipe import Recipe
from exporter.report.record import CellRecord
from exporter.run import run_recipe


class Watch:
    """Takes what `TargetStopwatch` takes; every unit costs the same."""

    made: ClassVar[list[tuple[Any, ...]]] = []
    digest = "first"

    def __init__(self, column: Any, export: Any, folder: Path, progress: Any) -> None:
        self.made.append((column, export, folder))

    def whole_ms(self, network: nn.Module) -> float:
        """Count what is not cut."""
        parts = [module for module in network.modules() if isinstance(module, Bypass | Shortcut)]
        return 50.0 - len(parts)

    def units_ms(self, network: nn.Module, paths: list[str]) -> dict[str, float]:
        """Say 1 of everything but of what stays of it."""
        return {path: 0.0 if path.endswith("conv_shortcut") else 1.0 for path in paths}

    def control(self) -> dict[str, tuple[float, float, float]]:
        """Tell nothing."""
        return {}


def not_lowered(run: Any, state: Artifact, column: Column, shop: Any, bench: Any) -> CellRecord:
    """Stand in for what makes and measures engines, which is no matter here."""
    return CellRecord(state=state.path.name, target=column.name, status="not run", error="left out")


@pytest.fixture
def run(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Return a function that makes the pruned state and returns the facts of its record."""
    monkeypatch.setattr(exporter.run, "TargetStopwatch", Watch)
    monkeypatch.setattr(Watch, "made", [])
    monkeypatch.setattr(exporter.run, "_cell", not_lowered)
    (tmp_path / "prompts.txt").write_text("a boat\n")

    def carry_out(**changes: Any) -> dict[str, Any]:
        given = {"prompts": str(tmp_path / "prompts.txt"), "images": 1, "timesteps": 1, "sets": 0, "rescore": False}
        stage = {"method": "laptop-diff", "budget": "latency", "keep_ratio": 0.9, **given}
        made = run_recipe(
            tiny_recipe(stages=[{"prune": stage}], **changes), tmp_path / "out", progress=Silent(), until="1-pruned"
        )
        state = next(state for state in made.states if state.id == "1-pruned")
        return {**state.facts, "digest": state.digest, "reused": state.reused}

    return carry_out


def test_a_stage_by_latency_is_lent_the_first_target_at_the_recipes_shapes(run: Callable[..., dict[str, Any]]) -> None:
    facts = run()
    assert facts["modules_replaced"] == len(facts["removed"]) == 5  # of 50 ms 45 stay
    assert facts["latency"]["predicted_and_measured_ms"] == [[45.0, 45.0]]
    ((column, export, folder),) = Watch.made
    assert column.name == "ort"
    assert (export.batch, export.guided, export.latent, export.tokens) == (2, True, 8, 32)
    assert folder.parts[-2:] == ("work", "stopwatch")
    assert run()["reused"]


def test_another_target_makes_another_state(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    monkeypatch.setattr(Watch, "digest", "second")
    assert not run()["reused"]


def test_without_a_usable_target_the_recipe_is_refused(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(targets.TARGETS, "missing", f"{Missing.__module__}:Missing")
    with pytest.raises(RecipeError, match="no target of the recipe can be used here"):
        run(targets={"a": {"type": "missing"}})

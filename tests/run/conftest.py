"""A tiny recipe, carried out once for all tests that only look at the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from exporter.cli import main
from exporter.recipe import Recipe, read_recipe

MakeRecipe = Callable[..., Recipe]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def tiny_recipe(
    tiny_pipeline_folder: Path, made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory
) -> MakeRecipe:
    """Return a function that makes a recipe on the tiny pipeline; keyword arguments replace top-level keys."""
    folder = tmp_path_factory.mktemp("recipes")
    prompts = made_once("prompts", lambda made: (made / "prompts.txt").write_text("a cat\na dog\na hat\n"))

    def make(**changes: Any) -> Recipe:
        recipe: dict[str, Any] = {
            "name": "tiny",
            "source": {"path": str(tiny_pipeline_folder)},
            "sampling": {"steps": 3, "guidance": 3.0, "batch": 2},
            "stages": [{"prune": {"method": "magnitude", "keep_ratio": 0.75, "round_to": 8}}],
            "targets": {"ort": {"type": "onnxruntime", "threads": 1}},
            "measure": {"prompts": str(prompts / "prompts.txt"), "images": 3, "calls": 2, "latency_seconds": 0.2},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
        return read_recipe(folder / "recipe.yaml")

    return make


@pytest.fixture(scope="session")
def finished(tiny_recipe: MakeRecipe, made_once: MadeOnce) -> Path:
    """The folder of a finished run. Read only: copy it to change it."""
    from exporter.progress import Silent
    from exporter.run import run_recipe

    def carry_out(folder: Path) -> None:
        record = run_recipe(tiny_recipe(), folder / "out", progress=Silent())
        assert record.exit_code == 0, [cell.error for cell in record.cells]

    return made_once("finished", carry_out) / "out"


@pytest.fixture(scope="session")
def built(tiny_recipe: MakeRecipe, made_once: MadeOnce) -> Path:
    """The folder of a run of two zeros in four, on a runtime that runs here and on one that does not. Read only."""
    from exporter.progress import Silent
    from exporter.run import run_recipe

    recipe = tiny_recipe(
        stages=[{"prune": {"method": "magnitude", "cut": "weights", "pattern": "2:4", "keep_ratio": 0.5}}],
        targets={"ort": {"type": "onnxruntime", "threads": 1}, "rtx": {"type": "tensorrt-rtx"}},
        gates=[
            {"metric": "size_bytes", "max": 1e9},
            {"metric": "latency.median_ms", "max": 1e9, "component": "denoiser"},
            {"metric": "sparse.chosen", "min": 1, "targets": ["rtx"], "component": "denoiser", "state": "final"},
        ],
    )
    return made_once("built", lambda folder: run_recipe(recipe, folder / "out", progress=Silent())) / "out"


@pytest.fixture(scope="session")
def scheduled_run(tiny_recipe: MakeRecipe, made_once: MadeOnce) -> Path:
    """The folder of a run of 5 steps: pruned in width, then every second step cut. Read only."""
    from exporter.progress import Silent
    from exporter.run import run_recipe

    recipe = tiny_recipe(
        sampling={"steps": 5, "guidance": 3.0, "batch": 2},
        stages=[
            {"prune": {"method": "magnitude", "keep_ratio": 0.75, "round_to": 8}},
            {"prune": {"method": "deepcache", "interval": 2}},
        ],
        measure={**tiny_recipe().measure.model_dump(), "states": "final"},
        gates=[{"metric": "latency.loop_ms", "max": 1e9, "state": "final"}, {"metric": "lowering.psnr_db", "min": 60}],
    )

    def carry_out(folder: Path) -> None:
        record = run_recipe(recipe, folder / "out", progress=Silent())
        assert record.exit_code == 0, [cell.error for cell in record.cells]

    return made_once("scheduled", carry_out) / "out"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the command and returns exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["exporter", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run

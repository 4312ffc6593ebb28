"""For every family: its tiny pipeline, and a run that prunes it, on two runtimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_families import PROMPTS, PRUNE, SAMPLING, write_pipeline

from exporter.loan import DenseLoan
from exporter.networks.components import FAMILIES
from exporter.recipe import Recipe
from exporter.report.record import RunRecord


@dataclass(frozen=True)
class Finished:
    """A run of one family.

    Attributes:
        family: its pipeline class.
        source: folder of the tiny pipeline.
        out: folder of the run.
        record: what it found.
    """

    family: str
    source: Path
    out: Path
    record: RunRecord


@pytest.fixture(scope="session")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from family to the folder of its tiny pipeline. Read only: copy it to change it."""
    found: dict[str, Path] = {}

    def source(family: str) -> Path:
        if family not in found:
            found[family] = write_pipeline(family, tmp_path_factory.mktemp(family))
        return found[family]

    return source


@pytest.fixture(scope="session")
def loan_of(source_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DenseLoan]:
    """Return a function from family to what a run lends to pruning methods; prompts lie beside its folder."""
    from exporter.networks.source import check_source
    from exporter.progress import Silent
    from exporter.states import own_size
    from exporter.transforms import make_dense

    found: dict[str, DenseLoan] = {}

    def loan(family: str) -> DenseLoan:
        if family not in found:
            folder = tmp_path_factory.mktemp(f"{family}-loan")
            (folder / "prompts.txt").write_text(PROMPTS.get(family, "a cat\na dog\n"))
            dense, _ = make_dense(source_of(family), check_source(source_of(family)), folder / "dense")
            size = SAMPLING.get(family, {}).get("size") or own_size(dense.path)
            guidance = 1.0 if FAMILIES[family].guidance == "none" else 3.0
            sampling = {"scheduler": "source", "steps": 3, "guidance": guidance, "size": size, "batch": 2}
            found[family] = DenseLoan(dense, sampling, "no target here", 5, folder / "loan", Silent())
        return found[family]

    return loan


@pytest.fixture(scope="session")
def recipe_of(source_of: Callable[[str], Path]) -> Callable[..., Recipe]:
    """Return a function from family to a recipe on its tiny pipeline; keyword arguments change the sampling."""

    def recipe(family: str, **sampling: Any) -> Recipe:
        source = source_of(family)
        prompts = source.parent / "prompts.txt"
        prompts.write_text(PROMPTS.get(family, "a cat\na dog\n"))
        return Recipe.model_validate(
            {
                "name": "tiny",
                "source": {"path": str(source)},
                "sampling": {"steps": 2, "batch": 2, **SAMPLING.get(family, {"guidance": 3}), **sampling},
                "stages": [{"prune": PRUNE}],
                "targets": {
                    "ort": {"type": "onnxruntime", "threads": 1},
                    "ov": {"type": "openvino", "threads": 1},
                },
                "export": {"vae_encoder": bool(FAMILIES[family].on_request)},
                "measure": {"prompts": str(prompts), "images": 2, "calls": 2, "latency_seconds": 0.05},
            }
        )

    return recipe


@pytest.fixture(scope="session")
def finished_of(
    recipe_of: Callable[..., Recipe],
    source_of: Callable[[str], Path],
    made_once: Callable[[str, Callable[[Path], object]], Path],
) -> Callable[[str], Finished]:
    """Return a function from family to its finished run, made once for all workers. Read only."""
    from exporter.progress import Silent
    from exporter.report.writing import read_record
    from exporter.run import run_recipe

    found: dict[str, Finished] = {}

    def finished(family: str) -> Finished:
        if family not in found:
            made = made_once(
                f"{family}-run", lambda folder: run_recipe(recipe_of(family), folder / "out", progress=Silent())
            )
            found[family] = Finished(family, source_of(family), made / "out", read_record(made / "out"))
        return found[family]

    return finished

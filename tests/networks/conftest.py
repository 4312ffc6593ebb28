"""A tiny fp16 pipeline with a safety checker, and what to make of its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def half_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny StableDiffusionPipeline in fp16 with a safety checker. Read only: copy it to change it."""
    from exporter.progress import Silent
    from exporter.random_weights.families import family
    from exporter.random_weights.writing import write_random

    wanted = family("sd15", tiny=True, safety_checker=True)
    return write_random(wanted, tmp_path_factory.mktemp("half") / "sd15", seed=0, progress=Silent()).folder


@pytest.fixture
def half(half_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(half_pipeline, tmp_path / "sd15"))


@pytest.fixture(scope="session")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from family, as `exporter random` names it, to its tiny pipeline in fp16. Read only."""
    from exporter.progress import Silent
    from exporter.random_weights.families import family
    from exporter.random_weights.writing import write_random

    found: dict[str, Path] = {}

    def source(name: str) -> Path:
        if name not in found:
            out = tmp_path_factory.mktemp("random") / name
            found[name] = write_random(family(name, tiny=True), out, seed=0, progress=Silent()).folder
        return found[name]

    return source

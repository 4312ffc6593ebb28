"""The tiny pipeline, loaded, and recordings of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from calibration.prompts import PromptSet
from calibration.record import record
from calibration.recording import Recording

PROMPTS = PromptSet.of("three", ["a red circle", "a small blue square", "a star"])
SAMPLING: dict[str, Any] = {"seed": 11, "steps": 3, "guidance": 4.0, "size": 64}


@pytest.fixture(scope="session")
def pipeline(tiny_pipeline_folder: Path) -> StableDiffusionPipeline:
    torch.set_num_threads(1)
    loaded = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="session")
def recording(pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Three prompts in batches of two: two shards. Read only."""
    return record(pipeline, PROMPTS, tmp_path_factory.mktemp("recordings") / "guided", batch=2, **SAMPLING)

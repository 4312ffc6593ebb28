"""What a run lends: the same dense pipeline every time, noise of its own, and sentences where something is missing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from exporter.errors import RecipeError
from exporter.progress import Silent
from exporter.pruners.base import Context
from exporter.sampling import use_scheduler


def prompts_of(loan):
    return str(loan.folder.parent / "prompts.txt")


def test_a_recording_is_made_once_and_its_noise_is_the_loans_own(tiny_loan):
    first = tiny_loan.recording(prompts_of(tiny_loan), 2)
    again = tiny_loan.recording(prompts_of(tiny_loan), 2)
    assert first.folder == again.folder
    assert first.seeds == (5, 6)
    other = dataclasses.replace(tiny_loan, seed=9).recording(prompts_of(tiny_loan), 2)
    assert not np.array_equal(other.calls(0).sample, first.calls(0).sample)


def test_data_is_what_the_dense_pipeline_draws(tiny_loan):
    found = tiny_loan.data(prompts_of(tiny_loan), 3)
    assert found.latents.shape == (3, 4, 8, 8)
    assert torch.isfinite(found.latents).all()


def test_a_method_without_prompts_is_told_to_name_some(tiny_loan):
    with pytest.raises(RecipeError, match=r"prune\.prompts: missing; expected a set or file .* Write prompts: FILE"):
        tiny_loan.recording(None, 1)


def test_a_method_that_needs_data_outside_of_a_run_says_so(tmp_path):
    bare = Context(torch.Generator(), Silent(), tmp_path)
    with pytest.raises(RecipeError, match="needs data, and none is lent"):
        _ = bare.borrowed


@pytest.mark.parametrize("clips", [True, False, None])
def test_ddim_clips_where_the_sources_scheduler_does(tiny_loan, clips):
    """Latents are no pixels: clipped to -1 and 1 they would be spoilt, which is what DDIM does unless told."""
    pipeline = tiny_loan.pipeline()
    assert not pipeline.scheduler.config.clip_sample  # the loan draws with ddim; its source, DPM-Solver++, never clips
    pipeline.scheduler = DDPMScheduler() if clips is None else DDPMScheduler(clip_sample=clips)
    use_scheduler(pipeline, "ddim")
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.scheduler.config.clip_sample is (clips is not False)

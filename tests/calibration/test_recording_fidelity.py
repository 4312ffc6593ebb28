"""A real recording through the real comparison: exact for the pipeline's own denoiser, worse for a damaged one."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from calibration.recording import Recording
from exporter.metrics.fidelity import Answer, Subset, ask, lowering, recorded_answers, teacher_forced
from exporter.metrics.place import Place

PLACE = Place("0-dense", "torch", "unet")

pytestmark = pytest.mark.filterwarnings(
    # diffusers' schedulers hand torch tensors to numpy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def answer_of(unet: torch.nn.Module) -> Answer:
    def answer(sample: np.ndarray, timestep: float, given: Mapping[str, np.ndarray]) -> np.ndarray:
        others = {name: torch.from_numpy(array) for name, array in given.items()}
        with torch.inference_mode():
            out = unet(torch.from_numpy(sample), torch.tensor(timestep), **others)
        return np.asarray(out.sample.numpy())

    return answer


def test_the_pipelines_own_denoiser_answers_the_same(pipeline: StableDiffusionPipeline, recording: Recording) -> None:
    reference = recorded_answers(recording)
    for batch in (1, 2, 3):
        got = ask(recording, answer_of(pipeline.unet), Subset(batch=batch))
        found = teacher_forced(reference, got, PLACE)
        assert found.value is not None
        assert found.value > 90
        assert found.samples == 9


def test_damage_is_seen(pipeline: StableDiffusionPipeline, recording: Recording) -> None:
    damaged = copy.deepcopy(pipeline.unet)
    with torch.no_grad():
        damaged.mid_block.resnets[0].conv1.weight.mul_(8)
    subset = Subset(prompts=2)
    reference, got = recorded_answers(recording, subset), ask(recording, answer_of(damaged), subset)
    found = teacher_forced(reference, got, PLACE)
    assert found.value is not None
    assert found.value < 60
    assert found.timestep in recording.timesteps
    psnr, error = lowering(reference, got, PLACE)
    assert psnr.value is not None
    assert psnr.value < 60
    assert error.value is not None
    assert error.value > 1e-4

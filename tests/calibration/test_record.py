from __future__ import annotations

import copy
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

from calibration.errors import CalibrationError
from calibration.prompts import PromptSet
from calibration.record import record
from calibration.recording import Recording

SAMPLING: dict[str, Any] = {"seed": 11, "steps": 3, "guidance": 4.0, "size": 64}

pytestmark = pytest.mark.filterwarnings(
    # diffusers' schedulers hand torch tensors to numpy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def draw(pipeline: StableDiffusionPipeline, prompts: tuple[str, ...], guidance: float = 4.0) -> np.ndarray:
    """The pipeline's own images, as a user gets them."""
    images = pipeline(
        list(prompts),
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=guidance,
        generator=[torch.Generator("cpu").manual_seed(11 + index) for index in range(len(prompts))],
    ).images
    return np.stack([np.asarray(image) for image in images])


def with_scheduler(pipeline: StableDiffusionPipeline, scheduler: type, **settings: Any) -> StableDiffusionPipeline:
    changed = copy.copy(pipeline)
    changed.scheduler = scheduler.from_config(pipeline.scheduler.config, **settings)
    return changed


def one(pipeline: StableDiffusionPipeline, out: Path, **changes: Any) -> Recording:
    return record(pipeline, PromptSet.of("one", ["a red circle"]), out, **{**SAMPLING, **changes})


def test_images_are_the_pipelines_own(pipeline: StableDiffusionPipeline, recording: Recording) -> None:
    # Two and one prompts were recorded at a time; batch size moves float rounding, not more.
    own = np.concatenate([draw(pipeline, recording.prompts[:2]), draw_third(pipeline, recording.prompts[2])])
    assert np.array_equal(recording.images(), own)
    assert recording.images().std() > 1


def draw_third(pipeline: StableDiffusionPipeline, prompt: str) -> np.ndarray:
    generator = [torch.Generator("cpu").manual_seed(13)]
    image = pipeline(
        [prompt], height=64, width=64, num_inference_steps=3, guidance_scale=4.0, generator=generator
    ).images[0]
    return np.asarray(image)[None]


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler]
)
def test_images_are_the_pipelines_own_with_any_scheduler(
    pipeline: StableDiffusionPipeline, tmp_path: Path, scheduler: type
) -> None:
    settings = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    other = with_scheduler(pipeline, scheduler, **settings)
    found = one(other, tmp_path / "r")
    assert np.array_equal(found.images(), draw(other, found.prompts))
    assert found.index.scheduler == scheduler.__name__
    assert len(found.timesteps) >= 3  # Heun and PNDM call the denoiser more often than there are steps
    assert found.timesteps == tuple(float(t) for t in other.scheduler.timesteps)


def test_recorded_answers_are_what_the_denoiser_answers(
    pipeline: StableDiffusionPipeline, recording: Recording
) -> None:
    call = recording.calls(1)
    assert call.uncond is not None
    assert call.given_uncond is not None
    with torch.inference_mode():
        for given, answer in ((call.given, call.cond), (call.given_uncond, call.uncond)):
            text = given["encoder_hidden_states"]
            again = pipeline.unet(
                torch.from_numpy(call.sample), torch.tensor(call.timestep), torch.from_numpy(text)
            ).sample
            np.testing.assert_allclose(again.numpy(), answer, atol=1e-4)
    np.testing.assert_allclose(call.guided, call.uncond + 4.0 * (call.cond - call.uncond), atol=1e-5)


def test_scheduler_replays_the_recording(pipeline: StableDiffusionPipeline, recording: Recording) -> None:
    """The guided answers lead the scheduler from the first sample to the final latents."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(3)
    latents = torch.from_numpy(recording.calls(0).sample)
    for step, timestep in enumerate(scheduler.timesteps):
        call = recording.calls(step)
        np.testing.assert_allclose(scheduler.scale_model_input(latents, timestep).numpy(), call.sample, atol=1e-5)
        latents = scheduler.step(torch.from_numpy(call.guided), timestep, latents).prev_sample
    decoded = latents.numpy() / pipeline.vae.config.scaling_factor
    np.testing.assert_allclose(decoded, recording.fed("vae")["latent_sample"], rtol=1e-5, atol=1e-4)


def test_first_sample_is_each_seeds_own_noise(recording: Recording) -> None:
    assert recording.seeds == (11, 12, 13)
    for seed, sample in zip(recording.seeds, recording.calls(0).sample, strict=True):
        noise = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(seed))[0]
        np.testing.assert_allclose(sample, noise.numpy(), atol=1e-6)


def test_text_states_are_the_text_encoders(pipeline: StableDiffusionPipeline, recording: Recording) -> None:
    call = recording.calls(0)
    token_ids = recording.fed("text_encoder")["input_ids"]
    ids = pipeline.tokenizer(
        list(recording.prompts), padding="max_length", max_length=32, return_tensors="np"
    ).input_ids
    assert np.array_equal(token_ids, ids)
    with torch.inference_mode():
        states = pipeline.text_encoder(torch.from_numpy(token_ids))[0].numpy()
    np.testing.assert_allclose(call.given["encoder_hidden_states"], states, atol=1e-5)
    assert call.given_uncond is not None
    empty = call.given_uncond["encoder_hidden_states"]
    assert np.array_equal(empty, np.repeat(empty[:1], 3, axis=0))
    assert not np.allclose(empty[0], states[0], atol=1e-2)


def test_result_does_not_depend_on_the_batch(
    pipeline: StableDiffusionPipeline, recording: Recording, tmp_path: Path
) -> None:
    prompts = PromptSet.of("three", recording.prompts)
    single = record(pipeline, prompts, tmp_path / "r", batch=1, **SAMPLING)
    assert single.seeds == recording.seeds
    np.testing.assert_allclose(single.calls(2).sample, recording.calls(2).sample, rtol=1e-3, atol=1e-3)
    assert np.abs(single.images().astype(int) - recording.images().astype(int)).max() <= 1


def test_without_guidance_there_is_one_branch(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    found = one(pipeline, tmp_path / "r", guidance=1.0)
    call = found.calls(0)
    assert call.uncond is None
    assert call.given_uncond is None
    assert call.guided is call.cond
    assert not found.index.guided
    assert np.array_equal(found.images(), draw(pipeline, found.prompts, guidance=1.0))


def test_same_arguments_same_digest(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    digests = [one(pipeline, tmp_path / name).digest for name in ("a", "b")]
    assert digests[0] == digests[1]
    assert one(pipeline, tmp_path / "c", seed=12).digest != digests[0]


def test_long_prompt_is_truncated_as_diffusers_does_with_a_note(
    pipeline: StableDiffusionPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "a red circle left of a small blue star on a gray background"
    with caplog.at_level(logging.ERROR):
        found = record(pipeline, PromptSet.of("long", [text, "a star"]), tmp_path / "r", **SAMPLING)
    assert found.index.truncated == [0]
    assert "prompt 0 is longer than the tokenizer takes" in found.notes[0]
    assert found.prompts[0] == text
    assert np.array_equal(found.images(), draw(pipeline, found.prompts))


def test_pipeline_is_left_as_it_was(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    before = (pipeline.unet, pipeline.config, dict(vars(pipeline)).keys())
    one(pipeline, tmp_path / "r")
    assert (pipeline.unet, pipeline.config, dict(vars(pipeline)).keys()) == before
    assert not pipeline.unet._forward_hooks
    assert not pipeline.text_encoder._forward_hooks


class Told:
    """Writes down what progress it was told of."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    def start(self, title: str, total: int) -> None:
        self.stream.write(f"start {title} {total};")

    def advance(self, units: int = 1, note: str = "") -> None:
        self.stream.write(f"advance {units}{note};")

    def finish(self) -> None:
        self.stream.write("finish;")


def test_progress_counts_prompts(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    told = Told()
    prompts = PromptSet.of("three", ["a star", "a circle", "a square"])
    record(pipeline, prompts, tmp_path / "r", batch=2, progress=told, **{**SAMPLING, "steps": 1})
    assert told.stream.getvalue() == "start record three 3;advance 2;advance 1;finish;"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 0}, "steps: out of range; got 0, expected at least 1"),
        ({"batch": 0}, "batch: out of range; got 0"),
        ({"guidance": float("nan")}, "guidance: out of range; got nan"),
        ({"seed": -1}, "seed: out of range; got -1"),
        ({"size": 60}, "height: out of range; got 60, expected a multiple of 8"),
        ({"size": (64, 0)}, "width: out of range; got 0"),
    ],
)
def test_arguments_out_of_range(
    pipeline: StableDiffusionPipeline, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(CalibrationError, match=told):
        one(pipeline, tmp_path / "r", **change)
    assert not list(tmp_path.iterdir())


def test_nan_weights_are_named_and_leave_nothing(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    broken = copy.copy(pipeline)
    broken.unet = copy.deepcopy(pipeline.unet)
    with torch.no_grad():
        broken.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(CalibrationError, match="answer is not finite; got NaN or Inf at timestep"):
        one(broken, tmp_path / "r")
    assert not list(tmp_path.iterdir())
    assert not broken.unet._forward_hooks


def test_taken_folder_is_refused_and_kept(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CalibrationError, match="is taken"):
        one(pipeline, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_empty_folder_is_filled(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    out = tmp_path / "r"
    out.mkdir()
    one(pipeline, out, steps=1)
    assert Recording.open(out).count == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_pipeline_without_torch_denoiser_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no torch unet"):
        one(object(), tmp_path / "r")  # type: ignore[arg-type]


def test_further_denoiser_inputs_are_refused(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """A distilled denoiser that takes the guidance scale as input cannot be replayed from what a recording holds."""
    from diffusers import UNet2DConditionModel

    other = copy.copy(pipeline)
    other.unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=16)
    with pytest.raises(CalibrationError, match="inputs that a recording does not hold; got \\['timestep_cond'\\]"):
        one(other, tmp_path / "r")

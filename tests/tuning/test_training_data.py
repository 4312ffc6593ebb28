"""Training data: noise as the schedule says, latents made once, images as the user names them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from exporter.errors import RecipeError
from exporter.progress import Silent
from exporter.tuning.data import Generation, encoded, generated, noise_schedule, training_schedule
from exporter.tuning.images import captioned_images

CPU = torch.device("cpu")


def batch_of(data, size=64, dropout=0.25, seed=0):
    return data.batch(size, dropout=dropout, generator=torch.Generator().manual_seed(seed), device=CPU)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_what_the_model_predicts(latents, kind):
    """From sample and target alone the clean latent must come out, by the definitions of the three kinds."""
    data = dataclasses.replace(latents, scheduler=DDPMScheduler(prediction_type=kind))
    batch = batch_of(data)
    sample, target = batch.feeds["sample"], batch.target
    alpha = data.scheduler.alphas_cumprod[batch.feeds["timestep"]].reshape(-1, 1, 1, 1)
    if kind == "epsilon":
        clean = (sample - (1 - alpha).sqrt() * target) / alpha.sqrt()
    elif kind == "v_prediction":
        clean = alpha.sqrt() * sample - (1 - alpha).sqrt() * target
    else:
        clean = target
    early = batch.feeds["timestep"] < 700  # later, next to nothing of the latent is left to divide by
    distance = (clean[early, None] - data.latents[None]).abs().amax(dim=(2, 3, 4)).amin(dim=1)
    assert distance.max() < 1e-3


def test_timesteps_cover_the_schedule_evenly(latents):
    steps = batch_of(latents, size=50).feeds["timestep"]
    assert torch.equal(steps // 20, torch.arange(50))


def test_prompts_are_dropped_as_often_as_asked(latents):
    empty = latents.given["encoder_hidden_states"][-1]
    shares = [
        float((batch_of(latents, 400, dropout).feeds["encoder_hidden_states"] == empty).all(dim=(1, 2)).float().mean())
        for dropout in (0.0, 0.25)
    ]
    assert shares[0] == 0.0
    assert 0.18 < shares[1] < 0.32


def test_a_batch_follows_from_its_generator(latents):
    one, same, other = batch_of(latents), batch_of(latents), batch_of(latents, seed=1)
    assert all(torch.equal(value, same.feeds[name]) for name, value in one.feeds.items())
    assert not torch.equal(one.feeds["sample"], other.feeds["sample"])


def test_both_asks_the_same_latents_without_and_with_their_prompts(latents):
    def batch(**how):
        generator = torch.Generator().manual_seed(4)
        return latents.batch(5, dropout=0.0, generator=generator, device=torch.device("cpu"), **how)

    once, both = batch(), batch(both=True)
    for name in ("sample", "timestep"):
        assert torch.equal(both.feeds[name], once.feeds[name].repeat(2, *[1] * (once.feeds[name].dim() - 1)))
    without, with_prompts = both.feeds["encoder_hidden_states"].chunk(2)
    assert torch.equal(with_prompts, once.feeds["encoder_hidden_states"])
    assert torch.equal(without, latents.given["encoder_hidden_states"][-1:].expand_as(without))
    assert torch.equal(both.target, once.target.repeat(2, 1, 1, 1))


def test_a_schedule_without_betas_is_refused():
    with pytest.raises(RecipeError, match="FlowMatchEulerDiscreteScheduler"):
        noise_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000})
    assert noise_schedule({"beta_schedule": "linear", "prediction_type": "v_prediction", "solver_order": 2})


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_noised_as_its_own_scheduler_does(latents, shift):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift}
    data = dataclasses.replace(latents, scheduler=training_schedule(config), timestep_unit=1e-3)
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    images, levels = torch.tensor([0, 3, 5, 5]), torch.tensor([0, 10, 500, 999])
    batch = data.noised(images, levels, noise, device=CPU)
    own = FlowMatchEulerDiscreteScheduler(shift=shift)
    timesteps = own.timesteps.flip(0)[levels]
    wanted = own.scale_noise(latents.latents[images], timesteps, noise)
    torch.testing.assert_close(batch.feeds["sample"], wanted)
    torch.testing.assert_close(batch.feeds["timestep"], timesteps / 1000)
    assert batch.feeds["timestep"].tolist() == sorted(batch.feeds["timestep"].tolist())
    # A step of the scheduler along the target, from any level down to none, must end in the clean latents.
    sigmas = (batch.feeds["timestep"]).reshape(-1, 1, 1, 1)
    clean = batch.feeds["sample"] - sigmas * batch.target
    torch.testing.assert_close(clean, latents.latents[images], rtol=1e-4, atol=1e-5)


def test_the_same_noise_serves_every_level(latents):
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    images = torch.tensor([4, 0, 2])
    for level in (0, 500, 999):
        batch = latents.noised(images, torch.full((3,), level), noise, device=CPU)
        alpha = latents.scheduler.alphas_cumprod[level]
        wanted = alpha.sqrt() * latents.latents[images] + (1 - alpha).sqrt() * noise
        torch.testing.assert_close(batch.feeds["sample"], wanted)
        prompts = latents.given["encoder_hidden_states"][latents.prompt_of[images]]
        assert torch.equal(batch.feeds["encoder_hidden_states"], prompts)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder):
    return StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, safety_checker=None)


PLAN = Generation(steps=2, guidance=3.0, size=64, seed=10, batch=2)


def generate(pipeline, folder, prompts=("a", "b"), count=5, **changes):
    plan = dataclasses.replace(PLAN, **changes)
    calls = []
    handle = pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        return generated(pipeline, prompts, count, plan, folder=folder, progress=Silent()), len(calls)
    finally:
        handle.remove()


def test_latents_are_what_the_pipeline_makes(pipeline, tmp_path):
    pipeline.set_progress_bar_config(leave=False, disable=True)
    data, calls = generate(pipeline, tmp_path)
    assert calls == 3 * 2
    assert data.latents.shape == (5, 4, 8, 8)
    alone = pipeline(
        "a",
        num_inference_steps=2,
        guidance_scale=3.0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(12),
        output_type="latent",
    ).images
    torch.testing.assert_close(data.latents[2:3], alone, rtol=1e-4, atol=1e-4)
    assert data.prompt_of.tolist() == [0, 1, 0, 1, 0]
    with torch.no_grad():
        expected = pipeline.encode_prompt(["a", "b", ""], CPU, 1, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(data.given["encoder_hidden_states"], expected, atol=1e-5, rtol=1e-5)
    assert pipeline._progress_bar_config == {"leave": False, "disable": True}


def test_finished_chunks_are_found_again(pipeline, tmp_path):
    first, _ = generate(pipeline, tmp_path)
    again, calls = generate(pipeline, tmp_path)
    assert calls == 0
    assert torch.equal(first.latents, again.latents)
    (second,) = tmp_path.glob("latents-000002-*.safetensors")
    (third,) = tmp_path.glob("latents-000004-*.safetensors")
    second.unlink()
    third.write_bytes(b"broken")
    again, calls = generate(pipeline, tmp_path)
    assert calls == 2 * 2
    assert torch.equal(first.latents, again.latents)


@pytest.mark.parametrize("changes", [{"seed": 11}, {"guidance": 1.0}, {"prompts": ("c", "b")}])
def test_chunks_of_another_run_are_not_taken(pipeline, tmp_path, changes):
    first, _ = generate(pipeline, tmp_path)
    other, calls = generate(pipeline, tmp_path, **changes)
    assert calls > 0
    assert not torch.equal(first.latents, other.latents)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "images"
    made.mkdir()
    for number, size in enumerate([(64, 64), (80, 64), (32, 48)]):
        pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made / f"{number}.png")
        (made / f"{number}.txt").write_text(f"picture {number}\n", encoding="utf-8")
    return made


def test_images_are_encoded_as_the_pipeline_would(pipeline, folder, tmp_path):
    images = captioned_images(folder)
    assert images.captions == ("picture 0", "picture 1", "picture 2")
    data = encoded(pipeline, images, PLAN, folder=tmp_path / "work", progress=Silent())
    assert data.latents.shape == (3, 4, 8, 8)
    pixels = pipeline.image_processor.preprocess(Image.open(folder / "0.png"))
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(data.latents[:1], expected, rtol=1e-4, atol=1e-5)
    again = encoded(pipeline, images, PLAN, folder=tmp_path / "work", progress=Silent())
    assert torch.equal(again.latents, data.latents)
    (folder / "2.txt").write_text("something else", encoding="utf-8")
    changed = encoded(pipeline, captioned_images(folder), PLAN, folder=tmp_path / "work", progress=Silent())
    assert changed.prompt_of.tolist() == [0, 1, 2]


def test_captions_may_stand_in_one_file(folder):
    lines = [{"file_name": "2.png", "text": "two"}, {"file_name": "0.png", "text": "zero"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    images = captioned_images(folder)
    assert [path.name for path in images.files] == ["2.png", "0.png"]
    assert images.captions == ("two", "zero")


@pytest.mark.parametrize("harm", ["no folder", "empty", "no caption", "bad line", "no file", "no image"])
def test_bad_folders_are_refused_with_the_fix(folder, harm):
    if harm == "no folder":
        folder /= "missing"
    elif harm == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif harm == "no caption":
        (folder / "1.txt").unlink()
    elif harm == "bad line":
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n', encoding="utf-8")
    elif harm == "no file":
        (folder / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "x"}\n', encoding="utf-8")
    else:
        (folder / "1.png").write_bytes(b"nothing")
    with pytest.raises(RecipeError, match=r"(Correct|Write|Add|Replace)"):
        captioned_images(folder).pixels(0, 3, 16)

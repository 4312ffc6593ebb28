from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from exporter.errors import SourceError
from exporter.reference import JUDGE, SHAPES
from exporter.reference.grammar import SHAPES as SHAPE_WORDS
from exporter.reference.grammar import negatives, prompt_set, scene_from_prompt, scenes
from exporter.reference.judge import Judge
from exporter.reference.reader import agrees
from exporter.reference.render import render_many
from exporter.reference.train.words import build_tokenizer

GUIDANCE = json.loads((SHAPES.parent / "figures.json").read_text(encoding="utf-8"))["guidance"]


@pytest.fixture(scope="module")
def pipeline():
    found = StableDiffusionPipeline.from_pretrained(SHAPES)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def judge():
    return Judge()


@pytest.fixture(scope="module")
def renders():
    drawn = scenes(81, 400, held_out=True)
    return drawn, render_many(drawn, 3_000_000)


def test_sizes_of_the_folders():
    assert sum(path.stat().st_size for path in SHAPES.rglob("*") if path.is_file()) <= 40_000_000
    assert sum(path.stat().st_size for path in JUDGE.rglob("*") if path.is_file()) <= 16_000_000
    kinds = {path.suffix for folder in (SHAPES, JUDGE) for path in folder.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".txt"}


def test_the_pipeline_is_stock(pipeline):
    index = json.loads((SHAPES / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert index["requires_safety_checker"] is False
    assert isinstance(pipeline.vae, AutoencoderKL)
    assert isinstance(pipeline.unet, UNet2DConditionModel)
    assert isinstance(pipeline.text_encoder, CLIPTextModel)
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert {part.dtype for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder)} == {torch.float32}


def test_architecture_is_as_promised(pipeline):
    unet = pipeline.unet.config
    assert 12e6 < sum(weight.numel() for weight in pipeline.unet.parameters()) < 14e6
    assert len(unet.block_out_channels) == 3
    assert (unet.layers_per_block, unet.norm_num_groups, unet.sample_size) == (2, 8, 8)
    assert min(unet.attention_head_dim) >= 4
    assert all("CrossAttn" in name for name in unet.down_block_types)
    assert 4 <= pipeline.vae.config.latent_channels <= 16
    assert pipeline.vae_scale_factor == 8
    assert pipeline.tokenizer.model_max_length == 32


def test_every_word_is_one_token(pipeline):
    for prompt in prompt_set("shapes-validation"):
        assert len(pipeline.tokenizer(prompt).input_ids) == len(prompt.split()) + 2


def test_unknown_words_are_spelled(pipeline):
    ids = pipeline.tokenizer("Ein Zebra, gemalt für dich! 東京", padding="max_length", truncation=True).input_ids
    assert len(ids) == 32
    assert max(ids) < pipeline.text_encoder.config.vocab_size


def test_tokenizer_is_rebuilt_from_the_grammar(tmp_path, pipeline):
    rebuilt = build_tokenizer(tmp_path)
    assert rebuilt.get_vocab() == pipeline.tokenizer.get_vocab()
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (SHAPES / "tokenizer" / name).read_bytes()


def test_text_encoder_pools_at_the_first_end_token(pipeline):
    config = pipeline.text_encoder.config
    assert config.eos_token_id == pipeline.tokenizer.eos_token_id == pipeline.tokenizer.pad_token_id
    short = pipeline.tokenizer("a small red ring", return_tensors="pt").input_ids
    padded = pipeline.tokenizer("a small red ring", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = [pipeline.text_encoder(ids).pooler_output for ids in (short, padded)]
    assert torch.allclose(*pooled, atol=1e-5)


def test_latents_have_unit_spread(pipeline, renders):
    pixels = torch.from_numpy(renders[1][:64]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1, abs=0.05)


def test_autoencoder_reconstructs(pipeline, renders):
    pixels = torch.from_numpy(renders[1][:64]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        rebuilt = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (rebuilt - pixels).square().mean(dim=(1, 2, 3)))
    assert float(psnr.mean()) > 38


def test_judge_on_fresh_renders(judge, renders):
    drawn, images = renders
    assert judge.rates(images, [scene.prompt for scene in drawn]).mean() >= 0.95


def test_judge_scores_right_prompts_higher(judge, renders):
    drawn, images = renders
    right = judge.scores(images[:100], [scene.prompt for scene in drawn[:100]])
    wrong = judge.scores(images[:100], [negatives(scene)[0].prompt for scene in drawn[:100]])
    assert right.dtype == np.float32
    assert right.shape == (100,)
    assert 0 <= wrong.min() <= right.max() <= 100
    assert (right > wrong).mean() > 0.95


def test_judge_features(judge, renders):
    found = judge.features(renders[1][:5])
    assert found.shape == (5, judge.model.config.projection_dim)
    assert found.dtype == np.float32
    assert np.allclose(found[2:3], judge.features(renders[1][2:3]), atol=1e-4)
    assert judge.features(np.empty((0, 64, 64, 3), np.uint8)).shape == (0, 128)
    assert judge.rates(np.empty((0, 64, 64, 3), np.uint8), []).shape == (0,)
    assert judge.scores(np.empty((0, 64, 64, 3), np.uint8), []).shape == (0,)


def test_judge_refuses_what_it_cannot_judge(judge, tmp_path):
    with pytest.raises(SourceError, match=r"wrong images; got float32 \(1, 64, 64, 3\)"):
        judge.features(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(SourceError, match="differ in number; got 2 and 1"):
        judge.scores(np.zeros((2, 64, 64, 3), np.uint8), ["a small red ring on a white background"])
    with pytest.raises(SourceError, match="not a prompt of the reference grammar"):
        judge.rates(np.zeros((1, 64, 64, 3), np.uint8), ["a cat"])
    with pytest.raises(SourceError, match="no model folder"):
        Judge(tmp_path)


def test_judge_is_a_stock_model_too():
    assert CLIPModel.from_pretrained(JUDGE).dtype == torch.float32
    facts = json.loads((JUDGE / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert facts["image_mean"] == facts["image_std"] == [0.5, 0.5, 0.5]
    assert set(SHAPE_WORDS) <= {
        token.removesuffix("</w>") for token in CLIPTokenizer.from_pretrained(JUDGE).get_vocab()
    }


def test_generated_images_follow_held_out_prompts(pipeline, judge):
    prompts = prompt_set("shapes-validation")[:48]
    generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    found = pipeline(
        prompts, num_inference_steps=20, guidance_scale=GUIDANCE, generator=generators, output_type="np"
    ).images
    images = np.rint(found * 255).astype(np.uint8)
    assert judge.rates(images, prompts).mean() >= 0.8
    assert np.mean([agrees(image, scene_from_prompt(text)) for image, text in zip(images, prompts, strict=True)]) >= 0.8

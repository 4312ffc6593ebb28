"""A tiny pipeline of random weights for every supported family, the same weights every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIDE = 32
"""Image side of those that say none themselves; the tiny autoencoder scales by 4."""


def write_pipeline(family: str, folder: Path) -> Path:
    """Write the tiny pipeline of a family and return its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        MAKERS[family](folder / "parts").save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def sdxl(folder: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = clip_tokenizer(folder)
    unet = unet_of(
        cross_attention_dim=48,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(tokenizer, 16),
        text_encoder_2=clip(tokenizer, 32, projection=20),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
    )


def lcm(folder: Path) -> Any:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    tokenizer = clip_tokenizer(folder)
    return LatentConsistencyModelPipeline(
        vae=vae(),
        text_encoder=clip(tokenizer, 16),
        tokenizer=tokenizer,
        unet=unet_of(time_cond_proj_dim=32),
        scheduler=LCMScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixels() -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=8,
    )


def ddpm(folder: Path) -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler

    del folder
    return DDPMPipeline(unet=pixels(), scheduler=DDPMScheduler())


def ddim(folder: Path) -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler

    del folder
    return DDIMPipeline(unet=pixels(), scheduler=DDIMScheduler())


def pixart(folder: Path) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(12),
        vae=vae(),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            cross_attention_dim=16,
            caption_channels=12,
            sample_size=8,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )


def dit(folder: Path) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    made = DiTPipeline(
        transformer=DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=8, out_channels=8
        ),
        vae=vae(),
        scheduler=DDIMScheduler(),
    )
    made.register_to_config(id2label={"281": "tabby, cat", "207": "golden retriever"})  # as published folders have it
    return made


def sd3(folder: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer = clip_tokenizer(folder)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=40,
            caption_projection_dim=16,
            pooled_projection_dim=36,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer, 16, projection=16),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, 20, projection=20),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(40),
        tokenizer_3=t5_tokenizer(),
    )


def flux(folder: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer = clip_tokenizer(folder)
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=t5(12),
        tokenizer_2=t5_tokenizer(),
    )


MAKERS: dict[str, Callable[[Path], Any]] = {
    "StableDiffusionXLPipeline": sdxl,
    "LatentConsistencyModelPipeline": lcm,
    "DDPMPipeline": ddpm,
    "DDIMPipeline": ddim,
    "PixArtAlphaPipeline": pixart,
    "DiTPipeline": dit,
    "StableDiffusion3Pipeline": sd3,
    "FluxPipeline": flux,
}
PROMPTS = {"DiTPipeline": "207\ncat\n"}
SAMPLING: dict[str, dict[str, Any]] = {
    "DDPMPipeline": {},
    "DDIMPipeline": {},
    "FluxPipeline": {"guidance": 3, "size": SIDE},
}
PRUNE = {"method": "magnitude", "keep_ratio": 0.75, "round_to": 4}


def unet_of(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    options = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,  # in this class the number of heads
        "cross_attention_dim": 16,
    }
    return UNet2DConditionModel(**{**options, **changes})


def vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    options = {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": SIDE,
    }
    return AutoencoderKL(**{**options, **changes})


def clip(tokenizer: Any, width: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def clip_tokenizer(folder: Path) -> Any:
    """A CLIPTokenizer without merges: every letter is a token, with and without the end of a word."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({name: index for index, name in enumerate(names)}), encoding="utf-8")
    merges.write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(vocab=str(vocabulary), merges=str(merges), model_max_length=16)


def t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=40, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )


def t5_tokenizer() -> Any:
    """A T5Tokenizer whose pieces are single letters."""
    from transformers import T5Tokenizer

    letters = [(chr(code), -3.0) for code in range(ord("a"), ord("z") + 1)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=32)

"""Small networks with weights that hide nothing, of published configs and of others."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from exporter.random_weights.families import family

CLASSES = {cls.__name__: cls for cls in (UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection)}


def scrambled(network: nn.Module) -> nn.Module:
    """Norms that do nothing and biases of zero would hide what is left out."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def made(name: str, folder: str) -> Any:
    """The tiny network of a published model's config."""
    part = next(part for part in family(name, tiny=True).parts if part.folder == folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if part.cls == "UNet2DConditionModel":
            return scrambled(UNet2DConditionModel(**part.config))
        return scrambled(CLASSES[part.cls](CLIPTextConfig(**part.config)))


def unet(**changes: Any) -> Any:
    options = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 12,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return scrambled(UNet2DConditionModel(**{**options, **changes}))


def one_level() -> Any:
    """A U-Net that changes no sides: one down, one middle and one up block, each with attention."""
    return unet(
        block_out_channels=(16,),
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )


def clip(cls: Any = CLIPTextModel, **changes: Any) -> Any:
    options = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 10,
        "bos_token_id": 48,
        "eos_token_id": 49,
        "pad_token_id": 49,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return scrambled(cls(CLIPTextConfig(**{**options, **changes})))

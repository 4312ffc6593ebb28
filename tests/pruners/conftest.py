"""Tiny networks of the three supported classes, and a context that lends nothing but a seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from exporter.progress import Silent
from exporter.pruners.base import Context


def build_unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,  # in this class the number of heads
        cross_attention_dim=24,
    )


def build_vae() -> nn.Module:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def build_clip() -> nn.Module:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=12,
            bos_token_id=38,
            eos_token_id=39,
            pad_token_id=39,
        )
    )


BUILDERS: dict[str, Callable[[], nn.Module]] = {"unet": build_unet, "vae": build_vae, "clip": build_clip}


@pytest.fixture(scope="session")
def originals() -> dict[str, nn.Module]:
    """Built once; tests take copies."""
    torch.set_num_threads(1)
    made = {}
    for name, build in BUILDERS.items():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            made[name] = build().eval()
    return made


@pytest.fixture
def network(originals: dict[str, nn.Module]) -> Callable[[str], nn.Module]:
    """Return a fresh copy of a network by its name in `BUILDERS`."""
    return lambda name: copy.deepcopy(originals[name])


@pytest.fixture
def context(tmp_path: Path) -> Callable[[int], Context]:
    """Return a context of this seed."""
    return lambda seed=0: Context(torch.Generator().manual_seed(seed), Silent(), tmp_path)

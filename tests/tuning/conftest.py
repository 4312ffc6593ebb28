"""A tiny teacher, a pruned student of it, and latents to ask them about."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from exporter.progress import Silent
from exporter.pruners.base import Context, CutOptions
from exporter.pruners.magnitude import Magnitude
from exporter.tuning.data import LatentData


@pytest.fixture(scope="session")
def dense() -> nn.Module:
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = UNet2DConditionModel(
            sample_size=4,
            in_channels=2,
            out_channels=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=8,
        )
    return made.eval()


@pytest.fixture(scope="session")
def pruned(dense: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    made = copy.deepcopy(dense)
    context = Context(torch.Generator(), Silent(), tmp_path_factory.mktemp("prune"))
    Magnitude(CutOptions(0.5)).prune(made, context)
    return made


@pytest.fixture
def teacher(dense: nn.Module) -> nn.Module:
    return copy.deepcopy(dense)


@pytest.fixture
def student(pruned: nn.Module) -> nn.Module:
    return copy.deepcopy(pruned)


@pytest.fixture(scope="session")
def latents() -> LatentData:
    generator = torch.Generator().manual_seed(9)
    return LatentData(
        latents=torch.randn(12, 2, 4, 4, generator=generator),
        prompt_of=torch.arange(12) % 3,
        given={"encoder_hidden_states": torch.randn(4, 5, 8, generator=generator)},
        scheduler=DDPMScheduler(prediction_type="v_prediction"),
    )

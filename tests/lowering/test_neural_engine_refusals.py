"""What the Neural Engine form does not know is refused by its place in the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import SlicedAttnProcessor
from scrambled_networks import unet
from torch import nn
from transformers import T5Config, T5EncoderModel

from exporter.errors import ComponentFailed
from exporter.lowering.neural_engine import neural_engine_form


class Unheard(nn.Linear):
    """A layer of which nothing is known."""


def refuse_processor(network: Any) -> str:
    network.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(SlicedAttnProcessor(2))
    return (
        r"unet: mid_block\.attentions\.0\.transformer_blocks\.0\.attn1: .*SlicedAttnProcessor, expected AttnProcessor"
    )


def refuse_norm(network: Any) -> str:
    network.mid_block.attentions[0].transformer_blocks[0].norm1 = nn.RMSNorm(32)
    return r"transformer_blocks\.0\.norm1: .* got RMSNorm"


def refuse_gate(network: Any) -> str:
    network.mid_block.attentions[0].transformer_blocks[0].fuser = nn.Identity()
    return r"transformer_blocks\.0\.fuser: .* got Identity, expected of BasicTransformerBlock only norm1"


def refuse_kind(network: Any) -> str:
    network.mid_block.attentions[0].transformer_blocks[0].norm_type = "ada_norm"
    return r"transformer_blocks\.0: .* got ada_norm, expected layer_norm"


def refuse_widths(network: Any) -> str:
    attention = network.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attention.to_v = nn.Linear(12, 8, bias=False)
    return r"attn2: .* got \[16, 16, 8\], expected three times one multiple of 2 heads"


def refuse_layer(network: Any) -> str:
    network.mid_block.resnets[0].time_emb_proj = Unheard(64, 32)
    return r"unet: mid_block\.resnets\.0\.time_emb_proj: .* got Unheard"


def refuse_freeu(network: Any) -> str:
    network.enable_freeu(0.9, 0.2, 1.2, 1.4)
    return r"unet: up_blocks\.0: .*FreeU"


def refuse_hook(network: Any) -> str:
    network.conv_in.forward = lambda hidden: hidden
    return r"unet: conv_in: .* a forward set on a module"


def refuse_class_embedding(network: Any) -> str:
    network.class_embedding = nn.Embedding(3, 64)
    return r"unet: class_embedding: .* got Embedding, expected of UNet2DConditionModel only conv_in"


REFUSALS = [value for name, value in list(globals().items()) if name.startswith("refuse_")]


@pytest.mark.parametrize("damage", REFUSALS, ids=lambda damage: damage.__name__.removeprefix("refuse_"))
def test_what_is_not_known_is_refused_by_name(damage: Callable[[Any], str]) -> None:
    network = unet()
    with pytest.raises(ComponentFailed, match=damage(network)) as caught:
        neural_engine_form("unet", network)
    assert "Convert this component as it is" in str(caught.value)


def test_other_blocks_and_adapters_are_refused() -> None:
    simple = unet(
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )
    with pytest.raises(ComponentFailed, match=r"unet: down_blocks\.1: .* got SimpleCrossAttnDownBlock2D"):
        neural_engine_form("unet", simple)
    fused = unet()
    fused.fuse_qkv_projections()
    with pytest.raises(ComponentFailed, match=r"attn1\.to_qkv: .* expected of Attention only to_q, to_k, to_v, to_out"):
        neural_engine_form("unet", fused)


@pytest.mark.parametrize(
    "network",
    [
        lambda: DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=8),
        lambda: T5EncoderModel(T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        lambda: neural_engine_form("unet", unet()),
    ],
    ids=["DiT", "T5", "a form"],
)
def test_other_networks_are_refused(network: Callable[[], nn.Module]) -> None:
    with pytest.raises(ComponentFailed, match=r"part: .* expected one of UNet2DConditionModel, CLIPTextModel, "):
        neural_engine_form("part", network())

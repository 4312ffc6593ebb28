"""Scalar attributes of diffusers and CLIP modules that repeat a width, set to the width after a cut."""

from __future__ import annotations

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention


def head_widths(network: nn.Module) -> dict[nn.Module, int]:
    """Return the channels of one head of every attention; read it before a cut, while heads and widths agree."""
    return {
        module: module.to_q.out_features // module.heads if isinstance(module, Attention) else module.head_dim
        for module in network.modules()
        if isinstance(module, Attention | CLIPAttention)
    }


def sync(network: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Set every attribute that repeats a width to what the weights say.

    torch-pruning keeps torch's own attributes; diffusers asserts on its own ones (``channels`` of the samplers) and
    reshapes by them (``heads``).

    Args:
        network: the network after the cut.
        heads: `head_widths` from before.
    """
    for module in network.modules():
        if isinstance(module, Attention):
            _attention(module, heads[module])
        elif isinstance(module, CLIPAttention):
            module.num_heads = module.q_proj.out_features // heads[module]
        elif isinstance(module, ResnetBlock2D):
            module.in_channels = module.norm1.num_channels
            module.out_channels = module.conv2.out_channels
        elif isinstance(module, Upsample2D | Downsample2D) and isinstance(module.conv, nn.Conv2d):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
        elif isinstance(module, BasicTransformerBlock):
            _basic(module)
        elif isinstance(module, Transformer2DModel):
            _transformer(module)


def _attention(module: Attention, head_width: int) -> None:
    module.inner_dim, module.inner_kv_dim = module.to_q.out_features, module.to_k.out_features
    module.heads = module.sliceable_head_dim = module.inner_dim // head_width
    if module.out_context_dim == module.query_dim:
        module.out_context_dim = module.to_q.in_features
    module.query_dim, module.cross_attention_dim = module.to_q.in_features, module.to_k.in_features
    module.out_dim = module.to_out[0].out_features


def _basic(module: BasicTransformerBlock) -> None:
    if isinstance(module.attn1, Attention):
        module.dim = module.attn1.to_q.in_features
        module.num_attention_heads = module.attn1.heads


def _transformer(module: Transformer2DModel) -> None:
    if isinstance(module.norm, nn.GroupNorm):
        module.in_channels = module.norm.num_channels
        width = module.proj_in.weight.shape[0]
        module.inner_dim, module.out_channels = width, module.proj_out.weight.shape[0]

"""Tiny networks of every class, and edits of every sort to apply to them at random."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from exporter.networks.probe import run_probe
from exporter.networks.standins import stand_in
from exporter.networks.storage import build_network
from exporter.networks.surgery import Surgery, replay
from exporter.networks.wiring import drop_pair, droppable_pairs

CLASSES = ("UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel")
Edit = Callable[[Any, random.Random], None]


def unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    options = {
        "sample_size": 8,
        "block_out_channels": (16, 24),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return _seeded(lambda: UNet2DConditionModel(**{**options, **changes}))


def vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    options = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return _seeded(lambda: AutoencoderKL(**{**options, **changes}))


def text_encoder(**changes: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    options = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 8,
        "bos_token_id": 38,
        "eos_token_id": 39,
        "pad_token_id": 39,
    }
    return _seeded(lambda: CLIPTextModel(CLIPTextConfig(**{**options, **changes})))


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


MAKERS: dict[str, Callable[..., Any]] = dict(zip(CLASSES, (unet, vae, text_encoder), strict=True))


def network(cls: str) -> Any:
    return MAKERS[cls]()


def config_of(net: Any) -> dict[str, Any]:
    return net.config.to_dict() if hasattr(net.config, "to_dict") else dict(net.config)


def shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def assert_same_answers(one: nn.Module, other: nn.Module) -> None:
    first, second = run_probe(one), run_probe(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def rebuilt(net: Any, surgery: Surgery, folder: Any) -> nn.Module:
    """The network again, from its untouched config, the record and the weights alone; `folder` holds the config."""
    fresh = build_network(folder, cls=type(net).__name__)
    replay(fresh, surgery)
    fresh.load_state_dict(net.state_dict(), strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in [*fresh.parameters(), *fresh.buffers()])
    return fresh.eval()


def take(layer: Any, kept: list[int], *, axis: int) -> None:
    """Keep some outputs (axis 0) or inputs (axis 1) of a linear layer or a convolution."""
    index = torch.tensor(kept)
    layer.weight = nn.Parameter(layer.weight.detach().index_select(axis, index).clone())
    if axis == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[index].clone())
    linear = isinstance(layer, nn.Linear)
    setattr(
        layer, ("out_features", "in_features")[axis] if linear else ("out_channels", "in_channels")[axis], len(kept)
    )


def take_norm(norm: Any, kept: list[int]) -> None:
    index = torch.tensor(kept)
    norm.weight = nn.Parameter(norm.weight.detach()[index].clone())
    norm.bias = nn.Parameter(norm.bias.detach()[index].clone())
    norm.num_channels = len(kept)


def parts(net: nn.Module, cls: str) -> list[Any]:
    return [module for module in net.modules() if type(module).__name__ == cls]


def narrow_resnet(net: Any, rng: random.Random) -> None:
    """Fewer channels inside a residual block, in whole groups."""
    blocks = [block for block in parts(net, "ResnetBlock2D") if block.conv1.out_channels > block.norm2.num_groups]
    if blocks:
        block = rng.choice(blocks)
        width, step = block.conv1.out_channels, block.norm2.num_groups
        kept = sorted(rng.sample(range(width), rng.randrange(step, width, step)))
        take(block.conv1, kept, axis=0)
        if block.time_emb_proj is not None:
            take(block.time_emb_proj, kept, axis=0)
        take_norm(block.norm2, kept)
        take(block.conv2, kept, axis=1)


def narrow_feed_forward(net: Any, rng: random.Random) -> None:
    blocks = [ff for ff in parts(net, "FeedForward") if isinstance(ff.net[2], nn.Linear)]
    if blocks:
        feed_forward = rng.choice(blocks)
        first, last = feed_forward.net[0].proj, feed_forward.net[2]
        kept = sorted(rng.sample(range(last.in_features), rng.randint(1, last.in_features)))
        take(first, [*kept, *(i + last.in_features for i in kept)], axis=0)
        take(last, kept, axis=1)


def drop_head(net: Any, rng: random.Random) -> None:
    found = [attention for attention in parts(net, "Attention") if attention.heads > 1]
    if found:
        attention = rng.choice(found)
        size = attention.inner_dim // attention.heads
        gone = rng.randrange(attention.heads)
        kept = [i for i in range(attention.inner_dim) if i // size != gone]
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            take(layer, kept, axis=0)
        take(attention.to_out[0], kept, axis=1)
        attention.heads -= 1
        attention.inner_dim = attention.inner_kv_dim = len(kept)


def bypass_transformer(net: Any, rng: random.Random) -> None:
    lists = [m.attentions for m in net.modules() if isinstance(getattr(m, "attentions", None), nn.ModuleList)]
    spots = [(entries, i) for entries in lists for i in range(len(entries))]
    if spots:
        entries, i = rng.choice(spots)
        entries[i] = stand_in("bypass", entries[i])


def remove_attention(net: Any, rng: random.Random) -> None:
    blocks = parts(net, "BasicTransformerBlock")
    if blocks:
        block = rng.choice(blocks)
        if rng.random() < 0.5:
            block.attn1 = stand_in("zero", block.attn1)
        else:
            block.attn2 = block.norm2 = None


def shortcut_resnet(net: Any, rng: random.Random) -> None:
    lists = [m.resnets for m in net.modules() if isinstance(getattr(m, "resnets", None), nn.ModuleList)]
    spots = [(entries, i) for entries in lists for i in range(len(entries))]
    entries, i = rng.choice(spots)
    entries[i] = stand_in("shortcut", entries[i])


def drop_layer_pair(net: Any, rng: random.Random) -> None:
    pairs = droppable_pairs(net)
    if pairs:
        drop_pair(net, rng.choice(pairs))


def copy_transformer_block(net: Any, rng: random.Random) -> None:
    lists = [m.transformer_blocks for m in parts(net, "Transformer2DModel") if len(m.transformer_blocks) == 1]
    if lists:
        entries = rng.choice(lists)
        entries.append(copy.deepcopy(entries[0]))


def gather_feed_forward(net: Any, rng: random.Random) -> None:
    spots = [ff for ff in parts(net, "FeedForward") if isinstance(ff.net[2], nn.Linear)]
    if spots:
        entries = rng.choice(spots).net
        kept = rng.sample(range(entries[2].out_features), rng.randint(1, entries[2].out_features))
        entries[2] = stand_in("gather", entries[2], positions=tuple(sorted(kept)))


def drop_decoder_layer(net: Any, rng: random.Random) -> None:
    blocks = [block for block in net.decoder.up_blocks if len(block.resnets) > 1]
    if blocks:
        del rng.choice(blocks).resnets[-1]


def drop_text_layer(net: Any, rng: random.Random) -> None:
    if len(net.encoder.layers) > 1:
        del net.encoder.layers[rng.randrange(len(net.encoder.layers))]


def copy_text_layer(net: Any, rng: random.Random) -> None:
    if len(net.encoder.layers) < 4:
        layers = net.encoder.layers
        layers.insert(rng.randrange(len(layers)), copy.deepcopy(rng.choice(list(layers))))


def reorder_text_layers(net: Any, rng: random.Random) -> None:
    order = list(net.encoder.layers)
    rng.shuffle(order)
    net.encoder.layers = nn.ModuleList(order)


def thin_text_layer(net: Any, rng: random.Random) -> None:
    layer = rng.choice(list(net.encoder.layers))
    name = rng.choice(["self_attn", "mlp"])
    setattr(layer, name, stand_in("zero", getattr(layer, name)))


def narrow_text_layer(net: Any, rng: random.Random) -> None:
    found = parts(net, "CLIPMLP")
    if found:
        mlp = rng.choice(found)
        kept = sorted(rng.sample(range(mlp.fc1.out_features), rng.randint(1, mlp.fc1.out_features)))
        take(mlp.fc1, kept, axis=0)
        take(mlp.fc2, kept, axis=1)


def drop_text_head(net: Any, rng: random.Random) -> None:
    found = [attention for attention in parts(net, "CLIPAttention") if attention.num_heads > 1]
    if found:
        attention = rng.choice(found)
        kept = list(range(attention.head_dim, attention.num_heads * attention.head_dim))
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            take(layer, kept, axis=0)
        take(attention.out_proj, kept, axis=1)
        attention.num_heads -= 1


EDITS: dict[str, tuple[Edit, ...]] = {
    "UNet2DConditionModel": (
        narrow_resnet,
        narrow_feed_forward,
        drop_head,
        bypass_transformer,
        remove_attention,
        shortcut_resnet,
        drop_layer_pair,
        copy_transformer_block,
        gather_feed_forward,
    ),
    "AutoencoderKL": (narrow_resnet, drop_head, bypass_transformer, shortcut_resnet, drop_decoder_layer),
    "CLIPTextModel": (
        drop_text_layer,
        copy_text_layer,
        reorder_text_layers,
        thin_text_layer,
        narrow_text_layer,
        drop_text_head,
    ),
}

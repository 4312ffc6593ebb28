"""The inverse of diffusers' conversion: a pipeline's weights under the names of the first checkpoints.

Source: CompVis `ldm`, `UNetModel` and `Decoder`: which block has which number; OpenCLIP's `TextTransformer`.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_HEAD = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def save_checkpoint(pipeline: Path, file: Path, *, layers: int, levels: int) -> None:
    """Write all weights of a pipeline folder as one checkpoint file.

    Args:
        pipeline: a folder with plain weight files.
        file: what to write.
        layers: the U-Net's layers per block; its blocks with attention are taken from the weights' names.
        levels: how many levels its VAE has.
    """
    state = _ldm(pipeline, layers, levels)
    text = load_file(pipeline / "text_encoder/model.safetensors")
    save_state(
        state | {f"cond_stage_model.transformer.{name}": value for name, value in clip_names(text).items()}, file
    )


def save_openclip_checkpoint(pipeline: Path, file: Path, *, layers: int, levels: int) -> None:
    """Write SD 2's: like `save_checkpoint`, with OpenCLIP's text tower and what that has beside it."""
    text = open_clip_names(load_file(pipeline / "text_encoder/model.safetensors"))
    width = text["ln_final.weight"].shape[0]
    beside = {"text_projection": torch.randn(width, width).half(), "logit_scale": torch.ones(()).half()}
    names = {f"cond_stage_model.model.{name}": value for name, value in {**text, **beside}.items()}
    save_state(_ldm(pipeline, layers, levels) | names, file)


def save_sdxl_checkpoint(pipeline: Path, file: Path, *, layers: int, levels: int) -> None:
    """Write SDXL's: a CLIP and an OpenCLIP text tower."""
    first = clip_names(load_file(pipeline / "text_encoder/model.safetensors"))
    second = open_clip_names(load_file(pipeline / "text_encoder_2/model.safetensors"))
    state = _ldm(pipeline, layers, levels)
    state |= {f"conditioner.embedders.0.transformer.{name}": value for name, value in first.items()}
    state |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    save_state(state | {"conditioner.embedders.1.model.logit_scale": torch.ones(()).half()}, file)


def save_state(state: dict[str, Tensor], file: Path) -> None:
    """Write tensors as one safetensors file."""
    save_file({name: value.contiguous() for name, value in state.items()}, file, {"format": "pt"})


def clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIP text tower under the names of transformers 4."""
    return {
        name if name == "text_projection.weight" else f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in state.items()
    }


def open_clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIP text tower under OpenCLIP's names, query, key and value in one."""
    found: dict[str, Tensor] = {}
    given = {name.removeprefix("text_model."): value for name, value in state.items()}
    for name, value in given.items():
        if name == "text_projection.weight":
            found["text_projection"] = value.T
        elif ".self_attn.q_proj." in name:
            stack = [given[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            new = name.replace("encoder.layers", "transformer.resblocks").replace("self_attn.q_proj.", "attn.in_proj_")
            found[new] = torch.cat(stack)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            for ours, theirs in _OPEN_CLIP.items():
                name = name.replace(ours, theirs)
            found[name] = value
    return found


_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _ldm(pipeline: Path, layers: int, levels: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    unet = load_file(pipeline / "unet/diffusion_pytorch_model.safetensors")
    last_up = {b: f"up_blocks.{b}.attentions.0.norm.weight" in unet for b in range(8)}
    for name, value in unet.items():
        state[f"model.diffusion_model.{_unet(name, layers, last_up)}"] = value
    return state | vae_names(pipeline, levels)


def vae_names(pipeline: Path, levels: int, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    """Return an autoencoder under its first names."""
    state: dict[str, Tensor] = {}
    for name, value in load_file(pipeline / "vae/diffusion_pytorch_model.safetensors").items():
        new = _vae(name, levels)
        convolved = ".attn_1." in new and new.endswith("weight") and value.ndim == 2
        state[f"{prefix}{new}"] = value[:, :, None, None] if convolved else value
    return state


def _unet(name: str, layers: int, has_attention: dict[int, bool]) -> str:
    for new, old in _HEAD.items():
        if name.startswith(f"{new}."):
            return old + name.removeprefix(new)
    side, _, rest = name.partition(".")
    if side == "mid_block":
        kind, index, tail = re.fullmatch(r"(\w+)\.(\d)\.(.+)", rest).groups()  # type: ignore[union-attr]
        number = "1" if kind == "attentions" else str(int(index) * 2)
        return f"middle_block.{number}.{_resnet(tail) if kind == 'resnets' else tail}"
    block, kind, index, tail = re.fullmatch(r"(\d+)\.(\w+)\.(\d+)\.(.+)", rest).groups()  # type: ignore[union-attr]
    b, i = int(block), int(index)
    tail = _resnet(tail) if kind == "resnets" else tail
    if side == "down_blocks":
        number = (layers + 1) * b + i + 1 if kind != "downsamplers" else (layers + 1) * (b + 1)
        place = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
        tail = tail.replace("conv.", "op.", 1) if kind == "downsamplers" else tail
        return f"input_blocks.{number}.{place}.{tail}"
    number = (layers + 1) * b + (i if kind != "upsamplers" else layers)
    place = {"resnets": "0", "attentions": "1", "upsamplers": "2" if has_attention[b] else "1"}[kind]
    return f"output_blocks.{number}.{place}.{tail}"


def _resnet(tail: str) -> str:
    part, _, last = tail.rpartition(".")
    return f"{_RESNET[part]}.{last}"


def _vae(name: str, levels: int) -> str:
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for new, old in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
            name = name.replace(f".{new}.", f".{old}.")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)

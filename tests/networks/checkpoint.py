"""The inverse of diffusers' conversion: a StableDiffusionPipeline's weights under the names of the first checkpoints.

Source: CompVis `ldm`, `UNetModel` and `Decoder`: which block has which number.
"""

from __future__ import annotations

import re
from pathlib import Path

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
    state: dict[str, Tensor] = {}
    unet = load_file(pipeline / "unet/diffusion_pytorch_model.safetensors")
    last_up = {b: f"up_blocks.{b}.attentions.0.norm.weight" in unet for b in range(8)}
    for name, value in unet.items():
        state[f"model.diffusion_model.{_unet(name, layers, last_up)}"] = value
    for name, value in load_file(pipeline / "vae/diffusion_pytorch_model.safetensors").items():
        new = _vae(name, levels)
        convolved = ".attn_1." in new and new.endswith("weight") and value.ndim == 2
        state[f"first_stage_model.{new}"] = value[:, :, None, None] if convolved else value
    for name, value in load_file(pipeline / "text_encoder/model.safetensors").items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({name: value.contiguous() for name, value in state.items()}, file, {"format": "pt"})


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

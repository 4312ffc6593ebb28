"""SD3's and Flux's transformers under their authors' names: the inverse of what the product does, written on its own.

Source: Stability's `mmdit.py`, Black Forest Labs' `flux/model.py`.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

_B, _S = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
_SHARED = (
    (r"proj_out\.(.*)", r"final_layer.linear.\1", 0),
    (r"norm_out\.linear\.(.*)", r"final_layer.adaLN_modulation.1.\1", 0),
)
_SD3 = (
    *_SHARED,
    (r"pos_embed\.pos_embed", "pos_embed", 0),
    (r"pos_embed\.(proj.*)", r"x_embedder.\1", 0),
    (r"time_text_embed\.timestep_embedder\.linear_1\.(.*)", r"t_embedder.mlp.0.\1", 0),
    (r"time_text_embed\.timestep_embedder\.linear_2\.(.*)", r"t_embedder.mlp.2.\1", 0),
    (r"time_text_embed\.text_embedder\.linear_1\.(.*)", r"y_embedder.mlp.0.\1", 0),
    (r"time_text_embed\.text_embedder\.linear_2\.(.*)", r"y_embedder.mlp.2.\1", 0),
    (r"(context_embedder\..*)", r"\1", 0),
    (_B + r"norm1\.linear\.(.*)", r"joint_blocks.\1.x_block.adaLN_modulation.1.\2", 0),
    (_B + r"norm1_context\.linear\.(.*)", r"joint_blocks.\1.context_block.adaLN_modulation.1.\2", 0),
    *((_B + rf"(attn2?)\.to_{x}\.(.*)", r"joint_blocks.\1.x_block.\2.qkv.\3", n) for n, x in enumerate("qkv")),
    *(
        (_B + rf"attn\.add_{x}_proj\.(.*)", r"joint_blocks.\1.context_block.attn.qkv.\2", n)
        for n, x in enumerate("qkv")
    ),
    (_B + r"(attn2?)\.norm_([qk])\.(.*)", r"joint_blocks.\1.x_block.\2.ln_\3.\4", 0),
    (_B + r"attn\.norm_added_([qk])\.(.*)", r"joint_blocks.\1.context_block.attn.ln_\2.\3", 0),
    (_B + r"(attn2?)\.to_out\.0\.(.*)", r"joint_blocks.\1.x_block.\2.proj.\3", 0),
    (_B + r"attn\.to_add_out\.(.*)", r"joint_blocks.\1.context_block.attn.proj.\2", 0),
    (_B + r"ff\.net\.0\.proj\.(.*)", r"joint_blocks.\1.x_block.mlp.fc1.\2", 0),
    (_B + r"ff\.net\.2\.(.*)", r"joint_blocks.\1.x_block.mlp.fc2.\2", 0),
    (_B + r"ff_context\.net\.0\.proj\.(.*)", r"joint_blocks.\1.context_block.mlp.fc1.\2", 0),
    (_B + r"ff_context\.net\.2\.(.*)", r"joint_blocks.\1.context_block.mlp.fc2.\2", 0),
)  # fmt: skip
_FLUX = (
    (r"x_embedder\.(.*)", r"img_in.\1", 0),
    (r"context_embedder\.(.*)", r"txt_in.\1", 0),
    *(
        (rf"time_text_embed\.{ours}_embedder\.linear_{n}\.(.*)", rf"{theirs}_in.{side}_layer.\1", 0)
        for ours, theirs in {"timestep": "time", "text": "vector", "guidance": "guidance"}.items()
        for n, side in {1: "in", 2: "out"}.items()
    ),
    (_B + r"norm1\.linear\.(.*)", r"double_blocks.\1.img_mod.lin.\2", 0),
    (_B + r"norm1_context\.linear\.(.*)", r"double_blocks.\1.txt_mod.lin.\2", 0),
    *((_B + rf"attn\.to_{x}\.(.*)", r"double_blocks.\1.img_attn.qkv.\2", n) for n, x in enumerate("qkv")),
    *((_B + rf"attn\.add_{x}_proj\.(.*)", r"double_blocks.\1.txt_attn.qkv.\2", n) for n, x in enumerate("qkv")),
    (_B + r"attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale", 0),
    (_B + r"attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale", 0),
    (_B + r"attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale", 0),
    (_B + r"attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale", 0),
    (_B + r"attn\.to_out\.0\.(.*)", r"double_blocks.\1.img_attn.proj.\2", 0),
    (_B + r"attn\.to_add_out\.(.*)", r"double_blocks.\1.txt_attn.proj.\2", 0),
    (_B + r"ff\.net\.0\.proj\.(.*)", r"double_blocks.\1.img_mlp.0.\2", 0),
    (_B + r"ff\.net\.2\.(.*)", r"double_blocks.\1.img_mlp.2.\2", 0),
    (_B + r"ff_context\.net\.0\.proj\.(.*)", r"double_blocks.\1.txt_mlp.0.\2", 0),
    (_B + r"ff_context\.net\.2\.(.*)", r"double_blocks.\1.txt_mlp.2.\2", 0),
    (_S + r"norm\.linear\.(.*)", r"single_blocks.\1.modulation.lin.\2", 0),
    *((_S + rf"attn\.to_{x}\.(.*)", r"single_blocks.\1.linear1.\2", n) for n, x in enumerate("qkv")),
    (_S + r"proj_mlp\.(.*)", r"single_blocks.\1.linear1.\2", 3),
    (_S + r"attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale", 0),
    (_S + r"attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale", 0),
    (_S + r"proj_out\.(.*)", r"single_blocks.\1.linear2.\2", 0),
    *_SHARED,
)  # fmt: skip


def original_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a transformer's weights under the original names, stacked as the original stacks them."""
    flux = any(name.startswith("single_transformer_blocks.") for name in state)
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        original, place = _original(name, _FLUX if flux else _SD3)
        swapped = name.startswith("norm_out.")
        swapped |= not flux and name.startswith(f"transformer_blocks.{last}.norm1_context.")
        if swapped:
            scale, shift = value.chunk(2)
            value = torch.cat([shift, scale])
        parts.setdefault(original, {})[place] = value
    return {name: torch.cat([found[n] for n in sorted(found)]) for name, found in parts.items()}


def _original(name: str, table: tuple[tuple[str, str, int], ...]) -> tuple[str, int]:
    for pattern, replacement, place in table:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement), place
    raise KeyError(name)

"""What the layers of SD3 and Flux were called by their authors, who stack query, key and value into one layer.

Checkpoints of one file have these names, and so have LoRAs that were trained on them.

Source: Stability's `mmdit.py` and Black Forest Labs' `flux/model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.errors import SourceError

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_TIME = "time_text_embed.timestep_embedder.linear_"
_POOLED = "time_text_embed.text_embedder.linear_"
_GUIDANCE = "time_text_embed.guidance_embedder.linear_"

_Names = Mapping[str, tuple[str, ...]]
_FINAL: _Names = {"final_layer.linear": ("proj_out",), "final_layer.adaLN_modulation.1": ("norm_out.linear",)}

_Blocks = Mapping[tuple[str, str], _Names]
"""Kinds of blocks, as (original, ours), to their layers: an original one to those of ours that it stacks."""

_SD3: _Blocks = {
    ("", ""): {
        "x_embedder.proj": ("pos_embed.proj",),
        "t_embedder.mlp.0": (f"{_TIME}1",),
        "t_embedder.mlp.2": (f"{_TIME}2",),
        "y_embedder.mlp.0": (f"{_POOLED}1",),
        "y_embedder.mlp.2": (f"{_POOLED}2",),
        "context_embedder": ("context_embedder",),
        **_FINAL,
    },
    ("joint_blocks", "transformer_blocks"): {
        "x_block.adaLN_modulation.1": ("norm1.linear",),
        "x_block.attn.qkv": _QKV,
        "x_block.attn.ln_q": ("attn.norm_q",),
        "x_block.attn.ln_k": ("attn.norm_k",),
        "x_block.attn.proj": ("attn.to_out.0",),
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "x_block.attn2.ln_q": ("attn2.norm_q",),
        "x_block.attn2.ln_k": ("attn2.norm_k",),
        "x_block.attn2.proj": ("attn2.to_out.0",),
        "x_block.mlp.fc1": ("ff.net.0.proj",),
        "x_block.mlp.fc2": ("ff.net.2",),
        "context_block.adaLN_modulation.1": ("norm1_context.linear",),
        "context_block.attn.qkv": _ADDED,
        "context_block.attn.ln_q": ("attn.norm_added_q",),
        "context_block.attn.ln_k": ("attn.norm_added_k",),
        "context_block.attn.proj": ("attn.to_add_out",),
        "context_block.mlp.fc1": ("ff_context.net.0.proj",),
        "context_block.mlp.fc2": ("ff_context.net.2",),
    },
}
_FLUX: _Blocks = {
    ("", ""): {
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": (f"{_TIME}1",),
        "time_in.out_layer": (f"{_TIME}2",),
        "vector_in.in_layer": (f"{_POOLED}1",),
        "vector_in.out_layer": (f"{_POOLED}2",),
        "guidance_in.in_layer": (f"{_GUIDANCE}1",),
        "guidance_in.out_layer": (f"{_GUIDANCE}2",),
        **_FINAL,
    },
    ("double_blocks", "transformer_blocks"): {
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
        "img_attn.qkv": _QKV,
        "img_attn.norm.query_norm": ("attn.norm_q",),
        "img_attn.norm.key_norm": ("attn.norm_k",),
        "img_attn.proj": ("attn.to_out.0",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_attn.qkv": _ADDED,
        "txt_attn.norm.query_norm": ("attn.norm_added_q",),
        "txt_attn.norm.key_norm": ("attn.norm_added_k",),
        "txt_attn.proj": ("attn.to_add_out",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    },
    ("single_blocks", "single_transformer_blocks"): {
        "modulation.lin": ("norm.linear",),
        "linear1": (*_QKV, "proj_mlp"),
        "norm.query_norm": ("attn.norm_q",),
        "norm.key_norm": ("attn.norm_k",),
        "linear2": ("proj_out",),
    },
}

_POSITIONS = "pos_embed"
"""A table of numbers without a layer of its own in SD3's original."""


@dataclass(frozen=True)
class Piece:
    """Rows of an original layer, and where the network has them.

    Attributes:
        module: of the network.
        start: first row in the original layer.
        rows: how many.
        at: first row in the network's module.
    """

    module: str
    start: int
    rows: int
    at: int = 0


def original_pieces(rows: Mapping[str, int]) -> dict[str, tuple[Piece, ...]]:
    """Return every original layer of a network with what it is made of; empty for one that was not renamed.

    Args:
        rows: module to the rows of its weight; which modules there are tells SD3 and Flux apart.
    """
    found: dict[str, tuple[Piece, ...]] = {}
    for (theirs, ours), layers in _blocks(rows).items():
        numbers = _numbers(ours, rows)
        for number in numbers:
            before, after = (f"{theirs}.{number}.", f"{ours}.{number}.") if ours else ("", "")
            for name, modules in layers.items():
                paths = [f"{after}{module}" for module in modules]
                if all(path in rows for path in paths):
                    last_text = name == "context_block.adaLN_modulation.1" and number == max(numbers)
                    swapped = name == "final_layer.adaLN_modulation.1" or last_text
                    found[f"{before}{name}"] = _swapped(paths[0], rows) if swapped else _stacked(paths, rows)
    return found


def _blocks(rows: Mapping[str, int]) -> _Blocks:
    if "context_embedder" not in rows:
        return {}
    return _SD3 if "pos_embed.proj" in rows else _FLUX


def _numbers(blocks: str, rows: Mapping[str, int]) -> list[int]:
    if not blocks:
        return [0]
    return sorted({int(path.split(".")[1]) for path in rows if re.match(rf"{blocks}\.\d+\.", path)})


def _stacked(paths: Iterable[str], rows: Mapping[str, int]) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for path in paths:
        start = pieces[-1].start + pieces[-1].rows if pieces else 0
        pieces.append(Piece(path, start, rows[path]))
    return tuple(pieces)


def _swapped(path: str, rows: Mapping[str, int]) -> tuple[Piece, ...]:
    """The authors answer (shift, scale) where diffusers' last norms answer (scale, shift)."""
    half = rows[path] // 2
    return Piece(path, 0, half, half), Piece(path, half, half, 0)


def state_from_original(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], place: str
) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the network's own names; unknown names stay as they are.

    Args:
        state: original name to tensor, without a prefix.
        shapes: the network's own tensors.
        place: for the message.

    Raises:
        SourceError: a stacked layer has other rows than the network's modules together.
    """
    rows = {name.removesuffix(".weight"): shape[0] for name, shape in shapes.items() if name.endswith(".weight")}
    pieces = original_pieces(rows)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module not in pieces:
            found[f"{_POSITIONS}.{_POSITIONS}" if name == _POSITIONS else name] = tensor
            continue
        parts = pieces[module]
        total = sum(part.rows for part in parts)
        if tensor.shape[0] != total:
            raise SourceError(f"{place}: {name}: got {tensor.shape[0]} rows, expected {total} by the config.")
        for target in dict.fromkeys(part.module for part in parts):
            mine = sorted((part for part in parts if part.module == target), key=lambda part: part.at)
            cut = [tensor[part.start : part.start + part.rows] for part in mine]
            found[f"{target}.{'weight' if kind == 'scale' else kind}"] = cut[0] if len(cut) == 1 else torch.cat(cut)
    return found

"""What the modules of a diffusers U-Net were called in the first checkpoints: numbered input, middle, output blocks.

LoRAs that kohya's scripts train for SDXL go by these names.

Source: CompVis `ldm`, class `UNetModel`: every resnet (with its attention) and every sampler is one numbered block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_HEADS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(?P<side>down_blocks|up_blocks)\.(?P<block>\d+)\.(?P<kind>\w+)\.(?P<index>\d+)\.(?P<tail>.+)")
_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<index>\d+)\.(?P<tail>.+)")


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """Return the original name of each module that had one.

    Args:
        paths: of the modules of one U-Net as diffusers names them; all of them, since numbers follow from how many
            resnets a block has and which blocks have attention.
    """
    known = list(paths)
    layers = len({path.split(".")[3] for path in known if path.startswith("down_blocks.0.resnets.")})
    attended = {path.split(".")[1] for path in known if re.match(r"up_blocks\.\d+\.attentions\.", path)}
    found = {path: _original(path, layers, attended) for path in known}
    return {path: name for path, name in found.items() if name}


def _original(path: str, layers: int, attended: set[str]) -> str:
    if path in _HEADS:
        return _HEADS[path]
    middle, block = _MIDDLE.fullmatch(path), _BLOCK.fullmatch(path)
    if middle:
        number = 1 if middle["kind"] == "attentions" else 2 * int(middle["index"])
        return f"middle_block.{number}.{_inner(middle['kind'], middle['tail'])}"
    if block is None:
        return ""
    kind, b, i = block["kind"], int(block["block"]), int(block["index"])
    tail = _inner(kind, block["tail"])
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (b + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * b + layers}.{2 if block['block'] in attended else 1}.{tail}"
    place = 1 if kind == "attentions" else 0
    if block["side"] == "down_blocks":
        return f"input_blocks.{(layers + 1) * b + i + 1}.{place}.{tail}"
    return f"output_blocks.{(layers + 1) * b + i}.{place}.{tail}"


def _inner(kind: str, tail: str) -> str:
    return _RESNET.get(tail, tail) if kind == "resnets" else tail

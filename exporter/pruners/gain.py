"""What sparse kernels could gain at most on a network whose layers have zeros: a bound with its basis, no promise."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from exporter.networks.probe import example_inputs, has_probe, run_probe
from exporter.networks.sparse_kernels import IMPLYING, WIDE, bound
from exporter.pruners.sparse import SparseLayer

_SIDE, _TOKENS = 128, 77
"""Latent of 1024 pixels, for networks whose config names no size; tokens of CLIP's text."""


@torch.no_grad()
def expected_gain(network: nn.Module, layers: Sequence[SparseLayer]) -> dict[str, Any]:
    """Return what part of a network's multiplications sparse kernels could take, and what that gains at most.

    Args:
        network: any that can be cut.
        layers: of it, those that have their zeros.

    Returns:
        JSON values: ``share`` of all multiplications, those of attention included; ``wide_share``, of those in layers
        so wide that gains were seen; ``bound``, a sentence on both. Text encoders count weights instead.
    """
    counts, total, of = _counted(network)
    taken = [layer for layer in layers if layer.pattern in IMPLYING]
    wide = [layer for layer in taken if min(layer.module.weight.shape[:2]) >= WIDE]
    share, wide_share = (sum(counts[layer.path] for layer in some) / max(total, 1) for some in (taken, wide))
    told = "Nothing: sparse kernels take 2:4 only."
    if taken or not layers:
        seen = f"{wide_share:.1%} in layers of {WIDE} inputs and outputs or more, where gains were seen"
        told = f"{share:.1%} of the {of}; {seen}. {bound(share)}"
    return {"share": round(share, 4), "wide_share": round(wide_share, 4), "bound": told}


def _counted(network: nn.Module) -> tuple[Counter[str], int, str]:
    """Return multiplications with a weight by module path, how many there are in all, and of what they are."""
    layers = {path: m for path, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    if isinstance(network, PreTrainedModel) or not has_probe(network):
        weights = Counter({path: module.weight.numel() for path, module in layers.items()})
        return weights, weights.total(), "weights of linear layers and convolutions"
    twin = _without_memory(network)
    counts: Counter[str] = Counter()
    for path in layers:
        twin.get_submodule(path).register_forward_hook(_counting(counts, path))
    size = _own_side(network)
    feeds = example_inputs(twin, size=size, tokens=_TOKENS)
    with FlopCounterMode(display=False) as counter:
        run_probe(twin, feeds)
    total = counter.get_total_flops() // 2  # a multiplication and an addition
    return counts, total, f"multiplications of one call with a latent of {size} x {size}"


def _without_memory(network: nn.Module) -> nn.Module:
    """Return a copy on the meta device, which tells shapes; no weight is copied."""
    known: dict[int, Any] = {}
    for parameter in network.parameters():
        known[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in network.buffers():
        known[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(network, known)


def _own_side(network: Any) -> int:
    """Return the side of the latent that a network was made for."""
    side = network.config.get("sample_size")
    if not isinstance(side, int):
        return _SIDE
    scale = 2 ** (len(network.config.block_out_channels) - 1) if type(network).__name__ == "AutoencoderKL" else 1
    return side // scale  # an autoencoder's is of its images


def _counting(counts: Counter[str], path: str) -> Callable[..., None]:
    def hook(module: Any, given: Any, answer: torch.Tensor) -> None:
        counts[path] += answer.numel() * module.weight[0].numel()

    return hook

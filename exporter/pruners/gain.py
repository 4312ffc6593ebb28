"""What sparse kernels could gain at most on a network whose layers have zeros: a bound with its basis, no promise."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
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
        JSON values: ``share`` of the multiplications ``of`` what is said there, ``wide_share`` of them in layers that
        are wide enough that gains were seen, and ``bound``, a sentence.
    """
    counts, of = _counted(network)
    taken = [layer for layer in layers if layer.pattern in IMPLYING]
    wide = [layer for layer in taken if min(layer.module.weight.shape[:2]) >= WIDE]
    total = sum(counts.values())
    share, wide_share = (sum(counts[layer.path] for layer in some) / max(total, 1) for some in (taken, wide))
    told = "Nothing: sparse kernels take 2:4 only." if layers and not taken else bound(share)
    return {"share": round(share, 4), "wide_share": round(wide_share, 4), "of": of, "bound": told}


def _counted(network: nn.Module) -> tuple[Counter[str], str]:
    """Return multiplications with a weight by module path, and of what they are."""
    layers = {path: m for path, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    if isinstance(network, PreTrainedModel):  # every layer is called once for every token
        weights = {path: module.weight.numel() for path, module in layers.items()}
        return Counter(weights), "multiplications of linear layers, for any length of text"
    if not has_probe(network):
        return Counter(
            {path: m.weight.numel() for path, m in layers.items()}
        ), "weights of linear layers and convolutions"
    twin = _without_memory(network)
    counts: Counter[str] = Counter()
    for path in layers:
        twin.get_submodule(path).register_forward_hook(_counting(counts, path))
    size = _own_side(network)
    run_probe(twin, example_inputs(twin, size=size, tokens=_TOKENS))
    place = "of any size" if type(network).__name__ == "AutoencoderKL" else f"of a latent of {size} x {size}"
    return counts, f"multiplications of linear layers and convolutions in one call {place}"


def _without_memory(network: nn.Module) -> nn.Module:
    """Return a copy on the meta device, which tells shapes; no weight is copied."""
    known: dict[int, Any] = {}
    for parameter in network.parameters():
        known[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in network.buffers():
        known[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(network, known)


def _own_side(network: Any) -> int:
    side = network.config.get("sample_size")
    if type(network).__name__ == "AutoencoderKL" or not isinstance(side, int):
        return 8 if type(network).__name__ == "AutoencoderKL" else _SIDE
    return side


def _counting(counts: Counter[str], path: str) -> Callable[..., None]:
    def hook(module: Any, given: Any, answer: torch.Tensor) -> None:
        counts[path] += answer.numel() * module.weight[0].numel()

    return hook

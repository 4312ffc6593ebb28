"""Widths that the graph of couplings does not show.

Heads of attention over text and image at once, where a head serves both; heads and neurons that lie side by side in the
one projection of Flux's single-stream blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from exporter.pruners.base import Layer, Share

_ROWS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_COLUMNS = ("to_out.0", "to_add_out")


def joint_layers(network: nn.Module) -> Iterator[Layer]:
    """Yield the layers of a network that `cut_joint` cuts, in the network's order."""
    for path, module in network.named_modules():
        block = cast("Any", module)
        if type(module).__name__ == "FluxSingleTransformerBlock":
            yield from _side_by_side(path, block)
        elif getattr(module, "added_kv_proj_dim", None) is not None and block.heads > 1:
            yield _heads(path, block, [f"{path}.{name}" for name in _COLUMNS], network)


def _side_by_side(path: str, block: Any) -> Iterator[Layer]:
    """Yield heads and neurons of a block whose projection reads first all heads, then all neurons."""
    width, neurons = int(block.attn.to_q.out_features), int(block.proj_mlp.out_features)
    if block.attn.heads > 1:
        yield _heads(f"{path}.attn", block.attn, [f"{path}.proj_out"], block, prefix=f"{path}.")
    index = torch.arange(neurons).unsqueeze(1)
    rows = [Share(f"{path}.proj_mlp.{name}", p, 0, index) for name, p in block.proj_mlp.named_parameters()]
    reads = Share(f"{path}.proj_out.weight", block.proj_out.weight, 1, index + width)
    yield Layer(f"{path}.proj_mlp", "neurons", neurons, 1, 1, (*rows, reads))


def _heads(path: str, attention: Any, readers: list[str], within: nn.Module, prefix: str = "") -> Layer:
    heads, width = int(attention.heads), int(attention.to_q.out_features) // int(attention.heads)
    index = torch.arange(heads * width).reshape(heads, width)
    shares = []
    for name in _ROWS:
        projection = getattr(attention, name, None)
        if projection is not None:
            shares += [Share(f"{path}.{name}.{own}", p, 0, index) for own, p in projection.named_parameters()]
    modules = dict(within.named_modules())
    for reader in readers:  # the last block of SD3 has no output for the text
        module = modules.get(reader.removeprefix(prefix))
        if isinstance(module, nn.Linear):
            weight = module.get_parameter("weight")
            shares.append(Share(f"{reader}.weight", weight, 1, index))
    return Layer(path, "heads", heads, width, 1, tuple(shares))


def cut_joint(network: nn.Module, layers: list[Layer], gone: Mapping[str, list[int]]) -> None:
    """Remove units of these layers, in place, all at once: two layers may be read by one projection.

    Args:
        network: it, as it was when the layers were found.
        layers: of `joint_layers`.
        gone: path of a layer to its units that go, never all of them.
    """
    dropped: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for layer in layers:
        for share in layer.shares if gone.get(layer.path) else ():
            dropped[share.path, share.dim].append(share.index[torch.tensor(gone[layer.path])].flatten())
    for (path, dim), entries in dropped.items():
        owner, _, name = path.rpartition(".")
        module = cast("nn.Linear", network.get_submodule(owner))
        parameter = module.get_parameter(name)
        keeps = torch.ones(parameter.shape[dim], dtype=torch.bool)
        keeps[torch.cat(entries)] = False
        kept = parameter.detach().index_select(dim, keeps.nonzero().flatten().to(parameter.device))
        module.register_parameter(name, nn.Parameter(kept.clone(), requires_grad=parameter.requires_grad))
        module.out_features, module.in_features = module.weight.shape
    for layer in layers:
        if layer.part == "heads" and gone.get(layer.path):
            attention = cast("Any", network.get_submodule(layer.path))
            attention.inner_dim = attention.to_q.out_features
            attention.heads = attention.inner_dim // layer.unit_width

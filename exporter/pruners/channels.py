"""Cutting widths through torch-pruning's dependency graph: what can be cut, how many units stay, and the cut."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from exporter.errors import RecipeError, SurgeryError
from exporter.progress import Progress, task
from exporter.pruners.attributes import head_widths, sync
from exporter.pruners.base import CutOptions, Layer, Share
from exporter.pruners.joint import cut_joint, joint_layers
from exporter.pruners.protect import check_patterns, is_protected
from exporter.pruners.ranking import removals
from exporter.pruners.trace import dependency_graph

FIXED = ("time_embedding", "add_embedding", "class_embedding", "encoder_hid_proj", "post_quant_conv", "quant_conv")
"""Top-level modules whose widths other components or inputs rely on."""

_CUTTABLE = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class _Root:
    """Where the graph is entered to reach one width."""

    owner: str
    part: str
    module: nn.Module
    is_output: bool
    unit_width: int = 1
    norm_groups: int = 1


@dataclass(frozen=True)
class _Member:
    """One layer of a coupled group: which of its outputs or inputs belong to which channel of the root."""

    path: str
    module: nn.Module
    is_output: bool
    entries: tuple[tuple[int, int], ...]  # (root channel, index in this layer)


def cut_channels(
    network: nn.Module, options: CutOptions, score: Callable[[Layer], Tensor], *, progress: Progress
) -> None:
    """Remove the lowest-scored units, in place, so that about `keep_ratio` of each width, or of all widths, stays.

    GroupNorm channels are removed evenly from every group, so that each that stays keeps its group.

    Args:
        network: a UNet2DConditionModel, an AutoencoderKL (its decoder alone is cut) or a CLIPTextModel.
        options: the recipe's keys.
        score: (layer.units,) float scores of a layer, larger is kept.
        progress: one unit per layer cut.

    Raises:
        RecipeError: no layer can be cut by these options.
        ComponentFailed: a score is not a number.
        SurgeryError: the graph of couplings contradicts the network's structure.
    """
    if options.keep_ratio == 1.0:
        return
    check_patterns(network, options.protect)
    cutter = _Cutter(network, options)
    layers = cutter.found
    # All scores before the first cut: a stream that shrinks must not change what its neighbours are worth.
    removed = removals(layers, options, score)
    gone = {layer.path: units for layer, units in zip(layers, removed, strict=True) if units}
    if not gone:
        raise RecipeError(_nothing_to_cut(options))
    cutter.remove(gone, progress)


def remove_units(network: nn.Module, options: CutOptions, gone: Mapping[str, list[int]], *, progress: Progress) -> None:
    """Remove these units from everything they are coupled to, in place.

    Args:
        network: as for `cut_channels`.
        options: those that the layers were found with.
        gone: path of a layer, as `layers_of` has it, to the units to remove, never all of them.
        progress: one unit per layer cut.
    """
    _Cutter(network, options).remove(gone, progress)


def layers_of(network: nn.Module, options: CutOptions) -> list[Layer]:
    """Return every layer that `cut_channels` would consider, in the network's order."""
    return _Cutter(network, options).found


class _Cutter:
    """The traced graph of one network, and what may be done through it."""

    def __init__(self, network: nn.Module, options: CutOptions) -> None:
        self._network, self._options = network, options
        self._graph = dependency_graph(network)
        self._paths = {module: path for path, module in network.named_modules()}
        self._joint = [layer for layer in joint_layers(network) if self._is_wanted(layer)]
        self._rooted = list(self._layers())
        self.found = [*(layer for _, layer in self._rooted), *self._joint]

    def _is_wanted(self, layer: Layer) -> bool:
        modules = {share.path.rpartition(".")[0] for share in layer.shares}
        return layer.part in self._options.parts and not is_protected([layer.path, *modules], self._options.protect)

    def _layers(self) -> Iterator[tuple[_Root, Layer]]:
        """Yield what can be cut, protected layers left out."""
        for root in [*_inner_roots(self._network), *self._stream_roots()]:
            if root.part not in self._options.parts or root.module not in self._graph.module2node:
                continue
            members = self._members(root, range(_width(root)))
            if root.part != "streams":
                _check_inner(root, members)
            if not is_protected([root.owner, *(member.path for member in members)], self._options.protect):
                yield root, _layer(root, members)

    def remove(self, gone: Mapping[str, list[int]], progress: Progress) -> None:
        """Remove units of layers, by their paths, from everything they are coupled to."""
        learnable = {path: parameter.requires_grad for path, parameter in self._network.named_parameters()}
        widths = head_widths(self._network)
        with task(progress, "cut channels", len(gone)):
            for root, layer in self._rooted:
                if layer.path in gone:
                    width = layer.unit_width
                    channels = [unit * width + i for unit in gone[layer.path] for i in range(width)]
                    self._group(root, channels).prune(record_history=False)
                    progress.advance(note=layer.path)
            cut_joint(self._network, self._joint, gone)
        sync(self._network, widths)
        for path, parameter in self._network.named_parameters():
            parameter.requires_grad_(learnable[path])

    def _group(self, root: _Root, channels: Sequence[int]) -> Any:
        pruner = self._graph.get_pruner_of_module(root.module)
        function = pruner.prune_out_channels if root.is_output else pruner.prune_in_channels
        return self._graph.get_pruning_group(root.module, function, list(channels))

    def _members(self, root: _Root, channels: Sequence[int]) -> list[_Member]:
        members = []
        for item in self._group(root, channels):
            module = item.dep.target.module
            if module in self._paths:
                is_output = self._graph.is_out_channel_pruning_fn(item.dep.handler)
                entries = tuple(zip(item.root_idxs, item.idxs, strict=True))
                members.append(_Member(self._paths[module], module, is_output, entries))
            elif item.dep.target.type in (torch_pruning.ops.OPTYPE.OUTPUT, torch_pruning.ops.OPTYPE.PARAMETER):
                members.append(_Member("", nn.Identity(), is_output=False, entries=()))
        return members

    def _outputs(self, root: _Root) -> list[_Member]:
        if root.module not in self._graph.module2node:
            return []
        return [member for member in self._members(root, range(_width(root))) if member.is_output]

    def _stream_roots(self) -> list[_Root]:
        """Residual streams: coupled groups that neither a fixed module nor the network's output is part of."""
        if "streams" not in self._options.parts:
            return []
        samplers = [m for m in self._network.modules() if isinstance(m, Upsample2D | Downsample2D)]
        if any(not isinstance(sampler.conv, nn.Conv2d) for sampler in samplers):
            got = "prune.parts: streams run through a sampler without a convolution; expected one in every sampler."
            raise RecipeError(f"{got} Leave streams out of parts.")
        roots: list[_Root] = []
        seen = {member.path for root in _inner_roots(self._network) for member in self._outputs(root)}
        for path, module in self._network.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear) or module not in self._graph.module2node or path in seen:
                continue
            root = _Root(path, "streams", module, is_output=True)
            members = self._members(root, range(_width(root)))
            seen.update(member.path for member in members if member.is_output)
            if all(_is_free(member) for member in members):
                groups = [member.module.num_groups for member in members if isinstance(member.module, nn.GroupNorm)]
                roots.append(_Root(path, "streams", module, is_output=True, norm_groups=math.lcm(*groups)))
        return roots


def _inner_roots(network: nn.Module) -> list[_Root]:
    """Widths that live inside one module, which nothing outside depends on."""
    roots = []
    for path, module in network.named_modules():
        if isinstance(module, ResnetBlock2D):
            roots.append(_Root(path, "channels", module.conv1, is_output=True, norm_groups=module.norm2.num_groups))
        elif isinstance(module, Attention):
            if _has_plain_heads(module):
                width = module.to_q.out_features // module.heads
                roots.append(_Root(path, "heads", module.to_v, is_output=True, unit_width=width))
        elif isinstance(module, CLIPAttention):
            roots.append(_Root(path, "heads", module.v_proj, is_output=True, unit_width=module.head_dim))
        elif isinstance(module, FeedForward):
            roots.append(_Root(path, "neurons", module.net[2], is_output=False))
        elif isinstance(module, CLIPMLP):
            roots.append(_Root(path, "neurons", module.fc2, is_output=False))
    return roots


def _has_plain_heads(module: Attention) -> bool:
    """Whether query, key and value have the same heads and nothing mixes them before the output projection."""
    projections = (module.to_q, module.to_k, module.to_v)
    return (
        module.heads > 1
        and not module.fused_projections
        and module.added_kv_proj_dim is None
        and all(isinstance(projection, nn.Linear) for projection in projections)
        and len({projection.out_features for projection in projections}) == 1
        and all(norm is None or norm.weight.shape[-1] < module.inner_dim for norm in (module.norm_q, module.norm_k))
    )


def _width(root: _Root) -> int:
    weight: nn.Parameter = root.module.get_parameter("weight")
    return weight.shape[0 if root.is_output else 1]


def _is_free(member: _Member) -> bool:
    if not isinstance(member.module, _CUTTABLE) or member.path.split(".")[0] in FIXED:
        return False
    # Head widths set the scale of attention, conv_out makes the answer, the time embedding feeds every block.
    barred = ("to_q", "to_k", "to_v", "conv_out") if member.is_output else ("time_emb_proj",)
    return member.path.rpartition(".")[2] not in barred


def _check_inner(root: _Root, members: list[_Member]) -> None:
    outside = [member.path for member in members if not member.path.startswith(f"{root.owner}.")]
    if outside:
        raise SurgeryError(
            f"{root.owner}: its inner width is coupled to {outside[0] or 'the output'}; expected no layer outside of "
            f"it. Add {root.owner!r} to prune.protect."
        )


def _layer(root: _Root, members: list[_Member]) -> Layer:
    units = _width(root) // root.unit_width
    shares = [share for member in members for share in _shares(member, units, root.unit_width)]
    return Layer(root.owner, root.part, units, root.unit_width, root.norm_groups, tuple(shares))


def _shares(member: _Member, units: int, unit_width: int) -> Iterator[Share]:
    """Yield the member's parameters with the entries of every unit, in the order of the units."""
    by_unit: dict[int, list[int]] = defaultdict(list)
    for root_channel, index in member.entries:
        by_unit[root_channel // unit_width].append(index)
    sizes = {len(indices) for indices in by_unit.values()}
    if len(by_unit) != units or len(sizes) != 1:
        raise SurgeryError(
            f"{member.path}: {len(by_unit)} of {units} coupled units, of sizes {sorted(sizes)}; expected all, alike. "
            "Add the module to prune.protect."
        )
    table = torch.tensor([sorted(by_unit[unit]) for unit in range(units)])
    for name, parameter in member.module.named_parameters(recurse=False):
        if member.is_output or name == "weight":
            yield Share(f"{member.path}.{name}", parameter, 0 if member.is_output or parameter.dim() == 1 else 1, table)


def _nothing_to_cut(options: CutOptions) -> str:
    return (
        f"prune.keep_ratio: {options.keep_ratio:g} in multiples of {options.round_to} removes nothing from any layer; "
        "expected at least one width that can shrink. Lower keep_ratio or round_to, or shorten protect."
    )

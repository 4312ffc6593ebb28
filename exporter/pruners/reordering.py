"""Reordering the input channels of layers, so that more stays under a pattern n:m, without changing the network.

Channels that one part of the network makes and reads, and no other, may stand in any order as long as all that makes or
reads them has the same: the neurons of a feed-forward layer (both halves of a gated one), the values of a head with the
inputs of the projections behind the attention, and the channels between the two convolutions of a resnet with the norm
and the time embedding between. There a channel stays in its group of the norm, and a value stays in its head. Queries
and keys are nobody's inputs, and residual streams, which many layers read, are left alone. How such channels are found
is `exporter.pruners.channels`' matter, the search for an order that of `exporter.pruners.permutation`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporter.networks.sparsity import Pattern, pattern_mask
from exporter.progress import Progress, task
from exporter.pruners.base import CutOptions, Layer, Share
from exporter.pruners.channels import layers_of
from exporter.pruners.permutation import best_order, kept_by
from exporter.pruners.sparse import SparseLayer

Score = Callable[[SparseLayer], Tensor]
"""A layer -> float scores of its weight's shape, at least 0, larger is kept."""

_VALUES = ("to_v", "add_v_proj", "v_proj")
"""Projections that make the values of attention."""


@dataclass(frozen=True)
class _Channels:
    """Channels that may be reordered.

    Attributes:
        shares: every parameter that they live in, by channel.
        classes: (classes, size) channels that may take each other's place.
        readers: layers to mask that have them as inputs, each with the first of these inputs.
    """

    shares: tuple[Share, ...]
    classes: Tensor
    readers: tuple[tuple[SparseLayer, int], ...]


@torch.no_grad()
def reorder(
    network: nn.Module, layers: Sequence[SparseLayer], score: Score, protect: tuple[str, ...], *, progress: Progress
) -> dict[str, Any]:
    """Reorder channels, in place, so that every layer keeps at least as much of its scores under its pattern.

    Args:
        network: any that can be cut; it answers as before, but for rounding.
        layers: of it, those to mask; of patterns n:m.
        score: what is to stay. It is asked before the reordering of what it is asked about.
        protect: the recipe's: modules that are not touched.
        progress: one unit per part of the network.

    Returns:
        JSON values: ``plain`` and ``permuted``, the share of all scores of all the layers that their patterns keep, and
        ``layers``: path -> the same two of every layer whose inputs were reordered.
    """
    kept = {layer.path: _kept(layer, score) for layer in layers}
    found = list(_parts(network, layers, protect))
    changed: dict[str, dict[str, float]] = {}
    after = dict(kept)
    with task(progress, "permute channels", len(found)):
        for part in found:
            order, gains = _order(part, score)
            if min(gains.values()) >= 0 < max(gains.values()):
                _carry_out(part, order)
                for path, gain in gains.items():
                    after[path] = after[path][0] + gain, after[path][1]
                    changed[path] = _told(kept[path], after[path])
            progress.advance(note=part.shares[0].path)
    plain, permuted = (
        (sum(value for value, _ in some.values()), sum(whole for _, whole in some.values())) for some in (kept, after)
    )
    return {**_told(plain, permuted), "layers": changed}


def _kept(layer: SparseLayer, score: Score) -> tuple[float, float]:
    """Return the sum of what a layer's pattern keeps, and of all."""
    scores = score(layer)
    mask = pattern_mask(scores, layer.pattern)
    return float((scores * mask).sum(dtype=torch.float64)), float(scores.sum(dtype=torch.float64))


def _told(plain: tuple[float, float], permuted: tuple[float, float]) -> dict[str, float]:
    both = {"plain": plain, "permuted": permuted}
    return {name: round(kept / whole, 6) if whole else 1.0 for name, (kept, whole) in both.items()}


def _parts(network: nn.Module, layers: Sequence[SparseLayer], protect: tuple[str, ...]) -> Iterator[_Channels]:
    masked = {layer.name: layer for layer in layers if not layer.is_whole}
    uses = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    options = CutOptions(keep_ratio=1.0, protect=protect)
    for layer in layers_of(network, options):
        shares = _by_channel(layer)
        readers = tuple((masked[s.path], int(s.index[0, 0])) for s in shares if s.dim == 1 and s.path in masked)
        once = all(uses[id(share.parameter)] == 1 for share in shares)
        if readers and once and all(_is_aligned(share, readers[0][0].pattern) for share in shares if share.dim == 1):
            count = len(shares[0].index)
            classes = layer.units if layer.part == "heads" else layer.norm_groups
            yield _Channels(shares, torch.arange(count).reshape(classes, -1), readers)


def _by_channel(layer: Layer) -> tuple[Share, ...]:
    """Return what makes and reads the channels; of heads the values alone, channel by channel."""
    if layer.part != "heads":
        return layer.shares
    values = [s for s in layer.shares if s.dim == 1 or s.path.split(".")[-2] in _VALUES]
    return tuple(Share(share.path, share.parameter, share.dim, share.index.reshape(-1, 1)) for share in values)


def _is_aligned(reader: Share, pattern: Pattern) -> bool:
    """Whether channels are consecutive inputs that fill whole groups of the pattern."""
    inputs = reader.index.flatten()
    start, count = int(inputs[0]), len(inputs)
    in_a_row = torch.equal(inputs, torch.arange(start, start + count))
    return in_a_row and start % pattern[1] == 0 and count % pattern[1] == 0


def _order(part: _Channels, score: Score) -> tuple[Tensor, dict[str, float]]:
    """Return the order that the readers together keep most in, and what each then keeps more, by path."""
    count, pattern = len(part.shares[0].index), part.readers[0][0].pattern
    tables = {
        layer.path: score(layer).float().movedim(1, 0).flatten(1)[start : start + count]
        for layer, start in part.readers
    }
    order = best_order(torch.cat(list(tables.values()), dim=1), pattern, part.classes)
    return order, {p: kept_by(table[order], pattern) - kept_by(table, pattern) for p, table in tables.items()}


def _carry_out(part: _Channels, order: Tensor) -> None:
    for share in part.shares:
        rows = share.parameter.detach().movedim(share.dim, 0)
        rows[share.index.flatten()] = rows[share.index[order].flatten()]

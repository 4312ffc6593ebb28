"""Which units stay: of each layer by itself, or of all layers out of one budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from exporter.errors import ComponentFailed, RecipeError
from exporter.pruners.base import CutOptions, Layer

Score = Callable[[Layer], Tensor]


def removals(layers: Sequence[Layer], options: CutOptions, score: Score) -> list[list[int]]:
    """Return the units of each layer that go, ascending; none of a layer that stays whole.

    With ``ranking: local`` every layer keeps `keep_ratio` of its own width. With ``global`` the scores of each layer
    are divided by their mean, and all layers together keep `keep_ratio` of their channels: those of the highest scores,
    and of every layer at least its narrowest width.

    Args:
        layers: what may be cut.
        options: the recipe's keys.
        score: (layer.units,) float scores of a layer, larger is kept.

    Raises:
        RecipeError: the ratio would empty a layer, or the narrowest widths together exceed it.
        ComponentFailed: a score is not a number.

    Source: local and global pruning as in Torch-Pruning (arXiv 2301.12900). Departs: the budget counts channels that
        stay, in whole steps of `round_to` and of the norm's groups, and no layer is emptied.
    """
    if options.ranking == "local":
        _refuse_emptied(layers, options)
        counts = [kept_units(layer, options) for layer in layers]
        return [
            removed_units(layer, checked(layer, score(layer)), count) if count < layer.units else []
            for layer, count in zip(layers, counts, strict=True)
        ]
    scores = [checked(layer, score(layer)) for layer in layers]
    relative = [values / values.mean().clamp_min(1e-30) for values in scores]
    widths = [float(layer.unit_width) for layer in layers]
    counts = allotted(layers, relative, widths, options, least=[min(steps_of(layer, options)) for layer in layers])
    return [removed_units(layer, found, count) for layer, found, count in zip(layers, scores, counts, strict=True)]


def allotted(
    layers: Sequence[Layer],
    scores: Sequence[Tensor],
    costs: Sequence[float],
    options: CutOptions,
    *,
    least: Sequence[int],
) -> list[int]:
    """Return how many units of each layer stay when all share one budget: `keep_ratio` of the cost of all units.

    Widths grow from the least in their steps, the step of the highest mean score first; what no longer fits is left
    out, so that the total ends within half a step of the budget.

    Args:
        layers: what may be cut.
        scores: (layer.units,) float of each, comparable between layers.
        costs: of one unit of each.
        options: the recipe's keys.
        least: fewest units that may stay of each.

    Raises:
        RecipeError: the least of all layers together cost more than the budget.
    """
    budget = options.keep_ratio * sum(cost * layer.units for layer, cost in zip(layers, costs, strict=True))
    counts = list(least)
    spent = sum(cost * count for cost, count in zip(costs, counts, strict=True))
    if spent > budget:
        reachable = options.keep_ratio * spent / budget
        got = f"prune.keep_ratio: got {options.keep_ratio:g}, expected at least {reachable:.3f}, which the narrowest"
        raise RecipeError(f"{got} widths of {len(layers)} layers need. Raise it, or lower round_to.")
    found = []
    for index, layer in enumerate(layers):
        ranked = ranked_units(layer, scores[index])[0].mean(dim=0)
        for low, high in _steps_from(layer, options, least[index]):
            value = float(ranked[low // layer.norm_groups : high // layer.norm_groups].mean())
            found.append((-value, index, high, costs[index] * (high - low)))
    full: set[int] = set()
    for _, index, high, cost in sorted(found):
        if index not in full and spent + cost / 2 <= budget:
            counts[index], spent = high, spent + cost
        else:
            full.add(index)
    return counts


def kept_units(layer: Layer, options: CutOptions) -> int:
    """Return how many units stay: nearest to the ratio, the larger of two, such that the width keeps the multiple.

    All units when no smaller count gives a width that is a multiple of `round_to` and spreads over the norm's groups.
    """
    wanted = options.keep_ratio * layer.units
    return min(steps_of(layer, options), key=lambda count: (abs(count - wanted), -count))


def _refuse_emptied(layers: Sequence[Layer], options: CutOptions) -> None:
    """Refuse a ratio that is nearer to nothing than to the narrowest width of a layer that can be cut."""
    shares = [(min(steps_of(layer, options)) / layer.units, layer) for layer in layers]
    share, layer = max(
        ((share, layer) for share, layer in shares if share < 1), default=(0.0, None), key=lambda x: x[0]
    )
    if layer is not None and options.keep_ratio < share / 2:
        got = f"prune.keep_ratio: got {options.keep_ratio:g}, which would empty {layer.path} ({layer.units} units, the"
        expected = f"fewest that may stay are {round(share * layer.units)}); expected at least {share / 2:.3g}."
        raise RecipeError(f"{got} {expected} Raise it, lower round_to, or add the layer to prune.protect.")


def steps_of(layer: Layer, options: CutOptions) -> list[int]:
    """Return the counts of units that a layer may keep, ascending, all of them being the last."""
    allowed = [
        count
        for count in range(layer.norm_groups, layer.units, layer.norm_groups)
        if count * layer.unit_width % options.round_to == 0
    ]
    return [*allowed, layer.units]


def _steps_from(layer: Layer, options: CutOptions, least: int) -> list[tuple[int, int]]:
    counts = [least, *(count for count in steps_of(layer, options) if count > least)]
    return list(pairwise(counts))


def removed_units(layer: Layer, scores: Tensor, kept: int) -> list[int]:
    """Return the units to remove, ascending: the lowest-scored of every norm group; of equals the later go first.

    Args:
        layer: the layer.
        scores: (layer.units,) float, larger is kept.
        kept: how many stay, a multiple of the layer's norm groups.
    """
    order = ranked_units(layer, scores)[1][:, kept // layer.norm_groups :]
    return sorted(int(unit) for unit in order.flatten())


def ranked_units(layer: Layer, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores and numbers of the units, each (groups, units / groups), of every group the highest first."""
    grouped = scores.detach().to("cpu", torch.float64).reshape(layer.norm_groups, -1)
    values, order = torch.sort(grouped, dim=1, descending=True, stable=True)
    return values, order + torch.arange(layer.norm_groups).unsqueeze(1) * grouped.shape[1]


def checked(layer: Layer, scores: Tensor) -> Tensor:
    """Return the scores.

    Raises:
        ComponentFailed: one of them is not a number.
    """
    if not bool(scores.isfinite().all()):
        count = int((~scores.isfinite()).sum())
        got = f"prune: {count} of {layer.units} scores of {layer.path} are not finite; expected numbers."
        raise ComponentFailed(f"{got} Check the source with `exporter check`, or add {layer.path!r} to prune.protect.")
    return scores

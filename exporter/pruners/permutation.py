"""Which order of its input channels lets a layer keep most under a pattern n:m: a search by swaps.

A group of m channels keeps n, so two large weights of one row lose one of them where they share a group of 1:2, and
keep both where they do not. Any order of the channels is the same layer, as long as what makes them has it too.

Source: "Channel Permutations for N:M Sparsity" (Pool and Yu, NeurIPS 2021), whose search NVIDIA's ASP has: swap two
channels of different groups where that keeps more, until none does. Departs: all swaps of a pass that share no group
are done together, instead of one at a time or every order of two groups; the passes are bounded, and so are the rows
that are looked at; nothing is drawn, and worse orders are never taken in the hope of better ones (the paper's escapes).
"""

from __future__ import annotations

import torch
from torch import Tensor

PASSES = 16
"""Most passes over all channels."""
TOGETHER = 256
"""Most channels of a class that are compared with one another in a pass; the next pass compares others."""
ROWS = 2048
"""Most rows that swaps are chosen by, evenly spaced; what the order keeps is then counted on all."""
_FEWEST = 0.02
"""Swaps of a pass, as a share of the groups, below which the search ends."""
_LEAST = 1e-5
"""Smallest gain of a swap, as a share of what a group keeps: below it are rounding errors of float32."""


def kept_by(scores: Tensor, pattern: tuple[int, int]) -> float:
    """Return the sum of what a pattern keeps, the n largest of every m.

    Args:
        scores: (channels, rows) float32, at least 0; m divides the channels.
        pattern: n and m.
    """
    return float(_largest(scores, *pattern).sum(dtype=torch.float64))


def _largest(scores: Tensor, count: int, group: int) -> Tensor:
    """Return (groups, count, rows): the largest of every group and row, in falling order."""
    groups = scores.reshape(-1, group, scores.shape[1])
    return groups.sort(dim=1, descending=True).values[:, :count]


@torch.no_grad()
def best_order(scores: Tensor, pattern: tuple[int, int], classes: Tensor) -> Tensor:
    """Return an order of channels that keeps at least as much as the given one.

    Args:
        scores: (channels, rows) float32, finite and at least 0; m divides the channels.
        pattern: n and m, n below m.
        classes: (classes, size) int64: channels that may take each other's place. None is in two of them; those in
            none stay where they are.

    Returns:
        (channels,) int64: which channel comes to each place.
    """
    order, m, idle = torch.arange(len(scores)), pattern[1], 0
    seen = scores
    if scores.shape[1] > ROWS:
        seen = scores[:, torch.linspace(0, scores.shape[1] - 1, ROWS).long()]
    least = _LEAST * kept_by(seen, pattern) / (len(scores) // m)
    for number in range(PASSES):
        swaps = _swaps(seen[order], pattern, _parts(classes, number), least)
        first, second = swaps.unbind(dim=1)
        order[first], order[second] = order[second], order[first]
        idle = idle + 1 if len(swaps) < _FEWEST * len(scores) / m else 0
        if idle == (2 if classes.shape[1] > TOGETHER else 1):
            break
    gained = kept_by(scores[order], pattern) > kept_by(scores, pattern)
    return order if gained else torch.arange(len(scores))


def _parts(classes: Tensor, number: int) -> tuple[Tensor, ...]:
    """Return classes of at most `TOGETHER`: neighbours in one pass, far ones in the next."""
    count = -(-classes.shape[1] // TOGETHER)
    if number % 2:
        return tuple(classes[:, start::count] for start in range(count))
    shift = number // 2 * (TOGETHER // 3) if count > 1 else 0
    return torch.tensor_split(classes.roll(shift, dims=1), count, dim=1)


def _swaps(scores: Tensor, pattern: tuple[int, int], parts: tuple[Tensor, ...], least: float) -> Tensor:
    """Return (swaps, 2) places whose channels change with each other, no two swaps in one group.

    A channel of a group is worth what it adds to the n - 1 largest of the others: the larger of itself and the n-th of
    them. So a swap gains by how much two such maxima grow; and the sum of max(a, b) is half the sum of a + b + |a - b|,
    of which all but the distances cancel.
    """
    n, m = pattern
    largest = _largest(scores, n + 1, m).repeat_interleave(m, dim=0)
    others = torch.where(scores >= largest[:, n - 1], largest[:, n], largest[:, n - 1])
    found = []
    for part in parts:
        distances = torch.cdist(others[part], scores[part], p=1)
        own = distances.diagonal(dim1=1, dim2=2)
        gains = (distances + distances.mT - own[:, :, None] - own[:, None, :]) / 2
        gains[part[:, :, None] // m == part[:, None, :] // m] = 0
        gain, place = gains.max(dim=2)
        found.append(torch.stack([gain, part, part.gather(1, place)]).flatten(1))
    gain, first, second = torch.cat(found, dim=1)
    chosen, taken = [], set[int]()
    for index in torch.argsort(gain, descending=True, stable=True).tolist():
        if gain[index] <= least:
            break
        places = int(first[index]), int(second[index])
        groups = {place // m for place in places}
        if not groups & taken:
            taken |= groups
            chosen.append(places)
    return torch.tensor(chosen, dtype=torch.long).reshape(-1, 2)

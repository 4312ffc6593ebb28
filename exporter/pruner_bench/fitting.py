"""The value of a contestant's knob at which its network has the latency that is asked for, found by measuring."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporter.artifact import digest_of, write_text
from exporter.errors import RecipeError
from exporter.progress import Progress
from exporter.pruner_bench.contestants import Contestant
from exporter.pruners import pruner
from exporter.pruners.base import Context, Loan, Stopwatch
from exporter.validation import options_from

TOLERANCE = 0.03
"""How far below the ratio asked for a network may be; above it no more than a third of this."""
_TRIES = 7


@dataclass(frozen=True)
class Fitted:
    """Where the search ended.

    Attributes:
        value: of the knob; None where the latency cannot be reached.
        ratio: latency there, as a fraction of dense's; the least that was reached, if known, where `value`
            is None.
        tried: every value that was tried with its ratio.
        note: what a method said that cannot reach it.
    """

    value: float | None
    ratio: float | None
    tried: tuple[tuple[float, float], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Fitter:
    """Tries values of a knob on copies of the dense network.

    Attributes:
        network: the dense denoiser.
        stopwatch: of the target, at the bench's batch.
        loan: what methods borrow.
        prompts: the set that they draw with.
        folder: keeps what was found, and the methods' work.
        progress: what long work reports to.
    """

    network: nn.Module
    stopwatch: Stopwatch
    loan: Loan
    prompts: str
    folder: Path
    progress: Progress

    def fit(self, contestant: Contestant, target: float) -> Fitted:
        """Return the knob's value for a fraction of dense's latency; found once, then read."""
        made_by = digest_of([contestant.stage(None), self.prompts])[:8]  # of other options it would be another value
        kept = self.folder / f"{_plain(contestant.name)}-{target:g}-{made_by}.json"
        if kept.is_file():
            found = json.loads(kept.read_text())
            tried = tuple((float(value), float(ratio)) for value, ratio in found["tried"])
            return Fitted(found["value"], found["ratio"], tried, found["note"])
        fitted = self._fit(contestant, target)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps(vars(fitted)))
        return fitted

    def _fit(self, contestant: Contestant, target: float) -> Fitted:
        assert contestant.knob is not None
        return search(lambda value: self.ratio(contestant, value), target, contestant.knob.low)

    def ratio(self, contestant: Contestant, value: float | None) -> float:
        """Return the measured latency of a contestant's network as a fraction of dense's."""
        dense = self.stopwatch.whole_ms(self.network)
        return self.stopwatch.whole_ms(self.pruned(contestant, value)) / dense

    def pruned(self, contestant: Contestant, value: float | None, seed: int = 0) -> nn.Module:
        """Return a copy of the dense network that the contestant has pruned."""
        given: dict[str, Any] = dict(contestant.stage(value)["prune"])
        method = pruner(given.pop("method"))
        if any(name == "prompts" for name in method.options.__dataclass_fields__):
            given["prompts"] = self.prompts
        options = options_from(method.options, given, "prune")
        network = copy.deepcopy(self.network)
        # What a method learns of a network before it cuts to a ratio serves every ratio.
        workdir = self.folder / "work" / _plain(f"{contestant.name}-{seed}")
        workdir.mkdir(parents=True, exist_ok=True)
        context = Context(torch.Generator().manual_seed(seed), self.progress, workdir, self.loan)
        method(options).prune(network, context)
        return network


def search(ratio: Callable[[float], float], target: float, low: float) -> Fitted:
    """Return the value whose ratio comes nearest to the target from below, by bisection.

    Args:
        ratio: from a value in (0, 1] to a latency as a fraction of dense's; rises with it but for noise and steps.
        target: the fraction asked for.
        low: smallest value to try.
    """
    tried: list[tuple[float, float]] = []

    def at(value: float) -> float:
        try:
            tried.append((value, ratio(value)))
        except RecipeError:  # so little to remove that nothing is, or so little left that it cannot be
            tried.append((value, 1.0 if value >= target else math.inf))
        return tried[-1][1]

    bottom, top, value = low, 1.0, target
    for _ in range(_TRIES):
        found = at(round(value, 3))
        if target - TOLERANCE <= found <= target + TOLERANCE / 3:
            return Fitted(round(value, 3), found, tuple(tried))
        bottom, top = (value, top) if found < target else (bottom, value)
        value = (bottom + top) / 2
        if top - bottom < 0.01:
            break
    if min(found for _, found in tried) > target + TOLERANCE / 3:
        at(low)
    below = [pair for pair in tried if pair[1] <= target + TOLERANCE / 3]
    if below:
        best, found = max(below, key=lambda pair: pair[1])
        return Fitted(best, found, tuple(tried), f"the nearest to {target:g}x that its steps allow")
    least = min(found for _, found in tried)
    return Fitted(None, least, tuple(tried), f"not reachable: {least:.2f}x")


def first_below(ratio: Callable[[float], float], values: Sequence[float], target: float) -> Fitted:
    """Return the first of some values whose ratio is not above the target, by bisection.

    Args:
        ratio: from a value to a latency as a fraction of dense's.
        values: in the order of falling ratios.
        target: the fraction asked for.
    """
    tried: dict[float, float] = {}
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        tried[values[middle]] = ratio(values[middle])
        low, high = (low, middle) if tried[values[middle]] <= target + TOLERANCE / 3 else (middle + 1, high)
    if low < len(values):
        return Fitted(values[low], tried[values[low]], tuple(tried.items()))
    least = min(tried.values())
    return Fitted(None, least, tuple(tried.items()), f"not reachable: {least:.2f}x")


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)

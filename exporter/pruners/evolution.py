"""The evolution loop of SnapFusion: the unit that costs least quality per millisecond goes, until the target is met.

What there is to spare then is given back: to units that went, and to copies of what is worth most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from exporter.errors import OutOfReach
from exporter.progress import Progress, task
from exporter.pruners.additivity import additivity, measured, random_sets
from exporter.pruners.base import MS, Block, Stopwatch, budget_facts
from exporter.pruners.copies import MOST, edit, edited, layer_of
from exporter.pruners.latency_table import LatencyTable, Timed
from exporter.pruners.notes import Notes

Insert = Literal["gains", "always", "never"]
_CANDIDATES = 4
"""Copies that are looked at in one round, those of the units of highest value, and whole networks that are timed."""


@dataclass(frozen=True)
class Genome:
    """A network by what differs from the one that evolution started from.

    Attributes:
        removed: paths of units.
        copied: paths of units, one entry per copy.
    """

    removed: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What its loss is noted under."""
        return f"{' '.join(sorted(self.removed))}; {' '.join(sorted(self.copied))}"


@dataclass(frozen=True)
class Means:
    """What evolution works with.

    Attributes:
        loss: quality lost by a network; see `exporter.pruners.quality`.
        stopwatch: of the target.
        notes: losses found so far.
        progress: one unit per network that is looked at.
        generator: draws the random sets that additivity is measured on.
    """

    loss: Callable[[nn.Module], float]
    stopwatch: Stopwatch
    notes: Notes
    progress: Progress
    generator: torch.Generator


@dataclass(frozen=True)
class Habits:
    """How evolution goes.

    Attributes:
        group: units that go before all are valued again.
        insert: which copies stay: those that lose no quality, all that fit, or none.
        sets: random sets on which additivity is measured.
    """

    group: int
    insert: Insert
    sets: int


class Evolution:
    """One evolution.

    Args:
        network: comes back as it was; `genome` tells what to do to it.
        blocks: its removable units.
        means: what to work with.
        habits: how.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[Block], means: Means, habits: Habits) -> None:
        self._network, self._means, self._habits = network, means, habits
        self._blocks = {block.path: block for block in blocks}
        layers = {block.path: layer_of(network, block) for block in blocks}
        self._layers: Mapping[str, str] = {path: layer for path, layer in layers.items() if layer is not None}
        self.table = LatencyTable.of(means.stopwatch, network, list(self._blocks), self._layers)
        self._timed: list[Timed] = []
        self._log: list[dict[str, Any]] = []
        self._values: dict[str, float] = {}
        self._additivity: dict[str, Any] = {}

    def check(self, target: float) -> None:
        """Refuse a latency that is not reached without any unit.

        Raises:
            RecipeError: naming the least that is reached.
        """
        least = self.whole_ms(Genome(tuple(self._blocks)))
        if least > target:
            got = f"prune.latency: below what is left without any unit; got {target:.4g} ms, expected {_up(least)} ms"
            share = f"{math.ceil(1000 * least / self.table.whole) / 1000:g} * dense"
            told = f"{got} ({share}) or more. Raise it, shorten protect, or cut channels too."
            raise OutOfReach(told, least / self.table.whole)

    def genome(self, target: float) -> Genome:
        """Return the network that keeps to a latency in ms, measured whole."""
        now = Genome()
        if self._habits.sets:
            self._measure_additivity()
        while self.whole_ms(now) > target:
            if not self._values or len(now.removed) % self._habits.group == 0:
                self._values = self._value(now)
            now = self._shrink(now, target)
        return self._grow(now, target)

    def facts(self, genome: Genome, target: float) -> dict[str, Any]:
        """Return what happened on the way to a latency of `target` ms, as JSON values."""
        control = {kind: list(ratio) for kind, ratio in self._means.stopwatch.control().items()}
        return {
            "kept": budget_facts(MS, dense=self.table.whole, asked=target, left=self.whole_ms(genome)),
            "history": self._log,
            "removed": list(genome.removed),
            "copied": list(genome.copied),
            "lost": _rounded(self.loss(genome)),
            "additivity": self._additivity,
            "latency": {**self.table.facts(self._timed), "control": control},
        }

    def apply(self, genome: Genome) -> None:
        """Edit the network for good."""
        edit(self._network, [self._blocks[path] for path in genome.removed], self.layers_of(genome))

    def layers_of(self, genome: Genome) -> list[str]:
        """Return the paths of the layers that a genome's copies repeat."""
        return [self._layers[path] for path in genome.copied]

    def loss(self, genome: Genome) -> float:
        """Return the quality that a network has lost, found out once."""

        def find() -> float:
            with edited(self._network, [self._blocks[path] for path in genome.removed], self.layers_of(genome)):
                return self._means.loss(self._network)

        return float(self._means.notes.once(genome.name, find))

    def whole_ms(self, genome: Genome) -> float:
        """Return the measured latency of a whole network; every one is held to the table, and makes it better."""
        with edited(self._network, [self._blocks[path] for path in genome.removed], self.layers_of(genome)):
            ms = self._means.stopwatch.whole_ms(self._network)
        seen = Timed(frozenset(genome.removed), ms, genome.copied)
        if genome != Genome() and seen not in self._timed:
            self._timed.append(seen)
            self.table = self.table.fitted(self._timed)
        return ms

    def _value(self, now: Genome) -> dict[str, float]:
        """Return quality lost per ms saved of every unit that is left."""
        base = self.loss(now)
        left = [path for path in self._blocks if path not in now.removed and path not in now.copied]
        found = {}
        with task(self._means.progress, f"Value of units, {len(now.removed)} removed", len(left)) as told:
            for path in left:
                lost = self.loss(Genome((*now.removed, path), now.copied)) - base
                found[path] = lost / self.table.saving(path)
                told.advance(note=path)
        return found

    def _shrink(self, now: Genome, target: float) -> Genome:
        """Remove the units of lowest value: a group, or fewer where the table says that fewer are enough."""
        room = self._habits.group - len(now.removed) % self._habits.group
        order = sorted((value, path) for path, value in self._values.items() if path not in now.removed)
        for value, path in order[:room]:
            now = Genome((*now.removed, path), now.copied)
            self._log.append({"did": "remove", "unit": path, "value": _rounded(value)})
            if self.table.predict(now.removed, now.copied) <= target:
                break
        return now

    def _grow(self, now: Genome, target: float) -> Genome:
        """Give back what is to spare: to removed units, and to copies of those of the highest value."""
        while True:
            spare = target - self.whole_ms(now)
            better = self._offers(now, spare)
            accepted = next((offer for offer in better[:_CANDIDATES] if self.whole_ms(offer[2]) <= target), None)
            if accepted is None:
                return now
            did, path, now = accepted
            self._log.append({"did": did, "unit": path})

    def _offers(self, now: Genome, spare: float) -> list[tuple[str, str, Genome]]:
        """Return what fits by the table and pays, best first."""
        base = self.loss(now)
        offers: list[tuple[float, str, str, Genome]] = []
        for path in now.removed:
            if (cost := self.table.saving(path)) <= spare:
                other = Genome(tuple(entry for entry in now.removed if entry != path), now.copied)
                offers.append(((base - self.loss(other)) / cost, "restore", path, other))
        for path in self._worth_most(now):
            if (cost := self.table.cost(path)) <= spare:
                other = Genome(now.removed, (*now.copied, path))
                offers.append(((base - self.loss(other)) / cost, "copy", path, other))
        always = self._habits.insert == "always"
        paying = [entry for entry in offers if entry[0] > 0 or (always and entry[1] == "copy")]
        return [entry[1:] for entry in sorted(paying, key=lambda entry: -entry[0])]

    def _worth_most(self, now: Genome) -> list[str]:
        """Return the units of highest value that can have one more copy."""
        if self._habits.insert == "never":
            return []
        values = self._values or self._value(now)
        able = [path for path in values if path in self._layers and path not in now.removed]
        able = [path for path in able if now.copied.count(path) < MOST]
        return sorted(able, key=lambda path: -values[path])[:_CANDIDATES]

    def _measure_additivity(self) -> None:
        """Compare summed with joint losses, before anything is removed."""
        alone = {path: self.loss(Genome((path,))) for path in self._blocks}
        half = max(2, len(alone) // 2)
        sizes = sorted({min(len(alone), number) for number in (2, max(2, half // 2), half)})
        sets = random_sets(list(alone), sizes, self._habits.sets, self._means.generator)
        with task(self._means.progress, "Additivity of losses", len(sets)) as told:

            def joint(removed: tuple[str, ...]) -> float:
                told.advance()
                return self.loss(Genome(removed))

            self._additivity = additivity(measured(sets, alone, joint))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _up(ms: float) -> str:
    """Return milliseconds rounded up, so that what is written can be reached."""
    return f"{math.ceil(ms * 100) / 100:g}"

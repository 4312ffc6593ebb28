"""Plans that mix palettes of 8, 6, 4 and 2 bits: each unit's width from what it costs alone at each of them.

One choice of several per unit, a knapsack: the fewest bytes whose errors keep to a limit, or the least error in so many
bytes. As for plans of one scheme, errors of units add up well as squares, but not exactly: the whole is asked, and a
plan that misses the limit is mended by asking for less error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.schemes import FLOAT, PALETTES
from calibration.sites import sites_of
from exporter.errors import RecipeError
from exporter.progress import Progress, task
from exporter.pruners.notes import Notes
from exporter.quantizing.plan import plan_text
from exporter.quantizing.planning import Planned, weights_of
from exporter.quantizing.trial import Trial, decibels
from exporter.quantizing.units import units_of

_TRIES = 6
_GRAINS = 1 << 16
"""Parts that the bytes of all units are counted in, at most; a unit's are rounded up to whole ones."""
_ENTRY = 2
"""Bytes of a value in 16 bits: of a weight that stays as it is, and of an entry of a table."""


@dataclass(frozen=True)
class Choice:
    """What one unit can become.

    Attributes:
        scheme: the unit's.
        nbytes: of its weights and their tables then.
        errors: relative squared error of the network's answer, call by call, with this unit alone in this scheme.
    """

    scheme: str
    nbytes: int
    errors: tuple[float, ...]


Choices = Mapping[str, Sequence[Choice]]
Picks = dict[str, Choice]


def most_exact(choices: Choices, largest: int) -> Picks | None:
    """Return a choice for each unit whose errors sum to the least in so many bytes; None where none is as small."""
    table = _Table(choices)
    place = table.upto(largest)
    return None if place is None else table.picks(place)


def lightest(choices: Choices, allowed: float) -> Picks | None:
    """Return a choice for each unit with the fewest bytes whose errors, in each call, sum to no more than is allowed.

    The table knows one error per choice, that of the call where it is largest; whether every call keeps to the limit
    is looked at with each call's own sum.
    """
    table = _Table(choices)
    best: Picks | None = None
    low, high = 0, len(table.least) - 1
    while low <= high:
        middle = (low + high) // 2
        place = table.upto(table.grain * middle)
        picks = None if place is None else table.picks(place)
        if picks is not None and max(summed(picks), default=0.0) <= allowed:
            best, high = picks, middle - 1
        else:
            low = middle + 1
    return best


def summed(picks: Mapping[str, Choice]) -> list[float]:
    """Return the errors of some choices, added up call by call."""
    return [float(value) for value in np.sum([choice.errors for choice in picks.values()], axis=0)] if picks else []


def size_of(picks: Mapping[str, Choice]) -> int:
    """Return the bytes of some choices."""
    return sum(choice.nbytes for choice in picks.values())


class _Table:
    """The least sum of errors for every sum of bytes, and how it comes about; by dynamic programming over units.

    Args:
        choices: of each unit, at least one.
    """

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        whole = sum(max(choice.nbytes for choice in several) for several in choices.values())
        self.grain = max(1, math.ceil(whole / _GRAINS))
        width = sum(max(self._weight(choice) for choice in several) for several in choices.values()) + 1
        self.least = np.full(width, np.inf)
        self.least[0] = 0.0
        self._taken: list[NDArray[np.uint8]] = []
        for several in choices.values():
            tried = np.full((len(several), width), np.inf)
            for row, choice in zip(tried, several, strict=True):
                weight = self._weight(choice)
                row[weight:] = self.least[: width - weight] + max(choice.errors, default=0.0)
            self._taken.append(tried.argmin(axis=0).astype(np.uint8))
            self.least = tried.min(axis=0)

    def _weight(self, choice: Choice) -> int:
        return math.ceil(choice.nbytes / self.grain)

    def upto(self, nbytes: int) -> int | None:
        """Return the sum, of no more bytes, with the least error; None where there is none."""
        within = self.least[: nbytes // self.grain + 1]
        return int(np.argmin(within)) if np.isfinite(within).any() else None

    def picks(self, place: int) -> Picks:
        """Return how a sum comes about."""
        found: Picks = {}
        for (unit, several), taken in zip(reversed(list(self._choices.items())), reversed(self._taken), strict=True):
            found[unit] = several[int(taken[place])]
            place -= self._weight(found[unit])
        return dict(reversed(found.items()))


@dataclass(frozen=True)
class Mixed:
    """A plan, as measured.

    Attributes:
        picks: unit -> what it becomes.
        worst_db: PSNR of the worst call.
        tries: (bytes, dB predicted, dB measured) of every plan that was measured.
    """

    picks: Picks
    worst_db: float
    tries: tuple[tuple[int, float, float], ...]


def search_mixed(choices: Choices, limit_db: float, measure: Callable[[Picks], Sequence[float]]) -> Mixed | None:
    """Return the smallest plan that keeps the worst call at the limit or above; None where only floats do.

    Args:
        choices: of each unit, staying in float among them.
        limit_db: least PSNR of the worst call.
        measure: from a plan to its errors per call, all units together.
    """
    allowed = 10 ** (-limit_db / 10)
    budget, tries = allowed, []
    for _ in range(_TRIES):
        picks = lightest(choices, budget)
        if picks is None or all(choice.scheme == FLOAT for choice in picks.values()):
            return None
        promised, got = max(summed(picks)), max(measure(picks))
        tries.append((size_of(picks), round(decibels(promised), 2), round(decibels(got), 2)))
        if got <= allowed:
            return Mixed(picks, decibels(got), tuple(tries))
        budget = min(budget, promised) * 0.95 * allowed / got  # the sum promised too little by this factor
    return None


@dataclass(frozen=True)
class Mixer:
    """Mixed plans for one network.

    Attributes:
        trial: the float graph and its calls.
        known: of this network and these calls: errors that were measured before, under the names of one-scheme plans.
        progress: one unit per unit and width.
    """

    trial: Trial
    known: Notes
    progress: Progress

    def plan(self, limit_db: float | None, size: float | None) -> Planned:
        """Return the plan of the fewest bytes at a limit, or that of the least error at a size.

        Args:
            limit_db: least PSNR of the worst call.
            size: share of what the weights take in 16 bits; where no limit is given.

        Raises:
            RecipeError: no plan keeps to it.
        """
        sites = sites_of(ir.load(self.trial.graph).graph)
        units = {
            unit: names
            for unit, names in units_of(sites).items()
            if any(sites[name].weight is not None for name in names)
        }
        counts = {name: weights_of(site) for name, site in sites.items()}
        sizes = {unit: _sizes([counts[name] for name in names if counts[name]]) for unit, names in units.items()}
        whole = sum(held[FLOAT] for held in sizes.values())
        least = sum(min(held.values()) for held in sizes.values())
        if size is not None and size * whole < least:
            known = math.ceil(1000 * least / whole) / 1000
            raise RecipeError(
                f"quantize.size: got {size:g}, expected at least {known:g}, what every unit in 2 bits takes. Raise "
                "it, or prune before."
            )
        choices = self._choices(units, sizes)

        def together(picks: Picks) -> list[float]:
            chosen = {unit: choice.scheme for unit, choice in picks.items() if choice.scheme != FLOAT}
            return self.trial.errors({site: scheme for unit, scheme in chosen.items() for site in units[unit]})

        if limit_db is not None:
            found = search_mixed(choices, limit_db, together)
            if found is None:
                raise RecipeError(
                    f"quantize.limit_db: got {limit_db:g}, expected less: no unit in a palette keeps to it. Lower it, "
                    "or leave the stage out."
                )
        else:
            assert size is not None
            picks = most_exact(choices, int(size * whole))
            if picks is None:  # a hair above the least, which the table's grains are too coarse for
                picks = {unit: min(several, key=lambda choice: choice.nbytes) for unit, several in choices.items()}
            got, promised = max(together(picks)), max(summed(picks))
            tried = (size_of(picks), round(decibels(promised), 2), round(decibels(got), 2))
            found = Mixed(picks, decibels(got), (tried,))
        return _told(found, choices, whole)

    def _choices(self, units: Mapping[str, tuple[str, ...]], sizes: Mapping[str, Mapping[str, int]]) -> Choices:
        """Measure each unit alone in each palette."""
        found: dict[str, list[Choice]] = {}
        with task(self.progress, "sensitivity", len(units) * len(PALETTES)) as told:
            for unit, names in units.items():
                found[unit] = [Choice(FLOAT, sizes[unit][FLOAT], (0.0,) * len(self.trial.calls))]
                for scheme in PALETTES:
                    find = partial(self.trial.errors, dict.fromkeys(names, scheme))
                    errors = self.known.once(f"{scheme} {unit}", find)
                    found[unit].append(Choice(scheme, sizes[unit][scheme], tuple(errors)))
                    told.advance(note=f"{unit} {scheme}")
        return found


def _sizes(counts: Sequence[int]) -> dict[str, int]:
    """Return the bytes of a unit's weights as they are in 16 bits, and with their tables in each palette."""
    found = {FLOAT: _ENTRY * sum(counts)}
    for scheme, bits in PALETTES.items():
        found[scheme] = sum(math.ceil(count * bits / 8) + _ENTRY * 2**bits for count in counts)
    return found


def _told(found: Mixed, choices: Choices, whole: int) -> Planned:
    plan = {unit: choice.scheme for unit, choice in found.picks.items()} | {"": FLOAT}
    alone = {
        scheme: {unit: f"{decibels(max(several[at].errors)):.1f}" for unit, several in choices.items()}
        for at, scheme in enumerate(PALETTES, 1)
    }
    sizes = {unit: f"{choice.nbytes / 1000:.1f}" for unit, choice in found.picks.items()}
    columns = {f"{scheme}_db": values for scheme, values in alone.items()} | {"kB": sizes}
    units = {scheme: list(plan.values()).count(scheme) for scheme in (*PALETTES, FLOAT)}
    facts = {
        "units": units | {FLOAT: units[FLOAT] - 1},
        "worst_db": round(found.worst_db, 2),
        "bytes": size_of(found.picks),
        "size": round(size_of(found.picks) / whole, 4),
        "tries": [list(entry) for entry in found.tries],
        "table": [
            {"unit": unit, "scheme": choice.scheme, "alone_db": round(decibels(max(choice.errors)), 1)}
            | {"bytes": choice.nbytes}
            for unit, choice in found.picks.items()
        ],
    }
    return Planned(plan, plan_text(plan, columns), facts)

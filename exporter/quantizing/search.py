"""The fastest plan under a limit of fidelity: errors and gains of units are added up, then the whole is measured.

Errors of units add up well as squares, but not exactly, and what a layer saves depends on its neighbours: a plan that
the sums promise is built, asked and timed. What misses the limit is mended by asking for less error; what is slower
than promised competes with plans that leave units of small gain in float, and so convert less often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exporter.pruners.knapsack import cheapest
from exporter.quantizing.trial import decibels

_TRIES = 6
_STEPS = 40
_AS_PROMISED = 1.05


@dataclass(frozen=True)
class Found:
    """A plan that keeps to the limit, as measured.

    Attributes:
        units: that are quantized.
        worst_db: PSNR of the worst call, measured with all of them together.
        tries: (units, dB predicted, dB measured) of every plan that was measured.
    """

    units: tuple[str, ...]
    worst_db: float
    tries: tuple[tuple[int, float, float], ...]


def search(
    errors: Mapping[str, Sequence[float]],
    gains: Mapping[str, float],
    limit_db: float,
    measure: Callable[[tuple[str, ...]], Sequence[float]],
) -> Found | None:
    """Return the plan that gains most and keeps the worst call at the limit or above; None where no plan does.

    Args:
        errors: unit -> relative squared error per call, alone.
        gains: unit -> what quantizing it saves, in ms or bytes; where it saves nothing it stays in float.
        limit_db: least PSNR of the worst call.
        measure: from units to their errors per call, together.
    """
    useful = [unit for unit, gain in gains.items() if gain > 0]
    allowed = 10 ** (-limit_db / 10)
    budget, tries = allowed, []
    for _ in range(_TRIES):
        chosen = _best(useful, errors, gains, budget)
        if not chosen:
            return None
        promised = max(_summed(errors, chosen))
        got = max(measure(chosen))
        tries.append((len(chosen), round(decibels(promised), 2), round(decibels(got), 2)))
        if got <= allowed:
            return Found(chosen, decibels(got), tuple(tries))
        budget = min(budget, promised) * 0.95 * allowed / got  # the sum promised too little by this factor
    return None


@dataclass(frozen=True)
class Proven:
    """A plan against the float network, on the target.

    Attributes:
        plan: what was timed.
        promised: time over that of the float network, by the sums.
        measured: the same, timed.
    """

    plan: Found
    promised: float
    measured: float


def fastest(
    plans: Iterable[Found], promise: Callable[[Found], float], measure: Callable[[Found], float]
) -> tuple[Proven, ...]:
    """Time plans until one is as fast as its sum promised; the fastest comes first.

    Args:
        plans: the most promising first; made as they are asked for, and the same units are timed once.
        promise: time over that of the float network, by the sums.
        measure: the same, timed.
    """
    timed: dict[tuple[str, ...], Proven] = {}
    for plan in plans:
        if plan.units in timed:
            continue
        found = timed[plan.units] = Proven(plan, promise(plan), measure(plan))
        if found.measured <= _AS_PROMISED * found.promised:
            break
    return tuple(sorted(timed.values(), key=lambda found: found.measured))


def _best(
    useful: Sequence[str], errors: Mapping[str, Sequence[float]], gains: Mapping[str, float], budget: float
) -> tuple[str, ...]:
    """Return the units that gain most while no call's sum of errors is above the budget.

    The knapsack knows one cost per unit, its error in the call where it is largest; whether every call keeps to the
    budget is looked at with each call's own sum.
    """
    if not useful:
        return ()
    costs = [max(errors[unit]) for unit in useful]
    weights = [gains[unit] for unit in useful]
    low, high = 0.0, sum(weights)
    best: tuple[str, ...] = ()
    for _ in range(_STEPS):
        middle = (low + high) / 2
        chosen = cheapest(costs, weights, middle)
        picked = tuple(useful[index] for index in chosen or ())
        if chosen is not None and max(_summed(errors, picked), default=0.0) <= budget:
            low, best = middle, picked
        else:
            high = middle
    return best


def _summed(errors: Mapping[str, Sequence[float]], units: Sequence[str]) -> list[float]:
    return [float(value) for value in np.sum([errors[unit] for unit in units], axis=0)] if units else [0.0]

"""Finds the first operation of a program that computes something else than the same operation of another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from targets.base import Array, TargetError
from targets.mil.package import Operation

if TYPE_CHECKING:
    from targets.mil.evaluator import Evaluator

Recorded = Iterable[tuple[Operation, Sequence[Tensor]]]


@dataclass(frozen=True)
class Divergence:
    """The first operation whose results differ although it was given the same values.

    Attributes:
        name: of the operation in the program under suspicion.
        type: of it.
        module: torch module that it comes from; empty where that is not known.
        index: its place in the order of execution.
        error: largest difference over the largest absolute value of the sound result; infinite where shapes, types or
            what is not finite differ.
        told: what differs, in words.
    """

    name: str
    type: str
    module: str
    index: int
    error: float
    told: str


def first_divergence(
    reference: Evaluator | Recorded,
    suspect: Evaluator,
    feeds: Mapping[str, Array],
    tolerance: float = 1e-6,
) -> Divergence | None:
    """Return the first operation of a program that does something else than the reference's; None where all agree.

    Every operation of the suspect gets what the *reference* computed, not what the suspect made of it before. So its
    own parameters, constants and order of inputs are judged, and no difference is carried along.

    Args:
        reference: a sound program with the same operations, or what one gave for these feeds (`Evaluator.values`).
        suspect: the program under suspicion.
        feeds: for both.
        tolerance: largest error that is none.

    Raises:
        TargetError: wrong feeds, or a reference that does not compute.
    """
    recorded: Recorded = reference.values(feeds) if hasattr(reference, "values") else reference
    values = {name: torch.from_numpy(array.copy()) for name, array in feeds.items()}
    last = {name: index for index, own in enumerate(suspect.package.operations) for name in suspect.takes(own)}
    pairs = zip_longest(recorded, suspect.package.operations)
    for index, (sound, own) in enumerate(pairs):
        if sound is None or own is None or sound[0].type != own.type:
            return _other_program(suspect, index, sound[0] if sound else None, own)
        found = _difference(suspect, own, values, sound[1])
        if found[0] > tolerance:
            return Divergence(own.name, own.type, suspect.module(own), index, *found)
        values |= {spec.name: result for spec, result in zip(own.outputs, sound[1], strict=True)}
        for name in {*suspect.takes(own), *(spec.name for spec in own.outputs)}:
            if last.get(name, index) <= index:
                values.pop(name, None)
    return None


def _other_program(suspect: Evaluator, index: int, sound: Operation | None, own: Operation | None) -> Divergence:
    """Return that the programs' operations differ."""
    named = own or sound
    if named is None:
        raise TargetError("ML Program: got no operation, expected one. Give evaluators of programs with operations.")
    kinds = [f"{item.type} '{item.name}'" if item else "nothing" for item in (own, sound)]
    told = f"another operation: got {kinds[0]}, expected {kinds[1]}"
    return Divergence(named.name, named.type, suspect.module(named), index, math.inf, told)


def _difference(
    suspect: Evaluator, own: Operation, values: Mapping[str, Tensor], sound: Sequence[Tensor]
) -> tuple[float, str]:
    """Return the largest error of an operation's results, and what differs."""
    try:
        results = suspect.apply(own, values)
    except TargetError as error:
        return math.inf, str(error)
    if len(results) != len(sound):
        return math.inf, f"results: got {len(results)}, expected {len(sound)}"
    worst = (0.0, "")
    for result, wanted in zip(results, sound, strict=True):
        if result.shape != wanted.shape or result.dtype != wanted.dtype:
            got = f"{result.dtype} {tuple(result.shape)}, expected {wanted.dtype} {tuple(wanted.shape)}"
            return math.inf, f"result: got {got}"
        worst = max(worst, (_error(result, wanted), "values"))
    return worst


def _error(result: Tensor, wanted: Tensor) -> float:
    if torch.equal(result, wanted) or not wanted.numel():
        return 0.0
    left, right = result.double(), wanted.double()
    finite = right.isfinite()
    same = (left == right) | (left.isnan() & right.isnan())
    if bool((~same & ~(finite & left.isfinite())).any()):
        return math.inf
    apart = torch.where(same, 0.0, left - right).abs().amax()
    scale = torch.where(finite, right, 0.0).abs().amax()
    return float(apart / scale) if scale > 0 else float("inf" if apart > 0 else 0)

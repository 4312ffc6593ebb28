"""A schedule without training: what every reuse costs in the dense trajectory's answers, and the cheapest choice.

Not DiP-GO but a stand-in for its gates, where a few minutes must do. Each step of a recorded trajectory is answered
again with what an earlier step left, at every depth; the squared error of the guided answer is the price of that reuse.
The schedule with the least sum of prices within the budget is found exactly, up to one simplification: cached features
are priced as those of the last whole step, although a step at a smaller depth may have renewed them since.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from exporter.errors import ComponentFailed, RecipeError
from exporter.networks.cuts import run_unet
from exporter.networks.schedule import MAX_PATTERNS, reuse_of
from exporter.progress import Progress, task
from exporter.pruners.base import Loan
from exporter.pruners.sampler import Sampler

if TYPE_CHECKING:
    from calibration.recording import Call

Floats = NDArray[np.float64]

REACH = 8
"""Steps that a feature or an answer may be old."""
_GRAIN = 200  # parts of a whole call in which costs are counted, each rounded up


def reuse_errors(
    network: nn.Module, sampler: Sampler, loan: Loan, prompts: str | None, images: int, progress: Progress
) -> Floats:
    """Return the mean squared error of every step's answer when it reuses what an earlier step left.

    Args:
        network: the U-Net.
        sampler: of the dense pipeline.
        loan: whose recording is answered again.
        prompts: a set or file.
        images: how many of them.
        progress: one unit per image and step.

    Returns:
        (steps, levels, `REACH`): at depth 1, 2, ..., of what is 1, 2, ... steps old; infinite where nothing is so old.

    Raises:
        ComponentFailed: an answer is not finite.
    """
    recording, steps = loan.recording(prompts, images), len(sampler.timesteps)
    total = np.zeros((steps, sampler.levels, REACH))
    with torch.no_grad(), task(progress, "price reuse", recording.count * steps) as shown:
        for image in range(recording.count):
            past: list[tuple[dict[str, torch.Tensor], torch.Tensor, dict[int, torch.Tensor]]] = []
            for step in range(steps):
                feeds = _feeds(recording.calls(step, image, image + 1))
                features: dict[int, torch.Tensor] = {}

                def keep(cut: int, value: torch.Tensor, features: dict[int, torch.Tensor] = features) -> torch.Tensor:
                    features[cut] = value
                    return value

                answer = run_unet(network, feeds, meet=keep)
                for age, (then, answered, cached) in enumerate(reversed(past), start=1):
                    for cut, value in cached.items():
                        got = run_unet(network, feeds, depth=cut, cached=value)
                        total[step, cut - 1, age - 1] += _error(got, answer, loan.drawing.guidance)
                    a, b = reuse_of(sampler.pipeline.scheduler, float(then["timestep"]), float(feeds["timestep"]))
                    got = a * answered + b * then["sample"] if b else a * answered
                    total[step, -1, age - 1] += _error(got, answer, loan.drawing.guidance)
                past = [*past, (feeds, answer, features)][-REACH:]
                shown.advance()
    if not np.isfinite(total).all():
        raise ComponentFailed("dip-go: an answer is not finite; expected numbers. Check the source's weights.")
    old = np.arange(REACH)[None, :] >= np.arange(steps)[:, None]
    return np.where(old[:, None, :], np.inf, total / recording.count)


def least_error(errors: Floats, costs: Sequence[float], keep_ratio: float) -> list[int]:
    """Return the depths whose prices have the least sum within the budget.

    Args:
        errors: (steps, levels, reach), see `reuse_errors`.
        costs: of depths 0 to levels, from 1 to 0.
        keep_ratio: of the cost of all steps; at least what the first step costs.

    Raises:
        RecipeError: the budget does not allow to compute anything often enough.
    """
    levels = errors.shape[1]
    budget = int(np.floor(keep_ratio * len(errors) * _GRAIN + 1e-9))
    prices = np.ceil(np.asarray(costs) * _GRAIN - 1e-9).astype(int)
    inner = range(1, levels)
    found = [
        _cheapest(errors, prices, (0, *chosen, levels), budget)
        for chosen in combinations(inner, min(len(inner), MAX_PATTERNS - 1))
    ]
    least, depths = min(found, key=lambda answer: answer[0])
    if not np.isfinite(least):
        raise RecipeError(
            f"prune.keep_ratio: got {keep_ratio:g}, expected more: with order: drift nothing older than {REACH} steps "
            "is reused. Keep more, or write order: learned."
        )
    return depths


_State = tuple[int, int]
"""How many steps ago the last whole step was, and the last that computed anything."""


def _cheapest(errors: Floats, prices: NDArray[np.int_], allowed: Sequence[int], budget: int) -> tuple[float, list[int]]:
    """Return the least error within the budget, and the depths that reach it."""
    levels, reach = errors.shape[1:]
    start = np.full(budget + 1, np.inf)
    start[prices[0] :] = 0.0  # the first step computes everything
    best: dict[_State, Floats] = {(1, 1): start}
    steps: list[dict[_State, tuple[NDArray[np.int_], list[tuple[_State, int]]]]] = []
    too_old = np.full((len(errors), levels, 1), np.inf)
    errors = np.concatenate([errors, too_old], axis=2)
    for step in range(1, len(errors)):
        ways: dict[_State, list[tuple[Floats, tuple[_State, int]]]] = {}
        for (whole, latest), spent in best.items():
            older, later = min(whole + 1, reach + 1), min(latest + 1, reach + 1)
            for depth in allowed:
                if depth == 0:
                    after, error = (1, 1), 0.0
                elif depth < levels:
                    after, error = (older, 1), errors[step, depth - 1, whole - 1]
                else:
                    after, error = (older, later), errors[step, -1, latest - 1]
                reached = np.full(budget + 1, np.inf)
                price = int(prices[depth])
                reached[price:] = spent[: budget + 1 - price] + error
                ways.setdefault(after, []).append((reached, ((whole, latest), depth)))
        best, told = {}, {}
        for after, found in ways.items():
            table = np.stack([reached for reached, _ in found])
            choice = table.argmin(axis=0)
            best[after] = table[choice, np.arange(budget + 1)]
            told[after] = (choice, [way for _, way in found])
        steps.append(told)
    state = min(best, key=lambda key: best[key][budget])
    least, left = float(best[state][budget]), budget
    depths: list[int] = []
    if not np.isfinite(least):
        return least, depths
    for told in reversed(steps):
        choice, ways_to = told[state]
        state, depth = ways_to[int(choice[left])]
        depths.append(depth)
        left -= int(prices[depth])
    return least, [0, *reversed(depths)]


def _feeds(call: Call) -> dict[str, torch.Tensor]:
    sides = [call.given] if call.given_uncond is None else [call.given_uncond, call.given]
    found = {name: torch.from_numpy(np.concatenate([side[name] for side in sides])) for name in call.given}
    sample = torch.from_numpy(np.concatenate([call.sample] * len(sides)))
    return {"sample": sample, "timestep": torch.tensor(call.timestep), **found}


def _error(got: torch.Tensor, wanted: torch.Tensor, guidance: float) -> float:
    off = got - wanted
    if len(off) == 2:
        uncond, cond = off.chunk(2)
        off = uncond + guidance * (cond - uncond)
    return float(off.double().square().mean())

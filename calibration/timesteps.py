"""Which steps of recorded trajectories ranges are fitted on: a denoiser is another network at every noise level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from calibration.recording import Recording


def uniform(recording: Recording, count: int, seed: int) -> list[int]:
    """Return steps at even distances, the first and the last among them."""
    del seed
    return [round(step) for step in np.linspace(0, len(recording.timesteps) - 1, count)]


def stratified(recording: Recording, count: int, seed: int) -> list[int]:
    """Return a random step out of each of `count` equal parts of the trajectory."""
    edges = np.linspace(0, len(recording.timesteps), count + 1)
    drawn = np.random.default_rng(seed).uniform(edges[:-1], edges[1:])
    return [min(int(step), len(recording.timesteps) - 1) for step in drawn]


def informative(recording: Recording, count: int, seed: int) -> list[int]:
    """Return steps at even distances of how far the answer moves, so that there are more where it changes fast.

    The distance of two steps is the mean square of the difference of their guided answers, its root, on the first
    prompt.
    """
    del seed
    answers = [recording.calls(step, 0, 1).guided for step in range(len(recording.timesteps))]
    moved = [float(np.sqrt(np.mean((b - a) ** 2))) for a, b in pairwise(answers)]
    way = np.concatenate([[0.0], np.cumsum(moved)])
    wanted = np.linspace(0, way[-1], count)
    return [int(np.argmin(np.abs(way - goal))) for goal in wanted]


CHOICES: Mapping[str, Callable[[Recording, int, int], list[int]]] = MappingProxyType(
    {"uniform": uniform, "stratified": stratified, "informative": informative}
)


def chosen(recording: Recording, how: str, calls: int, batch: int, seed: int) -> list[tuple[int, range]]:
    """Return the calls to fit on: a step, and the prompts that are asked in it, which take turns.

    Args:
        recording: of the dense pipeline.
        how: one of `CHOICES`.
        calls: how many.
        batch: prompts of a call.
        seed: of what is random.
    """
    parts: Sequence[range] = [
        range(start, start + batch) for start in range(0, max(recording.count - batch, 0) + 1, batch)
    ]
    steps = CHOICES[how](recording, calls, seed)
    return [(step, parts[index % len(parts)]) for index, step in enumerate(steps)]

"""Recorded inputs of each component, as the arrays its engine takes. Parity, fidelity and latency all feed these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.recording import Recording
from exporter.networks.components import Component
from exporter.networks.inputs import SHARED, inputs_of, takes_timestep_rows

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Fed:
    """One recorded call.

    Attributes:
        timestep: as the denoiser got it, None for components that have none.
        feeds: name -> array, as the engine's inputs are named.
    """

    timestep: float | None
    feeds: Feeds


def recorded_calls(component: Component, config: Mapping[str, Any], recording: Recording, rows: range) -> Iterator[Fed]:
    """Yield the recorded calls of a component for some of the prompts.

    Args:
        component: whose.
        config: of its network.
        recording: of the dense pipeline.
        rows: which prompts.

    Yields:
        One per timestep for the denoiser, rows without the prompt first where there is guidance; one for the others.
    """
    start, stop = rows.start, rows.stop
    if component.role == "encoder":  # what it would be given to start from: the images that the dense pipeline drew
        images = recording.images(start, stop).astype(np.float32) / 127.5 - 1
        yield Fed(None, {"sample": np.ascontiguousarray(images.transpose(0, 3, 1, 2))})
        return
    if component.role != "denoiser":
        fed = recording.fed(component.folder, start, stop)
        if "attention_mask" in inputs_of(component.cls, config):  # as the network has it where it is given none
            fed.setdefault("attention_mask", np.ones_like(fed["input_ids"]))
        yield Fed(None, fed)
        return
    for step in range(len(recording.timesteps)):
        yield denoiser_call(component, config, recording, step, rows)


def denoiser_call(component: Component, config: Mapping[str, Any], recording: Recording, step: int, rows: range) -> Fed:
    """Return one recorded call of the denoiser, rows without the prompt first where there is guidance."""
    call = recording.calls(step, rows.start, rows.stop)
    sides = [call.given] if call.given_uncond is None else [call.given_uncond, call.given]
    sample = np.concatenate([call.sample] * len(sides))
    given = {name: np.concatenate([side[name] for side in sides]) for name in call.given}
    return Fed(call.timestep, denoiser_feeds(component.cls, config, sample, call.timestep, given))


def denoiser_feeds(
    cls: str, config: Mapping[str, Any], sample: NDArray[Any], timestep: float, given: Mapping[str, NDArray[Any]]
) -> Feeds:
    """Return a denoiser call as its engine takes it.

    Args:
        cls: its network class.
        config: of its network.
        sample: (rows, ...).
        timestep: the same for every row.
        given: its other inputs, each (rows, ...).
    """
    shape = (len(sample),) if takes_timestep_rows(cls) else ()
    known = {inputs_of(cls, config)[0]: sample, "timestep": np.full(shape, timestep, np.float32), **given}
    known |= {name: given[name][0] for name in SHARED if name in given}
    return {name: known[name] for name in inputs_of(cls, config)}


def spread(calls: list[Fed], count: int) -> list[Fed]:
    """Return `count` of the calls, the first and the last among them, evenly spread."""
    if len(calls) <= count:
        return calls
    return [calls[round(index * (len(calls) - 1) / (count - 1))] for index in range(count)]

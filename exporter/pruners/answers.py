"""What a network answers to recorded calls, and how far that is from what the dense one answered: the output loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration.calling import Form
from calibration.recording import Call, Recording
from exporter.errors import ComponentFailed
from exporter.networks.inputs import as_arguments
from exporter.networks.probe import evaluating


@dataclass(frozen=True)
class Asked:
    """One recorded denoiser call, and what the dense network answered.

    Attributes:
        timestep: as the denoiser got it.
        arguments: keyword arguments of its forward; tensors of n rows, or of 2n where guidance is asked for: first
            without the prompts, then with them.
        count: n, the prompts of this call.
        cond: (n, ...) dense answers to the prompts.
        guided: (n, ...) dense answers after guidance; `cond` itself where the denoiser answers one row per image.
    """

    timestep: float
    arguments: Mapping[str, Any]
    count: int
    cond: Tensor
    guided: Tensor

    @property
    def has_two_rows(self) -> bool:
        """Whether each prompt is asked without and with its text."""
        rows = next(value.shape[0] for value in self.arguments.values() if isinstance(value, Tensor))
        return bool(rows == 2 * self.count)


@dataclass(frozen=True)
class Loss:
    """Mean squared errors to the dense answers, one per call; squared units of the network's prediction.

    Attributes:
        cond: of answers to the prompts.
        guided: of answers after guidance; equal to `cond` where guidance was not asked for.
        counts: prompts of each call.
    """

    cond: tuple[float, ...]
    guided: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def mean_cond(self) -> float:
        """Mean over prompts and calls."""
        return self._mean(self.cond)

    @property
    def mean_guided(self) -> float:
        """Mean over prompts and calls."""
        return self._mean(self.guided)

    def _mean(self, values: tuple[float, ...]) -> float:
        return sum(value * count for value, count in zip(values, self.counts, strict=True)) / sum(self.counts)


@dataclass(frozen=True)
class Exam:
    """Calls that every network in question is asked alike, with the dense answers beside them.

    Attributes:
        calls: in the order of the steps.
        guidance: guidance scale of the recording.
    """

    calls: tuple[Asked, ...]
    guidance: float

    @classmethod
    def of(cls, recording: Recording, form: Form, *, batch: int, steps: int | None = None, guided: bool = True) -> Exam:
        """Return the calls of a recording as tensors.

        Args:
            recording: of the dense pipeline.
            form: how that pipeline is called.
            batch: prompts per call.
            steps: how many of the recorded steps, evenly spread from the first to the last; None for all.
            guided: ask without the prompts too, where the recording did; False halves the work.
        """
        total = len(recording.timesteps)
        count = total if steps is None else min(steps, total)
        chosen = sorted({round(i * (total - 1) / max(count - 1, 1)) for i in range(count)})
        starts = range(0, recording.count, batch)
        calls = [
            recording.calls(step, start, min(start + batch, recording.count)) for step in chosen for start in starts
        ]
        return cls(tuple(_asked(call, form, guided=guided) for call in calls), recording.guidance)

    @property
    def peak(self) -> float:
        """Range of the dense guided answers over all calls, the peak of PSNR."""
        low = min(float(asked.guided.min()) for asked in self.calls)
        return max(float(asked.guided.max()) for asked in self.calls) - low

    @torch.no_grad()
    def answers(self, network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what a network answers to each call: to the prompts, and after guidance; (n, ...) float32 on the CPU.

        Args:
            network: denoiser, float32, on any device; its mode is as before afterwards.
        """
        device = next(network.parameters()).device
        with evaluating(network):
            for asked in self.calls:
                answer = network(**_on(asked.arguments, device), return_dict=False)[0].float().cpu()
                if not asked.has_two_rows:
                    yield answer, answer
                    continue
                uncond, cond = answer.split(asked.count)
                guided = uncond + self.guidance * (cond - uncond)
                yield cond, guided[:, : asked.guided.shape[1]]

    def loss(self, network: nn.Module, place: str = "prune") -> Loss:
        """Return how far a network's answers are from the dense ones.

        Args:
            network: as for `answers`.
            place: what was done to it, for messages.

        Raises:
            ComponentFailed: an answer is not finite.
        """
        conds, guideds = [], []
        for asked, (cond, guided) in zip(self.calls, self.answers(network), strict=True):
            conds.append(_square(cond, asked.cond))
            guideds.append(_square(guided, asked.guided) if asked.has_two_rows else conds[-1])
            if not math.isfinite(conds[-1] + guideds[-1]):
                raise ComponentFailed(
                    f"{place}: the answer at timestep {asked.timestep:g} is not finite; expected numbers. Load the "
                    "source in float32, or add the module to prune.protect."
                )
        return Loss(tuple(conds), tuple(guideds), tuple(asked.count for asked in self.calls))

    def psnr_db(self, squared: float) -> float:
        """Return a mean squared error of guided answers as PSNR, with `peak`; at most 200."""
        return min(200.0, 10 * math.log10(self.peak**2 / squared)) if squared > 0 else 200.0


def _asked(call: Call, form: Form, *, guided: bool) -> Asked:
    sides = [call.given] if call.given_uncond is None or not guided else [call.given_uncond, call.given]
    sample = np.concatenate([call.sample] * len(sides))
    feeds: dict[str, Tensor] = {
        form.inputs[0]: torch.from_numpy(sample),
        "timestep": torch.full((len(sample),), call.timestep, dtype=torch.float32),
    }
    for name in form.given:
        rows = np.concatenate([side[name] for side in sides])
        feeds[name] = torch.from_numpy(rows[0] if name in form.shared else rows)
    named = as_arguments({name: feeds[name] for name in form.inputs})
    cond = torch.from_numpy(call.cond)
    return Asked(
        call.timestep, named, len(call.sample), cond, torch.from_numpy(call.guided) if len(sides) == 2 else cond
    )


def _on(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: _on(value, device) if isinstance(value, Mapping) else value.to(device)
        for name, value in arguments.items()
    }


def _square(answer: Tensor, wanted: Tensor) -> float:
    return float((answer.double() - wanted.double()).square().mean())

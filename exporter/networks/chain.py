"""Carries a schedule out: the calls of a sampler, in order, answered by one graph or another, or by none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import ComponentFailed
from exporter.networks.schedule import Schedule
from targets.base import Evidence, Session

Array = NDArray[Any]
Ask = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""What answers for one pattern: feeds by name -> answers by name."""

ANSWER = "out_sample"
_SAME = 1e-3  # timesteps; samplers hand them over as float32


def cache_input(cut: int) -> str:
    """Return the name under which a graph is given the feature of a cut."""
    return f"cache_{cut}"


def cache_output(cut: int) -> str:
    """Return the name under which a graph hands out the feature of a cut."""
    return f"fresh_{cut}"


class Chain:
    """Answers a sampler's calls for one batch of images after another; the first timestep begins a new one.

    Args:
        schedule: what each step computes.
        asks: one per pattern of the schedule, in its order.
    """

    def __init__(self, schedule: Schedule, asks: Sequence[Ask]) -> None:
        self.schedule = schedule
        self._asks = dict(zip((pattern.depth for pattern in schedule.patterns), asks, strict=True))
        self._patterns = {pattern.depth: pattern for pattern in schedule.patterns}
        self._next = 0
        self._caches: dict[int, Array] = {}
        self._last: dict[str, Array] = {}

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Answer one call.

        Args:
            feeds: ``sample`` (rows, ...), ``timestep`` and what else the network takes, float32.

        Returns:
            ``out_sample`` (rows, ...).

        Raises:
            ComponentFailed: a call that the schedule does not have next, or with another number of rows.
        """
        index = self._position(float(np.ravel(feeds["timestep"])[0]))
        sample, step = feeds["sample"], self.schedule.steps[index]
        if index and len(sample) != len(self._last["sample"]):
            raise ComponentFailed(
                f"schedule: the number of rows changed within a batch; got {len(sample)}, expected "
                f"{len(self._last['sample'])}. Keep guidance and batch the same over all steps."
            )
        self._next = index + 1
        if step.depth == self.schedule.levels:
            a, b = (np.float32(factor) for factor in step.reuse)
            answer = a * self._last[ANSWER] + b * self._last["sample"] if b else a * self._last[ANSWER]
            return {ANSWER: answer}
        pattern = self._patterns[step.depth]
        cached = {cache_input(cut): self._caches[cut] for cut in pattern.takes}
        found = self._asks[step.depth]({**feeds, **cached})
        self._caches |= {cut: found[cache_output(cut)] for cut in pattern.emits}
        self._last = {"sample": np.array(sample), ANSWER: found[ANSWER]}
        return {ANSWER: np.array(found[ANSWER])}

    def _position(self, timestep: float) -> int:
        """Return which step a call is: the next one, or the first of a new batch."""
        steps = self.schedule.steps
        if self._next < len(steps) and abs(steps[self._next].timestep - timestep) <= _SAME:
            return self._next
        if abs(steps[0].timestep - timestep) <= _SAME:
            return 0
        expected = (
            f"{steps[self._next].timestep:g}" if self._next < len(steps) else f"a new batch at {steps[0].timestep:g}"
        )
        raise ComponentFailed(
            f"schedule: not made for this list of steps; got timestep {timestep:g}, expected {expected}. Sample with "
            f"{self.schedule.scheduler} at its {len(steps)} steps, one after another."
        )


class ChainSession:
    """Sessions of a schedule's graphs as one session; see `targets.base.Session`.

    Args:
        schedule: what each step computes.
        parts: one session per pattern, in their order.
        ask: runs a session on any number of rows.
    """

    def __init__(
        self,
        schedule: Schedule,
        parts: Sequence[Session],
        ask: Callable[[Session, Mapping[str, Array]], Mapping[str, Array]],
    ) -> None:
        self.schedule = schedule
        self.parts = dict(zip((pattern.name for pattern in schedule.patterns), parts, strict=True))
        self.fed: dict[str, Mapping[str, Array]] = {}
        self._chain = Chain(schedule, [self._asking(name, part, ask) for name, part in self.parts.items()])
        # The first computes everything, so it takes no cache. Rows are split by whoever asks it.
        self.inputs = tuple(
            replace(spec, shape=(-1, *spec.shape[1:]) if spec.shape else ()) for spec in parts[0].inputs
        )
        self.outputs = tuple(spec for spec in parts[0].outputs if spec.name == ANSWER)

    @property
    def rows(self) -> int:
        """Rows that the graphs were compiled for."""
        return next(spec.shape[0] for spec in self.parts[self.schedule.patterns[0].name].inputs if spec.shape)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Answer the next call of a sampler; see `Chain`."""
        return self._chain(feeds)

    def evidence(self) -> Evidence:
        """Return what the compiler did with every graph, one after another."""
        found = {name: part.evidence() for name, part in self.parts.items()}
        layers = tuple(
            replace(layer, name=f"{name}: {layer.name}") for name, one in found.items() for layer in one.layers
        )
        return replace(next(iter(found.values())), layers=layers)

    def close(self) -> None:
        """Free every session."""
        for part in self.parts.values():
            part.close()

    def _asking(
        self, name: str, part: Session, ask: Callable[[Session, Mapping[str, Array]], Mapping[str, Array]]
    ) -> Ask:
        def asked(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
            self.fed[name] = feeds
            return ask(part, feeds)

        return asked

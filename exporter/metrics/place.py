"""Where a number was taken, and how it is stated or said to be missing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from exporter.metrics.measurement import Measurement

DENSE = "0-dense"
"""Id of the state that everything is held to."""


@dataclass(frozen=True)
class Place:
    """One cell of the table state x target, or one component in it.

    Attributes:
        state: id of the state.
        target: the recipe's name of the target.
        component: such as ``unet``; None for the whole pipeline.
    """

    state: str
    target: str
    component: str | None = None

    def at(self, component: str) -> Place:
        """Return the same cell, narrowed to a component."""
        return replace(self, component=component)

    def measured(self, name: str, value: float, unit: str, **extra: Any) -> Measurement:
        """Return a measurement taken here; `extra` are further fields of `Measurement`."""
        place = {"state": self.state, "target": self.target, "component": self.component}
        return Measurement(name=name, value=value, unit=unit, **place, **extra)

    def missing(self, name: str, unit: str, why: str) -> Measurement:
        """Return a measurement that was not taken, with the reason and what fills it."""
        return Measurement(
            name=name, value=None, unit=unit, state=self.state, target=self.target, component=self.component, note=why
        )

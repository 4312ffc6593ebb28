"""Recovery after pruning: training a state towards the dense one. Nothing is imported until chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.tuning.base import Tuner

TUNERS = {"distill": "exporter.tuning.distill:Distill"}
"""The registry: what a recipe calls ``method`` -> ``module:Class``."""


def tuner(name: str) -> type[Tuner]:
    """Return the class of this method; KeyError for a name that is not in `TUNERS`."""
    module, _, attribute = TUNERS[name].partition(":")
    found: type[Tuner] = getattr(import_module(module), attribute)
    return found


__all__ = ["TUNERS", "tuner"]

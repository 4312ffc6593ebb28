"""What removing or repeating a unit saves or costs on the target: whole networks predicted from units timed alone.

Source: the latency table of SnapFusion (arXiv 2306.00980, section 3.2). Departs: units timed alone carry what a call of
the runtime costs by itself, a constant that is fitted to whole networks; what stays behind of a removed unit, its
shortcut convolution, is timed too. Sums of many removals are estimates: a chosen network is always timed whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from exporter.errors import RecipeError
from exporter.pruners.additivity import spearman
from exporter.pruners.base import Context, Stopwatch


@dataclass(frozen=True)
class Timed:
    """A whole network as it was measured.

    Attributes:
        removed: paths of the units it lacks.
        ms: its latency.
        copied: paths of the units it has copies of, one entry per copy.
    """

    removed: frozenset[str]
    ms: float
    copied: tuple[str, ...] = ()


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of units, each measured alone, and of the whole network; all in ms.

    Attributes:
        units: path -> the unit.
        whole: the network with all of them.
        remains: path -> what stays in its place when it goes; only where that computes anything.
        per_call: what every unit measured alone contains that it does not cost inside of a network.
        copies: path -> what a copy of the unit adds, measured alone, where that is not all of the unit.
    """

    units: Mapping[str, float]
    whole: float
    remains: Mapping[str, float] = field(default_factory=dict)
    per_call: float = 0.0
    copies: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, stopwatch: Stopwatch, network: nn.Module, paths: Sequence[str], copied: Mapping[str, str] | None = None
    ) -> LatencyTable:
        """Measure a network and its units.

        Args:
            stopwatch: of the target.
            network: the denoiser.
            paths: of the units.
            copied: path of a unit -> path of the module that a copy of it repeats.
        """
        whole = stopwatch.whole_ms(network)
        left = {path: f"{path}.conv_shortcut" for path in paths if _has_shortcut(network.get_submodule(path))}
        layers = copied or {}
        found = stopwatch.units_ms(network, list(dict.fromkeys([*paths, *left.values(), *layers.values()])))
        return cls(
            {path: found[path] for path in paths},
            whole,
            {path: found[name] for path, name in left.items()},
            copies={path: found[name] for path, name in layers.items()},
        )

    @property
    def rest(self) -> float:
        """What the whole takes besides the units; may be below 0 where calls of single units cost more."""
        return self.whole - sum(value - self.per_call for value in self.units.values())

    def saving(self, path: str) -> float:
        """Return what removing a unit saves, at least a thousandth of the whole divided by the units."""
        gain = self.units[path] - self.remains.get(path, self.per_call)
        return max(gain, 1e-3 * self.whole / len(self.units))

    def cost(self, path: str) -> float:
        """Return what a copy of a unit costs."""
        return max(self.copies.get(path, self.units[path]) - self.per_call, 1e-3 * self.whole / len(self.units))

    def predict(self, removed: Collection[str], copied: Sequence[str] = ()) -> float:
        """Return the latency of the network without some units and with copies of others."""
        return self.whole - sum(self.saving(path) for path in removed) + sum(self.cost(path) for path in copied)

    def fitted(self, seen: Sequence[Timed]) -> LatencyTable:
        """Return the table with the `per_call` that fits whole networks best, by least squares of relative errors.

        But for the network without any unit: little is left of it but what no unit has, and a constant fitted to it is
        wrong for all others.
        """
        top = bottom = 0.0
        bare = replace(self, per_call=0.0)
        for timed in filter(self._has_units, seen):
            count = sum(path not in self.remains for path in timed.removed) - len(timed.copied)
            off = timed.ms - bare.predict(timed.removed, timed.copied)
            top, bottom = top + count * off / timed.ms**2, bottom + count**2 / timed.ms**2
        least = min(self.units.values(), default=0.0)
        return replace(self, per_call=min(max(top / bottom, 0.0), least) if bottom else 0.0)

    def _has_units(self, timed: Timed) -> bool:
        return bool(timed.copied) or not timed.removed >= self.units.keys()

    def facts(self, seen: Sequence[Timed]) -> dict[str, Any]:
        """Return what the table says and how it compares with whole networks, as JSON values.

        The network without any unit has an error of its own: all that is left there is what no unit tells of.
        """
        pairs = [[round(self.predict(timed.removed, timed.copied), 3), round(timed.ms, 3)] for timed in seen]
        errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
        whole = [error for error, timed in zip(errors, seen, strict=True) if self._has_units(timed)]
        bare = [error for error, timed in zip(errors, seen, strict=True) if not self._has_units(timed)]
        return {
            "whole_ms": round(self.whole, 3),
            "units_ms": {path: round(value, 3) for path, value in self.units.items()},
            "rest_ms": round(self.rest, 3),
            "per_call_ms": round(self.per_call, 4),
            "predicted_and_measured_ms": pairs,
            "largest_error": round(max(whole), 4) if whole else None,
            "error_without_units": round(max(bare), 4) if bare else None,
            "spearman": spearman([pair[0] for pair in pairs], [pair[1] for pair in pairs]),
        }


def stopwatch_of(context: Context) -> Stopwatch:
    """Return what measures on the recipe's target.

    Raises:
        RecipeError: there is no usable target.
    """
    found = context.borrowed.stopwatch
    if isinstance(found, str):
        raise RecipeError(f"prune: latencies are asked for; got none: {found}. Add a target that runs on this machine.")
    return found


def _has_shortcut(module: nn.Module) -> bool:
    return getattr(module, "conv_shortcut", None) is not None

"""Who takes part in the bench: each method's options, and the one key that makes its networks faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

FEWER_STEPS = "fewer-steps"
"""The baseline that prunes nothing: the plain sampler with fewer steps."""


@dataclass(frozen=True)
class Knob:
    """The option that decides how fast a method's networks are.

    Attributes:
        key: name of the option.
        meaning: ``keep``: a ratio whose latency has to be searched for. ``latency``: the method takes the fraction of
            dense's latency itself. ``relative``: the same, written as ``0.5 * dense``. ``loop``: `values` are tried in
            turn, since calls stay as slow as they were and only the loop tells.
        low: smallest value that is tried.
        values: for ``loop``, in the order of falling latency.
    """

    key: str
    meaning: Literal["keep", "latency", "relative", "loop"]
    low: float = 0.1
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Contestant:
    """One line of the table, at each latency that is asked for.

    Attributes:
        name: of the line.
        method: a pruner, or `FEWER_STEPS`.
        options: the recipe's keys of the stage besides the knob.
        knob: None for a method of one size, which has one line whatever latency is asked for.
        informed: whether it looks at weights or data; it then has to beat `random` of the same kind.
        kind: what it removes; lines of one kind are compared with that kind's random one.
        recovers: whether training the network afterwards is part of it; a schedule leaves the weights as they are.
        draws: whether what it removes depends on the seed.
        widths_of: name of a cheaper contestant whose networks have the same shapes at the same value of the knob: how
            many channels of a layer stay follows from the ratio alone, unless layers share one budget.
    """

    name: str
    method: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    knob: Knob | None = None
    informed: bool = True
    recovers: bool = True
    draws: bool = True
    widths_of: str = ""

    def stage(self, value: float | None) -> dict[str, Any]:
        """Return the recipe's stage at a value of the knob."""
        given = dict(self.options)
        if self.knob is not None and value is not None:
            plain = round(value, 4) if value % 1 else int(value)
            given[self.knob.key] = f"{value:.4g} * dense" if self.knob.meaning == "relative" else plain
        return {"prune": {"method": self.method, **given}}


_KEEP = Knob("keep_ratio", "keep")
_BY_LATENCY = MappingProxyType({"budget": "latency"})
_DATA: Mapping[str, Any] = MappingProxyType({"images": 32})


def _cut(
    name: str,
    method: str,
    kind: str = "channels",
    *,
    informed: bool = True,
    draws: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Contestant:
    given = {"cut": kind, **(options or {})}
    local = kind == "channels" and given.get("ranking", "local") == "local"
    return Contestant(name, method, kind, given, _KEEP, informed, draws=draws, widths_of="random" if local else "")


def _zeros(
    name: str, method: str, *, informed: bool = True, draws: bool = True, options: Mapping[str, Any]
) -> Contestant:
    return Contestant(name, method, "zeros", options, None, informed, draws=draws)


_HALF: Mapping[str, Any] = MappingProxyType({"pattern": "unstructured", "keep_ratio": 0.5})
_HALF_CUT: Mapping[str, Any] = MappingProxyType({"cut": "weights", "keep_ratio": 0.5})
_GATES: Mapping[str, Any] = MappingProxyType({"iterations": 100, "images": 32})
_SHARE = Knob("keep_ratio", "loop", values=(0.75, 0.7, 0.65, 0.5, 0.45, 0.4, 0.35))
_BY: Mapping[str, Any] = MappingProxyType({**_BY_LATENCY, **_DATA})

CONTESTANTS: tuple[Contestant, ...] = (
    Contestant(
        FEWER_STEPS, FEWER_STEPS, "steps", knob=Knob("steps", "keep"), informed=False, recovers=False, draws=False
    ),
    _cut("random", "random", informed=False),
    _cut("magnitude", "magnitude", draws=False),
    _cut("taylor", "taylor", options=_DATA),
    _cut("diff-pruning", "diff-pruning", options=_DATA),
    _cut("diff-pruning squares", "diff-pruning", options={**_DATA, "score": "squares"}),
    _cut("diff-pruning early cut", "diff-pruning", options={**_DATA, "threshold": 0.2}),
    _cut("diff-pruning global", "diff-pruning", options={**_DATA, "ranking": "global"}),
    Contestant("ecodiff", "ecodiff", "channels", {"images": 16, "steps": 60, "sampler_steps": 6}, _KEEP),
    _cut("random blocks", "random", "blocks", informed=False),
    _cut("magnitude blocks", "magnitude", "blocks", draws=False),
    Contestant("laptop-diff", "laptop-diff", "blocks", _BY, Knob("keep_ratio", "latency")),
    Contestant("improved-techniques", "improved-techniques", "blocks", _BY, Knob("keep_ratio", "latency")),
    Contestant("snapfusion", "snapfusion", "blocks", _DATA, Knob("latency", "relative")),
    *(
        Contestant(f"bk-sdm {preset}", "bk-sdm", "blocks", {"preset": preset}, draws=False)
        for preset in ("base", "small", "tiny")
    ),
    Contestant(
        "deepcache",
        "deepcache",
        "schedule",
        {"branch": 0},
        Knob("interval", "loop", values=(2.0, 3.0, 4.0, 5.0, 7.0, 10.0)),
        informed=False,
        recovers=False,
        draws=False,
    ),
    Contestant(
        "random schedule",
        "dip-go",
        "schedule",
        {"order": "random", "images": 1},
        _SHARE,
        informed=False,
        recovers=False,
    ),
    *(
        Contestant(f"dip-go {order}", "dip-go", "schedule", {"order": order, **_GATES}, _SHARE, recovers=False)
        for order in ("learned", "drift")
    ),
    _zeros("random 2:4", "random", informed=False, options={"cut": "weights", "pattern": "2:4", "keep_ratio": 0.5}),
    _zeros("magnitude 2:4", "magnitude", draws=False, options={"cut": "weights", "pattern": "2:4", "keep_ratio": 0.5}),
    _zeros("wanda 2:4", "wanda", options=_DATA),
    _zeros("sparsegpt 2:4", "sparsegpt", options=_DATA),
    _zeros("obs-diff 2:4", "obs-diff", options=_DATA),
    _zeros("sparsedm 2:4", "sparsedm", options={**_DATA, "steps": 300, "samples": 256}),
    _zeros("random 50 %", "random", informed=False, options=_HALF_CUT),
    _zeros("magnitude 50 %", "magnitude", draws=False, options=_HALF_CUT),
    _zeros("wanda 50 %", "wanda", options={**_DATA, **_HALF}),
    _zeros("sparsegpt 50 %", "sparsegpt", options={**_DATA, **_HALF}),
)
"""In the order of the table."""


def chosen(names: tuple[str, ...] | None) -> tuple[Contestant, ...]:
    """Return the contestants of these names, in the order of the table; all for None.

    Raises:
        RecipeError: there is none of a name.
    """
    if names is None:
        return CONTESTANTS
    known = {contestant.name: contestant for contestant in CONTESTANTS}
    for name in names:
        if name not in known:
            from exporter.errors import RecipeError
            from exporter.validation import hint, one_of

            raise RecipeError(f"bench pruners: got '{name}', expected {one_of(known)}." + hint(name, known))
    return tuple(contestant for contestant in CONTESTANTS if contestant.name in names)

"""A number with everything needed to believe it: unit, samples, interval, where it was taken."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Ratio(BaseModel):
    """A paired ratio to a baseline, taken in the same interleaved run.

    Attributes:
        to: the baseline, such as ``0-dense``.
        value: this divided by the baseline, median over pairs.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        pairs: number of pairs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)
    to: str
    value: float
    low: float
    high: float
    pairs: int


class Measurement(BaseModel):
    """One measured value, or the reason why it is missing.

    Attributes:
        name: metric name as in the vocabulary, such as ``latency.median_ms``.
        value: the value in `unit`; None means "not measured", never "passed".
        unit: ``ms``, ``dB``, ``fraction``, ``bytes``, ``MiB``, ``score`` or empty.
        state: id of the state, such as ``1-pruned``.
        target: the recipe's name of the target.
        component: ``unet``, ``vae_decoder``, ...; None for the whole pipeline.
        low: lower end of the 95 % interval, None when there is none.
        high: upper end of the 95 % interval, None when there is none.
        samples: how many samples the value rests on.
        timestep: the scheduler's timestep the value belongs to, when it belongs to one (the worst, for a worst value).
        ratio: paired ratio to dense, when one was taken.
        note: how it was taken; for a missing value, why, and the command that fills it.
        detail: JSON-ready extras, such as the curve over timesteps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    value: float | None
    unit: str = ""
    state: str
    target: str
    component: str | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    timestep: float | None = None
    ratio: Ratio | None = None
    note: str = ""
    detail: dict[str, Any] = {}

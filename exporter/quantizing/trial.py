"""How far a denoiser's answers move when some of it is rounded: the same measure as the report's, on recorded calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calibration.fitting import Fit
from calibration.qdq import Manner, quantized
from calibration.statistics import Feeds, Floats
from exporter.errors import ComponentFailed
from targets.base import TargetError
from targets.ort import OnnxRuntime, OrtOptions

CAP_DB = 200.0


@dataclass(frozen=True)
class Trial:
    """A float graph, and calls that rounded versions of it are asked.

    Attributes:
        graph: with folded weights, in a folder of one's own: rounded versions are written beside it.
        fit: of its activations; None where none are rounded.
        manner: of rounding.
        calls: recorded.
        guidance: scale; None where rows of a call are independent of one another.
    """

    graph: Path
    fit: Fit | None
    manner: Manner
    calls: Sequence[Feeds]
    guidance: float | None

    def errors(self, schemes: Mapping[str, str]) -> list[float]:
        """Return, call by call, the mean squared error of the answers, as a fraction of the squared range.

        The range is that of the float graph's answers to all calls. With guidance, answers are the guided ones.
        """
        model, _ = quantized(self.graph, schemes, self.fit, self.manner)
        path = self.graph.with_name(".trial.onnx")
        ir.save(model, path)
        got = self._answers(path)
        peak = max(float(a.max()) for a in self._wanted) - min(float(a.min()) for a in self._wanted)
        return [float(np.mean((a - b) ** 2)) / (peak * peak) for a, b in zip(got, self._wanted, strict=True)]

    @cached_property
    def _wanted(self) -> list[Floats]:
        return self._answers(self.graph)

    def _answers(self, path: Path) -> list[Floats]:
        try:
            session = OnnxRuntime().open(path, OrtOptions())
            try:
                return [self._guided(session(feeds)["out_sample"]) for feeds in self.calls]
            finally:
                session.close()
        except TargetError as error:
            raise ComponentFailed(f"quantize: {error}") from error

    def _guided(self, answer: Floats) -> Floats:
        if self.guidance is None:
            return answer
        without, with_prompt = np.split(answer, 2)
        return np.asarray(without + self.guidance * (with_prompt - without), np.float32)


def decibels(error: float) -> float:
    """Return the PSNR of a relative squared error."""
    return min(CAP_DB, -10 * math.log10(error)) if error > 0 else CAP_DB


def sensitivities(
    trial: Trial,
    units: Mapping[str, Sequence[str]],
    scheme: str,
    once: Callable[[str, Callable[[], list[float]]], list[float]],
) -> dict[str, list[float]]:
    """Return unit -> `Trial.errors` of that unit alone, in float all the rest.

    Args:
        trial: what is asked.
        units: -> their sites.
        scheme: of the unit.
        once: finds a value out, or knows it already.
    """
    return {unit: once(unit, partial(trial.errors, dict.fromkeys(sites, scheme))) for unit, sites in units.items()}

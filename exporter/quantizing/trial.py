"""How far a denoiser's answers move when some of it is rounded: the same measure as the report's, on recorded calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calibration.fitting import Fit
from calibration.qdq import Manner, palettized, quantized, values_of, with_open_weights
from calibration.schemes import PALETTES
from calibration.statistics import Feeds, Floats
from exporter.errors import ComponentFailed
from targets.base import Session, TargetError
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
        if schemes and PALETTES.keys() >= set(schemes.values()):
            return self._open.errors(schemes)
        model, _ = quantized(self.graph, schemes, self.fit, self.manner)
        path = self.graph.with_name(".trial.onnx")
        ir.save(model, path)
        return _relative(self._answers(path), self._wanted)

    @cached_property
    def _wanted(self) -> list[Floats]:
        return self._answers(self.graph)

    @cached_property
    def _open(self) -> _Open:
        return _Open(self)

    def _answers(self, path: Path) -> list[Floats]:
        with _opened(path) as session:
            return self.asked(session, {})

    def asked(self, session: Session, weights: Feeds) -> list[Floats]:
        """Return the answers of a graph to the calls; with guidance, the guided ones.

        Args:
            session: of the graph.
            weights: that it takes beside what is recorded.

        Raises:
            ComponentFailed: the runtime cannot run it.
        """
        with _ours():
            return [self._guided(session({**feeds, **weights})["out_sample"]) for feeds in self.calls]

    def _guided(self, answer: Floats) -> Floats:
        if self.guidance is None:
            return answer
        without, with_prompt = np.split(answer, 2)
        return np.asarray(without + self.guidance * (with_prompt - without), np.float32)


class _Open:
    """The graph with its weights as inputs, opened once: palettes are nothing but other weights.

    Its answers in float are its own: a runtime that packs no weights rounds a little otherwise.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        model, self._sites = with_open_weights(trial.graph)
        path = trial.graph.with_name(".open.onnx")
        ir.save(model, path)
        with _ours():
            self._session = OnnxRuntime().open(path, OrtOptions())
        self._weights = {site.input: values_of(name, site.weight) for name, site in self._sites.items()}
        self._wanted = trial.asked(self._session, self._weights)

    def errors(self, schemes: Mapping[str, str]) -> list[float]:
        """Return what `Trial.errors` does, of palettes."""
        changed = {
            self._sites[name].input: palettized(name, self._sites[name].weight, scheme, self._trial.manner)
            for name, scheme in schemes.items()
            if name in self._sites
        }
        return _relative(self._trial.asked(self._session, self._weights | changed), self._wanted)


def _relative(got: Sequence[Floats], wanted: Sequence[Floats]) -> list[float]:
    """Return, call by call, the mean squared error as a fraction of the squared range of what is wanted."""
    peak = max(float(a.max()) for a in wanted) - min(float(a.min()) for a in wanted)
    return [float(np.mean((a - b) ** 2)) / (peak * peak) for a, b in zip(got, wanted, strict=True)]


@contextmanager
def _opened(path: Path) -> Iterator[Session]:
    with _ours():
        session = OnnxRuntime().open(path, OrtOptions())
    try:
        yield session
    finally:
        session.close()


@contextmanager
def _ours() -> Iterator[None]:
    try:
        yield
    except TargetError as error:
        raise ComponentFailed(f"quantize: {error}") from error


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

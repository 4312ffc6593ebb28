"""Teacher-forced comparison: the same recorded calls answered again, and how far the answers are off, step by step.

Against the dense pipeline's recorded answers it is fidelity; against the same state in torch fp32 it is lowering.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.errors import ComponentFailed
from exporter.metrics.measurement import Measurement
from exporter.metrics.place import Place
from exporter.progress import Progress, Silent, task

Array = NDArray[Any]
Answer = Callable[[Array, float, Mapping[str, Array]], Array]
"""(sample (b, ...) float32, timestep, the denoiser's other inputs by name, each (b, ...)) -> answer (b, ...)."""

PSNR_CAP_DB = 200.0
"""Equal arrays have no finite PSNR; JSON has no infinity. Reported values lie within plus and minus this."""


class RecordedCall(Protocol):
    """One recorded denoiser call; see `calibration.recording.Call`, which fits."""

    @property
    def timestep(self) -> float:
        """The scheduler's timestep."""

    @property
    def sample(self) -> NDArray[np.float32]:
        """(n, ...) input."""

    @property
    def given(self) -> Mapping[str, Array]:
        """The other inputs with the prompts, by name, each (n, ...)."""

    @property
    def given_uncond(self) -> Mapping[str, Array] | None:
        """The same without the prompts; None where the denoiser did not answer without."""

    @property
    def cond(self) -> NDArray[np.float32]:
        """(n, ...) answer to the prompts."""

    @property
    def uncond(self) -> NDArray[np.float32] | None:
        """(n, ...) answer without them; None likewise."""

    @property
    def guided(self) -> NDArray[np.float32]:
        """(n, ...) answer that the scheduler got."""


class Recorded(Protocol):
    """A recording of the dense pipeline; see `calibration.recording.Recording`, which fits."""

    @property
    def count(self) -> int:
        """Number of prompts."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Timestep of every denoiser call."""

    @property
    def guidance(self) -> float:
        """Guidance scale."""

    def calls(self, step: int, start: int = 0, stop: int | None = None) -> RecordedCall:
        """Return one step's call for some of the prompts."""


@dataclass(frozen=True)
class Answers:
    """What one denoiser answered to the recorded calls, for s steps and n prompts; float32.

    Attributes:
        timesteps: one per step.
        guided: (s, n, ...) answers after guidance.
        raw: (s, n or 2n, ...) answers as they left the denoiser: without the prompt first, then with it.
    """

    timesteps: tuple[float, ...]
    guided: Array
    raw: Array


@dataclass(frozen=True)
class Subset:
    """Which of the recorded calls to compare; all by default.

    Attributes:
        prompts: the first so many; None for all.
        steps: indices of steps; None for all.
        batch: prompts per call; None for all at once.
    """

    prompts: int | None = None
    steps: tuple[int, ...] | None = None
    batch: int | None = None

    def of(self, recording: Recorded) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Return step indices and (start, stop) of every batch of prompts."""
        steps = tuple(range(len(recording.timesteps))) if self.steps is None else self.steps
        count = recording.count if self.prompts is None else min(self.prompts, recording.count)
        size = self.batch or count
        return steps, [(start, min(start + size, count)) for start in range(0, count, size)]


ALL = Subset()


def recorded_answers(recording: Recorded, subset: Subset = ALL) -> Answers:
    """Return what the dense pipeline answered when it was recorded."""
    steps, batches = subset.of(recording)
    guided, raw = [], []
    for step in steps:
        call = recording.calls(step, batches[0][0], batches[-1][1])
        guided.append(call.guided)
        raw.append(call.cond if call.uncond is None else np.concatenate([call.uncond, call.cond]))
    return Answers(tuple(recording.timesteps[step] for step in steps), np.stack(guided), np.stack(raw))


def ask(recording: Recorded, answer: Answer, subset: Subset = ALL, progress: Progress | None = None) -> Answers:
    """Put the recorded calls to a denoiser.

    Args:
        recording: of the dense pipeline.
        answer: the denoiser, called as a deployed pipeline calls it: where guidance takes two rows the batch is
            doubled, first all samples without their prompts, then all with them. A last batch that is not full is
            filled up by repetition, so that an engine of fixed shape can answer.
        subset: which calls.
        progress: is told of every step.

    Raises:
        ComponentFailed: an answer has the wrong shape.
    """
    steps, batches = subset.of(recording)
    guided, raw = [], []
    with task(progress or Silent(), "answer recorded calls", len(steps)) as told:
        size = batches[0][1] - batches[0][0]
        for step in steps:
            calls = [recording.calls(step, *batch) for batch in batches]
            parts = [_ask_once(call, answer, size) for call in calls]
            cond = np.concatenate([part[0] for part in parts])
            unconds = [part[1] for part in parts if part[1] is not None]
            if unconds:
                raw.append(np.concatenate([*unconds, cond]))
                guided.append(guide(raw[-1], recording.guidance)[:, : calls[0].guided.shape[1]])
            else:
                guided.append(cond)
                raw.append(cond)
            told.advance()
    return Answers(tuple(recording.timesteps[step] for step in steps), np.stack(guided), np.stack(raw))


def guide(raw: Array, guidance: float) -> Array:
    """Return answers (n, ...) with guidance, from those (2n, ...) without the prompt and with it."""
    uncond, cond = np.split(raw, 2)
    guided: Array = uncond + np.float32(guidance) * (cond - uncond)
    return guided


def _ask_once(call: RecordedCall, answer: Answer, size: int) -> tuple[Array, Array | None]:
    """Return the answers with the prompt and, with guidance, without it; `size` prompts go in, repeating the last."""
    count = len(call.sample)
    sides = [call.given] if call.given_uncond is None else [call.given_uncond, call.given]
    fill = np.minimum(np.arange(size), count - 1)
    sample = np.ascontiguousarray(np.concatenate([call.sample[fill]] * len(sides)))
    given = {name: np.ascontiguousarray(np.concatenate([side[name][fill] for side in sides])) for name in call.given}
    got = np.asarray(answer(sample, call.timestep, given), np.float32)
    expected = (len(sample), *call.cond.shape[1:])
    if got.shape != expected:
        msg = (
            f"denoiser at timestep {call.timestep:g}: wrong shape of the answer; got {got.shape}, expected "
            f"{expected}. Export it with the recipe's batch and size."
        )
        raise ComponentFailed(msg)
    if len(sides) == 1:
        return got[:count], None
    return got[size : size + count], got[:count]


@dataclass(frozen=True)
class Comparison:
    """How far answers are from the reference, per step.

    Attributes:
        timesteps: one per step; empty for a component that has none.
        peak: range of the reference over all steps.
        psnr_db: per step, within plus and minus `PSNR_CAP_DB`; the low end where an answer is not finite.
        cosine: per step, -1 to 1; 0 where an answer is not finite.
        max_error: per step; the largest float where an answer is not finite.
        worst_sample: per step, index along the second axis of the sample that is furthest off.
        bad: per step, how many values are not finite.
        samples: number of (step, sample) pairs.
    """

    timesteps: tuple[float, ...]
    peak: float
    psnr_db: tuple[float, ...]
    cosine: tuple[float, ...]
    max_error: tuple[float, ...]
    worst_sample: tuple[int, ...]
    bad: tuple[int, ...]
    samples: int

    @property
    def worst(self) -> int:
        """Index of the step with the lowest PSNR."""
        return int(np.argmin(self.psnr_db))

    def note(self) -> str:
        """Return what a reader must know about these numbers."""
        parts = [f"PSNR with the range of the reference's answers as peak ({self.peak:.4g})"]
        if any(self.bad):
            step = next(index for index, count in enumerate(self.bad) if count)
            where = f" at timestep {self.timesteps[step]:g}" if self.timesteps else ""
            parts.append(f"{sum(self.bad)} values are NaN or Inf, the first{where}: PSNR is set to {-PSNR_CAP_DB:g} dB")
        if any(value >= PSNR_CAP_DB for value in self.psnr_db):
            parts.append(f"equal answers count as {PSNR_CAP_DB:g} dB")
        return "; ".join(parts)


def compare(reference: Array, got: Array, timesteps: Sequence[float] = ()) -> Comparison:
    """Compare answers with reference answers.

    Args:
        reference: (s, n, ...) finite.
        got: the same shape.
        timesteps: s of them, or none.

    Raises:
        ComponentFailed: shapes differ, or the reference is not finite or constant.
    """
    if reference.shape != got.shape or reference.ndim < 2 or not reference.size:
        msg = f"comparison: shapes differ; got {got.shape}, expected {reference.shape}. Compare the same calls."
        raise ComponentFailed(msg)
    low, high = float(reference.min()), float(reference.max())
    if not math.isfinite(high - low) or high == low:
        msg = f"comparison: unusable reference; got values from {low:g} to {high:g}, expected a finite range. "
        raise ComponentFailed(msg + "Check the reference in torch float32.")
    rows = [_compare_step(reference[step], got[step], high - low) for step in range(len(reference))]
    psnr, cosine, error, sample, bad = zip(*rows, strict=True)
    count = reference.shape[0] * reference.shape[1]
    return Comparison(tuple(timesteps), high - low, psnr, cosine, error, sample, bad, count)


def _compare_step(reference: Array, got: Array, peak: float) -> tuple[float, float, float, int, int]:
    bad = int(got.size - np.isfinite(got).sum())
    if bad:
        per_sample = np.isfinite(got).reshape(len(got), -1).all(axis=1)
        return -PSNR_CAP_DB, 0.0, sys.float_info.max, int(np.argmin(per_sample)), bad
    a, b = reference.astype(np.float64), got.astype(np.float64)
    squares = np.square(a - b).reshape(len(a), -1).mean(axis=1)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(np.vdot(a, b)) / norms if norms else float(not np.any(a) and not np.any(b))
    return (
        psnr_from_mse(float(squares.mean()), peak),
        min(1.0, max(-1.0, cosine)),
        float(np.abs(a - b).max()),
        int(np.argmax(squares)),
        0,
    )


def psnr_from_mse(mse: float, peak: float) -> float:
    """Return the peak signal-to-noise ratio in dB, within plus and minus `PSNR_CAP_DB`."""
    if mse == 0:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, max(-PSNR_CAP_DB, 10 * math.log10(peak * peak / mse)))


def teacher_forced(reference: Answers, got: Answers, place: Place) -> Measurement:
    """Return ``fidelity.teacher_forced.psnr_db`` of the guided answers: the worst timestep's value.

    Detail: ``mean``, ``curve`` [[timestep, dB], ...], ``cosine`` (the lowest), ``max_error`` (the largest),
    ``worst_prompt`` (index, at the worst timestep), and the same without guidance under ``unguided``.
    """
    unguided = compare(reference.raw, got.raw, reference.timesteps)
    return _stated(
        "fidelity.teacher_forced.psnr_db",
        compare(reference.guided, got.guided, reference.timesteps),
        place,
        unguided=_summary(unguided, reference.guided.shape[1]),
    )


def component_fidelity(reference: Array, got: Array, place: Place) -> Measurement:
    """Return ``fidelity.teacher_forced.psnr_db`` of a component without timesteps, such as the decoder.

    Args:
        reference: (n, ...) what the dense component answered.
        got: (n, ...) what this one answered to the same inputs.
        place: with its component.
    """
    return _stated("fidelity.teacher_forced.psnr_db", compare(reference[None], got[None]), place)


def lowering(reference: Answers | Array, got: Answers | Array, place: Place) -> list[Measurement]:
    """Return ``lowering.psnr_db`` and ``lowering.max_error``: an engine against its own state in torch fp32.

    Args:
        reference: the state in torch; answers of a denoiser (compared before guidance), or an (n, ...) array.
        got: the engine, in the same form.
        place: with its component.
    """
    if isinstance(reference, Answers) and isinstance(got, Answers):
        found = compare(reference.raw, got.raw, reference.timesteps)
        summary = _summary(found, reference.guided.shape[1])
    else:
        found = compare(np.asarray(reference)[None], np.asarray(got)[None])
        summary = _summary(found)
    psnr = _stated("lowering.psnr_db", found, place, **summary)
    step = int(np.argmax(found.max_error))
    error = place.measured(
        "lowering.max_error",
        found.max_error[step],
        "",
        samples=found.samples,
        timestep=found.timesteps[step] if found.timesteps else None,
        note=f"largest absolute difference; the reference's range is {found.peak:.4g}",
        detail={"curve": [list(pair) for pair in zip(found.timesteps, found.max_error, strict=False)]},
    )
    return [psnr, error]


def _stated(name: str, found: Comparison, place: Place, **extra: Any) -> Measurement:
    return place.measured(
        name,
        found.psnr_db[found.worst],
        "dB",
        samples=found.samples,
        timestep=found.timesteps[found.worst] if found.timesteps else None,
        note=found.note(),
        detail={**_summary(found), **extra},
    )


def _summary(found: Comparison, prompts: int | None = None) -> dict[str, Any]:
    worst = found.worst_sample[found.worst]
    return {
        "mean": float(np.mean(found.psnr_db)),
        "curve": [list(pair) for pair in zip(found.timesteps, found.psnr_db, strict=False)],
        "cosine": min(found.cosine),
        "max_error": max(found.max_error),
        "worst_prompt": worst if prompts is None else worst % prompts,
        "peak": found.peak,
    }

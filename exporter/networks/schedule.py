"""Which parts of a U-Net each denoising step computes, and which it takes from an earlier step: plain data.

A U-Net of L levels can be cut at depth d: its d innermost levels are not computed, and the feature that they would hand
up is the one of the last step that computed it (DeepCache, arXiv 2312.00858). Depth 0 computes everything; depth L
computes nothing, and the step reuses the last answer. A schedule holds for one sampler and one list of steps only.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ArtifactError, ExporterError, RecipeError
from exporter.networks.components import SCHEDULER_CLASSES
from exporter.networks.reading import read_object

SCHEDULE = "schedule.json"
MAX_PATTERNS = 4
"""Graphs of one denoiser: each is compiled, loaded and held."""

_FORMAT, _MAX_STEPS, _MAX_LEVELS, _MAX_SETTINGS = 1, 4096, 16, 64
_KEYS = ("format", "scheduler", "settings", "guided", "levels", "steps")
_Plain = bool | int | float | str | None


@dataclass(frozen=True)
class Step:
    """One denoising step.

    Attributes:
        timestep: as the denoiser gets it.
        depth: how many of the innermost levels are reused; all of them: the step asks no network.
        reuse: (a, b) of a step that asks none: its answer is a * answer + b * sample of the last step that asked one.
    """

    timestep: float
    depth: int
    reuse: tuple[float, float] = (1.0, 0.0)


@dataclass(frozen=True)
class Pattern:
    """One way of computing a U-Net, one graph.

    Attributes:
        depth: how many of the innermost levels are reused.
        emits: depths of the cuts whose features it hands out, since a later step reads them.
    """

    depth: int
    emits: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of its graph's files."""
        return f"pattern-{self.depth}"

    @property
    def takes(self) -> tuple[int, ...]:
        """Depths of the cuts whose features it is given."""
        return (self.depth,) if self.depth else ()


@dataclass(frozen=True)
class Schedule:
    """A depth for every step of one sampler.

    Attributes:
        scheduler: class of the sampler, of the closed table.
        settings: of the sampler, JSON values.
        guided: whether the denoiser answers two rows per image.
        levels: of the U-Net, the depth at which a step computes nothing.
        steps: in order; the first computes everything.
    """

    scheduler: str
    settings: Mapping[str, Any]
    guided: bool
    levels: int
    steps: tuple[Step, ...]

    @property
    def depths(self) -> tuple[int, ...]:
        """Depth of every step."""
        return tuple(step.depth for step in self.steps)

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """What the steps compute, one per depth that occurs, with the features that any of its steps must hand out.

        A feature must be handed out when a later step reads it before another step computes it anew.
        """
        live: set[int] = set()
        emits: dict[int, set[int]] = {}
        for depth in reversed(self.depths):
            if depth == self.levels:
                continue
            made = {cut for cut in live if cut > depth}
            emits.setdefault(depth, set()).update(made)
            live -= made
            live |= {depth} if depth else set()
        return tuple(Pattern(depth, tuple(sorted(emits[depth]))) for depth in sorted(emits))

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        steps = [[step.timestep, step.depth, *step.reuse] for step in self.steps]
        return {
            "format": _FORMAT,
            "scheduler": self.scheduler,
            "settings": dict(self.settings),
            "guided": self.guided,
            "levels": self.levels,
            "steps": steps,
        }

    @classmethod
    def from_json(cls, data: Any, place: str = SCHEDULE) -> Schedule:
        """Read a schedule; nothing in it is trusted.

        Raises:
            ArtifactError: it is not one, or one that cannot be carried out.
        """
        _check(isinstance(data, dict) and set(data) == set(_KEYS), place, f"its keys; expected {', '.join(_KEYS)}")
        _check(type(data["format"]) is int and data["format"] == _FORMAT, place, f"format; expected {_FORMAT}")
        known = isinstance(data["scheduler"], str) and data["scheduler"] in SCHEDULER_CLASSES
        _check(known, place, f"scheduler; expected one of {', '.join(SCHEDULER_CLASSES)}")
        _check(_are_settings(data["settings"]), place, "settings; expected plain values by name")
        _check(isinstance(data["guided"], bool), place, "guided; expected true or false")
        levels, steps = data["levels"], data["steps"]
        _check(type(levels) is int and 1 <= levels <= _MAX_LEVELS, place, f"levels; expected 1 to {_MAX_LEVELS}")
        fits = isinstance(steps, list) and 1 <= len(steps) <= _MAX_STEPS
        _check(fits, place, f"steps; expected 1 to {_MAX_STEPS}")
        for index, step in enumerate(steps):
            what = f"steps[{index}]; expected [timestep, depth of 0 to {levels}, a, b]"
            _check(_is_step(step, levels), place, what)
        found = cls(
            data["scheduler"],
            dict(data["settings"]),
            data["guided"],
            levels,
            tuple(Step(float(t), depth, (float(a), float(b))) for t, depth, a, b in steps),
        )
        _check(found.depths[0] == 0, place, "steps[0]; expected depth 0, since there is nothing to reuse yet")
        many = len(found.patterns)
        _check(many <= MAX_PATTERNS, place, f"depths: {many} that compute something; expected at most {MAX_PATTERNS}")
        return found


def read_schedule(folder: Path) -> Schedule | None:
    """Return the schedule of a component folder, None where it has none.

    Raises:
        ArtifactError: the file is not a schedule.
    """
    path = folder / SCHEDULE
    return Schedule.from_json(read_object(path, ArtifactError), str(path)) if path.exists() else None


def write_schedule(folder: Path, schedule: Schedule) -> None:
    """Write a schedule beside the weights of the denoiser that it is for."""
    (folder / SCHEDULE).write_text(json.dumps(schedule.to_json(), indent=1) + "\n", encoding="utf-8")


def settings_of(scheduler: Any) -> dict[str, Any]:
    """Return the settings of a diffusers sampler that its class takes, as JSON values; infinities are texts."""
    stated = json.loads(scheduler.to_json_string(), parse_constant=str)
    known = inspect.signature(type(scheduler).__init__).parameters
    return {name: stated[name] for name in sorted(known) if name in stated}


def schedule_for(scheduler: Any, steps: int, depths: Sequence[int], *, guided: bool, levels: int) -> Schedule:
    """Return the schedule of these depths for a sampler.

    Args:
        scheduler: diffusers', changed: its steps are set.
        steps: as the pipeline is asked for; some samplers call the denoiser more often.
        depths: one per call of the denoiser, 0 to `levels`.
        guided: see `Schedule`.
        levels: see `Schedule`.

    Raises:
        RecipeError: the depths do not fit the sampler, or its predictions cannot be reused.
    """
    timesteps = timesteps_of(scheduler, steps)
    if len(depths) != len(timesteps) or depths[0] != 0:
        raise RecipeError(
            f"schedule: got {len(depths)} depths from {depths[0]}, expected {len(timesteps)} of which the first is 0. "
            "Make it anew for this sampler."
        )
    found, last = [], 0
    for index, (timestep, depth) in enumerate(zip(timesteps, depths, strict=True)):
        skipped = depth == levels
        last = last if skipped else index
        found.append(Step(timestep, depth, reuse_of(scheduler, timesteps[last], timestep) if skipped else (1.0, 0.0)))
    made = Schedule(type(scheduler).__name__, settings_of(scheduler), guided, levels, tuple(found))
    return Schedule.from_json(made.to_json())


def timesteps_of(scheduler: Any, steps: int) -> list[float]:
    """Return the timesteps of a sampler, whose steps are set."""
    scheduler.set_timesteps(steps)
    return [float(timestep) for timestep in scheduler.timesteps]


def reuse_of(scheduler: Any, before: float, now: float) -> tuple[float, float]:
    """Return (a, b) with which a step answers from the last answer and sample: a * answer + b * sample.

    The predicted noise and the predicted clean sample stay what they were, which with deterministic DDIM makes one
    larger step of both. For predictions of noise or of the sample that is the answer itself. A velocity turns:
    v' = alpha' noise - sigma' clean with noise = alpha v + sigma x and clean = alpha x - sigma v.

    Raises:
        RecipeError: another kind of prediction, or a sampler without a schedule of noise.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind in ("epsilon", "sample"):
        return 1.0, 0.0
    betas = getattr(scheduler, "alphas_cumprod", None)
    if kind != "v_prediction" or betas is None:
        raise RecipeError(
            f"schedule: answers of kind {kind!r} cannot be reused; expected epsilon, sample or v_prediction. Choose "
            "another source or method."
        )
    kept = np.asarray(betas, np.float64)
    (alpha, sigma), (alpha_now, sigma_now) = (
        (math.sqrt(share), math.sqrt(1 - share))
        for share in (float(np.interp(timestep, np.arange(len(kept)), kept)) for timestep in (before, now))
    )
    return alpha_now * alpha + sigma_now * sigma, alpha_now * sigma - sigma_now * alpha


def check_sampler(schedule: Schedule, scheduler: Any, place: str, error: type[ExporterError]) -> None:
    """Refuse another sampler than the one that a schedule was made for.

    Raises:
        ExporterError: of the class given, naming what differs.
    """
    name, settings = type(scheduler).__name__, settings_of(scheduler)
    if name != schedule.scheduler:
        raise error(
            f"{place}: this denoiser's schedule was made for another sampler; got {name}, expected "
            f"{schedule.scheduler}. Use that one, or make a schedule for {name}."
        )
    for key in sorted({*settings, *schedule.settings}):
        if settings.get(key) != schedule.settings.get(key):
            raise error(
                f"{place}: this denoiser's schedule was made for other settings of {name}; got {key} "
                f"{settings.get(key)!r}, expected {schedule.settings.get(key)!r}. Use the engine's own sampler."
            )


def check_guidance(schedule: Schedule, guided: bool, place: str) -> None:
    """Refuse to answer with one row per image where the schedule was made for two, and the reverse.

    Raises:
        RecipeError: the layouts differ.
    """
    if guided != schedule.guided:
        words = {True: "with guidance (a scale above 1)", False: "without guidance (a scale of 1)"}
        raise RecipeError(
            f"{place}: this denoiser's schedule was made {words[schedule.guided]}; got a call {words[guided]}. Change "
            "the guidance scale, or make a schedule for it."
        )


def _check(holds: bool, place: str, what: str) -> None:
    if not holds:
        raise ArtifactError(f"{place}: not a schedule: {what}. Restore the original file.")


def _is_step(step: Any, levels: int) -> bool:
    if not isinstance(step, list) or len(step) != 4 or type(step[1]) is not int or not 0 <= step[1] <= levels:
        return False
    numbers = [step[0], *step[2:]]
    return all(type(number) in (int, float) and math.isfinite(number) and abs(number) <= 1e6 for number in numbers)


def _are_settings(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) > _MAX_SETTINGS:
        return False
    for entry in value.values():
        entries = entry if isinstance(entry, list) else [entry]
        if len(entries) > _MAX_STEPS or not all(isinstance(item, _Plain) for item in entries):
            return False
    return True

"""Whether a run fits this machine's disk and memory, and what to change where it does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from exporter.errors import RecipeError
from exporter.metrics.size import size_bytes
from exporter.networks.source import SourceFacts
from exporter.recipe import Recipe

if TYPE_CHECKING:
    from exporter.forecast import Forecast

IGNORE_MEMORY = "--ignore-memory"
"""The option of the command line that starts a run which is not expected to fit."""


def check_disk(out: Path, expected: Forecast) -> None:
    """Refuse a run whose files would not fit, with what to change."""
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free >> 20
    written = size_bytes(out) >> 20 if out.is_dir() else 0
    if expected.disk_mib - written > free:
        msg = (
            f"--out {out}: not enough room; got {free} MiB free, expected about {expected.disk_mib - written} MiB. "
            "Give another folder, or free some space."
        )
        raise RecipeError(msg)


def check_memory(expected: Forecast, recipe: Recipe, facts: SourceFacts, *, ignore: bool) -> tuple[str, ...]:
    """Refuse a run that would not fit into memory, with what to change; return a note where it goes on all the same."""
    available = psutil.virtual_memory().available >> 20
    if expected.needed_mib <= available:
        return ()
    if ignore:
        return (
            f"memory: {available} MiB were free and about {expected.needed_mib} MiB expected to be needed "
            f"({expected.phase}); started all the same, as {IGNORE_MEMORY} says",
        )
    fixes = ["close other programs"]
    if any(stage.kind == "tune" for stage in recipe.stages):
        fixes.append("tune on a larger machine")
    if recipe.sampling.batch > 1:
        fixes.append("write sampling.batch: 1")
    largest = max(facts.parameters, key=lambda name: facts.parameters[name])
    fixes.append(f"cut more of {largest} (keep_ratio)")
    raise RecipeError(
        f"memory: the run would not fit; got {available} MiB free, expected about {expected.needed_mib} MiB for "
        f"{expected.phase}. To change that: {', or '.join(fixes)}. If you know better, run it with {IGNORE_MEMORY}."
    )

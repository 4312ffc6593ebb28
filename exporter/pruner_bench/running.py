"""One contestant as a recipe: pruned, recovered, compiled, measured; and what the bench takes from the report."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from exporter.artifact import Artifact, write_text
from exporter.errors import ComponentFailed
from exporter.memo import FileMemo
from exporter.metrics.fidelity import Answers, Subset, recorded_answers, teacher_forced
from exporter.metrics.measurement import Measurement
from exporter.metrics.place import Place
from exporter.progress import Progress
from exporter.pruner_bench.rows import Value
from exporter.recipe import Recipe, read_recipe
from exporter.recordings import dense_recording
from exporter.report.record import CellRecord, RunRecord, StateRecord

TARGET = "openvino"
DENSE = "0-dense"
_LINKED = ("states/0-dense", "recordings", "lowered", "engines/0-dense", "cells/0-dense", "images/0-dense")
"""What every run has alike; made once and linked."""
MEASURED_CALLS = 32  # images whose calls errors are measured on
_SETS = 8  # of one size, for a correlation to say something
_HEAVY = ("engines", "lowered", "images", "recordings", "work")
"""What a finished run is rid of."""


@dataclass(frozen=True)
class Setting:
    """What all runs of a bench share.

    Attributes:
        out: folder of the bench.
        images: prompts that are drawn and judged.
        prompts: the set that they come from.
        tuning: prompts of methods and of recovery.
        batch: images at a time.
        steps: denoising steps.
        guidance: guidance scale.
        size: image side in pixels.
        source: of the recipe.
        latency_seconds: budget of every latency.
        states: which are measured, besides dense.
    """

    out: Path
    images: int
    prompts: str = "shapes-test"
    tuning: str = "shapes-train"
    batch: int = 16
    steps: int = 20
    guidance: float = 4.0
    size: int = 64
    source: str = "reference:shapes"
    latency_seconds: float = 20.0
    states: str = "all"

    @property
    def dense(self) -> Path:
        """Folder of the dense model's run with as many images."""
        return self.out / "runs" / f"dense-{self.images}"

    @property
    def sampling(self) -> dict[str, Any]:
        """The recipe's sampling."""
        return {
            "scheduler": "dpm-solver++",
            "steps": self.steps,
            "guidance": self.guidance,
            "size": self.size,
            "batch": self.batch,
        }

    def sentence(self) -> str:
        """Say how the numbers were taken."""
        return (
            f"Embedded model ({self.source}), {self.images:,} prompts of {self.prompts}, one image each, seeds from 0, "
            f"DPM-Solver++ {self.steps} steps, guidance {self.guidance:g}, {self.size} px, OpenVINO f32, batch "
            f"{self.batch}; latency is the ratio to the dense engine, taken in alternating pairs."
        )

    def recipe(self, folder: Path, stages: list[dict[str, Any]], seed: int) -> Recipe:
        """Write the recipe of a run into its folder, and read it."""
        content = {
            "name": "bench",
            "source": {"path": self.source},
            "seed": seed,
            "sampling": self.sampling,
            "stages": stages,
            "targets": {TARGET: {"type": "openvino", "precision": "f32"}},
            "measure": {
                "states": self.states,
                "prompts": self.prompts,
                "images": self.images,
                "calls": min(MEASURED_CALLS, self.images),
                "seed": 0,
                "latency_seconds": self.latency_seconds,
            },
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", yaml.safe_dump(content, sort_keys=False))
        return read_recipe(folder / "recipe.yaml")

    def recovery(self, steps: int) -> dict[str, Any]:
        """Return the stage that recovers: the same for every contestant."""
        samples = 256 if steps <= 1000 else 1024
        options = {"batch": 16, "samples": samples, "learning_rate": 5e-4, "checkpoint_every": 100}
        return {"tune": {"method": "distill", "steps": steps, "prompts": self.tuning, **options}}


def run_stages(
    folder: Path, stages: list[dict[str, Any]], seed: int, setting: Setting, progress: Progress
) -> RunRecord:
    """Carry out a recipe of these stages, on the dense state and recording that all runs share.

    Raises:
        ExporterError: a stage or a cell failed.
    """
    from exporter.run import run_recipe  # seconds to import

    if folder != setting.dense:
        _link(setting.dense, folder)
    shelf = setting.out / "data"
    _share(shelf, folder / "work" / "data")
    record = run_recipe(setting.recipe(folder, stages, seed), folder, progress=progress, ignore_memory=True)
    failed = next((cell for cell in record.cells if cell.status != "ok"), None)
    if failed is not None:
        raise ComponentFailed(failed.error)
    _share(folder / "work" / "data", shelf)
    return record


def make_dense(setting: Setting, progress: Progress) -> None:
    """Carry out the run that all others link, where it is not finished yet."""
    if not (setting.dense / "cells" / DENSE / TARGET).is_dir():
        run_stages(setting.dense, [], 0, setting, progress)


def values_of_zeros(setting: Setting, dense: Artifact, progress: Progress) -> dict[str, Value]:
    """Return the errors of a denoiser that answers nothing but zeros: what lies below has nothing left of dense."""
    recipe, memo = setting.recipe(setting.dense, [], 0), FileMemo.load(setting.dense)
    recording = dense_recording(recipe, dense, setting.dense, progress, memo)
    wanted = recorded_answers(recording, Subset(prompts=min(MEASURED_CALLS, setting.images)))
    zeros = Answers(wanted.timesteps, np.zeros_like(wanted.guided), np.zeros_like(wanted.raw))
    return dict(_of_denoiser(teacher_forced(wanted, zeros, Place(DENSE, TARGET))))


def drop_heavy(folder: Path) -> None:
    """Remove what can be made again from the states of a finished run."""
    for name in _HEAVY:
        shutil.rmtree(folder / name, ignore_errors=True)


def values_of(cell: CellRecord, state: StateRecord, component: str) -> dict[str, Value]:
    """Return what the bench takes from a cell and its state.

    Args:
        cell: measured.
        state: what was measured.
        component: the denoiser's name.
    """
    found: dict[str, Value] = {
        "parameters": Value(value=state.parameters[component]),
    }
    for item in cell.measurements:
        if item.value is None:
            continue
        if item.component == component:
            found |= dict(_of_denoiser(item))
        elif item.component is None:
            found |= dict(of_images(item))
    return found


def predictions_of(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return what a state's facts say about its method's own predictions; see `exporter.pruner_bench.rows.Row`."""
    additivity, latency = facts.get("additivity") or {}, facts.get("latency") or {}
    of_one_size = [found["spearman"] for found in additivity.get("by_size", {}).values() if found["sets"] >= _SETS]
    found = {
        "spearman": additivity.get("spearman"),
        "spearman_of_one_size": min((value for value in of_one_size if value is not None), default=None),
        "latency_error": latency.get("largest_error"),
        "latency_error_without_units": latency.get("error_without_units"),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def _of_denoiser(item: Measurement) -> Iterator[tuple[str, Value]]:
    assert item.value is not None
    if item.name == "fidelity.teacher_forced.psnr_db":
        yield "psnr_worst_db", Value(value=item.value)
        yield "psnr_mean_db", Value(value=item.detail["mean"])
    elif item.name == "latency.loop_ms" and item.ratio is not None:
        yield "latency_ratio", Value(value=item.ratio.value, low=item.ratio.low, high=item.ratio.high)
    elif item.name == "size_bytes":
        yield "size_bytes", Value(value=item.value)


def of_images(item: Measurement) -> Iterator[tuple[str, Value]]:
    """Yield what the bench takes from a measurement of images."""
    assert item.value is not None
    here = Value(value=item.value, low=item.low, high=item.high)
    if item.name == "fidelity.image.ssim":
        yield "ssim", here
    elif item.name == "fidelity.kid":
        yield "kid", here
    elif item.name == "fidelity.judge_rate":
        yield "judge_rate", here
        if "lost_to_dense" in item.detail:
            yield "judge_change", paired_change(item.detail)


def paired_change(detail: Mapping[str, Any]) -> Value:
    """Return by how many percentage points a rate differs from dense's on the same prompts, with a 95 % interval.

    Args:
        detail: ``of`` images, ``lost_to_dense`` and ``won_over_dense`` of them.

    Source: the interval of a difference of paired proportions by the normal approximation (McNemar's setting).
    """
    count, lost, won = int(detail["of"]), int(detail["lost_to_dense"]), int(detail["won_over_dense"])
    change = (won - lost) / count
    spread = 1.96 * math.sqrt(max(won + lost - (won - lost) ** 2 / count, 0.0)) / count
    return Value(value=100 * change, low=100 * (change - spread), high=100 * (change + spread))


def _link(source: Path, folder: Path) -> None:
    """Give a run hard links to what the dense run made; what is there already stays."""
    for name in _LINKED:
        target = folder / name
        if (source / name).is_dir() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = target.with_name(f".{target.name}.partial")
            shutil.rmtree(staging, ignore_errors=True)
            shutil.copytree(source / name, staging, copy_function=os.link)
            staging.rename(target)


def _share(source: Path, folder: Path) -> None:
    """Hard-link training data, whose names say what it was made from."""
    for file in source.glob("*.safetensors"):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / file.name).exists():
            os.link(file, folder / file.name)

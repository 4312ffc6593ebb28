"""Images through the deployed pipeline, compared with the dense pipeline's on the same prompts and seeds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calibration.calling import draw as call_pipeline
from exporter.bench import TORCH, Bench
from exporter.metrics.features import Baseline, Verdicts, clip_score, judge_measurements, kid
from exporter.metrics.images import detect, image_measurements, problem_measurement
from exporter.metrics.measurement import Measurement
from exporter.metrics.place import DENSE, Place
from exporter.progress import task
from exporter.report.record import ImageRecord
from exporter.runtime import pipeline_of
from exporter.sampling import drawing_of
from exporter.states import form_of
from targets.base import Session


def draw(
    engine: Path, sessions: Mapping[str, Session], place: Place, bench: Bench
) -> tuple[list[Measurement], list[ImageRecord]]:
    """Make the recipe's images through the deployed pipeline, measure them and write them as PNG.

    Raises:
        ComponentFailed: a judge failed.
    """
    sampling, recording = bench.sampling, bench.recording
    pipeline, form = pipeline_of(engine, sessions), form_of(engine)
    reference, size = recording.images(), (sampling["size"], sampling["size"])
    made, times = [], []
    problems: list[list[str]] = []
    with task(bench.progress, f"Images {place.state} on {place.target}", recording.count) as told:
        for start in range(0, recording.count, sampling["batch"]):
            prompts = recording.prompts[start : start + sampling["batch"]]
            seeds = recording.seeds[start : start + len(prompts)]
            started = time.perf_counter()
            floats = call_pipeline(pipeline, form, prompts, seeds, drawing_of(sampling))
            times.append((time.perf_counter() - started) * 1e3 / len(prompts))
            problems += detect(floats, size, reference=reference[start : start + len(prompts)])
            made.append((np.nan_to_num(floats).clip(0, 1) * 255).round().astype(np.uint8))
            told.advance(len(prompts))
    images = np.concatenate(made)
    found = [
        *image_measurements(images, reference, place, lpips=bench.judges.lpips, seed=bench.recipe.measure.seed),
        problem_measurement(problems, place),
        *_judged(images, place, bench, form.asked),
        _per_image(times, place, bench),
    ]
    return found, _write_images(images, problems, place, bench)


def _per_image(times: list[float], place: Place, bench: Bench) -> Measurement:
    batch, steps = bench.sampling["batch"], bench.sampling["steps"]
    note = f"the whole pipeline at {steps} steps, batches of {batch}, divided by images; mean of {len(times)} batches"
    return place.measured("latency.image_ms", float(np.mean(times)), "ms", samples=len(times), note=note)


def _judged(images: NDArray[np.uint8], place: Place, bench: Bench, asked: str) -> list[Measurement]:
    judges, seed = bench.judges, bench.recipe.measure.seed
    prompts, dense_images = bench.recording.prompts, bench.recording.images()
    found = []
    if asked != "prompt":
        reason = "this family draws without prompts, so there is none to compare with. Leave the gate out."
        judges = replace(judges, judge=reason, clip=reason)
    if isinstance(judges.judge, str):
        names = (("fidelity.clip_score", "score"), ("fidelity.judge_rate", "fraction"), ("fidelity.kid", "score"))
        found += [place.missing(name, unit, judges.judge) for name, unit in names]
    else:
        if bench.dense_verdicts is None:
            bench.dense_verdicts = Verdicts.of(judges.judge, dense_images, prompts)
        dense = Baseline(f"{DENSE} in torch", bench.dense_verdicts)
        verdicts = Verdicts.of(judges.judge, images, prompts)
        found += judge_measurements(verdicts, place, space=judges.space, dense=dense, seed=seed)
    if isinstance(judges.clip, str):
        found.append(place.missing("fidelity.clip_score.full", "score", judges.clip))
    else:
        scores = judges.clip.scores(images, prompts)
        found.append(clip_score(scores, place, space=judges.clip.name, seed=seed, name="fidelity.clip_score.full"))
    if isinstance(judges.inception, str):
        found.append(place.missing("fidelity.kid.inception", "score", judges.inception))
    else:
        features = judges.inception(images), judges.inception(dense_images)
        found.append(kid(*features, place, space="Inception-v3", seed=seed, name="fidelity.kid.inception"))
    return found


def _write_images(
    images: NDArray[np.uint8], problems: list[list[str]], place: Place, bench: Bench
) -> list[ImageRecord]:
    """Write the images of a cell, and those of the dense pipeline once; paths are relative to the report."""
    recording = bench.recording
    reference = _save(recording.images(), bench.out, Path("images") / DENSE / TORCH)
    paths = _save(images, bench.out, Path("images") / place.state / place.target)
    rows = zip(recording.prompts, recording.seeds, paths, reference, problems, strict=True)
    return [
        ImageRecord(prompt=prompt, seed=seed, path=str(path), reference=str(like), problems=found)
        for prompt, seed, path, like, found in rows
    ]


def _save(images: NDArray[np.uint8], out: Path, folder: Path) -> list[Path]:
    (out / folder).mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:04d}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(out / path)
    return paths

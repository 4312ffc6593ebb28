"""The baseline that every pruned network has to beat: the dense one, asked less often by the plain sampler."""

from __future__ import annotations

from pathlib import Path

from exporter.artifact import open_artifact
from exporter.bench import Bench
from exporter.memo import FileMemo
from exporter.metrics.latency import Timer
from exporter.metrics.place import Place
from exporter.networks.components import denoiser
from exporter.progress import Progress
from exporter.pruner_bench.rows import Value
from exporter.pruner_bench.running import DENSE, TARGET, Setting, of_images
from exporter.recordings import dense_recording
from exporter.states import pipeline_class_of


def fewer_steps(steps: int, folder: Path, setting: Setting, progress: Progress) -> dict[str, Value]:
    """Return what the bench measures of the dense engine that draws the same prompts and seeds in fewer steps.

    Teacher-forced errors are none by definition: the network is dense's own, and is asked at other timesteps.

    Args:
        steps: of the sampler.
        folder: images go there.
        setting: of the bench.
        progress: one unit per image.
    """
    from exporter.lowering.feeds import recorded_calls
    from exporter.pictures import draw
    from exporter.runtime import EngineFacts, close_sessions, open_sessions
    from exporter.states import config_of

    dense = setting.dense
    recipe = setting.recipe(folder, [], 0)
    state, memo = open_artifact(dense / "states" / DENSE), FileMemo.load(dense)
    recording = dense_recording(recipe, state, dense, progress, memo)
    bench = Bench(recipe, folder, state, recording, {**setting.sampling, "steps": steps}, progress)
    engine = dense / "engines" / DENSE / TARGET
    facts = EngineFacts.of(open_artifact(engine))
    sessions = open_sessions(engine, facts)
    try:
        found, _ = draw(engine, sessions, Place(DENSE, TARGET), bench)
        part = denoiser(pipeline_class_of(engine))
        config = config_of(engine / part.name)
        calls = [call.feeds for call in recorded_calls(part, config, recording, range(setting.batch))]
        session = sessions[part.name]
        pairs = Timer(budget_s=setting.latency_seconds).interleaved(
            lambda: [session(feeds) for feeds in calls[:steps]], lambda: [session(feeds) for feeds in calls]
        )
    finally:
        close_sessions(sessions)
    ratio = pairs.ratio("dense")
    values = {"latency_ratio": Value(value=ratio.value, low=ratio.low, high=ratio.high)}
    for item in found:
        if item.value is not None:  # KID needs more images than a trial may draw
            values |= dict(of_images(item))
    return values

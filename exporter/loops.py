"""How long a whole denoising loop takes: of an engine that answers every step alike, and of one with a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from exporter.metrics.latency import Latency, Pairs, Timer, latency_measurements
from exporter.metrics.measurement import Measurement, Ratio
from exporter.metrics.place import DENSE, Place
from exporter.networks.chain import ChainSession
from targets.base import Session

Feeds = Mapping[str, NDArray[Any]]
LOOP = "latency.loop_ms"


def loop_of_calls(latency: Latency, calls: int, place: Place, ratio: Ratio | None = None) -> Measurement:
    """Return ``latency.loop_ms`` of a denoiser whose calls all cost the same: of so many of them.

    Args:
        latency: of one call.
        calls: of the denoiser while one batch is drawn.
        place: with its component.
        ratio: to the dense engine, of a call.
    """
    low, high = latency.interval_ms
    return place.measured(
        LOOP,
        latency.median_ms * calls,
        "ms",
        low=low * calls,
        high=high * calls,
        samples=len(latency.samples_ms),
        ratio=ratio,
        note=f"{calls} calls of the denoiser, one of which was timed; {latency.note()}",
        detail={"calls": calls, "mode": latency.mode.to_json()},
    )


def scheduled_latency(
    session: ChainSession, calls: Sequence[Feeds], dense: Session | None, place: Place, timer: Timer
) -> list[Measurement]:
    """Time the loop of a scheduled denoiser, in order, against the dense one's pair by pair; and each of its graphs.

    Args:
        session: the denoiser.
        calls: feeds of every step, as many rows as it was compiled for.
        dense: the dense engine's denoiser; None to time this one alone.
        place: with its component.
        timer: of this target.

    Returns:
        ``latency.loop_ms``, whose detail has the graphs, and ``latency.median_ms`` and ``.p90_ms`` of a mean call.
    """

    def loop() -> None:
        for feeds in calls:
            session(feeds)

    if dense is None:
        latency, ratio = timer.measure(loop), None
    else:
        pairs: Pairs = timer.interleaved(loop, lambda: [dense(feeds) for feeds in calls])
        latency, ratio = pairs.a, pairs.ratio(DENSE)
    patterns = _graphs(session, timer)
    low, high = latency.interval_ms
    told = "; ".join(f"{name}: {one['steps']} steps of {one['median_ms']:.4g} ms" for name, one in patterns.items())
    skipped = session.schedule.depths.count(session.schedule.levels)
    whole = place.measured(
        LOOP,
        latency.median_ms,
        "ms",
        low=low,
        high=high,
        samples=len(latency.samples_ms),
        ratio=ratio,
        note=f"{len(calls)} steps, {skipped} of them without a call; {told}; {latency.note()}",
        detail={
            "calls": len(calls),
            "skipped": skipped,
            "patterns": patterns,
            "mode": latency.mode.to_json(),
            "samples_ms": list(latency.samples_ms),
        },
    )
    mean = Latency(
        tuple(sample / len(calls) for sample in latency.samples_ms),
        latency.warmup,
        latency.stable,
        latency.mode,
        latency.asked,
    )
    return [whole, *latency_measurements(mean, place, ratio)]


def _graphs(session: ChainSession, timer: Timer) -> dict[str, dict[str, Any]]:
    """Time every graph alone, on what it was last fed."""
    patterns = {}
    for pattern in session.schedule.patterns:
        feeds = session.fed[pattern.name]
        part = session.parts[pattern.name]
        alone = timer.measure(lambda part=part, feeds=feeds: part(feeds))  # type: ignore[misc]
        low, high = alone.interval_ms
        patterns[pattern.name] = {
            "depth": pattern.depth,
            "steps": session.schedule.depths.count(pattern.depth),
            "median_ms": alone.median_ms,
            "low": low,
            "high": high,
            "samples": len(alone.samples_ms),
        }
    return patterns

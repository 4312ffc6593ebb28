"""The metrics there are: unit, which direction is better, and what helps when a gate on one is missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """What a metric's name stands for.

    Attributes:
        unit: as in `exporter.metrics.measurement.Measurement`.
        better: the direction that the user wants.
        advice: what to do when a gate on it is missed; a sentence, or several.
    """

    unit: str
    better: Literal["higher", "lower"]
    advice: str


_LOWERING = "Compile at a higher precision (f32), or change the limit."
_DENOISER = "Keep more (keep_ratio), tune longer, keep the component in a higher precision, or change the limit."
_IMAGES = "Look at the images in the report. Keep more, tune longer, or change the limit."
_LATENCY = "Keep less (keep_ratio), choose a lower precision, repeat on a quiet machine, or change the limit."
_SPARSE = "See the evidence of the layers. Choose wider layers, or change the limit."

METRICS: dict[str, Metric] = {
    "lowering.psnr_db": Metric("dB", "higher", _LOWERING),
    "lowering.max_error": Metric("", "lower", _LOWERING),
    "fidelity.teacher_forced.psnr_db": Metric("dB", "higher", _DENOISER),
    "fidelity.image.psnr_db": Metric("dB", "higher", _IMAGES),
    "fidelity.image.ssim": Metric("fraction", "higher", _IMAGES),
    "fidelity.image.lpips": Metric("score", "lower", _IMAGES),
    "fidelity.image.problems": Metric("images", "lower", _IMAGES),
    "fidelity.clip_score": Metric("score", "higher", _IMAGES),
    "fidelity.clip_score.full": Metric("score", "higher", _IMAGES),
    "fidelity.judge_rate": Metric("fraction", "higher", _IMAGES),
    "fidelity.kid": Metric("score", "lower", _IMAGES),
    "fidelity.kid.inception": Metric("score", "lower", _IMAGES),
    "latency.median_ms": Metric("ms", "lower", _LATENCY),
    "latency.device_ms": Metric("ms", "lower", _LATENCY),
    "latency.loop_ms": Metric("ms", "lower", _LATENCY),
    "latency.p90_ms": Metric("ms", "lower", _LATENCY),
    "latency.image_ms": Metric("ms", "lower", _LATENCY),
    "latency.shapes_ms": Metric("ms", "lower", _LATENCY),
    "latency.shapes_cost": Metric("", "lower", "Leave shapes out of the recipe, or change the limit."),
    "latency.over_float": Metric("", "lower", "Leave what is slower in float (quantize.plan), or change the limit."),
    "load_ms": Metric("ms", "lower", "Use the target's cache, or change the limit."),
    "peak_rss_mib": Metric("MiB", "lower", "Keep less, choose a lower precision, or change the limit."),
    "size_bytes": Metric("bytes", "lower", "Keep less, choose a lower precision, or change the limit."),
    "neural_engine.at_risk": Metric("fraction", "lower", "See the findings in the evidence, each with its fix."),
    "sparse.eligible": Metric("layers", "higher", _SPARSE),
    "sparse.chosen": Metric("layers", "higher", _SPARSE),
    "sparse.flop_share": Metric("fraction", "higher", _SPARSE),
}

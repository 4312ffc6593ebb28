"""Scales for 8 bits, fitted on recorded calls: channels evened out, ranges by their error at every timestep.

Sources: SmoothQuant (Xiao et al., arXiv 2211.10438) divides each channel of a linear layer's input by
``max|x|^a / max|w|^(1-a)`` and multiplies its weights by as much. The bias correction is that of Nagel et al.
(arXiv 1906.04721, section 4.2): rounding shifts the weights of an output by ``e``, so its mean moves by ``e`` times the
mean input, which is taken from the bias. Neither speaks of timesteps; a denoiser's values grow and shrink along its
trajectory, and a range that fits the loudest step alone rounds the quiet ones away. So every range is the one, of a few
fractions of the largest magnitude, whose error relative to the value's own power is smallest on average over calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from calibration.errors import CalibrationError
from calibration.sites import sites_of
from calibration.statistics import (
    CANDIDATES,
    LEVELS,
    Feeds,
    Floats,
    Observed,
    Opener,
    Reached,
    Told,
    errors_of,
    observed_of,
    reach,
)

_LEAST = 1e-5


@dataclass(frozen=True)
class Fit:
    """Everything that a graph with 8-bit activations needs beyond its weights.

    Attributes:
        scales: value -> width of one level, after smoothing; the largest code stands for 127 of them.
        smoothing: value -> (channels,) what it is divided by; values that are not smoothed are missing.
        means: value -> (channels,) mean before smoothing, for the bias correction.
        facts: how it was made.
    """

    scales: Mapping[str, float]
    smoothing: Mapping[str, Floats]
    means: Mapping[str, Floats]
    facts: Mapping[str, object]

    def save(self, path: Path) -> None:
        """Write it as one safetensors file."""
        tensors = {f"scale {name}": np.float32([scale]) for name, scale in self.scales.items()}
        tensors |= {f"smoothing {name}": np.ascontiguousarray(value) for name, value in self.smoothing.items()}
        tensors |= {f"mean {name}": np.ascontiguousarray(value) for name, value in self.means.items()}
        staging = path.with_name(f".{path.name}.partial")
        save_file(tensors, staging, {"facts": json.dumps(dict(self.facts))})
        staging.replace(path)

    @classmethod
    def load(cls, path: Path) -> Fit:
        """Read it.

        Raises:
            CalibrationError: it is not what `save` wrote.
        """
        kinds: dict[str, dict[str, Floats]] = {"scale": {}, "smoothing": {}, "mean": {}}
        try:
            with safe_open(path, framework="numpy") as stored:
                facts = json.loads((stored.metadata() or {})["facts"])
                for key in stored.keys():  # noqa: SIM118 - it is no mapping
                    kind, _, name = key.partition(" ")
                    kinds[kind][name] = stored.get_tensor(key)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CalibrationError(f"{path}: not a fit; got: {error}. Delete it; it is made again.") from error
        scales = {name: float(value[0]) for name, value in kinds["scale"].items()}
        return cls(scales, kinds["smoothing"], kinds["mean"], facts)


def fit(  # noqa: PLR0913 - what is asked of whom, and how
    graph: Path,
    calls: Sequence[Feeds],
    opener: Opener,
    workdir: Path,
    told: Callable[[int], Told],
    *,
    smoothness: float = 0.5,
) -> Fit:
    """Fit scales for every value before the sites of a graph.

    Args:
        graph: an ONNX file with folded weights; copies with more outputs are written beside it.
        calls: recorded, of the steps that matter.
        opener: of the runtime that answers them.
        workdir: keeps what was found after every call.
        told: takes how many calls come, and returns what takes note of each.
        smoothness: how much of the difference between channels goes into the weights, 0 (none) to 1 (all).

    Raises:
        CalibrationError: a value is not finite, or nothing but zeros.
    """
    note = told(2 * len(calls))
    reached = reach(graph, calls, opener, workdir, note)
    known = observed_of(sites_of(ir.load(graph).graph).values())
    smoothing = _smoothing(graph, known, reached, smoothness) if smoothness else {}
    largest = {name: _largest(reached.largest[name], smoothing.get(name)) for name in known}
    errors = errors_of(graph, largest, smoothing, calls, opener=opener, workdir=workdir, told=note)
    best = {name: int(np.argmin(values.mean(axis=0))) for name, values in errors.items()}
    scales = {name: CANDIDATES[best[name]] * largest[name] / LEVELS for name in known}
    means = {name: reached.mean[name].mean(axis=0) for name, item in known.items() if item.channels > 1}
    facts = {
        "calls": len(calls),
        "smoothness": smoothness,
        "clipped": sum(CANDIDATES[index] < 1 for index in best.values()),
        "values": len(known),
    }
    return Fit(scales, smoothing, means, facts)


def _largest(seen: Floats, divisor: Floats | None) -> float:
    of_channels = seen.max(axis=0)
    return float((of_channels if divisor is None else of_channels / divisor).max())


def _smoothing(graph: Path, known: Mapping[str, Observed], reached: Reached, smoothness: float) -> dict[str, Floats]:
    """Return what linear layers' inputs are divided by, so that their channels and the weights' share the rounding."""
    found: dict[str, Floats] = {}
    weights: dict[str, Floats] = {}
    for site in sites_of(ir.load(graph).graph).values():
        if site.kind == "linear" and site.weight is not None and site.weight.const_value is not None:
            values = np.abs(site.weight.const_value.numpy()).max(axis=site.axis)
            name = site.node.inputs[0].name or "" if site.node.inputs[0] is not None else ""
            weights[name] = np.maximum(weights[name], values) if name in weights else values
    for name, item in known.items():
        if item.smooth:
            inputs = np.maximum(reached.largest[name].max(axis=0), _LEAST)
            divisor = inputs**smoothness / np.maximum(weights[name], _LEAST) ** (1 - smoothness)
            found[name] = np.maximum(divisor, _LEAST).astype(np.float32)
    return found

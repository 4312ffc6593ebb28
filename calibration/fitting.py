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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from calibration.errors import CalibrationError
from calibration.sites import Site
from calibration.statistics import CANDIDATES, LEVELS, Floats, Observed, Reached, Study, errors_of, observed_of, reach

_LEAST = 1e-5


@dataclass(frozen=True)
class Fit:
    """Everything that a graph with 8-bit activations needs beyond its weights.

    Attributes:
        scales: value -> width of one level of 8 bits, after smoothing; the largest code stands for 127 of them.
        largest: value -> largest magnitude, after smoothing.
        smoothing: value -> (channels,) what it is divided by; values that are not smoothed are missing.
        means: value -> (channels,) mean before smoothing, for the bias correction.
        facts: how it was made.
    """

    scales: Mapping[str, float]
    largest: Mapping[str, float]
    smoothing: Mapping[str, Floats]
    means: Mapping[str, Floats]
    facts: Mapping[str, object]

    def save(self, path: Path) -> None:
        """Write it as one safetensors file."""
        tensors: dict[str, Floats] = {}
        for kind, known in (("scale", self.scales), ("largest", self.largest)):
            tensors |= {f"{kind} {name}": np.array([value], np.float32) for name, value in known.items()}
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
        kinds: dict[str, dict[str, Floats]] = {"scale": {}, "largest": {}, "smoothing": {}, "mean": {}}
        try:
            with safe_open(path, framework="numpy") as stored:
                facts = json.loads((stored.metadata() or {})["facts"])
                for key in stored.keys():  # noqa: SIM118 - it is no mapping
                    kind, _, name = key.partition(" ")
                    kinds[kind][name] = stored.get_tensor(key)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CalibrationError(f"{path}: not a fit; got: {error}. Delete it; it is made again.") from error
        scales, largest = (
            {name: float(value[0]) for name, value in kinds[kind].items()} for kind in ("scale", "largest")
        )
        return cls(scales, largest, kinds["smoothing"], kinds["mean"], facts)


def fit(study: Study, smoothness: float = 0.5) -> Fit:
    """Fit scales for every value before the sites of a graph, in two passes over the calls.

    Args:
        study: the graph and its calls.
        smoothness: how much of the difference between channels goes into the weights, 0 (none) to 1 (all).

    Raises:
        CalibrationError: a value is not finite, or nothing but zeros.
    """
    reached = reach(study)
    known = observed_of(study.sites().values())
    smoothing = _smoothing(known, reached, smoothness) if smoothness else {}
    largest = {name: _largest(reached.largest[name], smoothing.get(name)) for name in known}
    errors = errors_of(study, largest, smoothing)
    best = {name: int(np.argmin(values.mean(axis=0))) for name, values in errors.items()}
    scales = {name: CANDIDATES[best[name]] * largest[name] / LEVELS for name in known}
    means = {name: reached.mean[name].mean(axis=0) for name, item in known.items() if item.channels > 1}
    facts = {
        "calls": len(study.calls),
        "smoothness": smoothness,
        "clipped": sum(CANDIDATES[index] < 1 for index in best.values()),
        "values": len(known),
    }
    return Fit(scales, largest, smoothing, means, facts)


def _largest(seen: Floats, divisor: Floats | None) -> float:
    of_channels = seen.max(axis=0)
    return float((of_channels if divisor is None else of_channels / divisor).max())


def _smoothing(known: Mapping[str, Observed], reached: Reached, smoothness: float) -> dict[str, Floats]:
    """Return what linear layers' inputs are divided by, so that their channels and the weights' share the rounding."""
    found: dict[str, Floats] = {}
    for name, item in known.items():
        if item.smooth:
            inputs = np.maximum(reached.largest[name].max(axis=0), _LEAST)
            weights = np.maximum(np.max([_heights(site) for site in item.readers], axis=0), _LEAST)
            divisor = inputs**smoothness / weights ** (1 - smoothness)
            found[name] = np.maximum(divisor, _LEAST).astype(np.float32)
    return found


def _heights(site: Site) -> Floats:
    """Return the largest magnitude of the weights of each input."""
    assert site.weight is not None
    assert site.weight.const_value is not None
    found: Floats = np.abs(site.weight.const_value.numpy()).max(axis=site.axis)
    return found


def fit_means(study: Study) -> Fit:
    """Return the mean of every value before the sites of a graph and nothing else: what weights alone in 4 bits need.

    Raises:
        CalibrationError: as `fit`.
    """
    reached, known = reach(study), observed_of(study.sites().values())
    means = {name: reached.mean[name].mean(axis=0) for name, item in known.items() if item.channels > 1}
    return Fit({}, {}, {}, means, {"calls": len(study.calls), "values": len(known)})

"""What a judge of images and prompts says: CLIP score, right-prompt rate, and KID in a named feature space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.errors import ComponentFailed
from exporter.metrics.intervals import bootstrap, wilson
from exporter.metrics.measurement import Measurement, Ratio
from exporter.metrics.place import Place

Floats = NDArray[np.float64]
KID_LEAST = 8
KID_HALVES = 200


class Judge(Protocol):
    """Looks at images, (n, h, w, 3) uint8, and prompts; see `exporter.reference.judge`."""

    def scores(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[Any]:
        """Return (n,) how well each image fits its prompt, 0 to 100."""

    def rates(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[Any]:
        """Return (n,) bool: the image's own prompt ranks first among its hard negatives."""

    def features(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        """Return (n, d) image features."""


@dataclass(frozen=True)
class Verdicts:
    """What a judge said about the images of one cell.

    Attributes:
        scores: (n,) 0 to 100.
        rates: (n,) bool.
        features: (n, d).
    """

    scores: Floats
    rates: NDArray[np.bool_]
    features: Floats

    @classmethod
    def of(cls, judge: Judge, images: NDArray[np.uint8], prompts: Sequence[str]) -> Verdicts:
        """Ask a judge about images and the prompts that they were drawn for.

        Raises:
            ComponentFailed: the judge's answers do not have one entry per image.
        """
        verdicts = cls(
            np.asarray(judge.scores(images, prompts), np.float64),
            np.asarray(judge.rates(images, prompts), np.bool_),
            np.asarray(judge.features(images), np.float64),
        )
        shapes = (verdicts.scores.shape, verdicts.rates.shape, verdicts.features.shape[:1])
        if shapes != ((len(images),),) * 3 or verdicts.features.ndim != 2:
            msg = f"judge: wrong shapes; got {shapes}, expected ({len(images)},) each. Answer once per image."
            raise ComponentFailed(msg)
        return verdicts


@dataclass(frozen=True)
class Baseline:
    """What the judge said about the dense pipeline's images of the same prompts and seeds.

    Attributes:
        state: id of the dense state.
        verdicts: in the same order of prompts.
    """

    state: str
    verdicts: Verdicts


def judge_measurements(
    verdicts: Verdicts,
    place: Place,
    *,
    space: str,
    dense: Baseline | None,
    seed: int = 0,
) -> list[Measurement]:
    """Return ``fidelity.clip_score``, ``fidelity.judge_rate`` and ``fidelity.kid`` of one cell.

    Args:
        verdicts: about this cell's images.
        place: the cell.
        space: name of the judge, said with every number.
        dense: for the paired ratios and for KID; None for the dense images themselves.
        seed: of the resampling.

    Raises:
        ComponentFailed: the pairs do not match, or a score or feature is not finite.
    """
    if dense is None:
        kid_of_dense = place.missing("fidelity.kid", "score", "these are the reference's own images")
        return [
            clip_score(verdicts.scores, place, space=space, seed=seed),
            judge_rate(verdicts.rates, place),
            kid_of_dense,
        ]
    then = dense.verdicts
    return [
        clip_score(verdicts.scores, place, space=space, dense=(dense.state, then.scores), seed=seed),
        judge_rate(verdicts.rates, place, dense=(dense.state, then.rates), seed=seed),
        kid(verdicts.features, then.features, place, space=space, seed=seed),
    ]


def clip_score(
    scores: Floats,
    place: Place,
    *,
    space: str,
    dense: tuple[str, Floats] | None = None,
    seed: int = 0,
    name: str = "fidelity.clip_score",
) -> Measurement:
    """Return the mean score, 0 to 100, with a bootstrap interval and the paired ratio to dense.

    Args:
        scores: (n,) finite.
        place: the cell.
        space: whose scores they are.
        dense: id of the dense state and its (n,) scores for the same prompts.
        seed: of the resampling.
        name: of the metric.

    Raises:
        ComponentFailed: pairs do not match, or a score is not finite.
    """
    _check_finite(scores, f"scores of {space}")
    low, high = bootstrap(scores, np.mean, seed=seed)
    return place.measured(
        name,
        float(scores.mean()),
        "score",
        low=low,
        high=high,
        samples=len(scores),
        ratio=None if dense is None else _ratio(scores, dense, seed),
        note=f"mean by {space}; 95 % interval by bootstrap over images",
        detail={"space": space, "per_image": [float(value) for value in scores]},
    )


def judge_rate(
    rates: NDArray[np.bool_],
    place: Place,
    *,
    dense: tuple[str, NDArray[np.bool_]] | None = None,
    seed: int = 0,
) -> Measurement:
    """Return the share of images whose own prompt ranks first: Wilson interval, paired ratio to dense.

    Args:
        rates: (n,) bool.
        place: the cell.
        dense: id of the dense state and its (n,) rates for the same prompts.
        seed: of the resampling of pairs.

    Raises:
        ComponentFailed: pairs do not match.
    """
    right = int(rates.sum())
    low, high = wilson(right, len(rates))
    ratio = None if dense is None else _ratio(rates.astype(np.float64), (dense[0], dense[1].astype(np.float64)), seed)
    note = "share of images whose prompt ranks first among its hard negatives; Wilson 95 % interval"
    detail: dict[str, Any] = {"right": right, "of": len(rates)}
    if dense is not None:
        lost, won = int((~rates & dense[1]).sum()), int((rates & ~dense[1]).sum())
        detail |= {"lost_to_dense": lost, "won_over_dense": won}
        note += "" if ratio else "; no ratio, because dense has none right"
    return place.measured(
        "fidelity.judge_rate",
        right / len(rates),
        "fraction",
        low=low,
        high=high,
        samples=len(rates),
        ratio=ratio,
        note=note,
        detail=detail,
    )


def kid(
    features: Floats,
    reference: Floats,
    place: Place,
    *,
    space: str,
    seed: int = 0,
    name: str = "fidelity.kid",
) -> Measurement:
    """Return the kernel distance between two sets of images in a named feature space.

    Unbiased squared MMD with the cubic kernel over all images, through torchmetrics. The interval is plus and minus
    1.96 standard deviations over random halves, whose spread equals that of the whole (delete-half jackknife).

    Args:
        features: (n, d).
        reference: (n, d) of the same prompts.
        place: the cell.
        space: name of the feature space.
        seed: of the halves.
        name: of the metric.

    Raises:
        ComponentFailed: shapes differ, or a feature is not finite.

    Source: Binkowski et al., Demystifying MMD GANs (arXiv 1801.01401); Shao and Wu 1989 for the jackknife. Departs:
        no averaging over subsets of fixed size, so that a set of a few dozen images can be measured.
    """
    if features.shape != reference.shape:
        msg = f"features in {space}: shapes differ; got {features.shape}, expected {reference.shape}. Pair the images."
        raise ComponentFailed(msg)
    _check_finite(features, f"features in {space}")
    _check_finite(reference, f"reference features in {space}")
    count = len(features)
    if count < KID_LEAST:
        why = f"{count} images are too few; set measure.images to {KID_LEAST} or more"
        return place.missing(name, "score", why)
    real, drawn = torch.from_numpy(reference), torch.from_numpy(features)
    from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel  # seconds to import

    kernels = [poly_kernel(real, real), poly_kernel(real, drawn), poly_kernel(drawn, drawn)]
    value = float(maximum_mean_discrepancy(*kernels))
    generator = np.random.default_rng(seed)
    halves = []
    for _ in range(KID_HALVES):
        half = torch.from_numpy(np.sort(generator.permutation(count)[: count // 2]))
        halves.append(float(maximum_mean_discrepancy(*(kernel[half][:, half] for kernel in kernels))))
    spread = 1.96 * float(np.sqrt(np.mean(np.square(np.asarray(halves) - value))))
    return place.measured(
        name,
        value,
        "score",
        low=value - spread,
        high=value + spread,
        samples=count,
        note=f"against dense's images in {space} ({features.shape[1]} features); unbiased, may be below 0",
        detail={"space": space, "features": int(features.shape[1])},
    )


def _ratio(values: Floats, dense: tuple[str, Floats], seed: int) -> Ratio | None:
    """Return mean over mean with pairs resampled together; None where dense's mean is 0."""
    state, then = dense
    if values.shape != then.shape:
        msg = f"pairs with {state}: counts differ; got {values.shape}, expected {then.shape}. Judge the same prompts."
        raise ComponentFailed(msg)
    _check_finite(then, f"values of {state}")
    if not then.sum():
        return None
    low, high = bootstrap((values, then), _mean_ratio, seed=seed)
    return Ratio(to=state, value=_mean_ratio(values, then), low=low, high=high, pairs=len(values))


def _mean_ratio(values: Floats, then: Floats) -> float:
    total = float(then.sum())
    return float(values.sum()) / total if total else float("nan")


def _check_finite(values: Floats, what: str) -> None:
    if not len(values) or not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        msg = f"{what}: unusable; got {bad} of {values.size} NaN or Inf, expected numbers. Look at the images."
        raise ComponentFailed(msg)

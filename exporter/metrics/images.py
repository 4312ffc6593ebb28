"""Free-running comparison of images with dense ones of the same prompts and seeds, and detectors of broken images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.errors import ComponentFailed
from exporter.metrics.fidelity import PSNR_CAP_DB
from exporter.metrics.intervals import bootstrap
from exporter.metrics.measurement import Measurement
from exporter.metrics.place import Place

Images = NDArray[np.uint8]
Distance = Callable[[Images, Images], NDArray[np.float64]]
"""(images, reference), each (n, h, w, 3) uint8 -> (n,) distances."""

BATCH = 16
_PIXELS = 2**17
SSIM_BYTES = 4840
"""What SSIM needs per pixel: torch lays out a float64 convolution of 11 x 11, five inputs at a time."""
BLACK_BELOW = 4 / 255
CONSTANT_BELOW = 2 / 255
SATURATED_SHARE = 0.5
SATURATED_MORE = 0.25
PROBLEMS = ("nan", "black", "constant", "saturated", "size")


def psnr_db(images: Images, reference: Images) -> NDArray[np.float64]:
    """Return the PSNR of each image in dB with 255 as peak, at most `PSNR_CAP_DB`.

    Args:
        images: (n, h, w, 3) uint8.
        reference: the same shape.

    Raises:
        ComponentFailed: shapes or types differ.
    """
    return np.minimum(_per_image(images, reference, _torch_psnr), PSNR_CAP_DB)


def ssim(images: Images, reference: Images) -> NDArray[np.float64]:
    """Return the structural similarity of each image, -1 to 1; arguments as for `psnr_db`.

    Source: Wang et al. 2004; 11x11 Gaussian window, sigma 1.5, as torchmetrics computes it.
    """
    return _per_image(images, reference, _torch_ssim)


def image_measurements(
    images: Images,
    reference: Images,
    place: Place,
    *,
    lpips: Distance | str,
    seed: int = 0,
) -> list[Measurement]:
    """Return ``fidelity.image.psnr_db``, ``.ssim`` and ``.lpips``: means over the images with their intervals.

    Args:
        images: (n, h, w, 3) uint8.
        reference: what the dense pipeline drew for the same prompts and seeds.
        place: the cell.
        lpips: the distance, or the reason why there is none (`exporter.metrics.at_hand.lpips`).
        seed: of the bootstrap over images.

    Raises:
        ComponentFailed: shapes or types differ.
    """
    decibels = psnr_db(images, reference)
    equal = int((decibels >= PSNR_CAP_DB).sum())
    told = f"; {equal} equal images count as {PSNR_CAP_DB:g} dB" if equal else ""
    found = [
        _mean("fidelity.image.psnr_db", decibels, "dB", place, seed, f"mean over images, peak 255{told}"),
        _mean("fidelity.image.ssim", ssim(images, reference), "fraction", place, seed, "mean over images"),
    ]
    if isinstance(lpips, str):
        return [*found, place.missing("fidelity.image.lpips", "score", lpips)]
    distances = np.asarray(lpips(images, reference), np.float64)
    note = "mean over images, AlexNet features"
    return [*found, _mean("fidelity.image.lpips", distances, "score", place, seed, note)]


def detect(
    images: NDArray[Any],
    size: tuple[int, int],
    *,
    reference: NDArray[Any] | None = None,
) -> list[list[str]]:
    """Return, for each image, what is wrong with it: any of `PROBLEMS`.

    nan: a value is not finite. black: nothing is brighter than 3 of 255. constant: no colour channel spans more than
    1 of 255. saturated: at least half of the values lie at an end of the range, and a quarter of all came there from
    more than 3 of 255 away in the reference, because a drawing may have pure colours, or nearly pure ones that rounding
    moves; not said of black. size: not the size asked for.

    Args:
        images: (n, h, w, 3); uint8, or float in 0 to 1 (which alone can hold NaN).
        size: (height, width) asked for.
        reference: dense images of the same prompts, uint8 or float; of another size, it says nothing.
    """
    likes: Sequence[NDArray[Any] | None] = [None] * len(images) if reference is None else list(reference)
    return [_problems(_unit(image), size, like) for image, like in zip(images, likes, strict=True)]


def _problems(image: NDArray[np.float64], size: tuple[int, int], like: NDArray[Any] | None) -> list[str]:
    finite = bool(np.isfinite(image).all())
    spans = image.max(axis=(0, 1)) - image.min(axis=(0, 1)) if finite else np.ones(1)
    black = finite and float(image.max()) < BLACK_BELOW
    ends = (image <= 0.5 / 255) | (image >= 254.5 / 255)
    came = ends if like is None or like.shape != image.shape else ends & (np.abs(image - _unit(like)) >= BLACK_BELOW)
    saturated = ends.mean() >= SATURATED_SHARE and came.mean() >= SATURATED_MORE
    tests = {
        "nan": not finite,
        "black": black,
        "constant": finite and float(spans.max()) < CONSTANT_BELOW,
        "saturated": finite and not black and bool(saturated),
        "size": tuple(image.shape[:2]) != tuple(size),
    }
    return [name for name in PROBLEMS if tests[name]]


def problem_measurement(problems: Sequence[Sequence[str]], place: Place) -> Measurement:
    """Return ``fidelity.image.problems``: how many images have a problem; detail has the count of each kind."""
    kinds = {name: sum(name in found for found in problems) for name in PROBLEMS}
    return place.measured(
        "fidelity.image.problems",
        float(sum(bool(found) for found in problems)),
        "images",
        samples=len(problems),
        note="images that a detector objects to",
        detail={name: count for name, count in kinds.items() if count},
    )


def _mean(name: str, values: NDArray[np.float64], unit: str, place: Place, seed: int, note: str) -> Measurement:
    low, high = bootstrap(values, np.mean, seed=seed)
    detail = {"median": float(np.median(values)), "lowest": float(values.min()), "highest": float(values.max())}
    return place.measured(
        name,
        float(values.mean()),
        unit,
        low=low,
        high=high,
        samples=len(values),
        note=f"{note}; 95 % interval by bootstrap over images",
        detail={**detail, "per_image": [float(value) for value in values]},
    )


def at_once(count: int, pixels: int) -> int:
    """Return how many images of a size are compared together: SSIM takes `SSIM_BYTES` for every pixel of them."""
    return min(count, BATCH, max(1, _PIXELS // pixels))


def _per_image(images: Images, reference: Images, metric: Callable[[Tensor, Tensor], Tensor]) -> NDArray[np.float64]:
    for name, array in (("images", images), ("reference", reference)):
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not len(array):
            msg = f"{name}: wrong form; got {array.dtype} {array.shape}, expected uint8 (n, h, w, 3). Convert them."
            raise ComponentFailed(msg)
    if images.shape != reference.shape:
        msg = f"images: shapes differ; got {images.shape}, expected {reference.shape}. Draw the same prompts and size."
        raise ComponentFailed(msg)
    step = at_once(len(images), images.shape[1] * images.shape[2])
    parts = [
        metric(_tensor(images[start : start + step]), _tensor(reference[start : start + step]))
        for start in range(0, len(images), step)
    ]
    return np.asarray(torch.cat([part.reshape(-1) for part in parts]).numpy(), np.float64)


def _torch_psnr(images: Tensor, reference: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio  # seconds to import

    found: Tensor = peak_signal_noise_ratio(images, reference, data_range=255.0, reduction="none", dim=(1, 2, 3))
    return found


def _torch_ssim(images: Tensor, reference: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    found: Tensor = structural_similarity_index_measure(images, reference, data_range=255.0, reduction="none")
    return found


def _tensor(images: Images) -> Tensor:
    """Return (n, 3, h, w) float64, 0 to 255."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).double()


def _unit(images: NDArray[Any]) -> NDArray[np.float64]:
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    return np.asarray(images, np.float64) / scale

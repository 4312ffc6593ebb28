"""Resizing, and integers that stand for floats, with what their documentation says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mil_cases import Case, _calls, floats
from mil_programs import Array


def resizing() -> list[Case]:
    return [*_resizing(), *_integers()]


def _line(x: Array, axis: int, points: Sequence[float]) -> Array:
    """Return x between its elements along an axis."""
    found = []
    for point in points:
        place = min(max(point, 0), x.shape[axis] - 1)
        low = int(np.floor(place))
        high = min(low + 1, x.shape[axis] - 1)
        found.append(np.take(x, low, axis) * (1 - (place - low)) + np.take(x, high, axis) * (place - low))
    return np.stack(found, axis)


def _points(have: int, want: int, mode: str) -> list[float]:
    """Return the grid points that the documentation gives for a sampling mode."""
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if want == 1:
            return [(have - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0]
        return [i * (have - 1) / (want - 1) for i in range(want)]
    if mode == "DEFAULT":
        return [i * (have - have / want) / (want - 1) for i in range(want)] if want > 1 else [0.0]
    if mode == "OFFSET_CORNERS":
        delta = max(1, have - 1) / want
        return [0.5 * delta + i * ((want - 1) * delta) / (want - 1) for i in range(want)] if want > 1 else [0.5 * delta]
    return [i * have / want + 0.5 * have / want - 0.5 for i in range(want)]


def _sampled(mode: str, height: int, width: int) -> Callable[[Array], Array]:
    def run(x: Array) -> Array:
        tall = _line(x, 2, _points(x.shape[2], height, mode))
        return _line(tall, 3, _points(x.shape[3], width, mode))

    return run


def _resizing() -> list[Case]:
    image = {"x": floats(1, 2, 3, 4)}
    found = [
        Case(
            "upsample_nearest_neighbor",
            _calls("upsample_nearest_neighbor", scale_factor_height=2, scale_factor_width=3),
            image,
            lambda x: x.repeat(2, 2).repeat(3, 3),
        ),
        Case(
            "upsample_nearest_neighbor by halves",
            _calls("upsample_nearest_neighbor", scale_factor_height=1.5, scale_factor_width=1.5),
            {"x": floats(1, 2, 4, 4)},
            lambda x: x[:, :, [0, 0, 1, 2, 2, 3]][:, :, :, [0, 0, 1, 2, 2, 3]],
        ),
        Case(
            "resize_nearest_neighbor",
            _calls("resize_nearest_neighbor", target_size_height=5, target_size_width=2),
            image,
            lambda x: x[:, :, [0, 0, 1, 1, 2]][:, :, :, [0, 2]],
        ),
        Case(
            "resize nearest",
            _calls("resize", shape=[1, 5, 0], resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR"),
            image,
            lambda x: x[:, :, [0, 0, 1, 1, 2]],
            "iOS17",
        ),
    ]
    for corners, mode in ((True, "STRICT_ALIGN_CORNERS"), (False, "UNALIGN_CORNERS")):
        scale = _calls("upsample_bilinear", scale_factor_height=2, scale_factor_width=3, align_corners=corners)
        found.append(Case(f"upsample_bilinear {mode}", scale, image, _sampled(mode, 6, 12)))
    for mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS"):
        size = _calls("resize_bilinear", target_size_height=5, target_size_width=2, sampling_mode=mode)
        found.append(Case(f"resize_bilinear {mode}", size, image, _sampled(mode, 5, 2)))
        both = _calls("resize", shape=[7, 6], resized_dims=np.uint32(2), sampling_mode=mode)
        found.append(Case(f"resize {mode}", both, image, _sampled(mode, 7, 6), "iOS17"))
    return found


def _integers() -> list[Case]:
    scale, zero = np.array([0.02, 0.5, 1.0], np.float32), np.array([3, -5, 0], np.int8)
    wide, shift = scale.reshape(1, 3, 1).astype(np.float64), zero.reshape(1, 3, 1).astype(np.float64)
    x = {"x": floats(2, 3, 8, low=-200, high=200)}

    def there(mb: Any, x: Any) -> Any:
        return mb.quantize(input=x, scale=scale, zero_point=zero, axis=1, output_dtype="int8")

    def whole(x: Array) -> Array:
        return np.clip(np.round(x / wide) + shift, -128, 127)

    return [
        Case("quantize", there, x, whole, "iOS17"),
        Case(
            "quantize to uint8",
            lambda mb, x: mb.quantize(input=x, scale=np.float32(0.5), output_dtype="uint8"),
            x,
            lambda x: np.clip(np.round(x / 0.5), 0, 255),
            "iOS17",
        ),
        Case(
            "dequantize",
            lambda mb, x: mb.dequantize(input=there(mb, x), scale=scale, zero_point=zero, axis=1),
            x,
            lambda x: (whole(x) - shift) * wide,
            "iOS17",
        ),
    ]

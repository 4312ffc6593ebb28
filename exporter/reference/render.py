"""Renderer of the reference grammar: a scene and a seed give one 64x64 RGB image, anti-aliased by signed distances."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from exporter.reference.grammar import Scene, Thing

IMAGE_SIZE = 64
COLOUR_VALUES: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 36),
    "green": (34, 154, 52),
    "blue": (38, 66, 214),
    "yellow": (250, 222, 30),
    "purple": (124, 38, 156),
    "orange": (246, 134, 20),
    "pink": (250, 136, 190),
    "cyan": (40, 204, 222),
}
"""RGB of the things' colours, 0 to 255."""
BACKGROUND_VALUES: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
    "beige": (226, 204, 164),
}
"""RGB of the backgrounds, 0 to 255."""
RADII = {"large": (12.4, 13.6), "small": (7.0, 8.0)}
"""Smallest and largest radius of each size, in pixels."""

_CENTRE = (IMAGE_SIZE - 1) / 2
_OFFSET = (14.5, 16.5)  # distance of each of two things from the middle, along the relation's axis
_ACROSS = 4.0  # largest jitter across that axis
_SINGLE = 6.0  # largest jitter of a lone thing
_AXIS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

Floats = npt.NDArray[np.float32]


def _regular(corners: int, outer: float, inner: float | None = None) -> Floats:
    count = corners if inner is None else 2 * corners
    radii = np.full(count, outer)
    if inner is not None:
        radii[1::2] = inner
    angles = -np.pi / 2 + 2 * np.pi * np.arange(count) / count
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1).astype(np.float32)


def _cross(half: float, arm: float) -> Floats:
    points = [
        (-arm, -half),
        (arm, -half),
        (arm, -arm),
        (half, -arm),
        (half, arm),
        (arm, arm),
        (arm, half),
        (-arm, half),
    ]
    points += [(-arm, arm), (-half, arm), (-half, -arm), (-arm, -arm)]
    return np.array(points, dtype=np.float32)


_TRIANGLE = _regular(3, 1.2)
_POLYGONS = {
    "square": np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)], dtype=np.float32),
    "triangle": _TRIANGLE - np.array([0.0, -0.15], dtype=np.float32),
    "star": _regular(5, 1.15, 0.48),
    "cross": _cross(1.0, 0.32),
}


@functools.cache
def _grid() -> tuple[Floats, Floats]:
    rows, columns = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
    return columns, rows


def _polygon_distance(x: Floats, y: Floats, corners: Floats) -> Floats:
    """Signed distance to a polygon, negative inside; `corners` (n, 2) in pixels."""
    squared = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    previous = np.roll(corners, 1, axis=0)
    for (ax, ay), (bx, by) in zip(corners.tolist(), previous.tolist(), strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        squared = np.minimum(squared, (wx - along * ex) ** 2 + (wy - along * ey) ** 2)
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    distance = np.sqrt(squared)
    return np.where(inside, -distance, distance).astype(np.float32)


def _coverage(shape: str, x: Floats, y: Floats, radius: float) -> Floats:
    """Share of each pixel that the shape covers, 0 to 1; `x`, `y` relative to the shape's centre."""
    scale = np.float32(radius)
    if shape == "circle":
        distance = np.hypot(x, y) - scale
    elif shape == "ring":
        distance = np.abs(np.hypot(x, y) - np.float32(0.76) * scale) - np.float32(0.24) * scale
    else:
        distance = _polygon_distance(x, y, _POLYGONS[shape] * scale)
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def _positions(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    if scene.relation is None:
        dx, dy = rng.uniform(-_SINGLE, _SINGLE, size=2)
        return [(_CENTRE + dx, _CENTRE + dy)]
    along_x, along_y = _AXIS[scene.relation]
    found = []
    for sign in (1, -1):
        offset = sign * rng.uniform(*_OFFSET)
        across = rng.uniform(-_ACROSS, _ACROSS)
        found.append((_CENTRE + along_x * offset + along_y * across, _CENTRE + along_y * offset + along_x * across))
    return found


def _paint(canvas: Floats, thing: Thing, centre: tuple[float, float], radius: float) -> None:
    columns, rows = _grid()
    reach = 1.25 * radius + 2
    left, top = (max(0, int(value - reach)) for value in centre)
    right, bottom = (min(IMAGE_SIZE, int(value + reach) + 2) for value in centre)
    window = np.s_[top:bottom, left:right]
    alpha = _coverage(
        thing.shape, columns[window] - np.float32(centre[0]), rows[window] - np.float32(centre[1]), radius
    )
    colour = np.array(COLOUR_VALUES[thing.colour], dtype=np.float32)
    canvas[window] += alpha[..., None] * (colour - canvas[window])


def render(scene: Scene, seed: int) -> npt.NDArray[np.uint8]:
    """Draw a scene.

    The seed decides positions and radii within the limits that keep sizes and relations unambiguous.

    Args:
        scene: What to draw.
        seed: Seed of the jitter, 0 or more.

    Returns:
        The image, uint8 (64, 64, 3), RGB.
    """
    rng = np.random.default_rng([seed, 0x5CE9E])
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    canvas[:] = BACKGROUND_VALUES[scene.background]
    for thing, centre in zip(scene.things, _positions(scene, rng), strict=True):
        _paint(canvas, thing, centre, float(rng.uniform(*RADII[thing.size])))
    return np.rint(canvas).astype(np.uint8)


def render_many(scenes: list[Scene], first_seed: int) -> npt.NDArray[np.uint8]:
    """Draw scene `i` with seed `first_seed + i`.

    Args:
        scenes: What to draw.
        first_seed: Seed of the first image.

    Returns:
        The images, uint8 (n, 64, 64, 3), RGB.
    """
    images = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for index, scene in enumerate(scenes):
        images[index] = render(scene, first_seed + index)
    return images

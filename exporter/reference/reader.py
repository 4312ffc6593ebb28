"""Rule-based reader of generated images: background, colours and positions of the things, with numpy alone.

It shares nothing with the judge but the grammar, so that the two can be held against each other.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from exporter.reference.grammar import Scene
from exporter.reference.render import BACKGROUND_VALUES, COLOUR_VALUES

MIN_PIXELS = 24
"""Fewer pixels of a colour than this are anti-aliasing or noise, not a thing."""
_NAMES = (*BACKGROUND_VALUES, *COLOUR_VALUES)
_PALETTE = np.array([*BACKGROUND_VALUES.values(), *COLOUR_VALUES.values()], dtype=np.float32)
_TOLERANCE = 70.0  # largest RGB distance of a pixel to its palette colour


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What the reader found in an image.

    Attributes:
        background: Name of the most frequent background colour on the image's border.
        things: Colour, column and row of the centre (pixels) and number of pixels of each thing, largest first.
    """

    background: str
    things: tuple[tuple[str, float, float, int], ...]


def _erode(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Keep the pixels whose four neighbours are set too: drops the mixed colours along edges."""
    kept = mask.copy()
    kept[1:] &= mask[:-1]
    kept[:-1] &= mask[1:]
    kept[:, 1:] &= mask[:, :-1]
    kept[:, :-1] &= mask[:, 1:]
    return kept


def read(image: npt.NDArray[np.uint8]) -> Reading:
    """Read an image.

    Args:
        image: uint8 (64, 64, 3), RGB.

    Returns:
        The background and at most the two largest things.
    """
    pixels = image.reshape(-1, 3).astype(np.float32)
    distances = np.sqrt(((pixels[:, None] - _PALETTE) ** 2).sum(axis=2))
    nearest = distances.argmin(axis=1).reshape(image.shape[:2])
    certain = (distances.min(axis=1) <= _TOLERANCE).reshape(image.shape[:2])
    border = np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    counts = np.bincount(border, minlength=len(_NAMES))[: len(BACKGROUND_VALUES)]
    background = _NAMES[int(counts.argmax())]
    found = []
    for index, name in enumerate(_NAMES[len(BACKGROUND_VALUES) :], start=len(BACKGROUND_VALUES)):
        mask = (nearest == index) & certain
        rows, columns = np.nonzero(mask)
        if len(rows) >= MIN_PIXELS and _erode(mask).sum() >= MIN_PIXELS // 4:
            found.append((name, float(columns.mean()), float(rows.mean()), len(rows)))
    found.sort(key=lambda thing: -thing[3])
    return Reading(background, tuple(found[:2]))


def _holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    across, down = second[0] - first[0], second[1] - first[1]
    if relation in ("left of", "right of"):
        return abs(across) > abs(down) and (across > 0) == (relation == "left of")
    return abs(down) > abs(across) and (down > 0) == (relation == "above")


def agrees(image: npt.NDArray[np.uint8], scene: Scene) -> bool:
    """Tell whether background, colours and relative positions of an image are those of a scene.

    Sizes and shapes are left to the judge.

    Args:
        image: uint8 (64, 64, 3), RGB.
        scene: What should be in it.

    Returns:
        True when everything that the reader reads is right.
    """
    reading = read(image)
    where = {colour: (column, row) for colour, column, row, _ in reading.things}
    if reading.background != scene.background or set(where) != {thing.colour for thing in scene.things}:
        return False
    if scene.relation is None:
        return True
    return _holds(scene.relation, where[scene.things[0].colour], where[scene.things[1].colour])

"""Image grids: thumbnails of the dense pipeline and of every cell, and amplified maps of their difference."""

from __future__ import annotations

import base64
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.report.formatting import number
from exporter.report.record import CellRecord, ImageRecord, RunRecord

AMPLIFICATION = 4
MAX_PROMPTS = 8
_MAX_SIDE = 4096
_PIXEL_BUDGET = 4_000_000
_SMALLEST, _LARGEST = 64, 256
_KEPT = 24
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """One image to embed.

    Attributes:
        source: ``data:`` URI of a PNG, empty when there is none to show.
        link: relative URL of the full-size file, empty when it is not inside the report's folder.
        missing: why there is nothing to show; empty when there is.
    """

    source: str
    link: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Tile:
    """One state on one target for one prompt.

    Attributes:
        state: id of the state.
        image: what it made.
        difference: absolute difference to dense, amplified `AMPLIFICATION` times.
        distance: how far from dense, as text: PSNR between the two PNG files.
        problems: what the detectors found.
    """

    state: str
    image: Picture
    difference: Picture
    distance: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """One prompt and seed: the dense image and, per target, one tile for every state of the run."""

    prompt: str
    seed: int
    reference: Picture
    rows: tuple[tuple[str, tuple[Tile, ...]], ...]


@dataclass(frozen=True)
class Gallery:
    """All grids of a report.

    Attributes:
        prompts: the prompts shown, those with a detector's finding first, then those that differ most.
        total: how many the run has.
        side: side of an embedded thumbnail at most, in pixels.
    """

    prompts: tuple[Prompt, ...]
    total: int
    side: int


class _Sources:
    """The image files of a report. A reference serves many cells in a row, so the last few files read are kept."""

    def __init__(self, root: Path, side: int) -> None:
        self._root = root.resolve()
        self.side = side
        self._recent: dict[str, Pixels | str] = {}

    def pixels(self, path: str) -> Pixels | str:
        """Return (height, width, 3) uint8, or why there are none."""
        if path not in self._recent:
            while len(self._recent) >= _KEPT:
                self._recent.pop(next(iter(self._recent)))
            self._recent[path] = self._read(path)
        return self._recent[path]

    def link(self, path: str) -> str:
        """Return the relative URL of a file inside the folder, empty when it is not there."""
        found = self._inside(path)
        if found is None or not found.is_file():
            return ""
        return "./" + quote(found.relative_to(self._root).as_posix())

    def _inside(self, path: str) -> Path | None:
        if "\0" in path:
            return None
        found = (self._root / path).resolve()
        return found if found.is_relative_to(self._root) else None

    def _read(self, path: str) -> Pixels | str:
        found = self._inside(path)
        if found is None:
            return f"not inside the report's folder: {path}"
        if not found.is_file():
            return f"file is missing: {path}"
        try:
            with warnings.catch_warnings():
                # A huge image raises instead of warning, and is refused like any other damaged file.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(found, formats=("PNG",)) as image:
                    if max(image.size) > _MAX_SIDE:
                        return f"larger than {_MAX_SIDE} pixels: {path}"
                    return np.asarray(image.convert("RGB"), dtype=np.uint8)
        except _UNREADABLE as error:
            return f"cannot be read: {path} ({type(error).__name__})"


Made = list[tuple[CellRecord, ImageRecord]]


def build(record: RunRecord, root: Path) -> Gallery:
    """Return the grids of a run; a missing or damaged file leaves a note in its place.

    Args:
        record: the run.
        root: the folder that the paths in the record are relative to; nothing outside it is read.
    """
    made: dict[tuple[str, int], Made] = {}
    for cell in record.cells:
        for image in cell.images:
            made.setdefault((image.prompt, image.seed), []).append((cell, image))
    chosen = _chosen(made, _Sources(root, 0))
    count = sum(1 + 2 * len(made[key]) for key in chosen)
    side = int(min(_LARGEST, max(_SMALLEST, math.sqrt(_PIXEL_BUDGET / max(1, count)))))
    sources = _Sources(root, side)
    prompts = tuple(_prompt(record, key, made[key], sources) for key in chosen)
    return Gallery(prompts, len(made), side)


def difference(image: Pixels, reference: Pixels) -> Pixels:
    """Return the absolute difference of two images, amplified and clipped.

    Args:
        image: (height, width, 3) uint8.
        reference: same shape.

    Returns:
        (height, width, 3) uint8; black where they are equal.
    """
    distance = np.abs(image.astype(np.int16) - reference.astype(np.int16))
    amplified: Pixels = np.minimum(distance * AMPLIFICATION, 255).astype(np.uint8)
    return amplified


def psnr_db(image: Pixels, reference: Pixels) -> float:
    """Return the PSNR of two uint8 images of one shape with peak 255; infinite when they are equal."""
    error = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _chosen(made: dict[tuple[str, int], Made], sources: _Sources) -> list[tuple[str, int]]:
    if len(made) <= MAX_PROMPTS:
        return list(made)
    ranks = {key: _rank(images, sources) for key, images in made.items()}
    return sorted(made, key=lambda key: ranks[key])[:MAX_PROMPTS]


def _rank(images: Made, sources: _Sources) -> tuple[bool, float]:
    distances = [_distance(sources.pixels(image.path), sources.pixels(image.reference)) for _, image in images]
    worst = min((distance for distance in distances if isinstance(distance, float)), default=math.inf)
    return not any(image.problems for _, image in images), worst


def _distance(pixels: Pixels | str, reference: Pixels | str) -> float | str:
    """Return the PSNR of two images in dB, or why there is none."""
    if isinstance(pixels, str) or isinstance(reference, str):
        return "no difference: an image is missing"
    if pixels.shape != reference.shape:
        sizes = " and ".join(f"{array.shape[1]} x {array.shape[0]}" for array in (pixels, reference))
        return f"no difference: sizes {sizes}"
    return psnr_db(pixels, reference)


def _prompt(record: RunRecord, key: tuple[str, int], images: Made, sources: _Sources) -> Prompt:
    reference = images[0][1].reference
    shown = _picture(sources.pixels(reference), sources.link(reference), sources.side)
    tiles = {(cell.target, cell.state): _tile(cell.state, image, sources) for cell, image in images}
    states = dict.fromkeys([*(state.id for state in record.states), *(cell.state for cell, _ in images)])
    why = {(cell.target, cell.state): cell.status if cell.status != "ok" else "no image" for cell in record.cells}
    rows = []
    for target in dict.fromkeys(cell.target for cell, _ in images):
        gaps = (why.get((target, state), "not run") for state in states)
        row = (tiles.get((target, state)) or _empty(state, gap) for state, gap in zip(states, gaps, strict=True))
        rows.append((target, tuple(row)))
    return Prompt(key[0], key[1], shown, tuple(rows))


def _empty(state: str, reason: str) -> Tile:
    return Tile(state, Picture("", missing=reason), Picture("", missing="no difference"), "", ())


def _tile(state: str, image: ImageRecord, sources: _Sources) -> Tile:
    pixels, reference = sources.pixels(image.path), sources.pixels(image.reference)
    shown = _picture(pixels, sources.link(image.path), sources.side)
    distance, problems = _distance(pixels, reference), tuple(image.problems)
    if isinstance(distance, str) or isinstance(pixels, str) or isinstance(reference, str):
        return Tile(state, shown, Picture("", missing=str(distance)), "", problems)
    text = "identical" if math.isinf(distance) else f"{number(distance)} dB"
    return Tile(state, shown, _picture(difference(pixels, reference), "", sources.side), text, problems)


def _picture(pixels: Pixels | str, link: str, side: int) -> Picture:
    if isinstance(pixels, str):
        return Picture("", missing=pixels)
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.BOX)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return Picture(f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}", link)

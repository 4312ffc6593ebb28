"""A folder of images with captions, as a user brings it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from exporter.artifact import digest_of
from exporter.errors import RecipeError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class CaptionedImages:
    """Images and what they show.

    Attributes:
        files: image files, in a fixed order.
        captions: one per file.
    """

    files: tuple[Path, ...]
    captions: tuple[str, ...]

    def pixels(self, start: int, stop: int, size: int) -> Tensor:
        """Return (images, 3, size, size) float32 in [-1, 1]: scaled to cover the square, centre kept.

        Raises:
            RecipeError: a file is not an image.
        """
        return torch.stack([_pixels_of(path, size) for path in self.files[start:stop]])

    def digest(self, start: int, stop: int) -> str:
        """Return the sha256 hex over bytes and captions of some of the images."""
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.files[start:stop]]
        return digest_of([hashes, self.captions[start:stop]])


def captioned_images(folder: Path) -> CaptionedImages:
    """Find the images of a folder: by its ``metadata.jsonl`` (``file_name``, ``text``), else by a ``.txt`` beside each.

    Raises:
        RecipeError: no such folder, no images, or an image without a caption.
    """
    if not folder.is_dir():
        raise RecipeError(
            f"tune.data: no folder {str(folder)!r}; expected 'generated' or a folder of images. Correct it."
        )
    pairs = _from_metadata(folder / METADATA) if (folder / METADATA).is_file() else _from_neighbours(folder)
    if not pairs:
        raise RecipeError(
            f"tune.data: {str(folder)!r} holds no images; expected files ending in {', '.join(ENDINGS)}, each with a "
            f".txt beside it, or {METADATA}. Add some, or write data: generated."
        )
    return CaptionedImages(tuple(path for path, _ in pairs), tuple(text for _, text in pairs))


def _from_metadata(path: Path) -> list[tuple[Path, str]]:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, text = path.parent / entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            got = f'{path}, line {number}: got {line[:60]!r}, expected {{"file_name": ..., "text": ...}}.'
            raise RecipeError(f"{got} Correct the line.") from error
        if not image.is_file() or not isinstance(text, str):
            raise RecipeError(f"{path}, line {number}: no file {image.name!r} beside it, or no text. Correct the line.")
        pairs.append((image, text))
    return pairs


def _from_neighbours(folder: Path) -> list[tuple[Path, str]]:
    pairs = []
    for image in sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS):
        caption = image.with_suffix(".txt")
        if not caption.is_file():
            raise RecipeError(f"{image}: has no caption; expected {caption.name} beside it. Write one, or {METADATA}.")
        pairs.append((image, caption.read_text(encoding="utf-8").strip()))
    return pairs


def _pixels_of(path: Path, size: int) -> Tensor:
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError) as error:
        raise RecipeError(f"{path}: cannot be read as an image ({error}). Replace or remove it.") from error
    return torch.from_numpy(np.asarray(square, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0

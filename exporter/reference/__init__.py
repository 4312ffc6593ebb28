"""The embedded reference model: a small trained text-to-image diffusion pipeline and an independent judge of it.

Importing this package is cheap: no torch, no numpy.
"""

from __future__ import annotations

from pathlib import Path

SHAPES: Path = Path(__file__).resolve().parent / "shapes"
"""Folder of the stock `StableDiffusionPipeline`."""
JUDGE: Path = Path(__file__).resolve().parent / "judge"
"""Folder of the judge, a `transformers.CLIPModel` with its tokenizer."""

__all__ = ["JUDGE", "SHAPES"]

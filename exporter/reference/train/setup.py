"""Where and how the networks train."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from exporter.reference.train.data import IMAGES


@dataclasses.dataclass(frozen=True)
class Setup:
    """Where and how everything trains.

    Attributes:
        work: Folder of data, checkpoints and logs.
        into: Folder that receives ``shapes`` and ``judge``.
        seed: Seed of everything.
        device: Where the networks train.
        images: Number of training images of the generator.
    """

    work: Path
    into: Path
    seed: int = 0
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    images: int = IMAGES

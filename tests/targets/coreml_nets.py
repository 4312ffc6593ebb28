"""A small network as packages for Core ML, and what our evaluator makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from targets.base import Array
from targets.coreml import CoreMl, CoreMlOptions
from targets.coreml.package import MANIFEST
from targets.coreml.session import CoreMlSession
from targets.torch_source import TorchProgram


class Net(nn.Module):
    """A convolution that an integer scales, and two linear layers; the first has 4,096 weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 32, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Linear(32, 128), nn.Linear(128, 8)])

    def forward(self, sample: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        hidden = (self.first(sample) * count.float()).permute(0, 2, 3, 1)
        return self.blocks[1](torch.nn.functional.silu(self.blocks[0](hidden)))


def fed(seed: int = 0, side: int = 8) -> dict[str, Array]:
    """Return inputs: (2, 4, side, side) and a number."""
    sample = np.random.default_rng(seed).normal(size=(2, 4, side, side)).astype(np.float32)
    return {"sample": sample, "count": np.array(3, np.int32)}


def made(folder: Path, sides: tuple[int, ...] = (), **options: Any) -> Path:
    """Convert the network into a new folder, for further sides where any are given."""
    folder.mkdir()
    inputs: dict[str, Array] = {"sample": np.zeros((2, 4, 8, 8), np.float32), "count": np.zeros((), np.int32)}
    shapes = tuple(((2, 4, side, side), ()) for side in sides)
    facts = {"weights_sha256": "e" * 64}
    source = TorchProgram("unet", Net(), inputs, ("out",), shapes=shapes, facts=facts, is_denoiser=True)
    CoreMl().convert(source, folder, CoreMlOptions(**options))
    return folder


def evaluated(folder: Path, feeds: dict[str, Array]) -> Array:
    """Return what our evaluator makes of packages."""
    return CoreMlSession(folder / MANIFEST, CoreMlOptions(), core_ml=False)(feeds)["out"]

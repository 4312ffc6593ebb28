"""Training images of the reference model: rendered once from a seed, kept as uint8 arrays and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from exporter.reference.grammar import Scene, scene_from_prompt, scenes
from exporter.reference.render import IMAGE_SIZE, render

IMAGES = 40_000
"""Number of training images of the generator."""


def _write(path: Path, drawn: list[Scene], seed: int) -> None:
    temporary = path.with_suffix(".partial")
    shape = (len(drawn), IMAGE_SIZE, IMAGE_SIZE, 3)
    images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)  # type: ignore[no-untyped-call]
    for index, scene in enumerate(drawn):
        images[index] = render(scene, seed * 10_000_000 + index)
    images.flush()
    temporary.replace(path)


def training_images(folder: Path, seed: int, count: int = IMAGES) -> tuple[npt.NDArray[np.uint8], list[Scene]]:
    """Render the training set, or map the one that is there.

    Args:
        folder: Where ``images-SEED-COUNT.npy`` and its prompts live; created.
        seed: Seed of scenes and renders.
        count: Number of images.

    Returns:
        Images, uint8 (count, 64, 64, 3), read only, and their scenes; none of them is held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"images-{seed}-{count}.npy"
    prompts = path.with_suffix(".json")
    if not prompts.exists():
        drawn = scenes(1000 + seed, count, held_out=False)
        _write(path, drawn, seed)
        temporary = prompts.with_suffix(".partial")
        temporary.write_text(json.dumps([scene.prompt for scene in drawn]), encoding="utf-8")
        temporary.replace(prompts)
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    return images, [scene_from_prompt(text) for text in json.loads(prompts.read_text(encoding="utf-8"))]


def to_tensor(images: npt.NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """Convert images for a network.

    Args:
        images: uint8 (n, height, width, 3), RGB.
        device: Where the tensor goes.

    Returns:
        float32 (n, 3, height, width), -1 to 1.
    """
    tensor = torch.from_numpy(np.array(images)).to(device)
    return tensor.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def draw_indices(count: int, batch: int, generator: torch.Generator) -> npt.NDArray[np.int64]:
    """Draw a batch with repetition.

    Args:
        count: Size of the set.
        batch: Size of the batch.
        generator: Source of the draw.

    Returns:
        int64 (batch,), 0 to `count` - 1.
    """
    drawn = torch.randint(0, count, (batch,), generator=generator, device=generator.device)
    return drawn.cpu().numpy()

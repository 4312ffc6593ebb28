"""Training of the autoencoder: first on crops around the things, then on whole images, then the decoder alone.

Crops cost a quarter of a whole image and hold most of what is hard: corners and small shapes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from exporter.reference.train.data import draw_indices, to_tensor
from exporter.reference.train.loop import Loss, Plan

LATENT_CHANNELS = 8
CROP = 32
KL_WEIGHT = 1e-4
"""Weight of the divergence, summed over the channels of a latent position and averaged over positions."""
THING_WEIGHT = 3.0
"""Extra weight of pixels on a thing or its edge."""


@dataclasses.dataclass(frozen=True)
class VaePlan(Plan):
    """Plan of the autoencoder.

    Attributes:
        crop_steps: Steps on crops, before those on whole images.
        crop_batch: Crops a step.
        batch: Whole images a step.
    """

    crop_steps: int = 0
    crop_batch: int = 32
    batch: int = 16


def build_vae(seed: int) -> AutoencoderKL:
    """Return the autoencoder with fresh weights.

    Args:
        seed: Seed of the weights.

    Returns:
        The network, float32 on the CPU: (n, 3, 64, 64) in -1 to 1 to and from latents (n, 8, 8, 8).
    """
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=64,
    )


def crops(
    images: npt.NDArray[np.uint8], indices: npt.NDArray[np.int64], generator: torch.Generator
) -> npt.NDArray[np.uint8]:
    """Cut one square around a point of a thing out of each image.

    Args:
        images: uint8 (n, 64, 64, 3).
        indices: int64 (batch,), the images to cut from.
        generator: Source of the positions.

    Returns:
        uint8 (batch, 32, 32, 3).
    """
    draws = torch.rand((len(indices), 3), generator=generator, device=generator.device).cpu().numpy()
    found = np.empty((len(indices), CROP, CROP, 3), dtype=np.uint8)
    for row, (index, (pick, right, down)) in enumerate(zip(indices.tolist(), draws.tolist(), strict=True)):
        image = images[index]
        ys, xs = np.nonzero((image != image[0, 0]).any(axis=-1))
        chosen = int(pick * len(ys))
        top = int(np.clip(ys[chosen] - CROP // 2 + (down - 0.5) * CROP / 2, 0, image.shape[0] - CROP))
        left = int(np.clip(xs[chosen] - CROP // 2 + (right - 0.5) * CROP / 2, 0, image.shape[1] - CROP))
        found[row] = image[top : top + CROP, left : left + CROP]
    return found


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the weighted error: absolute, squared and of the differences between neighbouring pixels.

    Args:
        output: float32 (n, 3, height, width), the decoder's image.
        target: The right image, -1 to 1, of the same shape.

    Returns:
        A scalar.
    """
    background = target.flatten(2).median(dim=2).values[:, :, None, None]
    thing = ((target - background).abs().amax(dim=1, keepdim=True) > 0.02).float()
    weight = 1 + THING_WEIGHT * functional.max_pool2d(thing, 3, stride=1, padding=1)
    error = output - target
    flat = (weight * (error.abs() + error.square())).mean()
    across = (weight[..., 1:] * (error[..., 1:] - error[..., :-1]).abs()).mean()
    down = (weight[..., 1:, :] * (error[..., 1:, :] - error[..., :-1, :]).abs()).mean()
    return flat + 0.5 * (across + down)


def vae_loss(vae: AutoencoderKL, images: npt.NDArray[np.uint8], plan: VaePlan) -> Loss:
    """Return the loss of the whole autoencoder.

    Args:
        vae: Network in training.
        images: Training images, uint8 (n, 64, 64, 3).
        plan: Says when crops end.

    Returns:
        The loss of a step: reconstruction and divergence.
    """

    def loss(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step < plan.crop_steps:
            indices = draw_indices(len(images), plan.crop_batch, generator)
            chosen = crops(images, indices, generator)
        else:
            chosen = images[draw_indices(len(images), plan.batch, generator)]
        target = to_tensor(chosen, vae.device)
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=vae.device)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        rebuilt = reconstruction_loss(output, target)
        spread = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).sum(dim=1).mean()
        return {"loss": rebuilt + KL_WEIGHT * spread, "rebuilt": rebuilt, "kl": spread}

    return loss

"""Training of the U-Net together with its text encoder, on latents that the autoencoder computed once."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from exporter.reference.train.data import draw_indices, to_tensor
from exporter.reference.train.folders import build_scheduler
from exporter.reference.train.loop import Loss, Plan
from exporter.reference.train.vae import LATENT_CHANNELS
from exporter.reference.train.words import MAX_TOKENS

TEXT_WIDTH = 128
PROMPT_DROPOUT = 0.1
"""Share of the training prompts replaced by the empty prompt, so that guidance works."""


@dataclasses.dataclass(frozen=True)
class DenoiserPlan(Plan):
    """Plan of the denoiser.

    Attributes:
        batch: Latents a step.
    """

    batch: int = 64


def text_config(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextConfig:
    """Return the configuration of a small CLIP text encoder.

    Args:
        tokenizer: Gives the vocabulary's size and the ids of the special tokens.
        layers: Number of layers.

    Returns:
        The configuration: width 128, 4 heads, 32 positions.
    """
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_denoiser(seed: int, tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """Return the U-Net and the text encoder with fresh weights.

    Args:
        seed: Seed of the weights.
        tokenizer: Tokenizer of the prompts.

    Returns:
        ``unet`` (`UNet2DConditionModel`) and ``text`` (`CLIPTextModel`), float32 on the CPU.
    """
    torch.manual_seed(seed)
    text = CLIPTextModel(text_config(tokenizer, layers=3))
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 96, 176),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(4, 6, 11),
        norm_num_groups=8,
    )
    return nn.ModuleDict({"unet": unet, "text": text})


def prompt_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Tokenize prompts as the pipeline does.

    Args:
        tokenizer: The tokenizer.
        prompts: Any texts.

    Returns:
        int64 (n, 32), padded with the end token.
    """
    found = tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    ids: torch.Tensor = found.input_ids
    return ids


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for weight in network.parameters():
        digest.update(weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def training_latents(vae: AutoencoderKL, images: npt.NDArray[np.uint8], folder: Path) -> torch.Tensor:
    """Encode the training images once, and set the autoencoder's scaling factor from their spread.

    Args:
        vae: Trained autoencoder; its ``scaling_factor`` is set here.
        images: uint8 (n, 64, 64, 3).
        folder: Holds the latents of earlier calls, each named after the encoder's weights.

    Returns:
        Scaled means, float32 (n, 8, 8, 8) on the autoencoder's device, standard deviation 1.
    """
    path = folder / f"latents-{_digest(vae.encoder)}-{len(images)}.npy"
    if not path.exists():
        found = np.empty((len(images), LATENT_CHANNELS, 8, 8), dtype=np.float32)
        with torch.no_grad():
            for start in range(0, len(images), 64):
                chosen = to_tensor(images[start : start + 64], vae.device)
                found[start : start + 64] = vae.encode(chosen).latent_dist.mean.cpu().numpy()
        temporary = path.with_suffix(".partial")
        with temporary.open("wb") as stream:
            np.save(stream, found, allow_pickle=False)
        temporary.replace(path)
    latents = torch.from_numpy(np.load(path, allow_pickle=False)).to(vae.device)
    factor = round(1 / float(latents.std()), 5)
    vae.register_to_config(scaling_factor=factor)
    return latents * factor


def denoiser_loss(networks: nn.ModuleDict, latents: torch.Tensor, ids: torch.Tensor, plan: DenoiserPlan) -> Loss:
    """Return the loss of the denoiser: the squared error of the velocity at a uniformly drawn timestep.

    Args:
        networks: ``unet`` and ``text``, trained together.
        latents: Scaled latents, float32 (n, 8, 8, 8).
        ids: Prompts' tokens, int64 (n + 1, 32); the last row is the empty prompt.
        plan: Gives the batch size.

    Returns:
        The loss of a step.
    """
    device = latents.device
    kept = build_scheduler().alphas_cumprod.to(device)
    ids = ids.to(device)

    def loss(_step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        indices = torch.from_numpy(draw_indices(len(latents), plan.batch, generator)).to(device)
        clean = latents[indices]
        noise = torch.randn(clean.shape, generator=generator, device=device)
        times = torch.randint(0, len(kept), (plan.batch,), generator=generator, device=device)
        dropped = torch.rand((plan.batch,), generator=generator, device=device) < PROMPT_DROPOUT
        tokens = ids[torch.where(dropped, len(ids) - 1, indices)]
        signal = kept[times].sqrt()[:, None, None, None]
        spread = (1 - kept[times]).sqrt()[:, None, None, None]
        states = networks["text"](tokens).last_hidden_state
        velocity = networks["unet"](signal * clean + spread * noise, times, encoder_hidden_states=states).sample
        error = (velocity - (signal * noise - spread * clean)).square().mean()
        return {"loss": error}

    return loss

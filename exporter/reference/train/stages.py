"""The generator's stages of training, each resumable and each from a seed: autoencoder, then denoiser."""

from __future__ import annotations

from collections.abc import Callable

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from exporter.reference.train.data import training_images
from exporter.reference.train.denoiser import (
    DenoiserPlan,
    build_denoiser,
    denoiser_loss,
    prompt_ids,
    training_latents,
)
from exporter.reference.train.folders import save_pipeline
from exporter.reference.train.loop import Run
from exporter.reference.train.optimizer import FIVE
from exporter.reference.train.setup import Setup
from exporter.reference.train.vae import VaePlan, build_vae, vae_loss
from exporter.reference.train.words import build_tokenizer

Tell = Callable[[str], None]


VAE_PLAN = VaePlan(
    name="vae", steps=2700, rate=2e-3, decay=0.35, weight_decay=0.0, muon=FIVE, crop_steps=2000, crop_batch=16, batch=8
)
DENOISER_PLANS = (
    DenoiserPlan(name="denoiser", steps=1700, rate=1e-3, decay=0.4, batch=48, save_every=50),
    DenoiserPlan(name="denoiser-second", steps=1000, rate=8e-4, warmup=50, decay=0.75, batch=48, save_every=50),
    DenoiserPlan(name="denoiser-third", steps=1600, rate=8e-4, warmup=50, decay=0.75, batch=48, save_every=50),
)


def train_vae(setup: Setup, plan: VaePlan, tell: Tell) -> AutoencoderKL:
    """Train the autoencoder, or take up its finished training.

    Args:
        setup: Where and how.
        plan: Length and rates.
        tell: Receives lines of progress.

    Returns:
        The autoencoder with averaged weights, in evaluation mode.
    """
    images, _ = training_images(setup.work, setup.seed, setup.images)
    vae = build_vae(setup.seed).to(setup.device)
    run = Run(plan, vae, setup.work, setup.seed)
    run.fit(vae_loss(vae, images, plan), tell)
    run.use_average()
    return vae


def train_denoiser(setup: Setup, plans: tuple[DenoiserPlan, ...], vae: AutoencoderKL, tell: Tell) -> None:
    """Train U-Net and text encoder, or take up their training, and write the pipeline folder.

    Args:
        setup: Where and how.
        plans: Lengths and rates; each but the first starts from the averaged weights of the one before.
        vae: Trained autoencoder.
        tell: Receives lines of progress.
    """
    images, drawn = training_images(setup.work, setup.seed, setup.images)
    tokenizer = build_tokenizer(setup.work / "tokenizer")
    ids = prompt_ids(tokenizer, [*(scene.prompt for scene in drawn), ""])
    latents = training_latents(vae, images, setup.work)
    networks = build_denoiser(setup.seed, tokenizer).to(setup.device)
    for index, plan in enumerate(plans):
        run = Run(plan, networks, setup.work, setup.seed + index)
        run.fit(denoiser_loss(networks, latents, ids, plan), tell)
        run.use_average()
    unet, text = networks["unet"], networks["text"]
    if not isinstance(unet, UNet2DConditionModel) or not isinstance(text, CLIPTextModel):
        raise TypeError("the denoiser holds a U-Net and a text encoder")
    save_pipeline(setup.into / "shapes", vae, unet, text, tokenizer)

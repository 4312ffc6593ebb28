"""Writes the two model folders: stock files only, fp16 safetensors, replaced as a whole by renames."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from exporter.reference.train.words import build_tokenizer


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Return the scheduler that training and generation share.

    Returns:
        DPM-Solver++ (second order), linear betas of 1,000 timesteps, velocity prediction.
    """
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        steps_offset=1,  # no effect with linspace spacing; the pipeline asks for it
    )


Network = TypeVar("Network", bound=nn.Module)


def half(network: Network) -> Network:
    """Copy a network to the CPU in fp16.

    Args:
        network: Any network; stays as it is.

    Returns:
        The copy.
    """
    return copy.deepcopy(network).to("cpu", torch.float16).eval()


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside the old one, then put it in its place.

    Args:
        folder: The folder to replace or create.
        write: Fills the new folder, which exists and is empty.
    """
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    _readable(fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def state_float32(config: Path) -> None:
    """Make plain ``from_pretrained`` of a transformers model give float32, whatever precision is stored.

    Args:
        config: The model's ``config.json``; changed in place, with every nested configuration.
    """
    content = json.loads(config.read_text(encoding="utf-8"))
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _readable(folder: Path) -> None:
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def save_pipeline(
    folder: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Write the stock pipeline folder.

    Args:
        folder: Where it goes; replaced as a whole.
        vae: Autoencoder; its config holds the scaling factor.
        unet: Denoiser.
        text: Text encoder.
        tokenizer: Tokenizer.
    """
    pipeline = StableDiffusionPipeline(
        vae=half(vae),
        text_encoder=half(text),
        tokenizer=tokenizer,
        unet=half(unet),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    def write(fresh: Path) -> None:
        pipeline.save_pretrained(fresh, safe_serialization=True)
        build_tokenizer(fresh / "tokenizer")
        state_float32(fresh / "text_encoder" / "config.json")

    replace_folder(folder, write)

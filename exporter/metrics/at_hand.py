"""Judges whose weights come from elsewhere: LPIPS, Inception, full-size CLIP. Never fetched; used when at hand.

Each function returns what computes, or one sentence that says what is missing and how to get it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.memo import FileMemo
from exporter.metrics.images import Distance, Images

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
CLIP_NAME = "openai/clip-vit-large-patch14"
BATCH = 16

Features = Callable[[Images], NDArray[np.float64]]
"""(n, h, w, 3) uint8 -> (n, d)."""


def identity(memo: FileMemo, hub: Path | None = None, cache: Path | None = None) -> dict[str, str | None]:
    """Return what decides which judges are at hand and what they say: versions and digests, None for what is missing.

    Args:
        memo: what is known of their weight files.
        hub: folder of torch's hub; its own by default.
        cache: folder of the model hub's cache; its own by default.
    """
    found: dict[str, str | None] = {}
    for name in ("torchvision", "torch-fidelity", "torchmetrics", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    files = [_checkpoints(hub) / ALEXNET_FILE, _checkpoints(hub) / INCEPTION_FILE, _clip_file(cache)]
    names = (ALEXNET_FILE, INCEPTION_FILE, CLIP_NAME)
    for name, file in zip(names, files, strict=True):
        found[name] = memo.sha256(file) if file is not None and file.is_file() else None
    return found


def lpips(hub: Path | None = None) -> Distance | str:
    """Return the LPIPS distance with AlexNet features, or why there is none.

    Args:
        hub: folder of torch's hub; its own by default.

    Source: Zhang et al. (arXiv 1801.03924), as torchmetrics computes it.
    """
    if problem := _import_problem("torchvision"):
        return (
            f"LPIPS needs torchvision's AlexNet; {problem}. Run: pip install torchvision (a build for the torch that "
            "is here), then once with network access: "
            "python -c 'import torchvision; torchvision.models.alexnet(weights=\"DEFAULT\")'"
        )
    weights = _checkpoints(hub) / ALEXNET_FILE
    if not weights.is_file():
        return (
            f"LPIPS needs AlexNet's weights; {ALEXNET_FILE} is not in torch's hub folder. Run once with network "
            "access: python -c 'import torchvision; torchvision.models.alexnet(weights=\"DEFAULT\")'"
        )
    return _lpips_alexnet


def inception(hub: Path | None = None) -> Features | str:
    """Return Inception-v3's 2048 features (the space of published FID and KID), or why there are none.

    Args:
        hub: folder of torch's hub; its own by default.
    """
    if problem := _import_problem("torch_fidelity"):
        return (
            f"Inception features need torch-fidelity; {problem}. Run: pip install torch-fidelity, then once with "
            "network access: python -c 'from torchmetrics.image import FrechetInceptionDistance as F; F()'"
        )
    weights = _checkpoints(hub) / INCEPTION_FILE
    if not weights.is_file():
        return (
            f"Inception features need its weights; {INCEPTION_FILE} is not in torch's hub folder. Run once with "
            "network access: python -c 'from torchmetrics.image import FrechetInceptionDistance as F; F()'"
        )
    return _Inception(weights)


@dataclass(frozen=True)
class Clip:
    """A CLIP model that scores images against prompts.

    Attributes:
        name: of the model.
        model: a transformers CLIPModel in evaluation mode.
        processor: its CLIPProcessor.
    """

    name: str
    model: Any
    processor: Any

    def scores(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Return (n,) 100 times the cosine of each image and its prompt, at least 0.

        Args:
            images: (n, h, w, 3) uint8.
            prompts: n texts; longer ones are truncated.

        Source: Hessel et al., CLIPScore (arXiv 2104.08718). Departs: weight 100 instead of 250, as torchmetrics.
        """
        parts = []
        for start in range(0, len(images), BATCH):
            inputs = self.processor(
                text=list(prompts[start : start + BATCH]),
                images=list(images[start : start + BATCH]),
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
            with torch.inference_mode():
                out = self.model(**inputs)
            cosine = torch.nn.functional.cosine_similarity(out.image_embeds.double(), out.text_embeds.double())
            parts.append((100 * cosine).clamp(min=0).numpy())
        return np.concatenate(parts)


def full_clip(cache: Path | None = None) -> Clip | str:
    """Return CLIP ViT-L/14 from the model cache, or why there is none.

    Args:
        cache: folder of the hub's cache; its own by default.
    """
    found = _clip_file(cache)
    if found is None:
        return f"{CLIP_NAME} is not in the model cache. Run once with network access: hf download {CLIP_NAME}"
    return clip_from_folder(found.parent, CLIP_NAME)


def _clip_file(cache: Path | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # keeps `import` of this module light

    found = try_to_load_from_cache(CLIP_NAME, "model.safetensors", cache_dir=cache)
    return Path(found) if isinstance(found, str) else None


def clip_from_folder(folder: Path, name: str) -> Clip:
    """Return the CLIP model of a folder that `save_pretrained` of model and processor wrote."""
    from transformers import CLIPModel, CLIPProcessor  # seconds to import

    model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return Clip(name, model.eval(), CLIPProcessor.from_pretrained(folder, local_files_only=True))


@dataclass(frozen=True)
class _Inception:
    weights: Path

    def __call__(self, images: Images) -> NDArray[np.float64]:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(self.weights))
        parts = [network(_channels_first(images[start : start + BATCH])) for start in range(0, len(images), BATCH)]
        return np.asarray(torch.cat(parts).double().numpy(), np.float64)


def _lpips_alexnet(images: Images, reference: Images) -> NDArray[np.float64]:
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    found: list[float] = []
    for start in range(0, len(images), BATCH):
        pair = [_channels_first(array[start : start + BATCH]).float() / 255 for array in (images, reference)]
        with torch.inference_mode():
            distances = learned_perceptual_image_patch_similarity(*pair, "alex", reduction="none", normalize=True)
        found.extend(float(value) for value in distances.reshape(-1))
    return np.asarray(found)


def _channels_first(images: Images) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _checkpoints(hub: Path | None) -> Path:
    return (Path(torch.hub.get_dir()) if hub is None else hub) / "checkpoints"


def _import_problem(name: str) -> str:
    """Return why a library cannot be imported; empty when it can.

    A torchvision built for another torch is installed and fails with RuntimeError.
    """
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except (ImportError, RuntimeError, OSError) as error:
        return f"{name} is installed and does not load ({str(error).splitlines()[0]})"
    return ""

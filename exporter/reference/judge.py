"""The judge: a small CLIP model, trained on renders alone, that scores and ranks prompts for images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from exporter.errors import SourceError
from exporter.reference import JUDGE
from exporter.reference.grammar import negatives, scene_from_prompt

NEGATIVES = 16
"""Wrong prompts that the right one is ranked among."""
_BATCH = 128


class Judge:
    """The judge on the CPU, in float32, without gradients.

    Args:
        folder: Folder of the `CLIPModel`.
    """

    def __init__(self, folder: Path = JUDGE) -> None:
        if not (folder / "config.json").is_file():
            raise SourceError(f"judge: no model folder; got {folder}, expected config.json in it. Give its folder.")
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(requires_grad=False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        facts = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        self.size: int = facts["crop_size"]["height"]
        self._mean = torch.tensor(facts["image_mean"]).reshape(1, 3, 1, 1)
        self._std = torch.tensor(facts["image_std"]).reshape(1, 3, 1, 1)

    def _pixels(self, images: npt.NDArray[np.uint8]) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1:] != (self.size, self.size, 3) or images.dtype != np.uint8:
            raise SourceError(
                f"judge: wrong images; got {images.dtype} {images.shape}, "
                f"expected uint8 (n, {self.size}, {self.size}, 3). Convert or resize them."
            )
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        return (pixels - self._mean) / self._std

    def _check_counts(self, images: npt.NDArray[np.uint8], prompts: Sequence[str]) -> None:
        if len(images) != len(prompts):
            raise SourceError(
                f"judge: images and prompts differ in number; got {len(images)} and {len(prompts)}, "
                "expected one prompt an image. Pair them."
            )

    @torch.no_grad()
    def features(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed images, for KID.

        Args:
            images: uint8 (n, 64, 64, 3), RGB.

        Returns:
            Projected embeddings before normalisation, float32 (n, 128).
        """
        pixels = self._pixels(images)
        if not len(pixels):
            return np.empty((0, self.model.config.projection_dim), np.float32)
        found = [
            self.model.visual_projection(self.model.vision_model(pixel_values=part).pooler_output)
            for part in torch.split(pixels, _BATCH)
        ]
        return np.asarray(torch.cat(found).numpy(), np.float32)

    @torch.no_grad()
    def _text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit embeddings of prompts, float32 (n, 128)."""
        found = []
        for start in range(0, len(prompts), 8 * _BATCH):
            tokens = self.tokenizer(
                list(prompts[start : start + 8 * _BATCH]), padding="longest", truncation=True, return_tensors="pt"
            ).input_ids
            found.append(self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output))
        return functional.normalize(torch.cat(found), dim=-1)

    def scores(self, images: npt.NDArray[np.uint8], prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the CLIP score of each image and its prompt.

        Args:
            images: uint8 (n, 64, 64, 3), RGB.
            prompts: n texts.

        Returns:
            100 times the cosine, not below 0; float32 (n,).
        """
        self._check_counts(images, prompts)
        if not prompts:
            return np.empty(0, np.float32)
        seen = functional.normalize(torch.from_numpy(self.features(images)), dim=-1)
        cosine = (seen * self._text(prompts)).sum(dim=-1)
        return np.asarray(100 * cosine.clamp(min=0), dtype=np.float32)

    def rates(self, images: npt.NDArray[np.uint8], prompts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Tell for each image whether its prompt is ranked above 16 fixed prompts with one attribute changed.

        Args:
            images: uint8 (n, 64, 64, 3), RGB.
            prompts: n prompts of the reference grammar.

        Returns:
            bool (n,).
        """
        self._check_counts(images, prompts)
        if not prompts:
            return np.empty(0, np.bool_)
        seen = functional.normalize(torch.from_numpy(self.features(images)), dim=-1)
        texts = [
            text
            for prompt in prompts
            for text in (prompt, *(scene.prompt for scene in negatives(scene_from_prompt(prompt), NEGATIVES)))
        ]
        said = self._text(texts).reshape(len(prompts), NEGATIVES + 1, -1)
        cosine = (said @ seen[:, :, None])[:, :, 0]
        return np.asarray(cosine[:, 0] > cosine[:, 1:].amax(dim=1), dtype=np.bool_)

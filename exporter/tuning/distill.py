"""Distillation from the dense state: the pruned denoiser learns to answer, and to see, as the dense one does.

Source: output and feature distillation as in BK-SDM (arXiv 2305.15798); features normalized as in LAPTOP-Diff
(arXiv 2404.11098); guided answers compared as "Improved Techniques for Training Smaller and Faster Stable Diffusion"
seems to (a reconstruction; see `exporter.tuning.losses`). Departs: the loss on the data itself is off by default, data
comes from the dense pipeline unless images are named.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from calibration.calling import Form
from exporter.errors import RecipeError, ToolMissing
from exporter.networks.components import denoiser, family
from exporter.tuning.base import Shelf, TuneContext
from exporter.tuning.data import Generation, LatentData, encoded, generated, noise_schedule
from exporter.tuning.images import captioned_images
from exporter.tuning.options import GENERATED, DistillOptions
from exporter.tuning.training import Work, distill
from exporter.tuning.zeros import Frozen

__all__ = ["Distill", "DistillOptions", "Work", "device_of", "distill"]


class Distill:
    """Trains the pruned denoiser to answer like the dense one, on latents the dense pipeline makes or on your images.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[DistillOptions]] = DistillOptions

    def __init__(self, options: DistillOptions) -> None:
        self._options = options

    def tune(self, student: nn.Module, teacher: DiffusionPipeline, context: TuneContext) -> dict[str, Any]:
        """Train the student's weights in place.

        Args:
            student: the denoiser of a state, float32; its shapes and structure stay.
            teacher: the dense pipeline, with the scheduler of the recipe's sampling.
            context: what the run lends.

        Returns:
            See `distill`, and ``data``: where the latents came from.

        Raises:
            RecipeError: no such images or prompts, or a scheduler that distillation has no noise for.
            ToolMissing: the recipe asks for a GPU and there is none.
            ComponentFailed: the loss is no longer a number.
        """
        _check_form(teacher, context.form)
        _check_guided(teacher, self._options.guided_share)
        device = device_of(self._options.device)
        teacher.to(device)
        data = self._data(teacher, context)
        dense = getattr(teacher, denoiser(type(teacher).__name__).folder)
        # Zeros that a stage before put, and that a compiler will count on, are no weights to train.
        zeros = partial(Frozen, names=tuple(context.sparsity)) if context.sparsity else None
        work = Work(context.workdir, context.progress, device, context.seed, zeros)
        facts = distill(student, dense, data, self._options, work)
        return {"data": self._options.data, **facts}

    def _data(self, teacher: DiffusionPipeline, context: TuneContext) -> LatentData:
        shelf = context.shelf or Shelf(context.workdir / "data", context.seed)
        plan = Generation(context.steps, context.guidance, context.size, shelf.seed, 32, context.form)
        if self._options.data == GENERATED:
            prompts = context.prompts(str(self._options.prompts))
            count = self._options.samples
            return generated(teacher, prompts, count, plan, folder=shelf.folder, progress=context.progress)
        images = captioned_images(Path(self._options.data))
        return encoded(teacher, images, replace(plan, batch=8), folder=shelf.folder, progress=context.progress)


def _check_form(teacher: DiffusionPipeline, form: Form) -> None:
    """Refuse, before any work, a family whose noise or latents distillation cannot make."""
    noise_schedule(teacher.scheduler.config)
    if form.asked == "class_labels":
        got = f"tune.method: distill makes its data from texts; got {type(teacher).__name__}, which draws classes."
        raise RecipeError(f"{got} Remove the stage.")


def _check_guided(teacher: DiffusionPipeline, share: float) -> None:
    name = type(teacher).__name__
    if share and family(name).guidance != "rows":
        got = f"tune.guided_share: {name} is not guided by a row without the prompt; got {share:g}, expected 0."
        raise RecipeError(f"{got} Remove it.")


def device_of(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device of this name; ``auto`` is a GPU if there is one.

    Raises:
        ToolMissing: ``cuda`` without a GPU that torch can use.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ToolMissing("tune.device: got 'cuda', but torch finds no GPU; expected one. Write device: auto, or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")

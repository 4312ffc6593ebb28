"""SparseDM: n:m zeros that move while the denoiser learns from the dense one, then stay.

Source: SparseDM (arXiv 2404.10445), its published code: masks found anew in every forward pass, the straight-through
gradient with SR-STE's decay 2e-4 of what is masked, transfer from the dense teacher at the same noised latents. Removes
single weights: n:m along the inputs of linear layers and the input channels of convolutions, or unstructured; shapes
stay and the zeros are baked in. Needs prompts; gradients and training for ``steps`` above 0.

Departs: the loss is the teacher's answer alone, as one of the two published scripts has it (the other adds the data's
noise; write ``data_weight``); weights are averaged; the mask is fixed for the last share of the steps, so that the
weights that stay settle; the most sensitive layers may stay dense; the first mask may come from another method. Does
not reproduce the published runs of 50,000 to 500,000 steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from exporter.errors import RecipeError
from exporter.networks.components import denoiser
from exporter.pruners.base import Context, Outcome
from exporter.pruners.hessians import HessianOptions, remove_by_hessian
from exporter.pruners.informed import Start, input_norms, outcome, scores_of, start
from exporter.pruners.obs_diff import log_decrease
from exporter.pruners.sparse import mask_by
from exporter.tuning.options import DistillOptions
from exporter.tuning.training import Work, distill
from exporter.tuning.zeros import Transfer

_COUNT = {"minimum": 1}
_POSITIVE = {"exclusiveMinimum": 0}


@dataclass(frozen=True)
class SparseDMOptions(HessianOptions):
    """Recipe keys of SparseDM.

    Attributes:
        prompts: a set or file of prompts, none of those that the run measures on. The embedded model has its own.
        images: how many of them are drawn, for the first mask and the sensitivities.
        pattern: ``n:m``, at most n of m consecutive inputs of a layer not zero, such as ``2:4``; or ``unstructured``.
        keep_ratio: fraction of a layer's weights that stay, in (0, 1]; for ``unstructured``. Follows from ``n:m``.
        protect: module path patterns that stay dense, all below a match included.
        keep_dense: how many of the most sensitive layers stay dense: those that, masked alone by magnitude, move the
            guided answer most.
        least: fewest inputs and outputs of a layer that gets n:m; narrower ones stay dense. The default is what one
            sparse instruction takes, so that a kernel exists. Those that win are wider: TensorRT's maintainers saw
            gains from 256 on (issues 4065 and 3849 of NVIDIA/TensorRT). Write 256 where only speed there counts.
        permute: reorder the inputs of layers before n:m is put, so that more magnitude stays, wherever the layers that
            make and read them can be reordered alike: feed-forward neurons, values of a head, channels of a norm's
            group inside of a resnet. The dense network answers as before. Off by default: it takes minutes for a large
            network, and other weights stay than without.
        groups: of a first mask from ``sparsegpt`` or ``obs-diff``; see there.
        damping: likewise.
        first: where the first mask comes from: ``magnitude``; ``wanda``, whose norms of inputs then weigh the sizes in
            every later mask too; ``sparsegpt`` or ``obs-diff``, which also move the weights that stay.
        steps: optimizer steps; 0 bakes the first mask in and trains nothing.
        decay: of masked weights, the lambda of SR-STE.
        frozen: share of the steps, the last ones, for which the mask is fixed; at least one step.
        batch: noised latents per step.
        learning_rate: the highest; see `exporter.tuning.training.rate_at`.
        weight_decay: of AdamW.
        data_weight: weight of the mean squared error to what the data itself says (noise or velocity); the teacher's
            answer has 1.
        samples: how many latents the dense pipeline draws to train on.
        ema: decay of the averaged weights that end in the network.
        checkpoint_every: steps between two checkpoints.
        device: where to train; ``auto`` takes a GPU if there is one.
    """

    first: Literal["magnitude", "wanda", "sparsegpt", "obs-diff"] = "magnitude"
    steps: int = field(default=0, metadata={"minimum": 0})
    decay: float = field(default=2e-4, metadata={"minimum": 0})
    frozen: float = field(default=0.15, metadata={"exclusiveMinimum": 0, "maximum": 1})
    batch: int = field(default=16, metadata=_COUNT)
    learning_rate: float = field(default=2e-4, metadata=_POSITIVE)
    weight_decay: float = field(default=0.0, metadata={"minimum": 0})
    data_weight: float = field(default=0.0, metadata={"minimum": 0})
    samples: int = field(default=128, metadata=_COUNT)
    ema: float = field(default=0.99, metadata={"minimum": 0, "exclusiveMaximum": 1})
    checkpoint_every: int = field(default=100, metadata=_COUNT)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        super().__post_init__()
        for key, least in (("steps", 0), ("batch", 1), ("samples", 1), ("checkpoint_every", 1)):
            if getattr(self, key) < least:
                got = f"prune.{key}: got {getattr(self, key)}, expected a whole number of at least {least}."
                raise RecipeError(f"{got} Write {max(least, 1)}.")
        for key in ("decay", "weight_decay", "data_weight"):
            if getattr(self, key) < 0:
                raise RecipeError(f"prune.{key}: got {getattr(self, key):g}, expected 0 or more. Write 0.0002.")
        if not 0 < self.frozen <= 1:
            raise RecipeError(f"prune.frozen: got {self.frozen:g}, expected a number in (0, 1]. Write 0.15.")
        if self.learning_rate <= 0:
            got = f"prune.learning_rate: got {self.learning_rate:g}, expected a number above 0."
            raise RecipeError(f"{got} Write 0.0002.")
        if not 0 <= self.ema < 1:
            raise RecipeError(f"prune.ema: got {self.ema:g}, expected a number in [0, 1). Write 0.99.")


class SparseDM:
    """Weights go by size; which ones, is decided anew at every step of the training and then fixed.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[SparseDMOptions]] = SparseDMOptions

    def __init__(self, options: SparseDMOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place.

        Raises:
            RecipeError: no layer can have these zeros, there are no prompts, or a scheduler without noise to train on.
            ToolMissing: the recipe asks for a GPU and there is none.
            ComponentFailed: inputs or a loss that are not finite.
        """
        begun = start(network, self._options, context, by_inputs=self._options.first == "wanda")
        if begun.exam is None or not begun.found.layers:
            return begun.found.outcome(**begun.facts)
        saliency, facts = self._first(network, begun, context)
        if self._options.steps:
            facts |= self._train(network, begun, saliency, context)
        else:
            mask_by(begun.found, partial(scores_of, norms=saliency))
        return outcome(network, begun, first=self._options.first, **facts)

    def _first(self, network: nn.Module, begun: Start, context: Context) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what weighs the sizes of weights, by weight; where another method moves weights, it has."""
        first, layers, exam = self._options.first, begun.found.layers, begun.exam
        if exam is None or first == "magnitude":
            return {}, {}
        if first == "wanda":
            return input_norms(network, layers, exam, context), {}
        steps = len({asked.timestep for asked in exam.calls})
        weights = log_decrease(steps) if first == "obs-diff" else []
        return {}, remove_by_hessian(network, layers, exam, self._options, context, weights)

    def _train(self, network: nn.Module, begun: Start, saliency: dict[str, Tensor], context: Context) -> dict[str, Any]:
        from exporter.tuning.distill import device_of

        options, loan = self._options, context.borrowed
        pipeline = loan.pipeline()
        teacher: nn.Module = getattr(pipeline, denoiser(type(pipeline).__name__).folder)
        freeze_at = options.steps - max(1, round(options.frozen * options.steps))
        claims = {layer.name: layer.pattern for layer in begun.found.layers}
        zeros = partial(Transfer, claims=claims, decay=options.decay, freeze_at=freeze_at, saliency=saliency)
        seed = int(torch.randint(2**31, (), generator=context.generator))
        work = Work(context.workdir / "training", context.progress, device_of(options.device), seed, zeros)
        told = distill(network, teacher, loan.data(options.prompts, options.samples), _distillation(options), work)
        kept = ("steps", "error_before", "error_after", "loss")
        return {"frozen_from": freeze_at, **{key: told[key] for key in kept}}


def _distillation(options: SparseDMOptions) -> DistillOptions:
    return DistillOptions(
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        feature_weight=0.0,
        task_weight=options.data_weight,
        ema=options.ema,
        prompts=options.prompts or "",  # families that are not asked have none
        samples=options.samples,
        checkpoint_every=options.checkpoint_every,
    )

"""What a recipe may say about distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from exporter.errors import RecipeError

GENERATED = "generated"
# Limits as editors read them in the recipe's JSON Schema; `__post_init__` enforces them.
_COUNT = {"minimum": 1}
_POSITIVE = {"exclusiveMinimum": 0}
_WEIGHT = {"minimum": 0}
_SHARE = {"minimum": 0, "exclusiveMaximum": 1}


@dataclass(frozen=True)
class DistillOptions:
    """Recipe keys of ``tune: {method: distill}``.

    Attributes:
        steps: optimizer steps.
        batch: noised latents per forward pass.
        accumulate: forward passes per step, for batches larger than memory allows.
        learning_rate: the highest, after a linear warm-up over the first twentieth; then a cosine down to 0.
        weight_decay: of AdamW.
        output_weight: weight of the mean squared error to the teacher's answer.
        feature_weight: weight of the relative error to what the teacher's stages answer.
        features: what that error is of: ``normalized`` divides each stage's by the teacher's mean square, so that every
            stage counts alike (LAPTOP-Diff); ``plain`` adds them up as they are (BK-SDM).
        guided_share: share of the forward passes whose error of the answer is that of the guided answer, which is what
            an image is made of; 0 for families that are not guided by two rows.
        guidance_low: lowest guidance scale of such a pass; the scale is drawn anew for every row.
        guidance_high: highest.
        task_weight: weight of the mean squared error to what the data itself says (noise or velocity).
        ema: decay of the averaged weights that end in the student.
        prompt_dropout: share of prompts replaced by the empty one.
        clip_norm: limit of the gradient's norm.
        data: ``generated``, or a folder of images with captions.
        prompts: for ``generated``: a named set or file of prompts.
        samples: for ``generated``: how many latents.
        checkpoint_every: steps between two checkpoints.
        precision: of the forward pass; weights stay float32.
        device: ``auto`` takes a GPU if there is one.
    """

    steps: int = field(metadata=_COUNT)
    batch: int = field(default=16, metadata=_COUNT)
    accumulate: int = field(default=1, metadata=_COUNT)
    learning_rate: float = field(default=2e-4, metadata=_POSITIVE)
    weight_decay: float = 1e-2
    output_weight: float = field(default=1.0, metadata=_WEIGHT)
    feature_weight: float = field(default=0.1, metadata=_WEIGHT)
    features: Literal["normalized", "plain"] = "normalized"
    guided_share: float = field(default=0.0, metadata={"minimum": 0, "maximum": 1})
    guidance_low: float = field(default=2.0, metadata={"minimum": 1})
    guidance_high: float = field(default=14.0, metadata={"minimum": 1})
    task_weight: float = field(default=0.0, metadata=_WEIGHT)
    ema: float = field(default=0.99, metadata=_SHARE)
    prompt_dropout: float = field(default=0.1, metadata=_SHARE)
    clip_norm: float = field(default=1.0, metadata=_POSITIVE)
    data: str = GENERATED
    prompts: str | None = None
    samples: int = field(default=128, metadata=_COUNT)
    checkpoint_every: int = field(default=100, metadata=_COUNT)
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        for key in ("steps", "batch", "accumulate", "samples", "checkpoint_every"):
            if getattr(self, key) < 1:
                got = f"tune.{key}: got {getattr(self, key)}, expected a whole number of at least 1."
                raise RecipeError(f"{got} Write 1 or more.")
        for key in ("learning_rate", "clip_norm"):
            if getattr(self, key) <= 0:
                raise RecipeError(f"tune.{key}: got {getattr(self, key):g}, expected a number above 0. Write 0.0002.")
        for key in ("ema", "prompt_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise RecipeError(f"tune.{key}: got {getattr(self, key):g}, expected a number in [0, 1). Write 0.1.")
        weights = (self.output_weight, self.feature_weight, self.task_weight)
        if min(weights) < 0 or max(weights) == 0:
            got = (
                f"tune: got output_weight, feature_weight, task_weight of {weights}, expected none below 0, one above."
            )
            raise RecipeError(f"{got} Write output_weight: 1.")
        if self.features not in ("normalized", "plain"):
            got = f"tune.features: got {self.features!r}, expected normalized or plain."
            raise RecipeError(f"{got} Write normalized.")
        if not 0 <= self.guided_share <= 1:
            got = f"tune.guided_share: got {self.guided_share:g}, expected a number in [0, 1]."
            raise RecipeError(f"{got} Write 0.5.")
        if not 1 <= self.guidance_low <= self.guidance_high:
            got = f"tune.guidance_low: got {self.guidance_low:g} with guidance_high {self.guidance_high:g}, expected"
            raise RecipeError(f"{got} two numbers of at least 1 in order. Write guidance_low: 2, guidance_high: 14.")
        if self.data == GENERATED and self.prompts is None:
            got = "tune.prompts: missing; expected a set or file of prompts, which data: generated needs."
            raise RecipeError(
                f"{got} Write prompts: FILE (one a line) or a built-in set, or name a folder of images as data."
            )

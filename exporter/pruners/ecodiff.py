"""EcoDiff: masks on heads and feed-forward neurons, learnt end to end over the whole sampling trajectory.

Source: "EcoDiff" (arXiv 2412.02852), now "Learnable Sparsity for Vision Generative Models", from its code:
hard-concrete masks, one logit per attention head, feed-forward neuron and, of Flux, output of a modulation; the same
mask at every timestep; weights frozen. The loss is on the final latents against those of the dense denoiser from the
same noise. Removes heads, neurons and modulation outputs. Needs prompts, many whole trajectories, and gradients through
them, of one step at a time; trains nothing but the logits.

Departs, on purpose:
- The noise of a mask is drawn once per optimisation step; the published code draws it anew when a step is run again, so
  that its gradient belongs to another mask than its loss.
- The sparsity term is the expected share of parameters that stay, in the sigmoid or the L0 form, instead of the L1 norm
  of raw logits, which pulls a mask to one half. Each unit weighs as many parameters as go with it, so that a logit says
  whether a unit is worth its cost.
- One budget: all units are ranked together by their logits, and `keep_ratio` is the share of their parameters that
  stays. Published is the same ratio for each family of units.
- A unit is masked in the weights that read it, not by a hook; a branch whose last unit goes loses its bias too.
- Trajectories are of a solver of one step, whatever the recipe samples with: DDIM, Euler for a flow, a consistency
  model's own. Adam without decay of the logits.
Not reproduced: attention of a single head keeps it, and so does attention over text and image at once its last one;
recovery by LoRA, for which there is `tune`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from exporter.artifact import digest_of
from exporter.errors import RecipeError
from exporter.progress import task
from exporter.pruners.base import Context, CutOptions, DataOptions, Outcome
from exporter.pruners.protect import check_patterns

if TYPE_CHECKING:  # seconds to import
    from exporter.pruners.masks import Maskable

MASKED = ("heads", "neurons", "modulations")
"""Kinds of unit that have masks."""

_TEMPERATURE, _STRETCH = 0.83, 0.1
START = 3.0
"""Every logit's first value: all but open."""


@dataclass(frozen=True)
class EcoDiffOptions(DataOptions):
    """Recipe keys.

    Attributes:
        keep_ratio: fraction kept, in (0, 1], of the parameters of all units that have a mask.
        prompts: a set or file of prompts to draw for; none for a pipeline that takes none.
        images: how many trajectories are learnt from, in turn, each with a prompt and a noise of its own.
        round_to: widths become multiples of it, at least 1.
        protect: module path patterns that are never touched, all below a match included.
        parts: units that get a mask, of ``heads``, ``neurons`` and ``modulations`` (of Flux).
        steps: optimisation steps, each on the recipe's batch of images.
        sampler_steps: denoising steps of a trajectory; those of the recipe's sampling where it is not set.
        learning_rate: of the logits. Published: 0.1, and 0.5 for heads and modulations of Flux.
        sparsity: weight of the sparsity term beside the error. Published: 0.5 for SDXL, 0.01 for Flux.
        regularizer: ``l0``, the chance that a mask is not 0, or ``sigmoid`` of 0.4 times the logit plus 1.
        softness: how little the noise of a mask reaches; in (0, 1). Published: 0.5 for SDXL, 0.1 for Flux.
    """

    keep_ratio: float = field(default=0.8, metadata={"exclusiveMinimum": 0, "maximum": 1})
    round_to: int = field(default=8, metadata={"minimum": 1})
    protect: tuple[str, ...] = ()
    parts: tuple[str, ...] = field(default=MASKED, metadata={"items": {"enum": list(MASKED)}, "minItems": 1})
    steps: int = field(default=100, metadata={"minimum": 1})
    sampler_steps: int | None = field(default=None, metadata={"minimum": 1})
    learning_rate: float = field(default=0.1, metadata={"exclusiveMinimum": 0})
    sparsity: float = field(default=0.5, metadata={"minimum": 0})
    regularizer: Literal["l0", "sigmoid"] = "l0"
    softness: float = field(default=0.5, metadata={"exclusiveMinimum": 0, "exclusiveMaximum": 1})

    @property
    def least_prompts(self) -> int:
        """Prompts are used in turn."""
        return 1

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        super().__post_init__()
        self.cut  # noqa: B018 - checks what is shared with other methods
        wrong = {
            "steps": None if self.steps >= 1 else "at least 1. Write 100",
            "sampler_steps": None if self.sampler_steps is None or self.sampler_steps >= 1 else "at least 1. Write 8",
            "learning_rate": None if self.learning_rate > 0 else "more than 0. Write 0.1",
            "sparsity": None if self.sparsity >= 0 else "at least 0. Write 0.5",
            "regularizer": None if self.regularizer in ("l0", "sigmoid") else "l0 or sigmoid. Choose one",
            "softness": None if 0 < self.softness < 1 else "a number between 0 and 1. Write 0.5",
            "parts": None if self.parts and not set(self.parts) - set(MASKED) else f"some of {', '.join(MASKED)}",
        }
        for key, expected in wrong.items():
            if expected:
                raise RecipeError(f"prune.{key}: got {getattr(self, key)!r}, expected {expected}.")

    @property
    def cut(self) -> CutOptions:
        """What is shared with other methods that cut widths."""
        return CutOptions(self.keep_ratio, self.round_to, protect=self.protect, parts=("heads", "neurons"))


class EcoDiff:
    """Units go whose masks the whole trajectory closes at least cost to the final latents.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[EcoDiffOptions]] = EcoDiffOptions

    def __init__(self, options: EcoDiffOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place.

        Raises:
            RecipeError: no prompts, nothing to mask, or a ratio that removes nothing or that cannot be reached.
            ComponentFailed: loss or gradients are not finite.
        """
        if self._options.keep_ratio == 1.0:
            return Outcome()
        from exporter.pruners import masks

        check_patterns(network, self._options.protect)
        options = self._options
        found = masks.maskables(network, options.cut, options.parts)
        _choose(found, torch.zeros(sum(item.layer.units for item in found)), options)  # refused before any work
        logits, facts = _learn(network, found, options, context)
        gone = _choose(found, logits, options)
        emptied = masks.remove_masked(network, found, gone, options.cut, context.progress)
        removed = sum(item.cost * len(units) for item, units in zip(found, gone, strict=True))
        total = sum(item.cost * item.layer.units for item in found)
        units = masks.kept_by_part(found, gone)
        return Outcome({**facts, "units": units, "maskable_kept": round(1 - removed / total, 6), "emptied": emptied})


def hard_concrete(logits: Tensor, uniform: Tensor, softness: float) -> Tensor:
    """Return masks from 0 to 1, both ends included.

    Args:
        logits: (units,) float; larger is more open.
        uniform: (units,) in [0, 1): the noise.
        softness: bounds the noise, which reaches to the logarithm of (1 + softness) / softness.

    Source: EcoDiff's ``hard_discrete``; hard-concrete of arXiv 1712.01312 with its ends stretched by 0.1.
    """
    noise = torch.log(uniform + softness) - torch.log(1 - uniform + softness)
    soft = torch.sigmoid((noise + logits) / _TEMPERATURE)
    return (soft * (1 + 2 * _STRETCH) - _STRETCH).clamp(0, 1)


def open_share(logits: Tensor, costs: Tensor, regularizer: str) -> Tensor:
    """Return the share of the units' parameters that is expected to stay, a scalar from 0 to 1.

    Args:
        logits: (units,) float.
        costs: (units,) parameters of each.
        regularizer: ``l0`` or ``sigmoid``; see `EcoDiffOptions`.
    """
    if regularizer == "sigmoid":
        each = torch.sigmoid(0.4 * logits + 1)
    else:
        each = torch.sigmoid(logits - _TEMPERATURE * torch.log(torch.tensor(_STRETCH / (1 + _STRETCH))))
    return (each * costs).sum() / costs.sum()


def _choose(found: Sequence[Maskable], logits: Tensor, options: EcoDiffOptions) -> list[list[int]]:
    """Return the units of each layer that go, all layers sharing one budget of parameters.

    Raises:
        RecipeError: there is nothing to mask, the ratio removes nothing, or it cannot be reached.
    """
    from exporter.pruners.ranking import allotted, removed_units

    layers = [item.layer for item in found]
    if not found:
        got = "prune.parts: the denoiser has no such units to mask; expected some."
        raise RecipeError(f"{got} Shorten protect, or write another method, such as magnitude.")
    scores = list(torch.split(logits, [layer.units for layer in layers]))
    costs = [item.cost for item in found]
    counts = allotted(layers, scores, costs, options.cut, least=[item.least for item in found])
    gone = [removed_units(layer, score, count) for layer, score, count in zip(layers, scores, counts, strict=True)]
    if not any(gone):
        got = f"prune.keep_ratio: {options.keep_ratio:g} in multiples of {options.round_to} removes nothing."
        raise RecipeError(f"{got} Lower keep_ratio or round_to.")
    return gone


def _learn(
    network: nn.Module, found: Sequence[Maskable], options: EcoDiffOptions, context: Context
) -> tuple[Tensor, dict[str, Any]]:
    """Return the logits, and facts of their training; goes on from its last checkpoint after a kill.

    What is learnt does not depend on how much of it is cut: in the same work folder it serves any ratio.
    """
    from exporter.pruners.mask_training import MaskTraining, examples
    from exporter.tuning.checkpoint import Sparing, digest_of_tensors

    seed = int(torch.randint(2**40, (), generator=context.generator))
    loan = context.borrowed
    drawing = replace(loan.drawing, steps=options.sampler_steps or loan.drawing.steps)
    texts = loan.texts(options.prompts)
    asked = asdict(replace(options, keep_ratio=1.0, round_to=1))
    key = digest_of([digest_of_tensors(network.state_dict()), asked, asdict(drawing), texts, loan.batch, seed])
    kept = Sparing(context.workdir / "masks.safetensors", key)
    shown = examples(context, texts, options.images, drawing, seed=seed, key=key)
    training = MaskTraining(network, found, shown, options, seed)
    start = training.resume(kept.read())
    with task(context.progress, "masks", options.steps):
        context.progress.advance(start)
        for step in range(start, options.steps):
            error = training.step(step)
            kept.offer(step + 1, training.tensors)
            context.progress.advance(note=f"error {error:.4f}")
    kept.keep(options.steps, training.tensors())
    facts = {"solver": type(shown[0].trajectory.solver).__name__, "sampler_steps": shown[0].trajectory.steps}
    return training.logits, {**facts, **training.facts()}

"""Diff-Pruning: Taylor scores over the timesteps that still teach something, those of much noise left out.

Source: "Structural Pruning for Diffusion Models" (arXiv 2305.10924), sections 3.2 and 3.3, and its code.
Removes channels, heads and neurons, or whole blocks. Needs latents that the dense pipeline draws, and gradients; no
training. One mini-batch of clean latents and one noise serve every timestep; from the least noise on, gradients are
summed without being zeroed, until the loss falls below a share of the highest so far. The test comes before the
backward pass, as in the code that made the paper's numbers, so that the step that fails it adds nothing; the script for
diffusers tests afterwards. The loss is highest at low noise where the model predicts noise, velocity or flow; a model
that predicts the clean sample has it lowest there, and nothing is cut. The loss of a model of velocities falls within
the first steps and rises again, so that a threshold above its lowest point leaves next to no steps: `timesteps_used`
tells.

Departs: widths are rounded; whole heads go, as in the scripts for latent diffusion; feed-forward neurons are cut too;
`conv_out`, time embedding and the residual streams stay (`parts: streams` adds the latter). Latents are the dense
pipeline's own instead of the training set's. Not reproduced: recovery on the plain loss for 100,000 steps, for which
there is `tune`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from exporter.errors import RecipeError
from exporter.pruners.base import Context, Outcome
from exporter.pruners.taylor import TaylorOptions, prune_by_gradients


@dataclass(frozen=True)
class DiffPruningOptions(TaylorOptions):
    """Recipe keys.

    Attributes:
        keep_ratio: fraction kept, in (0, 1]: of widths (``channels``) or of the units (``blocks``).
        round_to: widths become multiples of it, at least 1; ignored by ``blocks``.
        cut: remove ``channels`` of layers, or whole ``blocks``.
        component: the ``denoiser``; no other component has this loss.
        protect: module path patterns that are never touched, all below a match included.
        parts: which widths ``channels`` cuts.
        ranking: ``local``, as published, or ``global``.
        prompts: a set or file of prompts to draw for; none for a pipeline that takes none.
        images: how many latents make the one mini-batch.
        timesteps: how many levels of noise, spread evenly over the schedule; its own number of them takes each.
        threshold: the first level whose loss is below this share of the highest so far ends the sum; in [0, 1), 0
            takes all. Published: 0.05 for CIFAR-10, 0.01 for LSUN, 0.1 for latent diffusion.
        score: of a unit's weights times gradients the sum of ``absolute`` values, as the paper has it and Torch-Pruning
            now does, or of ``squares``, as the code did that made the paper's numbers.
    """

    threshold: float = field(default=0.05, metadata={"minimum": 0, "exclusiveMaximum": 1})
    score: Literal["absolute", "squares"] = "absolute"

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        super().__post_init__()
        if not 0 <= self.threshold < 1:
            got = f"prune.threshold: got {self.threshold:g}, expected a number from 0 to below 1."
            raise RecipeError(f"{got} Write 0.05.")
        if self.score not in SCORES:
            got = f"prune.score: got {self.score!r}, expected one of {', '.join(SCORES)}."
            raise RecipeError(f"{got} Choose one.")


class DiffPruning:
    """Units and blocks go by what the loss would lose of every one of their weights, at the steps of less noise.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[DiffPruningOptions]] = DiffPruningOptions

    def __init__(self, options: DiffPruningOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place.

        Raises:
            RecipeError: no prompts, or the options remove nothing from this network.
            ComponentFailed: loss or gradients are not finite.
        """
        options = self._options
        combine = SCORES[options.score]
        return prune_by_gradients(network, options, context, combine=combine, threshold=options.threshold)


def _absolute(terms: Tensor) -> Tensor:
    return terms.abs().sum(dim=1)


def _squares(terms: Tensor) -> Tensor:
    return terms.square().sum(dim=1)


SCORES = {"absolute": _absolute, "squares": _squares}
"""Published forms of the score: (units, n) weights times gradients to (units,)."""

"""Training of masks over whole trajectories: what is drawn, the gradient, and one step of Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibration.calling import Drawing
from exporter.errors import ComponentFailed
from exporter.networks.probe import evaluating
from exporter.progress import task
from exporter.pruners.base import Context
from exporter.pruners.ecodiff import START, EcoDiffOptions, hard_concrete, open_share
from exporter.pruners.masks import Maskable, masked_weights
from exporter.pruners.trajectory import Answer, Trajectory, gradient_along
from exporter.tuning.checkpoint import Checkpoint, read, write

CURVE_POINTS = 20


@dataclass(frozen=True)
class Example:
    """A batch of images: how they are drawn, from which noise, and what the dense denoiser draws.

    Attributes:
        trajectory: the steps.
        noise: (n, ...) latents to begin with.
        target: (n, ...) final latents of the dense denoiser.
    """

    trajectory: Trajectory
    noise: Tensor
    target: Tensor


def examples(
    context: Context, texts: Sequence[str], images: int, drawing: Drawing, *, seed: int, key: str
) -> list[Example]:
    """Return batches of dense trajectories' ends; finished ones are kept in the work folder and found again.

    Args:
        context: lends the dense pipeline, and says how many images go at a time.
        texts: used in turn.
        images: how many.
        drawing: steps, guidance and size.
        seed: every noise follows from it.
        key: of everything that the ends depend on.
    """
    loan, found = context.borrowed, []
    pipeline = loan.pipeline()
    dense = getattr(pipeline, loan.form.denoiser).eval()
    starts = range(0, images, min(loan.batch, images))
    with task(context.progress, "dense trajectories", len(starts)):
        for start in starts:
            chosen = [texts[i % len(texts)] for i in range(start, min(start + loan.batch, images))]
            generator = torch.Generator("cpu").manual_seed(seed + start)
            trajectory = Trajectory.of(pipeline, loan.form, chosen, drawing, seed=seed + start)
            noise = trajectory.noise(generator)
            path = context.workdir / f"dense-{start:06d}.safetensors"
            kept = read(path, key=key)
            target = trajectory.run(noise, _answer_of(dense, {}))[-1] if kept is None else kept.tensors["latents"]
            if not bool(target.isfinite().all()):
                got = f"prune: the dense denoiser's final latents of images from {start} are not finite."
                raise ComponentFailed(f"{got} Check the source with `exporter check`.")
            if kept is None:
                write(path, {"latents": target}, key=key)
            found.append(Example(trajectory, noise, target))
            context.progress.advance()
    return found


class MaskTraining:
    """Logits of masks, their optimizer, and the errors so far.

    Args:
        network: the denoiser, frozen while a step runs.
        found: what is masked.
        shown: batches, used in turn.
        options: the recipe's keys.
        seed: the noise of the masks of a step follows from it and the step.
    """

    def __init__(
        self,
        network: nn.Module,
        found: Sequence[Maskable],
        shown: Sequence[Example],
        options: EcoDiffOptions,
        seed: int,
    ) -> None:
        self._network, self._found, self._shown = network, found, shown
        self._options, self._seed = options, seed
        units = [item.layer.units for item in found]
        self._costs = torch.tensor([item.cost for item in found]).repeat_interleave(torch.tensor(units))
        self.logits = torch.full((sum(units),), START)
        # Slopes shrink with the number of units: Adam's usual epsilon would hold cheap units back.
        self._optimizer = torch.optim.Adam([self.logits], lr=options.learning_rate, eps=1e-16)
        self._history = torch.zeros(options.steps, 2, dtype=torch.float64)

    def step(self, step: int) -> float:
        """Do one optimisation step; return the mean squared error of the final latents.

        Raises:
            ComponentFailed: loss or gradients are not finite.
        """
        example = self._shown[step % len(self._shown)]
        generator = torch.Generator("cpu").manual_seed(self._seed + 7919 * (step + 1))
        uniform = torch.rand(self.logits.shape, generator=generator)  # once: every pass of this step sees these masks
        with _frozen(self._network), torch.enable_grad():
            logits = self.logits.detach().requires_grad_()
            masks = hard_concrete(logits, uniform, self._options.softness)
            error, slope = gradient_along(
                example.trajectory,
                example.noise,
                masks.detach(),
                self._masked,
                lambda latents: F.mse_loss(latents, example.target),
            )
            share = open_share(logits, self._costs, self._options.regularizer)
            (through,) = torch.autograd.grad(masks, [logits], slope, retain_graph=True)
            (pressure,) = torch.autograd.grad(share, [logits])
        self.logits.grad = through + self._options.sparsity * pressure
        self._optimizer.step()
        self._history[step] = torch.tensor([error, float(share.detach())])
        return error

    def _masked(self, masks: Tensor) -> Answer:
        return _answer_of(self._network, masked_weights(self._network, self._found, masks))

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on."""
        state = self._optimizer.state_dict()["state"].get(0, {})
        return {"logits": self.logits, "history": self._history, **{f"adam.{k}": v for k, v in state.items()}}

    def resume(self, saved: Checkpoint | None) -> int:
        """Take up a checkpoint; return how many steps are done."""
        if saved is None:
            return 0
        self.logits.copy_(saved.tensors["logits"])
        self._history.copy_(saved.tensors["history"])
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": {0: saved.part("adam")}})
        return saved.step

    def facts(self) -> dict[str, Any]:
        """Return ``curve``: list of [last step of a window, mean error, mean expected share of parameters]."""
        width = -(-len(self._history) // CURVE_POINTS)
        curve = []
        for start in range(0, len(self._history), width):
            error, share = self._history[start : start + width].mean(dim=0).tolist()
            curve.append([min(start + width, len(self._history)), float(f"{error:.6g}"), float(f"{share:.6g}")])
        return {"curve": curve}


def _answer_of(network: nn.Module, weights: dict[str, Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    """Return a denoiser that answers with these parameters in the place of its own."""

    def answer(feeds: dict[str, Any]) -> Tensor:
        found: Tensor = torch.func.functional_call(network, weights, (), {**feeds, "return_dict": False})[0]
        return found

    return answer


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients of parameters; everything as it was on the way out."""
    learnable = [parameter.requires_grad for parameter in network.parameters()]
    try:
        with evaluating(network):
            for parameter in network.parameters():
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, was in zip(network.parameters(), learnable, strict=True):
            parameter.requires_grad_(was)

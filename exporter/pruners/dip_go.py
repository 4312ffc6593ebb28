"""DiP-GO: learns on which steps which levels of a U-Net are computed, and which reuse what an earlier step left.

Source: Zhu et al., DiP-GO (NeurIPS 2024, arXiv 2410.16942) and its published code. Removes work of steps, no weights:
the network stays whole, and the state gets a schedule. Needs prompts and gradients through whole trajectories; trains
gates only.

As published: a network with backup connections, hard gates with the gradient of a softmax (skip, keep), start at
"keep" (0, 1), similarity 1 - SSIM of decoded images, sparsity weighted by each gate's share of the operations with its
cascade, dropped once what remains costs less than a floor, SGD with a cosine and clipped gradients, checkpointed steps.

Departs: the gates are a plain table of logits (the published encoder discards its attention's result, which leaves
independent logits), so the gradient is multiplied by their number, as weights shared between gates would add it up;
noise is drawn anew in every iteration (the published code trains on one noise); gates are nested cuts between levels;
the backup of a velocity turns with the timestep (`exporter.networks.schedule.reuse_of`); and scores become depths by an
exact knapsack over the nested cuts instead of a threshold. For transformers there is nothing yet.

Gates inside of a step that is skipped whole get no gradient, and skipping it whole saves most: what is learned are
foremost steps that compute nothing, as the published gates are. They are judged by the final image; where errors of
single answers count, ``order: drift`` is the better choice.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from exporter.artifact import digest_of
from exporter.errors import ComponentFailed, RecipeError
from exporter.progress import task
from exporter.pruners.base import Context, DataOptions, Outcome

_CLIP = 1.0
_EVERY = 10  # iterations between checkpoints


@dataclass(frozen=True)
class DipGoOptions(DataOptions):
    """Recipe keys of ``dip-go``.

    Attributes:
        prompts: a set or file of prompts, none of those that the run measures on. The embedded model has its own.
        images: how many of them are drawn, in turn.
        keep_ratio: fraction of the denoiser's operations over all steps that stays, in (0, 1]; never exceeded.
        order: ``learned`` gates as published; ``drift``, which is not DiP-GO: it trains nothing and prices every
            reuse by the error that it makes in recorded answers (`exporter.pruners.drift`); or ``random`` scores, the
            baseline that both have to beat.
        iterations: updates of the gates, each a whole trajectory and its way back.
        learning_rate: at the start; it falls as a cosine.
        similarity: ``ssim`` of decoded images, or the mean squared error of final ``latent``.
        sparsity: weight of the cost of what is computed, against the similarity.
        floor: share of the operations below which that cost is no longer pressed; by default `keep_ratio`, so that
            gates are trained at the compute that stays. Published: 0.2, whatever stays.
    """

    keep_ratio: float = field(default=0.5, metadata={"exclusiveMinimum": 0, "maximum": 1})
    order: Literal["learned", "drift", "random"] = "learned"
    iterations: int = field(default=200, metadata={"minimum": 1})
    learning_rate: float = field(default=0.2, metadata={"exclusiveMinimum": 0})
    similarity: Literal["ssim", "latent"] = "ssim"
    sparsity: float = field(default=1.0, metadata={"minimum": 0})
    floor: float | None = field(default=None, metadata={"minimum": 0, "maximum": 1})

    of_sampling: ClassVar[bool] = True

    @property
    def least_prompts(self) -> int:
        """Gates are trained on prompts in turn; errors are recorded of one each."""
        return self.images if self.order == "drift" else 1

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        super().__post_init__()
        for key, holds, expected in (
            ("keep_ratio", 0 < self.keep_ratio <= 1, "a number in (0, 1]. Write 0.5 to keep half of the compute"),
            ("order", self.order in ("learned", "drift", "random"), "learned, drift or random. Write learned"),
            ("iterations", self.iterations >= 1, "a whole number of at least 1. Write 200"),
            ("learning_rate", self.learning_rate > 0, "a number above 0. Write 0.2"),
            ("similarity", self.similarity in ("ssim", "latent"), "ssim or latent. Write ssim"),
            ("sparsity", self.sparsity >= 0, "a number of at least 0. Write 1"),
            ("floor", self.floor is None or 0 <= self.floor <= 1, "a number in [0, 1]. Write 0.2"),
        ):
            if not holds:
                raise RecipeError(f"prune.{key}: got {getattr(self, key)}, expected {expected}.")


class DipGo:
    """Trains gates of steps and levels through the sampler, then keeps the best that the budget allows.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[DipGoOptions]] = DipGoOptions

    def __init__(self, options: DipGoOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Schedule the steps; the network is left as it is.

        Raises:
            RecipeError: a network that cannot be cut, or a budget that the first step alone exceeds.
            ComponentFailed: the loss or its gradient is no longer a number.
        """
        from exporter.pruners.depths import best_depths  # diffusers takes seconds to import
        from exporter.pruners.sampler import Sampler

        sampler, options = Sampler.of(network, context.borrowed), self._options
        steps = len(sampler.timesteps)
        zeros = torch.zeros((steps, sampler.levels), dtype=torch.float64).numpy()
        best_depths(zeros, sampler.costs, options.keep_ratio)  # an unreachable budget is refused before any work
        if options.order == "random":
            drawn = torch.rand(zeros.shape, generator=context.generator, dtype=torch.float64).numpy()
            return sampler.outcome(best_depths(drawn, sampler.costs, options.keep_ratio), order=options.order)
        if options.order == "drift":
            from exporter.pruners.drift import least_error, reuse_errors

            errors = reuse_errors(network, sampler, context.borrowed, options.prompts, options.images, context.progress)
            return sampler.outcome(least_error(errors, sampler.costs, options.keep_ratio), order=options.order)
        wanted = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
        try:
            network.requires_grad_(requires_grad=False)
            logits, history = _Training(network, sampler, options, context).run()
        finally:
            for parameter, before in wanted:
                parameter.requires_grad_(before)
        keep = logits.softmax(dim=-1)[..., 1]
        depths = best_depths(keep.double().numpy(), sampler.costs, options.keep_ratio)
        scores = [[round(float(value), 4) for value in row] for row in keep]
        return sampler.outcome(depths, order=options.order, keep_scores=scores, loss=history)


def hard_gates(logits: Tensor) -> Tensor:
    """Return (steps, levels, 2) zeros and ones, (skip, keep), with the gradient of the softmax; step 0 keeps all."""
    soft = logits.softmax(dim=-1)
    hard = nn.functional.one_hot(soft.argmax(dim=-1), 2).to(soft)
    gates = hard + (soft - soft.detach())
    first = torch.tensor([0.0, 1.0]).expand_as(gates[:1])
    return torch.cat([first, gates[1:]])


def depths_of(gates: Tensor) -> list[int]:
    """Return the depth of every step: the outermost cut that reuses takes everything inside of it along."""
    skips = gates.detach()[..., 0] > 0.5
    return [max((cut + 1 for cut, skipped in enumerate(row) if skipped), default=0) for row in skips.tolist()]


class _Training:
    """The gates, their optimizer, and the losses so far."""

    def __init__(self, network: nn.Module, sampler: Any, options: DipGoOptions, context: Context) -> None:
        from exporter.pruners.supernet import SuperNet

        loan = context.borrowed
        self._options, self._context, self._sampler = options, context, sampler
        self._net = SuperNet(network, sampler, loan)
        named = loan.form.asked == "prompt"
        self._texts = loan.texts(options.prompts)[: options.images] if named else [""]
        self._seeds = torch.randint(2**31, (options.iterations,), generator=context.generator).tolist()
        self._saved = 1 - torch.tensor(sampler.costs[1:])
        logits = torch.zeros(len(sampler.timesteps), sampler.levels, 2)
        logits[..., 1] = 1.0
        self._logits = logits.requires_grad_()
        self._optimizer = torch.optim.SGD([self._logits], lr=options.learning_rate)
        self._losses = torch.zeros(options.iterations, 3)

    def run(self) -> tuple[Tensor, list[list[float]]]:
        """Train, or go on where an interrupted run stopped; return logits and [iteration, loss, computed share]."""
        from exporter.tuning.checkpoint import read, write

        total, path = self._options.iterations, self._context.workdir / "gates.safetensors"
        key = self._key()
        found = read(path, key=key)
        start = 0
        if found is not None:
            start = found.step
            self._losses.copy_(found.tensors["losses"])
            with torch.no_grad():
                self._logits.copy_(found.tensors["logits"])
        with task(self._context.progress, "dip-go", total) as shown:
            shown.advance(start)
            for index in range(start, total):
                loss, share = self._step(index)
                self._losses[index] = torch.tensor([index, loss, share])
                if (index + 1) % _EVERY == 0:
                    tensors = {"logits": self._logits.detach(), "losses": self._losses}
                    write(path, tensors, key=key, step=index + 1)
                shown.advance(note=f"loss {loss:.4f}, {share:.0%} computed")
        told = self._losses[:: max(1, total // 30)].tolist()
        history = [[int(step), round(loss, 5), round(share, 4)] for step, loss, share in told]
        return self._logits.detach(), history

    def _key(self) -> str:
        from exporter.networks.schedule import settings_of
        from exporter.tuning.checkpoint import digest_of_tensors

        weights = digest_of_tensors(self._net.network.state_dict())
        drawn = [self._seeds, self._texts, settings_of(self._sampler.pipeline.scheduler), list(self._sampler.timesteps)]
        return digest_of([weights, asdict(self._options), drawn])

    def _step(self, index: int) -> tuple[float, float]:
        """Update the gates once; return the distance from the whole trajectory, and the share that was computed."""
        options, net = self._options, self._net
        gates = hard_gates(self._logits)
        share = self._sampler.share(depths_of(gates))
        if share == 1:  # nothing is reused: the distance is 0, its least, and so is its gradient
            distance = torch.zeros(())
        else:
            start = net.start(self._texts[index % len(self._texts)], self._seeds[index])
            with torch.no_grad():
                whole = net.draw(start)
            distance = self._distance(net.draw(start, gates), whole)
        loss = distance
        if share >= (options.keep_ratio if options.floor is None else options.floor):
            loss = loss + options.sparsity * (self._saved * gates[..., 1]).mean()
        self._optimizer.param_groups[0]["lr"] = (
            options.learning_rate * 0.5 * (1 + math.cos(math.pi * index / options.iterations))
        )
        self._optimizer.zero_grad()
        (loss * gates[..., 0].numel()).backward()  # type: ignore[no-untyped-call]
        assert self._logits.grad is not None
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(self._logits.grad).all()):
            raise ComponentFailed(
                f"dip-go, iteration {index}: loss or gradient is not finite; got {float(loss):g}, expected numbers. "
                "Check the source's weights, or write similarity: latent."
            )
        nn.utils.clip_grad_norm_([self._logits], _CLIP)
        self._optimizer.step()
        return float(distance.detach()), share

    def _distance(self, latents: Tensor, whole: Tensor) -> Tensor:
        if self._options.similarity == "latent":
            return nn.functional.mse_loss(latents, whole) / whole.var().clamp_min(1e-12)
        from torchmetrics.functional.image import structural_similarity_index_measure

        with torch.no_grad():
            wanted = self._net.image(whole).double()  # single precision is off by 1e-4 where an image is flat
        found = structural_similarity_index_measure(self._net.image(latents).double(), wanted, data_range=1.0)
        assert isinstance(found, Tensor)
        return 1 - found

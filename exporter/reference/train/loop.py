"""One resumable training loop for all three networks: EMA, one learning-rate schedule, atomic checkpoints.

A step depends on the weights and on (seed, step) alone, so a killed run continues to the result of an unbroken one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from exporter.errors import ArtifactError
from exporter.reference.train.optimizer import THREE, MuonAdamW, Polynomials

Loss = Callable[[int, torch.Generator], dict[str, torch.Tensor]]
"""From (step, generator of this step) to named scalar losses; the one named ``loss`` is minimised."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long and how fast one network trains.

    Attributes:
        name: Name of the run: its folder and its lines in the log.
        steps: Number of optimizer steps.
        rate: Highest learning rate.
        warmup: Steps of linear warm-up.
        decay: Share of the steps, at the end, over which the rate falls to zero along a cosine.
        ema: Decay of the moving average of the weights, reached after a warm-up of its own.
        weight_decay: Decoupled weight decay of the matrices.
        muon: Iterations of Muon for weight matrices, None for AdamW.
        save_every: Steps between checkpoints.
        log_every: Steps between lines of the log.
    """

    name: str
    steps: int
    rate: float
    warmup: int = 100
    decay: float = 0.4
    ema: float = 0.998
    weight_decay: float = 0.01
    muon: Polynomials | None = THREE
    save_every: int = 200
    log_every: int = 25

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, constant, cosine to zero.

        Args:
            step: 0 to `steps` - 1.

        Returns:
            The learning rate.
        """
        first_decay = self.steps * (1 - self.decay)
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if step < first_decay:
            return self.rate * warm
        along = (step - first_decay) / max(1.0, self.steps - first_decay)
        return self.rate * warm * 0.5 * (1 + math.cos(math.pi * along))


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Return the random numbers of one step.

    Args:
        seed: Seed of the run.
        step: Number of the step.
        device: Where the numbers are drawn.

    Returns:
        A generator that depends on (seed, step) alone.
    """
    generator = torch.Generator(device=device)
    generator.manual_seed((seed * 1_000_003 + step) * 2_654_435_761 % (1 << 62))
    return generator


class Run:
    """A network in training: weights, their moving average, optimizer, position.

    Args:
        plan: Length and rates.
        model: Network to train, already on its device; modified in place.
        folder: Where checkpoint and log live; created.
        seed: Seed of the data order and of the noise.
    """

    def __init__(self, plan: Plan, model: nn.Module, folder: Path, seed: int) -> None:
        self.plan = plan
        self.model = model
        self.folder = folder
        self.seed = seed
        self.step = 0
        self.seconds = 0.0
        self.names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        self.weights: list[torch.Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
        self.average = [weight.detach().clone() for weight in self.weights]
        self.optimizer = MuonAdamW(model, plan.weight_decay, plan.muon)
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        """File with the last saved state."""
        return self.folder / f"{self.plan.name}.safetensors"

    @property
    def log(self) -> Path:
        """File with one JSON object a line: step, seconds, rate and losses."""
        return self.folder / f"{self.plan.name}.jsonl"

    def _load(self) -> None:
        with safe_open(self.checkpoint, framework="pt") as stored:
            head = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
        wanted = {f"{kind}.{name}" for kind in ("weight", "average") for name in self.names}
        wanted |= self.optimizer.state_names()
        if set(tensors) != wanted or head.get("seed") != str(self.seed):
            raise ArtifactError(
                f"{self.checkpoint}: checkpoint of another run; got {len(tensors)} tensors and seed "
                f"{head.get('seed')}, expected {len(wanted)} and {self.seed}. Remove it or use its seed."
            )
        self.step, self.seconds = int(head["step"]), float(head["seconds"])
        self.optimizer.load_state(tensors, self.step)
        with torch.no_grad():
            for name, weight, average in zip(self.names, self.weights, self.average, strict=True):
                weight.copy_(tensors[f"weight.{name}"])
                average.copy_(tensors[f"average.{name}"])
        if self.log.exists():
            lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            if kept != lines:
                self.log.write_text("".join(kept), encoding="utf-8")

    def save(self) -> None:
        """Write the state under a temporary name, then rename it."""
        tensors = self.optimizer.state()
        for name, weight, average in zip(self.names, self.weights, self.average, strict=True):
            tensors[f"weight.{name}"] = weight.detach()
            tensors[f"average.{name}"] = average
        head = {"step": str(self.step), "seconds": f"{self.seconds:.1f}", "seed": str(self.seed)}
        temporary = self.checkpoint.with_suffix(".partial")
        save_file(tensors, temporary, metadata=head)
        temporary.replace(self.checkpoint)

    def _advance(self, loss: Loss) -> dict[str, torch.Tensor]:
        generator = step_generator(self.seed, self.step, self.weights[0].device)
        losses = loss(self.step, generator)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step(self.plan.rate_at(self.step))
        self.step += 1
        keep = min(self.plan.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1 - keep)
        return losses

    def fit(self, loss: Loss, tell: Callable[[str], None], *, until: int | None = None) -> None:
        """Train to the end of the plan, or to a step before it; then the state is saved.

        Args:
            loss: Losses of one step.
            tell: Receives one line of progress with the time to go, every `Plan.log_every` steps.
            until: Step to stop at, None for the plan's last.
        """
        last = self.plan.steps if until is None else min(until, self.plan.steps)
        self.model.train()
        sums: dict[str, float] = {}
        started, before = time.monotonic(), self.step
        mark = started
        while self.step < last:
            for name, value in self._advance(loss).items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            now = time.monotonic()
            self.seconds, mark = self.seconds + now - mark, now
            if self.step % self.plan.log_every == 0:
                means = {name: round(value / self.plan.log_every, 6) for name, value in sums.items()}
                sums = {}
                line = {"step": self.step, "seconds": round(self.seconds, 1), "rate": self.plan.rate_at(self.step - 1)}
                with self.log.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line | means) + "\n")
                pace = (now - started) / (self.step - before)
                shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
                to_go = pace * (last - self.step) / 60
                tell(f"{self.plan.name} {self.step}/{last} {shown} | {pace:.3f} s a step, {to_go:.1f} min to go")
            if self.step % self.plan.save_every == 0 or self.step == last:
                self.save()

    def use_average(self) -> None:
        """Put the moving average into the network, in place; training cannot go on from there."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.average)
        self.model.eval()

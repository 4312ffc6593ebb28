"""The training loop of distillation: accelerate places it, a checkpoint carries it over a kill."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from exporter.artifact import digest_of
from exporter.errors import ComponentFailed
from exporter.progress import Progress, task
from exporter.tuning.checkpoint import Checkpoint, digest_of_tensors, read, write
from exporter.tuning.data import Batch, LatentData
from exporter.tuning.ema import Ema
from exporter.tuning.losses import feature_loss, guided_loss, stage_outputs
from exporter.tuning.options import DistillOptions
from exporter.tuning.zeros import Dense, Zeros

CURVE_POINTS = 60
_EXAM = (4, 8)
"""Batches and their size for the error before and after."""


@dataclass(frozen=True)
class Work:
    """Where and from what seed to train.

    Attributes:
        folder: keeps the checkpoint.
        progress: one unit per step, with the loss as note.
        device: where to train.
        seed: data order, noise, timesteps and dropped prompts follow from it and the step.
        zeros: makes, of the copy that is trained, what looks after its zeros; None where it may become dense.
        during: changes the student for one forward pass, undone at its end; what it draws comes from the generator,
            which follows from the seed and the pass.
    """

    folder: Path
    progress: Progress
    device: torch.device
    seed: int
    zeros: Callable[[nn.Module], Zeros] | None = None
    during: Callable[[nn.Module, torch.Generator], AbstractContextManager[None]] | None = None


def distill(
    student: nn.Module, teacher: nn.Module, data: LatentData, options: DistillOptions, work: Work
) -> dict[str, Any]:
    """Train a student denoiser in place towards a teacher; the averaged weights end in the student.

    Killed at any time and called again with the same arguments and folder, it goes on from its last checkpoint; on the
    CPU, with as many threads, the weights are then bit-equal to those of an undisturbed run.

    Args:
        student: float32 denoiser, on any device; comes back to it.
        teacher: denoiser that takes the same inputs; unchanged.
        data: what to ask both.
        options: the recipe's keys.
        work: where, and from what seed.

    Returns:
        ``steps``; ``samples``; ``error_before`` and ``error_after``: mean squared error to the teacher's answers on
        fixed inputs that are not trained on; ``stages_matched``: how many stages were compared; ``loss``: list of
        [step, loss], averaged.

    Raises:
        ComponentFailed: the loss is no longer a number.
    """
    work.folder.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(student, teacher, data, options, work)
    path = work.folder / "checkpoint.safetensors"
    key = _key(student, teacher, data, options, work.seed)
    with trainer.watching():
        before = trainer.error_before()
        matched = trainer.matched_stages()
        start = trainer.resume(read(path, key=key))
        with task(work.progress, "distill", options.steps):
            work.progress.advance(start)
            for step in range(start, options.steps):
                loss = trainer.step(step)
                if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
                    write(path, trainer.tensors(), key=key, step=step + 1)
                work.progress.advance(note=f"loss {loss:.4f}")
        trainer.ema.copy_to(student)
        after = trainer.error_of(student)
    return {
        "steps": options.steps,
        "samples": len(data.latents),
        "error_before": _rounded(before),
        "error_after": _rounded(after),
        "stages_matched": matched,
        "loss": _curve(trainer.history),
    }


def rate_at(step: int, options: DistillOptions) -> float:
    """Return the learning rate of step `step`, counted from 0: a linear warm-up, then a cosine to 0."""
    warm = max(1, round(options.steps / 20))
    if step < warm:
        return options.learning_rate * (step + 1) / warm
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, options.steps - warm)))


class _Trainer:
    """A copy of the student that is trained, its optimizer, its average, and the losses so far."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, data: LatentData, options: DistillOptions, work: Work
    ) -> None:
        self._data, self._options, self._seed, device = data, options, work.seed, work.device
        self._during = work.during or (lambda network, generator: nullcontext())
        self._accelerator = Accelerator(cpu=device.type == "cpu", gradient_accumulation_steps=options.accumulate)
        if self._accelerator.device.type != device.type:
            got = f"tune.device: accelerate took {self._accelerator.device}, expected {device}."
            raise ComponentFailed(f"{got} Tune on one kind of device per run.")
        # accelerate marks what it prepares; the caller's student must come back as it went in but for its weights.
        online = copy.deepcopy(student).to(device).eval()
        for parameter in online.parameters():
            parameter.requires_grad_(True)
        self._inner = torch.optim.AdamW(
            online.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        self._online, self._optimizer = self._accelerator.prepare(online, self._inner)
        self._teacher = teacher
        self._zeros: Zeros = work.zeros(online) if work.zeros is not None else Dense()
        self.ema = Ema(online, options.ema)
        self.history = torch.zeros(options.steps, dtype=torch.float64)
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._exam: list[tuple[Batch, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Teacher on the device and in evaluation mode, both networks observed; everything undone at the end."""
        home = next(self._teacher.parameters()).device
        modes = {module: module.training for module in self._teacher.modules()}
        try:
            self._teacher.to(self._accelerator.device).eval()
            with stage_outputs(self._online) as mine, stage_outputs(self._teacher) as theirs:
                self._seen = (mine, theirs)
                yield
        finally:
            self._teacher.to(home)
            for module, mode in modes.items():
                module.training = mode
            self._accelerator.free_memory()

    def step(self, step: int) -> float:
        """Do one optimizer step and return its loss.

        Raises:
            ComponentFailed: the loss is no longer a number.
        """
        for group in self._inner.param_groups:
            group["lr"] = rate_at(step, self._options)
        total = 0.0
        self._zeros.enter(step)
        for part in range(self._options.accumulate):
            number = step * self._options.accumulate + part
            batch, scale = self._drawn(number)
            with self._accelerator.accumulate(self._online):
                with self._during(self._online, self._generator("during", number)):
                    loss = self._loss(batch, scale)
                self._accelerator.backward(loss)
                if self._accelerator.sync_gradients:
                    self._zeros.gradients()
                    self._accelerator.clip_grad_norm_(self._online.parameters(), self._options.clip_norm)
                self._optimizer.step()
                self._optimizer.zero_grad()
            total += float(loss.detach()) / self._options.accumulate
        if not math.isfinite(total):
            got = f"tune: the loss of step {step + 1} is {total}; expected a number."
            raise ComponentFailed(f"{got} Lower tune.learning_rate, or write precision: float32.")
        self.ema.update(self._online, step)
        self._zeros.leave(self.ema.weights)
        self.history[step] = total
        return total

    def _drawn(self, number: int) -> tuple[Batch, Tensor | None]:
        """Return the batch of a forward pass and, where its guided answers are compared, the scale of every row."""
        options, generator = self._options, self._generator("guidance", number)
        if float(torch.rand((), generator=generator)) >= options.guided_share:
            return self._batch(number, options.batch), None
        width = options.guidance_high - options.guidance_low
        scale = options.guidance_low + width * torch.rand(options.batch, generator=generator)
        return self._batch(number, options.batch, both=True), scale

    def _batch(self, number: int, size: int, purpose: str = "train", *, both: bool = False) -> Batch:
        dropout, device = self._options.prompt_dropout, self._accelerator.device
        generator = self._generator(purpose, number)
        return self._data.batch(size, dropout=dropout, generator=generator, device=device, both=both)

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(int(digest_of([self._seed, purpose, number])[:15], 16))

    def _loss(self, batch: Batch, scale: Tensor | None) -> Tensor:
        mine, theirs = self._seen
        answer, target = self._answer(self._online, batch), self._teacher_answer(batch)
        options = self._options
        error = F.mse_loss(answer, target) if scale is None else guided_loss(answer, target, scale)
        loss = options.output_weight * error
        if options.feature_weight:
            features, _ = feature_loss(mine, theirs, normalized=options.features == "normalized")
            if features is not None:
                loss = loss + options.feature_weight * features
        if options.task_weight:
            # A denoiser that predicts its variance too answers more channels than the target has.
            loss = loss + options.task_weight * F.mse_loss(answer[:, : batch.target.shape[1]], batch.target)
        return loss

    @torch.no_grad()
    def _teacher_answer(self, batch: Batch) -> Tensor:
        return self._answer(self._teacher, batch)

    def _answer(self, network: nn.Module, batch: Batch) -> Tensor:
        device = self._accelerator.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self._options.precision == "bfloat16"):
            answer: Tensor = network(**batch.feeds, return_dict=False)[0]
        return answer.float()

    def error_before(self) -> float:
        """Return `error_of` the student as it is first trained: with its zeros."""
        self._zeros.enter(0)
        error = self.error_of(self._online)
        self._zeros.release()
        return error

    @torch.no_grad()
    def error_of(self, network: nn.Module) -> float:
        """Return the mean squared error to the teacher's answers on fixed inputs that are not trained on."""
        home, device = next(network.parameters()).device, self._accelerator.device
        modes = {module: module.training for module in network.modules()}
        if not self._exam:
            batches = [self._batch(number, _EXAM[1], "evaluate") for number in range(_EXAM[0])]
            self._exam = [(batch, self._teacher_answer(batch)) for batch in batches]
        network.to(device).eval()
        errors = [float(F.mse_loss(self._answer(network, batch), target)) for batch, target in self._exam]
        network.to(home)
        for module, mode in modes.items():
            module.training = mode
        return sum(errors) / len(errors)

    @torch.no_grad()
    def matched_stages(self) -> int:
        """Return how many stages of student and teacher have equal shapes and so are compared."""
        batch = self._batch(0, 1, "evaluate")
        self._answer(self._online, batch)
        self._teacher_answer(batch)
        return feature_loss(*self._seen)[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on."""
        names = [name for name, _ in self._online.named_parameters()]
        moments = self._inner.state_dict()["state"]
        return {
            "history": self.history,
            **{f"online.{name}": value for name, value in self._online.named_parameters()},
            **{f"ema.{name}": value for name, value in self.ema.weights.items()},
            **{f"{kind}.{names[i]}": value for i, state in moments.items() for kind, value in state.items()},
        }

    def resume(self, saved: Checkpoint | None) -> int:
        """Take up a checkpoint; return how many steps are done."""
        if saved is None:
            return 0
        with torch.no_grad():
            for name, value in saved.part("online").items():
                self._online.get_parameter(name).copy_(value)
        self.ema.load(saved.part("ema"))
        self.history.copy_(saved.tensors["history"])
        moments = {kind: saved.part(kind) for kind in ("step", "exp_avg", "exp_avg_sq")}
        state = {
            index: {kind: values[name] for kind, values in moments.items()}
            for index, (name, _) in enumerate(self._online.named_parameters())
            if name in moments["exp_avg"]
        }
        self._inner.load_state_dict({**self._inner.state_dict(), "state": state})
        return saved.step


def _key(student: nn.Module, teacher: nn.Module, data: LatentData, options: DistillOptions, seed: int) -> str:
    """Identify a run: a checkpoint of any other is not taken up."""
    weights = [digest_of_tensors(network.state_dict()) for network in (student, teacher)]
    asked = digest_of_tensors({"latents": data.latents, "prompt_of": data.prompt_of, **data.given})
    return digest_of([*weights, asked, asdict(options), seed])


def _curve(history: Tensor) -> list[list[float]]:
    """Return at most `CURVE_POINTS` of [last step of the window, mean loss of the window]."""
    width = math.ceil(len(history) / CURVE_POINTS)
    return [
        [min(start + width, len(history)), _rounded(float(history[start : start + width].mean()))]
        for start in range(0, len(history), width)
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")

"""Run a pipeline once and store what its denoiser saw and answered at every step.

Observed through torch's forward hooks, so it is the pipeline's own loop that runs.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor, nn

from calibration.calling import Drawing, Form, draw, named_inputs
from calibration.errors import CalibrationError
from calibration.index import INDEX_FILE, Index, Shard, file_digest
from calibration.prompts import PromptSet
from calibration.recording import Recording

MAX_SEED = 2**63 - 1
STABLE_DIFFUSION = Form()
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


class Progress(Protocol):
    """What `record` reports to: one unit per prompt."""

    def start(self, title: str, total: int) -> None:
        """Begin a task of `total` units."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """Report units done."""

    def finish(self) -> None:
        """End the task."""


@dataclass(frozen=True)
class _Plan:
    form: Form
    seed: int
    drawing: Drawing


@dataclass
class _Observed:
    """What the hooks saw while one batch ran; lists have one entry per denoiser call."""

    form: Form
    count: int
    guidance: float
    timesteps: list[float] = field(default_factory=list)
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)
    guided: bool = False

    def denoiser(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep one call; `module` is the denoiser."""
        named = named_inputs(self.form, args, kwargs)
        sample, timestep = named[self.form.inputs[0]], torch.as_tensor(named["timestep"]).flatten()
        answer = output[0]
        self.timesteps.append(float(timestep[0]))
        if not bool(torch.isfinite(answer).all()):
            msg = (
                f"recording {type(module).__name__}: answer is not finite; got NaN or Inf at timestep "
                f"{float(timestep[0]):g}, expected numbers. Load the pipeline in float32, or check its weights."
            )
            raise CalibrationError(msg)
        self.guided = len(sample) == 2 * self.count
        for name in self.form.given:
            value = named[name].detach()
            if name in self.form.shared:  # recorded per prompt as everything is, so that any slice holds it
                value = value.expand(len(sample), *value.shape)
            self._keep_given(name, value)
        if not self.guided:
            self._keep(sample=sample, cond=answer)
            return
        uncond, cond = self._halves(answer)
        # What the scheduler gets; a denoiser that predicts its variance too answers more channels than it gets.
        guided = (uncond + self.guidance * (cond - uncond))[:, : sample.shape[1]]
        self._keep(sample=sample.chunk(2)[0], uncond=uncond, cond=cond, guided=guided)

    def fed(self, part: str, names: tuple[str, ...]) -> Hook:
        """Return a hook that keeps what a text encoder or the decoder is called with; its first call is the prompts'.

        Args:
            part: attribute of the pipeline.
            names: of its inputs, in the order of its forward.
        """

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
                if name in names:
                    self.fixed.setdefault(f"fed.{part}.{name}", value.detach())

        return keep

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the tensors of one shard."""
        if not self.timesteps:
            msg = "recording: the pipeline did not call its denoiser; got 0 calls, expected at least 1. Raise `steps`."
            raise CalibrationError(msg)
        found = {name: _array(torch.stack(parts)) for name, parts in self.tensors.items()}
        return found | {name: _array(tensor) for name, tensor in self.fixed.items()}

    def _halves(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows without and with the prompt."""
        first, second = rows.chunk(2)
        return (second, first) if self.form.conditional_first else (first, second)

    def _keep_given(self, name: str, tensor: Tensor) -> None:
        if not self.guided:
            self.fixed.setdefault(f"given.{name}", tensor)
            return
        uncond, cond = self._halves(tensor)
        self.fixed.setdefault(f"given_uncond.{name}", uncond)
        self.fixed.setdefault(f"given.{name}", cond)

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            # To host memory at once: an accelerator must not fill up over the steps.
            self.tensors.setdefault(name, []).append(tensor.detach().to("cpu", torch.float32, copy=True))


def record(  # noqa: PLR0913 - the sampling is spelled out as in the recipe
    pipeline: Any,
    prompts: PromptSet,
    out: Path,
    *,
    seed: int,
    steps: int,
    guidance: float,
    size: int | tuple[int, int],
    batch: int = 8,
    progress: Progress | None = None,
    model: str = "",
    form: Form = STABLE_DIFFUSION,
) -> Recording:
    """Run a pipeline on every prompt and write what its networks saw and its denoiser answered.

    Prompt i starts from ``torch.Generator("cpu").manual_seed(seed + i)``, so neither the batch nor the device changes
    its noise. The pipeline object is left as it was.

    Args:
        pipeline: a diffusers pipeline, ready to run; used with its own scheduler.
        prompts: what to draw; only counted where the family takes no prompt.
        out: the folder to make; it must not exist, or be empty. Appears only when complete.
        seed: of the first prompt's noise.
        steps: denoising steps.
        guidance: guidance scale; 1 or less means without the unconditional branch.
        size: image side in pixels, or (height, width).
        batch: prompts that run at once.
        progress: is told of every batch.
        model: digest of the state being recorded, kept in the index.
        form: how pipelines of this family are called; by default StableDiffusionPipeline.

    Raises:
        CalibrationError: an argument is out of range, the denoiser answered NaN, or `out` is taken.
    """
    height, width = (size, size) if isinstance(size, int) else size
    plan = _Plan(form, seed, Drawing(steps, float(guidance), height, width))
    _check(pipeline, prompts, plan, batch)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        msg = f"recording {out}: is taken; expected a new or empty folder. Remove it, or name another."
        raise CalibrationError(msg)
    staging = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    staging.mkdir(parents=True)
    try:
        _write(pipeline, prompts, plan, staging, _Job(batch, progress, model))
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Recording.open(out, verify=False)


@dataclass(frozen=True)
class _Job:
    batch: int
    progress: Progress | None
    model: str


def _write(pipeline: Any, prompts: PromptSet, plan: _Plan, folder: Path, job: _Job) -> None:
    quiet = copy.copy(pipeline)
    quiet.set_progress_bar_config(disable=True)
    shards: list[Shard] = []
    observed = _Observed(plan.form, 0, plan.drawing.guidance)
    if job.progress:
        job.progress.start(f"record {prompts.name}", len(prompts.prompts))
    try:
        for start in range(0, len(prompts.prompts), job.batch):
            texts = list(prompts.prompts[start : start + job.batch])
            observed, arrays = _run(quiet, texts, plan, start)
            path = folder / f"shard-{len(shards):05d}.safetensors"
            save_file(arrays, path)
            _sync(path)
            shards.append(
                Shard(
                    file=path.name,
                    sha256=file_digest(path),
                    bytes=path.stat().st_size,
                    start=start,
                    count=len(texts),
                )
            )
            if job.progress:
                job.progress.advance(len(texts))
    finally:
        if job.progress:
            job.progress.finish()
    index = _index(pipeline, prompts, plan, observed, shards, job.model)
    path = folder / INDEX_FILE
    path.write_text(index.model_dump_json(indent=1), encoding="utf-8")
    _sync(path)
    _sync(folder)


def _run(pipeline: Any, texts: list[str], plan: _Plan, start: int) -> tuple[_Observed, dict[str, NDArray[Any]]]:
    observed = _Observed(plan.form, len(texts), plan.drawing.guidance)
    seeds = [plan.seed + start + index for index in range(len(texts))]
    with _observing(pipeline, observed):
        images = draw(pipeline, plan.form, texts, seeds, plan.drawing)
    arrays = observed.arrays()
    # The rounding of diffusers' numpy_to_pil.
    arrays["images"] = np.ascontiguousarray((images * 255).round().astype(np.uint8))
    return observed, arrays


@contextmanager
def _observing(pipeline: Any, observed: _Observed) -> Iterator[None]:
    form = observed.form
    handles = [getattr(pipeline, form.denoiser).register_forward_hook(observed.denoiser, with_kwargs=True)]
    parts = [(part, getattr(pipeline, part), names) for part, names in form.texts.items()]
    if form.decoder:
        vae = getattr(pipeline, form.decoder)
        # `decode` is no forward, so no hook sees it; its first layer gets the very latents.
        first = vae.post_quant_conv if getattr(vae, "post_quant_conv", None) is not None else vae.decoder
        parts.append((form.decoder, first, ("latent_sample",)))
    for part, module, names in parts:
        handles.append(module.register_forward_pre_hook(observed.fed(part, names), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _index(
    pipeline: Any,
    prompts: PromptSet,
    plan: _Plan,
    observed: _Observed,
    shards: list[Shard],
    model: str,
) -> Index:
    truncated, notes = _truncated(pipeline, prompts, plan.form, observed)
    return Index(
        pipeline=type(pipeline).__name__,
        model=model,
        prompt_set=prompts.name,
        prompts_digest=prompts.digest,
        prompts=list(prompts.prompts),
        seeds=[plan.seed + index for index in range(len(prompts.prompts))],
        steps=plan.drawing.steps,
        timesteps=observed.timesteps,
        guidance=plan.drawing.guidance,
        guided=observed.guided,
        inputs=list(plan.form.inputs),
        fed=sorted(name for name in observed.fixed if name.startswith("fed.")),
        height=plan.drawing.height,
        width=plan.drawing.width,
        scheduler=type(pipeline.scheduler).__name__,
        scheduler_config=json.loads(pipeline.scheduler.to_json_string(), parse_constant=str),
        truncated=truncated,
        notes=notes,
        shards=shards,
    ).signed()


def _truncated(pipeline: Any, prompts: PromptSet, form: Form, observed: _Observed) -> tuple[list[int], list[str]]:
    """Return which prompts the first tokenizer cuts, and a note on each."""
    if not form.texts:
        return [], []
    tokenizer = getattr(pipeline, form.tokenizers[0])
    limit = observed.fixed[f"fed.{next(iter(form.texts))}.input_ids"].shape[1]
    lengths = [len(tokenizer(text, verbose=False).input_ids) for text in prompts.prompts]
    found = [index for index, length in enumerate(lengths) if length > limit]
    notes = [
        f"prompt {index} is longer than the tokenizer takes ({lengths[index]} of {limit} tokens): its end is ignored"
        for index in found
    ]
    return found, notes


def _check(pipeline: Any, prompts: PromptSet, plan: _Plan, batch: int) -> None:
    denoiser, drawing = getattr(pipeline, plan.form.denoiser, None), plan.drawing
    if not isinstance(denoiser, nn.Module) or next(denoiser.parameters(), None) is None:
        msg = (
            f"recording {type(pipeline).__name__}: no torch {plan.form.denoiser}; expected a diffusers pipeline. "
            "Record the torch pipeline, not an engine."
        )
        raise CalibrationError(msg)
    factor = getattr(pipeline, "vae_scale_factor", 1)
    wrong = {
        "steps": None if drawing.steps >= 1 else "at least 1",
        "batch": None if batch >= 1 else "at least 1",
        "guidance": None if np.isfinite(drawing.guidance) else "a finite number",
        "seed": None if 0 <= plan.seed <= MAX_SEED - len(prompts.prompts) else "0 to 2**63",
        "height": None if drawing.height > 0 and drawing.height % factor == 0 else f"a multiple of {factor}",
        "width": None if drawing.width > 0 and drawing.width % factor == 0 else f"a multiple of {factor}",
    }
    given = {"batch": batch, "seed": plan.seed, **vars(drawing)}
    for name, expected in wrong.items():
        if expected:
            got = given[name]
            msg = f"recording: {name}: out of range; got {got}, expected {expected}. Change it."
            raise CalibrationError(msg)


def _array(tensor: Tensor) -> NDArray[Any]:
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    array: NDArray[Any] = tensor.detach().to("cpu", dtype).contiguous().numpy()
    return array


def _sync(path: Path) -> None:
    """Force a file or folder to the disk, so that the rename is never ahead of the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Holds an export or an engine to what torch answers, call by call, and refuses what misses the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from exporter.errors import ComponentFailed, ToolMissing
from exporter.lowering.wrappers import signature, wrap
from targets.base import Session, TargetError, TargetMissing

Array = NDArray[Any]
Call = tuple[float | None, Mapping[str, Array]]
"""The scheduler's timestep, None for components without one, and the feeds."""

_CAP_DB = 200.0


@dataclass(frozen=True)
class Limits:
    """What a component may differ from torch.

    Attributes:
        psnr_db: least peak signal-to-noise ratio of every call, the peak being the range of torch's answers.
        max_error: largest error of any one value, as a fraction of that range.
    """

    psnr_db: float
    max_error: float


LIMITS: Mapping[str, Limits] = MappingProxyType(
    {"f32": Limits(70.0, 2e-3), "f16": Limits(40.0, 5e-2), "bf16": Limits(22.0, 2.5e-1)}
)
"""By precision. Sound f32 lowerings reach 100 dB and more, f16 about 55, bf16 about 28 on large U-Nets."""


def check_parity(
    component: str,
    module: nn.Module,
    engine: Path | Session,
    calls: Sequence[Call],
    limits: Limits = LIMITS["f32"],
) -> dict[str, Any]:
    """Compare with torch on recorded inputs.

    Args:
        component: its name, for messages.
        module: the network in torch, in evaluation mode, float32.
        engine: an ONNX file, which is run with ONNX Runtime unoptimised, or an open session.
        calls: recorded inputs; for a component with timesteps early, middle and late ones, which stress other numbers.
        limits: what is still fine.

    Returns:
        JSON-ready: the limits, the worst ``psnr_db`` and ``max_error`` (as in `Limits`), and ``calls``, a list of
        ``{timestep, output, psnr_db, max_error}``.

    Raises:
        ComponentFailed: no calls, an answer of another shape, one that is not finite, or one beyond the limits.
        ToolMissing: ONNX Runtime is not installed.
    """
    return compare_answers(component, torch_answers(module, calls), engine, calls, limits)


def torch_answers(module: nn.Module, calls: Sequence[Call]) -> list[dict[str, Array]]:
    """Return what the network answers in torch, per call; arguments as in `check_parity`."""
    names = signature(module)
    wrapped = wrap(module)
    found = (_ask_torch(wrapped, names.inputs, feeds, module) for _, feeds in calls)
    return [dict(zip(names.outputs, answer, strict=True)) for answer in found]


def compare_answers(
    component: str,
    wanted: Sequence[Mapping[str, Array]],
    engine: Path | Session,
    calls: Sequence[Call],
    limits: Limits = LIMITS["f32"],
) -> dict[str, Any]:
    """Compare an engine with what `torch_answers` returned; everything else as in `check_parity`."""
    if not calls:
        raise ComponentFailed(f"{component}: parity: no recorded calls; expected at least one. Record more steps.")
    outputs = tuple(wanted[0])
    session = _open(component, engine) if isinstance(engine, Path) else engine
    try:
        answers = [
            (timestep, reference, _ask(component, session, feeds))
            for (timestep, feeds), reference in zip(calls, wanted, strict=True)
        ]
    finally:
        if isinstance(engine, Path):
            session.close()
    peaks = {name: _range([reference[name] for _, reference, _ in answers]) for name in outputs}
    found = [
        _compare(f"{component}{_at(timestep)}", name, (reference[name], got.get(name)), peaks[name], limits)
        | {"timestep": timestep}
        for timestep, reference, got in answers
        for name in outputs
    ]
    return {
        "limits": {"psnr_db": limits.psnr_db, "max_error": limits.max_error},
        "psnr_db": min(entry["psnr_db"] for entry in found),
        "max_error": max(entry["max_error"] for entry in found),
        "calls": found,
    }


def _open(component: str, path: Path) -> Session:
    from targets.ort import OnnxRuntime

    try:
        return OnnxRuntime().open_as_written(path)  # what is judged is the export, not the runtime's optimiser
    except TargetMissing as error:
        raise ToolMissing(f"{component}: parity: {error}") from error
    except TargetError as error:
        raise ComponentFailed(f"{component}: parity: {error}") from error


def _ask(component: str, session: Session, feeds: Mapping[str, Array]) -> dict[str, Array]:
    try:
        return session(feeds)
    except TargetError as error:
        raise ComponentFailed(f"{component}: parity: {error}") from error


def _ask_torch(
    wrapped: nn.Module, inputs: tuple[str, ...], feeds: Mapping[str, Array], module: nn.Module
) -> list[Array]:
    device = next(module.parameters()).device
    tensors = [torch.from_numpy(np.array(feeds[name])).to(device) for name in inputs]
    with torch.no_grad():
        answer = wrapped(*tensors)
    parts = answer if isinstance(answer, tuple) else (answer,)
    return [part.detach().cpu().numpy() for part in parts]


def _range(answers: list[Array]) -> float:
    return max(float(answer.max()) for answer in answers) - min(float(answer.min()) for answer in answers)


def _at(timestep: float | None) -> str:
    return "" if timestep is None else f" at timestep {timestep:g}"


def _compare(
    place: str, output: str, answers: tuple[Array, Array | None], peak: float, limits: Limits
) -> dict[str, Any]:
    reference, got = answers
    if got is None or got.shape != reference.shape:
        shape = None if got is None else got.shape
        raise ComponentFailed(
            f"{place}: {output}: another shape than in torch; got {shape}, expected {reference.shape}. Export it again."
        )
    if not np.isfinite(reference).all():
        raise ComponentFailed(
            f"{place}: {output}: torch's own answer is not finite; got {_odd(reference)}. Check this state's weights."
        )
    if not np.isfinite(got).all():
        raise ComponentFailed(
            f"{place}: {output}: not finite; got {_odd(got)}, expected finite numbers as from torch. Choose a wider "
            "precision."
        )
    difference = got.astype(np.float64) - reference.astype(np.float64)
    scale = peak or 1.0
    mean_square = float(np.mean(difference**2))
    psnr = min(_CAP_DB, 10 * math.log10(scale * scale / mean_square)) if mean_square else _CAP_DB
    worst = float(np.abs(difference).max()) / scale
    if psnr < limits.psnr_db or worst > limits.max_error:
        raise ComponentFailed(
            f"{place}: {output} differs from torch; got {psnr:.1f} dB and a largest error of {worst:.2g} of the range, "
            f"expected at least {limits.psnr_db:g} dB and at most {limits.max_error:g}. Choose a wider precision or "
            "another opset; if the limit is missed in f32, report it as a bug."
        )
    return {"output": output, "psnr_db": round(psnr, 2), "max_error": worst}


def _odd(values: Array) -> str:
    return f"{int(np.isnan(values).sum())} NaN and {int(np.isinf(values).sum())} infinite of {values.size}"

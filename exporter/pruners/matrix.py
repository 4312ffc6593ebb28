"""Which method prunes which family, and where one does not, why; known before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from exporter.networks.components import FAMILIES, denoiser
from exporter.pruners import PRUNERS

_CONDITIONAL = ("UNet2DConditionModel",)
_UNETS = (*_CONDITIONAL, "UNet2DModel")
_CACHED = "it reuses what the inner levels of a U-Net answered; transformers have no levels inside of others"

_ONLY: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        "bk-sdm": (_CONDITIONAL, "its presets remove layers of UNet2DConditionModel, so that stock configs fit"),
        "dip-go": (_UNETS, _CACHED),
        "deepcache": (_UNETS, _CACHED),
    }
)
"""Method -> the denoisers it is for, and why only those. A method that is not named here is for all."""


SCHEDULES = ("dip-go", "deepcache")
"""Methods that make a schedule of steps, of which a denoiser has one."""


def refusal(method: str, pipeline_class: str) -> str:
    """Return why a method does not prune the denoiser of a family; empty where it does.

    Args:
        method: a key of `PRUNERS`.
        pipeline_class: a key of `FAMILIES`.
    """
    classes, reason = _ONLY.get(method, ((), ""))
    return reason if classes and denoiser(pipeline_class).cls not in classes else ""


def matrix() -> dict[str, dict[str, str]]:
    """Return method -> family -> why not; empty where it is supported."""
    return {method: {name: refusal(method, name) for name in FAMILIES} for method in PRUNERS}


def matrix_text() -> str:
    """Return the matrix for people: families as columns by number, reasons below."""
    names = list(FAMILIES)
    width = max(map(len, PRUNERS)) + 2
    lines = [f"{'method':<{width}}" + "".join(f"{index + 1:<4}" for index in range(len(names)))]
    reasons: dict[str, str] = {}
    for method, row in matrix().items():
        marks = []
        for name in names:
            mark = "yes" if not row[name] else reasons.setdefault(row[name], chr(ord("a") + len(reasons)))
            marks.append(f"{mark:<4}")
        lines.append(f"{method:<{width}}{''.join(marks)}".rstrip())
    lines += ["", *(f"{index + 1}  {name}" for index, name in enumerate(names))]
    lines += ["", *(f"{mark}  not supported: {reason}" for reason, mark in reasons.items())]
    return "\n".join(lines)

"""What of stages that quantize can be refused before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from calibration.schemes import FLOAT, MIXED, PALETTE_MIXED, PALETTES, SCORES
from exporter.errors import RecipeError
from exporter.metrics.gates import Gate
from exporter.pruners.matrix import SCHEDULES
from exporter.quantizing.options import QuantizeOptions
from exporter.quantizing.plan import check_units, read_plan
from exporter.recipe import StageSpec
from exporter.validation import one_of

_ONLY = "palettes are Core ML's; any other runtime would store and compute them as floats, and gain nothing"
_DENOISERS = ("denoiser", "unet", "transformer")


def check_order(stages: Sequence[StageSpec]) -> None:
    """Refuse what cannot stand before or after quantization.

    Raises:
        RecipeError: weights that change, or a schedule of steps, beside a quantized network.
    """
    done: dict[str, int] = {}
    for index, stage in enumerate(stages):
        name = str(stage.options.get("component", "denoiser"))
        part = "the denoiser" if name in _DENOISERS else name
        if part in done and stage.kind != "quantize":  # another quantize takes the place of the one before
            raise RecipeError(
                f"stages[{index}].{stage.kind}: got {stage.kind} after {part} was quantized in stages[{done[part]}], "
                "expected quantization last: its ranges are those of the weights it saw. Move it behind."
            )
        if stage.kind == "quantize":
            done[part] = index
            before = [other for other in stages[:index] if other.method in SCHEDULES and other.kind == "prune"]
            if before and part == "the denoiser":
                raise RecipeError(
                    f"stages[{index}].quantize: got a denoiser with a schedule of steps ({before[0].method}), whose "
                    "graphs share their weights in float; expected one graph. Remove one of the two stages."
                )


def check_schemes(options: QuantizeOptions, place: str, offered: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse a scheme that a target of the recipe does not run, also one in a plan.

    Args:
        options: of the stage.
        place: key path for the message.
        offered: the recipe's name of a target, with its type -> scheme -> why it cannot be had with the target's
            options, empty where it can.

    Raises:
        RecipeError: naming what the target can.
    """
    plan = read_plan(Path(options.plan)) if options.plan else {}
    asked = PALETTES if options.scheme == PALETTE_MIXED else (options.scheme,)
    for scheme in dict.fromkeys([*asked, *plan.values()]):
        for name, schemes in offered.items():
            why = schemes.get(scheme, _ONLY if scheme in PALETTES else None)
            if scheme == FLOAT or why == "":
                continue
            left = [known for known, reason in schemes.items() if not reason]
            can = one_of(left) if left else "no quantized graphs"
            told = f": {why}" if why else ""
            raise RecipeError(
                f"{place}.scheme: target {name} does not run {scheme}{told}; got '{scheme}', expected {can}. "
                "Choose one of these, or leave the target out."
            )


def check_plans(stages: Sequence[StageSpec], source: Path) -> None:
    """Refuse plans that name units which the source's denoiser does not have; behind a cut it shows when it is made.

    Raises:
        RecipeError: naming the unit, with "did you mean".
    """
    for index, stage in enumerate(stages):
        if stage.kind == "prune" and str(stage.options.get("component", "denoiser")) in _DENOISERS:
            return
        file, part = stage.options.get("plan"), str(stage.options.get("component", "denoiser"))
        if stage.kind == "quantize" and isinstance(file, str) and part in _DENOISERS:
            units = read_plan(Path(file))
            check_units(units, _possible_units(source), f"stages[{index}].quantize.plan: {file}")


def _possible_units(source: Path) -> list[str]:
    """Return the paths of a denoiser's modules, and the names of products that could be in each."""
    from exporter.networks.storage import build_network  # seconds to import
    from exporter.states import components_of

    part = next(part for part in components_of(source) if part.role == "denoiser")
    modules = [name for name, _ in build_network(source / part.folder, cls=part.cls).named_modules() if name]
    products = [f"{name}.{kind}" for name in modules for kind in (SCORES, MIXED) if "attn" in name.rpartition(".")[2]]
    return [*modules, *products]


def speed_gates(stages: Mapping[str, StageSpec]) -> list[Gate]:
    """Return the gates of stages that ask for a speed-up, which hold on every target.

    Args:
        stages: by the id of the state that each makes.
    """
    found = []
    for state, stage in stages.items():
        factor = stage.options.get("require_speedup") if stage.kind == "quantize" else None
        if isinstance(factor, int | float) and not isinstance(factor, bool) and factor > 0:
            part = str(stage.options.get("component", "denoiser"))
            spec = {"metric": "latency.over_float", "max": 1 / factor, "state": state, "component": part}
            found.append(Gate.parse(spec, f"{state}.require_speedup"))
    return found

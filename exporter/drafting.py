"""A first recipe for a source and a device: commented, made of what exists here, and checked before it is written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import targets
from exporter.artifact import disk_failure, write_text
from exporter.errors import RecipeError, SourceError, ToolMissing
from exporter.networks.components import family
from exporter.networks.reading import read_object
from exporter.networks.single_file import refuse_pickles
from exporter.networks.source import MODEL_INDEX, open_source
from exporter.networks.weights import WEIGHT_STEMS, variants_of
from exporter.preflight import Plan, check_recipe
from exporter.prompts import EVERYDAY
from exporter.recipe import read_recipe
from exporter.reference import SHAPES
from exporter.states import image_size
from exporter.validation import hint, one_of

EMBEDDED = "reference:shapes"
_HUB = re.compile(r"(?P<hub>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")
_VARIANT_ORDER = ("fp16", "bf16")


@dataclass(frozen=True)
class Device:
    """What a recipe for a kind of device starts from.

    Attributes:
        about: for whom it is, a comment of the recipe.
        threads: of every target; None leaves them to the runtime.
        keep_ratio: of pruning; None for a recipe without stages.
        steps: of distillation.
        images: that are made and compared.
        faster: a gate: the final state's latency as a share of dense; None without.
        columns: names of `_TARGETS`.
    """

    about: str
    threads: int | None
    keep_ratio: float | None
    steps: int
    images: int
    faster: float | None
    columns: tuple[str, ...] = ("openvino", "ort")


DEVICES: Mapping[str, Device] = {
    "cpu": Device("Any x86 or Arm computer: the model as it is, no stages.", None, None, 0, 4, None),
    "laptop": Device("A laptop: a quarter of the widths goes, distillation repairs.", 4, 0.75, 500, 4, 0.95),
    "phone": Device(
        "A phone-sized budget: half of the widths goes, two threads.", 2, 0.5, 2000, 4, 0.8, ("ort", "coreml")
    ),
}

_TARGETS: Mapping[str, tuple[str, str]] = {
    "openvino": ("openvino", "precision: f32"),
    "ort": ("onnxruntime", "precision: f32"),
    "coreml": ("coreml", "deployment: iOS17"),
}
"""Name of a column to its target type and what it always says."""

_SAMPLING: Mapping[str, tuple[int, float]] = {
    "LatentConsistencyModelPipeline": (4, 8.0),
    "FluxPipeline": (20, 3.5),
    "StableDiffusion3Pipeline": (28, 7.0),
    "PixArtAlphaPipeline": (20, 4.5),
    "DiTPipeline": (25, 4.0),
}
_USUAL = (20, 7.5)
"""Steps and guidance that the families' authors give."""


def write_draft(source: str, device: str, out: Path, *, config: str | None = None, variant: str | None = None) -> Plan:
    """Write a commented recipe that `exporter check` passes.

    Args:
        source: a pipeline folder, a checkpoint file, ``owner/name@commit`` on the hub, or ``reference:shapes``.
        device: a key of `DEVICES`.
        out: the YAML file; must not be there.
        config: for a checkpoint file, the folder with its configs.
        variant: of the weight files; None takes the plain ones, or, of a folder without those, what there is.

    Returns:
        What `exporter check` says of it.

    Raises:
        RecipeError: an unknown device, or `out` is there already.
        SourceError: the source is missing, damaged or unsupported.
        ToolMissing: no target of the recipe can be used here.
    """
    if device not in DEVICES:
        raise RecipeError(f"--device: got '{device}', expected {one_of(DEVICES)}.{hint(device, DEVICES)}")
    if out.exists():
        raise RecipeError(f"--out: {out} is there already; expected a new file. Give another name with --out.")
    text = draft(source, device, out.stem, config=config, variant=variant)
    partial = out.with_name(f".partial-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(partial, text)
        recipe = read_recipe(partial)
        plan = check_recipe(recipe, Path("runs") / recipe.name)
        plan.raise_problems()
        partial.rename(out)
    except OSError as error:
        raise disk_failure(out, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return plan


def draft(source: str, device: str, name: str, *, config: str | None = None, variant: str | None = None) -> str:
    """Return the text of a recipe; see `write_draft`."""
    keys = _source_keys(source, config)
    folder = _folder_of(keys, variant)
    path = folder / MODEL_INDEX
    if not path.is_file():
        raise SourceError(f"{folder}: not a pipeline folder; got no {MODEL_INDEX}, expected one. Check the source.")
    pipeline = str(read_object(path, SourceError).get("_class_name"))
    family(pipeline)  # refuses one that the rest of the program does not know
    size = image_size(None, folder)
    variant = variant or (_variant_of(folder) if "config" not in keys else None)
    keys |= {"variant": variant} if variant else {}
    chosen = DEVICES[device]
    prompts = "shapes-validation" if source == EMBEDDED else EVERYDAY
    steps, guidance = (20, 4.0) if source == EMBEDDED else _SAMPLING.get(pipeline, _USUAL)
    return "\n".join(
        [
            f"# {chosen.about} Written for {pipeline}; change what you like: `exporter schema` lists every key.",
            f"name: {json.dumps(re.sub(r'[^A-Za-z0-9._-]', '-', name).lstrip('._-')[:64] or 'my-model')}",
            "source:",
            *(f"  {key}: {json.dumps(value)}" for key, value in keys.items()),
            "  # loras: [{path: style.safetensors, weight: 0.8}]   # fused before anything else",
            "  safety_checker: drop                               # or: keep",
            f"sampling: {{scheduler: source, steps: {steps}, guidance: {guidance}, size: {size}, batch: 1}}",
            *_stages(chosen, "shapes-train" if source == EMBEDDED else EVERYDAY, tunes=family(pipeline).distills),
            *_targets(chosen),
            "measure:",
            f"  prompts: {prompts}  # better: a txt, csv or jsonl file with prompts of your own",
            f"  images: {chosen.images}  # more give tighter intervals and take longer",
            "  calls: 2",
            "  seed: 0",
            *_gates(chosen),
            "on_miss: continue  # or: stop, after the state's other targets",
            "unmeasured: warn   # or: fail",
            "",
        ]
    )


def _source_keys(source: str, config: str | None) -> dict[str, str]:
    hub = _HUB.fullmatch(source)
    if hub and not Path(source).exists():
        return {"hub": hub["hub"], "revision": hub["revision"]}
    if "/" in source and re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", source) and not Path(source).exists():
        raise SourceError(
            f"{source}: no such folder, and a hub id needs its commit; expected owner/name@<40 hex digits>. "
            "Copy the commit from the repository's history."
        )
    return {"path": source} | ({"config": config} if config is not None else {})


def _folder_of(keys: Mapping[str, str], variant: str | None) -> Path:
    if keys.get("path") == EMBEDDED:
        return SHAPES
    if "hub" in keys:
        return open_source({"hub": keys["hub"], "revision": keys["revision"]}, variant=variant)
    path = Path(keys["path"]).expanduser()
    if not path.is_file():
        return open_source(path)
    refuse_pickles(path)
    if "config" not in keys:
        raise SourceError(
            f"{path}: holds weights only; expected --config beside it: a local folder with model_index.json, the "
            "configs, tokenizer and scheduler. Nothing is fetched for it."
        )
    return open_source(keys["config"])


def _variant_of(folder: Path) -> str | None:
    """Return the variant to name in the recipe: none where there are plain weights of everything."""
    found: set[str] | None = None
    for stem in set(WEIGHT_STEMS.values()):
        for place in sorted({path.parent for path in folder.glob(f"*/{stem}*.safetensors*")}):
            here = set(variants_of(place, stem))
            found = here if found is None else found & here
    if not found or "" in found:
        return None
    return next((word for word in _VARIANT_ORDER if word in found), min(found))


def _stages(device: Device, prompts: str, *, tunes: bool) -> list[str]:
    ratio, steps = device.keep_ratio, device.steps or 500
    tune = f"  - tune: {{method: distill, steps: {steps}, batch: 4, prompts: {prompts}}}"
    lines = [
        "  # `exporter pruners` lists the methods and their options; distillation is much faster on a GPU",
        f"  - prune: {{method: magnitude, keep_ratio: {ratio or 0.75}, round_to: 8}}",
        tune if tunes else "  # no tune stage: distillation does not know this family",
    ]
    if ratio is None:
        return ["stages: []", *(f"#{line[1:]}" for line in lines[1:])]
    return ["stages:", *lines]


def _targets(device: Device) -> list[str]:
    lines, usable = ["targets:  # variants of one type are columns of the report"], 0
    threads = "" if device.threads is None else f", threads: {device.threads}"
    missing = []
    for name, (kind, options) in ((name, _TARGETS[name]) for name in device.columns):
        here = targets.target(kind).capabilities()
        line = f"  {name}: {{type: {kind}, {options}{threads}}}"
        usable += here.runs
        lines.append(line if here.runs else f"  # {line.strip()}   # not here: {here.reason} Run: {here.install}")
        missing += [] if here.runs else [f"{kind}: {here.reason} Run: {here.install}"]
    if not usable:
        raise ToolMissing(f"--device: no target of it can be used here. {' '.join(missing)}")
    return lines


def _gates(device: Device) -> list[str]:
    lines = [
        "gates:",
        "  - {metric: lowering.psnr_db, min: 45}  # export and compile change nothing that matters",
        "  - {metric: fidelity.image.problems, max: 0}  # no NaN, black, constant, saturated or wrong-size image",
    ]
    if device.faster is not None:
        lines += [
            "  - {metric: fidelity.teacher_forced.psnr_db, min: 20, state: final}  # how close to the dense model",
            f"  - {{metric: latency.median_ms, max: {device.faster} * dense, state: final}}  # what pruning must bring",
        ]
    return lines


def summary(plan: Plan, out: Path) -> dict[str, Any]:
    """Return what the command prints as JSON."""
    return {"recipe": str(out), "plan": plan.to_json()}

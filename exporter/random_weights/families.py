"""The families that can be written, read from `families/*.json`: published configs, and tiny ones of the same make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from exporter.errors import RecipeError
from exporter.validation import hint, one_of

FAMILIES = ("sd15", "sd21", "sdxl", "lcm", "sd3-medium", "flux", "pixart", "dit", "ddpm")

SAFETY_PARTS = ("safety_checker", "feature_extractor")
"""Written only when asked for."""


@dataclass(frozen=True)
class Part:
    """One sub-folder of a pipeline.

    Attributes:
        folder: its name, such as ``unet``.
        library: as `model_index.json` states it: ``diffusers``, ``transformers`` or a pipeline's own module.
        cls: name of its class.
        config: what builds it.
    """

    folder: str
    library: str
    cls: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A pipeline of a family.

    Attributes:
        name: as on the command line.
        pipeline: the pipeline's class.
        like: the published model whose configs these are.
        index: further entries of `model_index.json`.
        parts: the sub-folders, in the order in which they are written.
        classes: how many class labels the model knows, 0 for one that takes text.
    """

    name: str
    pipeline: str
    like: str
    index: Mapping[str, Any]
    parts: tuple[Part, ...]
    classes: int


def family(name: str, *, tiny: bool = False, safety_checker: bool = False) -> Family:
    """Return a family.

    Args:
        name: one of `FAMILIES`.
        tiny: configs of the same classes and switches, but a few thousand numbers large.
        safety_checker: with the safety checker, where the published model has one.

    Raises:
        RecipeError: no such family, or none with a safety checker.
    """
    if name not in FAMILIES:
        raise RecipeError(f"--family: got '{name}', expected {one_of(FAMILIES)}.{hint(name, FAMILIES)}")
    stated = _read(name)
    given = stated["parts"]
    if safety_checker and "safety_checker" not in given:
        raise RecipeError(f"--safety-checker: {stated['like']} has none; got --family {name}. Leave the option out.")
    shared = _read("parts")
    kept = [folder for folder in given if safety_checker or folder not in SAFETY_PARTS]
    parts = tuple(_part(folder, given[folder], shared, tiny=tiny) for folder in kept)
    return Family(name, stated["pipeline"], stated["like"], stated["index"], parts, stated.get("classes", 0))


def _part(folder: str, stated: Mapping[str, Any], shared: Mapping[str, Any], *, tiny: bool) -> Part:
    """Merge what a family says of a part over the shared part that it is like."""
    base = shared[stated["like"]] if "like" in stated else {}
    config = {**base.get("config", {}), **stated.get("config", {})}
    if tiny:
        config |= {**base.get("tiny", {}), **stated.get("tiny", {})}
    library, _, cls = (stated.get("class") or base["class"]).partition(":")
    return Part(folder, library, cls, config)


def _read(name: str) -> dict[str, Any]:
    file = resources.files("exporter.random_weights") / "families" / f"{name}.json"
    return dict(json.loads(file.read_text(encoding="utf-8")))

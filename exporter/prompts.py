"""Prompts by the name of a shipped set or from the user's file."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

from calibration.errors import CalibrationError
from calibration.prompts import PromptSet, load_prompts
from exporter.errors import RecipeError
from exporter.reference.grammar import prompt_set as shapes_prompts


def _everyday() -> list[str]:
    text = (resources.files("exporter") / f"{EVERYDAY}.txt").read_text(encoding="utf-8")
    return text.splitlines()


EVERYDAY = "everyday"
"""Prompts for models of everyday images."""

NAMED: dict[str, Callable[[], list[str]]] = {
    **{
        name: (lambda name=name: shapes_prompts(name))  # type: ignore[misc]
        for name in ("shapes-validation", "shapes-calibration", "shapes-train", "shapes-test")
    },
    EVERYDAY: _everyday,
}
"""Sets that ship with the package."""


def prompt_set(source: str) -> PromptSet:
    """Return a named set or the prompts of a txt, csv or jsonl file.

    Raises:
        RecipeError: there is no such set or file, or it holds no prompts.
    """
    try:
        return load_prompts(source if source in NAMED else Path(source), named=NAMED)
    except CalibrationError as error:
        raise RecipeError(str(error)) from error

"""Module path patterns of the recipe key `protect`."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from exporter.errors import RecipeError


class Protects(Protocol):
    """Options of a method that leaves some modules alone."""

    @property
    def protect(self) -> tuple[str, ...]:
        """Module path patterns that are never touched, all below a match included."""


def is_protected(paths: Iterable[str], patterns: tuple[str, ...]) -> bool:
    """Return whether any path is matched by a pattern, or lies below a match."""
    return any(
        fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*") for path in paths for pattern in patterns
    )


def check_patterns(network: nn.Module, patterns: tuple[str, ...]) -> None:
    """Refuse a pattern that protects nothing, which is a slip of the pen.

    Raises:
        RecipeError: naming the pattern and the nearest module path.
    """
    paths = [path for path, _ in network.named_modules() if path]
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            near = get_close_matches(pattern, paths, n=1, cutoff=0.3) or paths[:1]
            raise RecipeError(
                f"prune.protect: got {pattern!r}, which matches no module of {type(network).__name__}; expected a path "
                f"or pattern such as {near[0]!r}. Correct or remove it."
            )

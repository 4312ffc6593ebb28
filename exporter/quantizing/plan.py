"""A plan: which unit of a network in which scheme. A text file, one unit a line, to be read and edited by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from calibration.schemes import SCHEMES, unit_of
from exporter.errors import RecipeError
from exporter.validation import hint, one_of

_REST = "*"
"""The unit that stands for everything that no other line names."""


def read_plan(path: Path) -> dict[str, str]:
    """Return module path -> scheme; the empty path stands for the rest of the network.

    A line holds a module path, or ``*`` for the rest, and a scheme; further columns are for the reader, and ``#``
    begins a remark.

    Raises:
        RecipeError: the file is missing or a line says no scheme, with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"quantize.plan: {path}: cannot be read: {error}. Check the path.") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        place = f"{path}:{number}"
        if len(words) < 2 or words[1] not in SCHEMES:
            got = words[1] if len(words) > 1 else ""
            raise RecipeError(f"{place}: scheme: got '{got}', expected {one_of(SCHEMES)}.{hint(got, SCHEMES)}")
        unit = "" if words[0] == _REST else words[0]
        if unit in found:
            raise RecipeError(f"{place}: {words[0]} stands there twice; expected each unit once. Remove one line.")
        found[unit] = words[1]
    return found


def plan_text(plan: Mapping[str, str], columns: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Return a plan as its file: aligned, the rest last.

    Args:
        plan: module path -> scheme.
        columns: title -> what it says of units, for the reader.
    """
    columns = columns or {}
    rows = [["# unit", "scheme", *columns]]
    for unit, scheme in sorted(plan.items(), key=lambda item: not item[0]):
        rows.append([unit or _REST, scheme, *(told.get(unit, "") for told in columns.values())])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def check_units(plan: Mapping[str, str], sites: Iterable[str], place: str) -> None:
    """Refuse units that a network does not have.

    Args:
        plan: module path -> scheme.
        sites: names of everything that can be quantized.
        place: where the plan stands, for the message.

    Raises:
        RecipeError: naming the unit, with "did you mean".
    """
    known = {prefix for name in sites for prefix in prefixes_of(name)}
    for unit in plan:
        if unit and unit not in known:
            msg = f"{place}: {unit}: no such unit; expected the path of a module that computes something."
            raise RecipeError(msg + hint(unit, known))


def prefixes_of(name: str) -> list[str]:
    """Return a site's name and the paths of the modules that hold it, innermost first."""
    found = [name]
    while "." in found[-1]:
        found.append(found[-1].rpartition(".")[0])
    return found


def schemes_of(plan: Mapping[str, str], sites: Iterable[str]) -> dict[str, str]:
    """Return site -> scheme, of sites that the plan reaches."""
    found = {name: unit_of(name, plan) for name in sites}
    return {name: plan[unit] for name, unit in found.items() if unit is not None}

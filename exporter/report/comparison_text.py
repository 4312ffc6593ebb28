"""A comparison for people: plain text of at most 120 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from exporter.metrics.names import METRICS
from exporter.report.comparison import Comparison, Difference, Gates, Pair
from exporter.report.formatting import moment, printable, quantity

WIDTH = 120
_SHOWN = 6
_COLUMN = 14


def render_comparison(found: Comparison, names: tuple[str, str]) -> str:
    """Return a comparison as text; ends with a line end.

    Args:
        found: the comparison.
        names: what the two are called, such as the folders of the runs.
    """
    lines = [_head("A", names[0], found.a), _head("B", names[1], found.b), ""]
    lines += _recipes(found.recipe)
    for obstacle in found.obstacles:
        told = "; ".join(_difference(item) for item in obstacle.differences[:_SHOWN])
        more = len(obstacle.differences) - _SHOWN
        told += f"; and {more} more" if more > 0 else ""
        lines += _wrapped(f"NOT COMPARABLE ({', '.join(obstacle.groups)}): {obstacle.what}: {told}")
    gates = {(entry.state, entry.target): entry for entry in found.gates}
    for place, entry in gates.items():
        lines += ["", f"{place[0]} on {place[1]}: {_gates(entry)}"]
        lines += [f"  {'':34}{'A':>{_COLUMN}}{'B':>{_COLUMN}}  B against A"]
        for pair in found.pairs:
            if (pair.state, pair.target) == place:
                lines += _pair(pair)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _head(letter: str, name: str, facts: Mapping[str, Any]) -> str:
    state = "" if facts["complete"] else ", not finished"
    text = f"{letter}  {name}: {facts['name']}, {moment(facts['started'])}, exit code {facts['exit_code']}{state}"
    return printable(text)[:WIDTH]


def _recipes(found: tuple[Difference, ...]) -> list[str]:
    if not found:
        return ["The recipes are the same."]
    return [
        "The recipes differ:",
        *(line for item in found for line in _wrapped(f"  {_difference(item)}")),
    ]


def _difference(item: Difference) -> str:
    return f"{item.key}: {_short(item.a)} | {_short(item.b)}"


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _gates(entry: Gates) -> str:
    sides = []
    for letter, statuses in (("A", entry.a), ("B", entry.b)):
        told = ", ".join(f"{count} {status}" for status, count in statuses.items())
        sides.append(f"{letter} {told or 'none'}")
    return f"gates {'; '.join(sides)}"


def _pair(pair: Pair) -> list[str]:
    name = pair.metric + (f" ({pair.component})" if pair.component else "")
    values = [quantity(value, pair.unit) for value in (pair.a, pair.b)]
    head = f"  {name:34}{values[0]:>{_COLUMN}}{values[1]:>{_COLUMN}}  "
    lines = _wrapped(head + _against(pair), len(head) if len(head) < WIDTH - 30 else 4)
    for letter, why in (("A", pair.why_a), ("B", pair.why_b)):
        first = printable(why).strip().partition("\n")[0]
        lines += _wrapped(f"      {letter}: {first}", 9) if first and first != "not measured" else []
    return lines


def _against(pair: Pair) -> str:
    if pair.a is None or pair.b is None:
        return "-"
    if pair.refused:
        return f"not compared: {pair.refused}"
    change = pair.difference or 0.0
    if change == 0:
        return "the same"
    if pair.ratio is not None and math.isfinite(pair.ratio):
        text = f"{pair.ratio:.3g} times"
    else:
        text = f"{'+' if change > 0 else '-'}{quantity(abs(change), pair.unit)}"
    metric = METRICS.get(pair.metric)
    if metric is None:
        return text
    return f"{text}, {'better' if (change > 0) == (metric.better == 'higher') else 'worse'}"


def _wrapped(text: str, indent: int = 4) -> list[str]:
    clean = printable(text).replace("\n", " ")
    return textwrap.wrap(clean, WIDTH, subsequent_indent=" " * indent, drop_whitespace=True) or [""]

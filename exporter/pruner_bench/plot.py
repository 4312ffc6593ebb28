"""Latency against fidelity as one drawing that stands alone: every method named beside its point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from exporter.pruner_bench.rows import Row

_COLOURS = {
    "dense": "#14181f",
    "steps": "#59616e",
    "channels": "#2a78d6",
    "blocks": "#d9541e",
    "schedule": "#14946a",
    "zeros": "#7a4fc4",
}
_TOLD = {
    "steps": "fewer steps of the sampler",
    "channels": "channels, heads, neurons",
    "blocks": "blocks",
    "schedule": "steps and levels of steps",
    "zeros": "zeros in weights",
}
_SIZE, _FONT = (10.0, 6.4), 8.0
_LINE = 0.026  # height of a label, as a share of the axis
_NEAR = 0.09  # points whose latencies differ by less share a column of labels
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bench",
    "text.parse_math": False,
    "axes.unicode_minus": False,
}


@dataclass(frozen=True)
class _Label:
    row: Row
    x: float
    y: float
    error: tuple[float, float] | None


def latency_against_fidelity(rows: Sequence[Row], title: str) -> str:
    """Return an SVG document of what one seed of each row says; rows without both numbers are left out.

    Args:
        rows: dense among them, each contestant at most once per latency.
        title: above the drawing.
    """
    points = [point for point in map(_label, rows) if point is not None]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE)
        FigureCanvasSVG(figure)
        plot = figure.add_axes((0.06, 0.08, 0.93, 0.86))
        plot.set_title(title, fontsize=11, loc="left")
        plot.set_xlabel("denoising loop, × dense (measured)", fontsize=9)
        plot.set_ylabel("right-prompt rate", fontsize=9)
        plot.tick_params(labelsize=8)
        plot.grid(color="#e6e9ee", linewidth=0.7)
        plot.set_axisbelow(True)
        plot.spines[["top", "right"]].set_visible(False)
        _frame(plot, points)
        for point in points:
            colour = _COLOURS[point.row.kind]
            if point.error is not None:
                plot.vlines(point.x, *point.error, color=colour, linewidth=0.8, alpha=0.45)
            plot.plot(point.x, point.y, "o", color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.7)
        for column in _columns(points):
            _name(plot, column)
        for kind, told in _TOLD.items():
            if any(point.row.kind == kind for point in points):
                plot.plot([], [], "o", color=_COLOURS[kind], markersize=5, label=told)
        plot.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.0))
        out = StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return out.getvalue()


def _label(row: Row) -> _Label | None:
    ratio, rate = row.values.get("latency_ratio"), row.values.get("judge_rate")
    if ratio is None or rate is None:
        return None
    error = None if rate.low is None or rate.high is None else (rate.low, rate.high)
    return _Label(row, ratio.value, rate.value, error)


def _frame(plot: Axes, points: Sequence[_Label]) -> None:
    ends = [end for point in points for end in (point.error or (point.y,))]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    room = 0.06 * (high - low or 1.0)
    plot.set_ylim(low - room, high + room)
    latencies = [point.x for point in points] or [1.0]
    plot.set_xlim(min(latencies) - 0.03, max(latencies) + 0.22)


def _columns(points: Sequence[_Label]) -> list[list[_Label]]:
    """Return points of about the same latency together."""
    ordered = sorted(points, key=lambda point: point.x)
    columns = [ordered[:1]] if ordered else []
    for before, point in pairwise(ordered):
        if point.x - before.x < _NEAR / 3 and point.x - columns[-1][0].x < _NEAR:
            columns[-1].append(point)
        else:
            columns.append([point])
    return columns


def _name(plot: Axes, column: Sequence[_Label]) -> None:
    """Write names to the right of a column, one above the other, each joined to its point."""
    bottom, top = plot.get_ylim()
    ordered = sorted(column, key=lambda point: point.y)
    heights = [(point.y - bottom) / (top - bottom) for point in ordered]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + _LINE)
    over = max(0.0, heights[-1] - (1 - _LINE / 2))
    heights[-1] -= over
    for index in range(len(heights) - 2, -1, -1):
        heights[index] = min(heights[index], heights[index + 1] - _LINE)
    x = max(point.x for point in column) + 0.018
    for point, height in zip(ordered, heights, strict=True):
        y = bottom + height * (top - bottom)
        colour = _COLOURS[point.row.kind]
        plot.plot([point.x, x - 0.002], [point.y, y], color=colour, linewidth=0.5, alpha=0.6)
        plot.text(x, y, point.row.name, fontsize=_FONT, color=colour, va="center")

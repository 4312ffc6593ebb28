"""Latency against fidelity as one drawing that stands alone: every method named beside its point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
_LINE, _LETTER = 0.028, 0.0078  # height of a name and width of a letter, as shares of the axes
_DOT = 0.007  # of a point's radius, the same
_NEAR = 0.1  # points whose latencies differ by less share a column of names
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
        plot = figure.add_axes((0.06, 0.12, 0.93, 0.83))
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
        _name(plot, points)
        for kind, told in _TOLD.items():
            if any(point.row.kind == kind for point in points):
                plot.plot([], [], "o", color=_COLOURS[kind], markersize=5, label=told)
        plot.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(_TOLD))
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


def _name(plot: Axes, points: Sequence[_Label]) -> None:
    """Write names to the right of columns of points, in the order of their heights, where they cover nothing."""
    (left, right), (bottom, top) = plot.get_xlim(), plot.get_ylim()
    spots = [replace(p, x=(p.x - left) / (right - left), y=(p.y - bottom) / (top - bottom)) for p in points]
    dots = [_Box(spot.x - _DOT, spot.x + _DOT, spot.y - _DOT, spot.y + _DOT) for spot in spots]
    names: list[_Box] = []
    for column in sorted(_columns(spots), key=len, reverse=True):
        # Names over names cannot be read; over a point they can.
        stack = min(_stacks(column), key=lambda boxes: 3 * _covered(boxes, names) + _covered(boxes, dots))
        names += stack
        for spot, box in zip(column, stack, strict=True):
            height, colour, frame = (box.low + box.high) / 2, _COLOURS[spot.row.kind], plot.transAxes
            plot.plot(
                [spot.x, box.left - 0.003], [spot.y, height], color=colour, linewidth=0.5, alpha=0.6, transform=frame
            )
            plot.text(box.left, height, spot.row.name, fontsize=_FONT, color=colour, va="center", transform=frame)


@dataclass(frozen=True)
class _Box:
    """A part of the axes, in shares of their sides."""

    left: float
    right: float
    low: float
    high: float

    def covers(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.low < other.high and other.low < self.high


def _covered(boxes: Sequence[_Box], others: Sequence[_Box]) -> int:
    return sum(box.covers(other) for box in boxes for other in others)


def _columns(spots: Sequence[_Label]) -> list[list[_Label]]:
    """Return points of about the same latency together, each column from the bottom up."""
    ordered = sorted(spots, key=lambda spot: spot.x)
    columns = [ordered[:1]] if ordered else []
    for before, spot in pairwise(ordered):
        if spot.x - before.x < _NEAR / 3 and spot.x - columns[-1][0].x < _NEAR:
            columns[-1].append(spot)
        else:
            columns.append([spot])
    return [sorted(column, key=lambda spot: (spot.y, spot.row.name)) for column in columns]


def _stacks(column: Sequence[_Label]) -> Iterator[list[_Box]]:
    """Yield where a column's names can stand: as near as they fit, then further up and down, then to the right."""
    heights = [spot.y for spot in column]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + _LINE)
    heights[-1] = min(heights[-1], 1 - _LINE / 2)
    for index in range(len(heights) - 2, -1, -1):
        heights[index] = min(heights[index], heights[index + 1] - _LINE)
    for far in range(2):
        start = max(spot.x for spot in column) + _DOT + 0.012 + 0.03 * far
        for step in range(24):
            moved = (-1) ** step * ((step + 1) // 2) * _LINE / 2
            if step == 0 or (heights[0] + moved >= _LINE / 2 and heights[-1] + moved <= 1 - _LINE / 2):
                yield [
                    _Box(start, start + len(spot.row.name) * _LETTER, y + moved - _LINE / 2, y + moved + _LINE / 2)
                    for spot, y in zip(column, heights, strict=True)
                ]

"""Charts as static SVG by matplotlib, coloured by the page's own CSS variables, so that light and dark both work.

Static SVG instead of an interactive library: a report stays small, prints, needs no script and opens on a phone.
"""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SERIES = 7
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MARKER_GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖")
_DASHES = ((0, ()), (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_WIDTH, _HEIGHT, _DPI = 360.0, 236.0, 72.0

# Placeholders: matplotlib needs real colours, the page needs variables; the SVG is rewritten from one to the other.
_INK, _GRID, _LIMIT = "#010000", "#020000", "#030000"
_COLOURS = {_INK: "var(--chart-ink)", _GRID: "var(--chart-grid)", _LIMIT: "var(--bad)"}
_COLOURS |= {f"#0000{index + 1:02x}": f"var(--series-{index + 1})" for index in range(SERIES)}

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.labelsize": 11,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": False,
    "font.size": 11,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: what it is, shown when the pointer rests on it.
        series: colour and dash, as an index.
        points: (x, y) pairs; those that are not finite leave a gap.
        text: a few characters written on it.
    """

    label: str
    series: int
    points: tuple[tuple[float, float], ...]
    text: str = ""


@dataclass(frozen=True)
class Point:
    """One point of a scatter chart, with the 95 % intervals of both values where there are any.

    Attributes:
        label: what it is, shown when the pointer rests on it.
        series: colour, as an index.
        marker: shape, as an index; points of one shape are joined by a thin line.
        text: a few characters written beside it.
        x, y: the values, finite.
        x_interval, y_interval: (low, high) or None.
    """

    label: str
    series: int
    marker: int
    text: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axes:
    """What the axes of a chart say.

    Attributes:
        name: unique in the page; prefix of every id in the SVG.
        x: text of the x axis.
        y: text of the y axis.
        description: what a screen reader says instead of the chart.
        is_reversed: whether x runs from right to left, as timesteps do.
        y_range: (low, high) to share among charts, None to follow the data.
        limit: a gate on y, drawn as a line.
    """

    name: str
    x: str
    y: str
    description: str
    is_reversed: bool = False
    y_range: tuple[float, float] | None = None
    limit: float | None = None


def line_chart(lines: Sequence[Line], axes: Axes) -> str:
    """Return an SVG element of lines."""
    with mpl.rc_context(_STYLE):
        figure, plot = _figure(axes)
        titles = {}
        for index, line in enumerate(lines):
            xs, ys = zip(*line.points, strict=True) if line.points else ((), ())
            drawn = plot.plot(
                xs,
                [y if math.isfinite(y) else math.nan for y in ys],
                color=_colour(line.series),
                linestyle=_DASHES[line.series // SERIES % len(_DASHES)],
                linewidth=1.8,
                marker="o" if len(xs) <= 60 else None,
                markersize=3.5,
                markeredgewidth=0,
            )
            drawn[0].set_gid(f"line{index}")
            titles[f"line{index}"] = line.label
            _annotate(plot, line, index, len(lines))
        return _svg(figure, axes, titles)


def scatter_chart(points: Sequence[Point], axes: Axes) -> str:
    """Return an SVG element of points."""
    with mpl.rc_context(_STYLE):
        figure, plot = _figure(axes)
        titles = {}
        by_marker = sorted(points, key=lambda point: point.marker)
        for _, group in itertools.groupby(by_marker, key=lambda point: point.marker):
            path = list(group)
            plot.plot([point.x for point in path], [point.y for point in path], color=_INK, linewidth=0.8, alpha=0.35)
        for index, point in enumerate(points):
            colour = _colour(point.series)
            _whiskers(plot, point, colour)
            drawn = plot.plot(
                [point.x],
                [point.y],
                _MARKERS[point.marker % len(_MARKERS)],
                color=colour,
                markersize=8,
                markeredgewidth=0,
            )
            drawn[0].set_gid(f"point{index}")
            titles[f"point{index}"] = point.label
            plot.annotate(point.text, (point.x, point.y), xytext=(6, 5), textcoords="offset points", fontsize=10)
        plot.margins(0.14)
        return _svg(figure, axes, titles)


def _figure(axes: Axes) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI, facecolor="none")
    FigureCanvasSVG(figure)
    # Fixed margins: every chart of a row has its axes in the same place, and nothing has to be laid out twice.
    plot = figure.add_axes((0.135, 0.175, 0.85, 0.8), facecolor="none")
    plot.set_xlabel(axes.x)
    plot.set_ylabel(axes.y)
    for axis in (plot.xaxis, plot.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    plot.tick_params(length=0)
    plot.set_axisbelow(True)
    if axes.limit is not None:
        plot.axhline(axes.limit, color=_LIMIT, linewidth=1.2, linestyle=(0, (4, 3)))
    return figure, plot


def _annotate(plot: Any, line: Line, index: int, count: int) -> None:
    """Write a line's text on it, each line's at another place so that close lines stay readable."""
    finite = [point for point in line.points if math.isfinite(point[1])]
    if line.text and finite:
        at = finite[(2 * index + 1) * len(finite) // (2 * count)]
        plot.annotate(line.text, at, xytext=(0, 5), textcoords="offset points", fontsize=10, ha="center")


def _whiskers(plot: Any, point: Point, colour: str) -> None:
    for interval, is_x in ((point.x_interval, True), (point.y_interval, False)):
        if interval is None or not all(math.isfinite(end) for end in interval):
            continue
        fixed = (point.y, point.y) if is_x else (point.x, point.x)
        plot.plot(*((interval, fixed) if is_x else (fixed, interval)), color=colour, linewidth=1.2)


def _colour(series: int) -> str:
    return f"#0000{series % SERIES + 1:02x}"


def _svg(figure: Figure, axes: Axes, titles: dict[str, str]) -> str:
    plot = figure.axes[0]
    if axes.y_range is not None:
        plot.set_ylim(*axes.y_range)
    if axes.is_reversed:
        plot.invert_xaxis()
    stream = StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ET.fromstring(stream.getvalue())
    _tidy(root, axes, titles)
    return ET.tostring(root, encoding="unicode")


def _tidy(root: ET.Element, axes: Axes, titles: dict[str, str]) -> None:
    """Make the SVG a part of a page: no namespaces, own ids, no sheet of its own, colours from the page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        given = dict(element.attrib)
        element.attrib.clear()
        for key, value in given.items():
            element.set(_local(key), _rewritten(_local(key), value, axes.name))
        label = titles.get(given.get("id", ""))
        if label is not None:
            title = ET.Element("title")
            title.text = label
            element.insert(0, title)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", axes.description)


def _rewritten(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href":
        return f"#{prefix}-{value.removeprefix('#')}"
    value = value.replace("url(#", f"url(#{prefix}-")
    if key == "style":
        value = re.sub(r"#[0-9a-f]{6}", lambda found: _COLOURS.get(found[0], found[0]), value)
        # The page's own font, in the size that was laid out.
        value = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value)
    return value


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]

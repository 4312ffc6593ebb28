"""The bench as files: rows as JSON, a Markdown table, and an HTML page with latency against fidelity."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from exporter.artifact import write_text
from exporter.pruner_bench.claims import claims
from exporter.pruner_bench.rows import COLUMNS, Row
from exporter.pruner_bench.table import HEAD, cells, grouped, markdown, sections, title
from exporter.report.charts import MARKER_GLYPHS, SERIES, Axes, Point, scatter_chart

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Pruning methods</title>
<style>{{ css }}
td, th { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; }
td.note { text-align: left; white-space: normal; }
</style></head><body><main>
<h1>Pruning methods on one bench</h1>
<p>{{ setting }}</p>
<h2>What holds</h2><ul>{% for claim in claims %}<li>{{ claim.text }}:
<strong>{{ {True: "holds", False: "does not hold", None: "not measured"}[claim.holds] }}</strong>. {{ claim.told }}</li>
{% endfor %}</ul>
{% for chart in charts %}<h2>{{ chart.title }}</h2>{{ chart.svg }}<p>{{ chart.legend }}</p>{% endfor %}
{% for part in parts %}<h2>{{ part.title }}</h2><div class="wide"><table><thead><tr>
{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for line in part.lines %}<tr>
{% if line.note %}<td>{{ line.cells[0] }}</td><td class="note" colspan="{{ head | length - 1 }}">{{ line.note }}</td>
{% else %}{% for cell in line.cells %}<td>{{ cell }}</td>{% endfor %}{% endif %}</tr>{% endfor %}
</tbody></table></div>{% endfor %}
<h2>Columns</h2><dl>{% for name, text in columns.items() %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>
</main></body></html>
"""


def write_pages(rows: Sequence[Row], setting: str, out: Path) -> None:
    """Write ``bench.json``, ``bench.md`` and ``bench.html``.

    Args:
        rows: of the bench, in the order of the table.
        setting: prompts, seeds, steps, guidance, machine, in a sentence.
        out: folder of the bench.
    """
    plain = {"setting": setting, "rows": [row.model_dump(mode="json", exclude_none=True) for row in rows]}
    write_text(out / "bench.json", json.dumps(plain, indent=1) + "\n")
    told = "\n".join(f"- {claim.line()}" for claim in claims(rows))
    write_text(out / "bench.md", f"{setting}\n\n{told}\n\n{markdown(rows)}")
    write_text(out / "bench.html", render(rows, setting))


def render(rows: Sequence[Row], setting: str) -> str:
    """Return the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    css = (resources.files("exporter") / "report" / "page.css").read_text(encoding="utf-8")
    dense = [row for row in rows if row.name == "dense"]
    parts = []
    for target, recovery in sections(rows):
        chosen = [row for row in rows if (row.target, row.recovery) == (target, recovery) and row.name != "dense"]
        lines = []
        for group in grouped([*dense, *chosen]):
            words = cells(group)
            lines.append({"cells": words, "note": "" if group[0].status == "ok" else words[1]})
        parts.append({"title": title(target, recovery), "lines": lines})
    return environment.from_string(_PAGE).render(
        css=Markup(css),
        setting=setting,
        claims=claims(rows),
        charts=[chart for chart in (_chart(rows, 0), _chart(rows, _short(rows))) if chart],
        parts=parts,
        head=HEAD,
        columns=COLUMNS,
    )


def _short(rows: Sequence[Row]) -> int:
    return min((row.recovery for row in rows if row.recovery), default=-1)


def _chart(rows: Sequence[Row], recovery: int) -> dict[str, object] | None:
    """Draw latency against the right-prompt rate, one point a contestant and latency."""
    dense = [row for row in rows if row.name == "dense"]
    chosen = [
        row for row in rows if row.recovery == recovery and row.seed == 0 and row.status == "ok" and row.name != "dense"
    ]
    if not chosen:
        return None
    names = list(dict.fromkeys(row.name for row in [*dense, *chosen]))
    points = []
    for row in [*dense, *chosen]:
        ratio, rate = row.values.get("latency_ratio"), row.values.get("judge_rate")
        if ratio is None or rate is None:
            continue
        index = names.index(row.name)
        points.append(
            Point(
                label=f"{row.name}: {ratio.value:.2f}x, {rate.value:.3f}",
                series=index % SERIES,
                marker=index,
                text=str(index),
                x=ratio.value,
                y=rate.value,
                y_interval=None if rate.low is None or rate.high is None else (rate.low, rate.high),
            )
        )
    axes = Axes(f"bench-{recovery}", "denoising loop, x dense", "right-prompt rate", "latency against fidelity")
    legend = ", ".join(f"{MARKER_GLYPHS[i % len(MARKER_GLYPHS)]} {i} {name}" for i, name in enumerate(names))
    heading = "before recovery" if not recovery else f"after {recovery:,} steps of recovery"
    svg = Markup(scatter_chart(points, axes))
    return {"title": f"Latency against fidelity, {heading}", "svg": svg, "legend": legend}

"""The bench as files: rows as JSON, a Markdown table, and an HTML page with latency against fidelity."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from exporter.artifact import write_text
from exporter.pruner_bench.claims import claims
from exporter.pruner_bench.plot import latency_against_fidelity
from exporter.pruner_bench.rows import COLUMNS, REFERENCES, Row, short_recovery
from exporter.pruner_bench.table import HEAD, cells, groups_at, markdown, overview, sections, title

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Pruning methods</title>
<style>{{ css }}
td, th { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; }
.drawn { margin: 14px 0; background: #fff; }
.drawn svg { display: block; width: 100%; height: auto; }
td.note { text-align: left; white-space: normal; }
</style></head><body><main>
<h1>Pruning methods on one bench</h1>
<p>{{ setting }}</p>
<h2>What holds</h2><ul>{% for claim in claims %}<li>{{ claim.text }}:
<strong>{{ claim.verdict }}</strong>. {{ claim.told }}</li>
{% endfor %}</ul>
{% for chart in charts %}<figure class="drawn">{{ chart }}</figure>{% endfor %}
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
    """Write ``bench.json``, ``bench.md``, ``bench.html`` and its drawings, ``before.svg`` and ``recovered-N.svg``.

    Args:
        rows: of the bench, in the order of the table.
        setting: prompts, seeds, steps, guidance, machine, in a sentence.
        out: folder of the bench.
    """
    plain = {"setting": setting, "rows": [row.model_dump(mode="json", exclude_none=True) for row in rows]}
    write_text(out / "bench.json", json.dumps(plain, indent=1) + "\n")
    told = "\n".join(f"- {claim.line()}" for claim in claims(rows))
    write_text(out / "bench.md", f"{setting}\n\n{told}\n\n{overview(rows)}\n{markdown(rows)}")
    for name, (_, svg) in _drawings(rows).items():
        write_text(out / f"{name}.svg", svg)
    write_text(out / "bench.html", render(rows, setting))


def render(rows: Sequence[Row], setting: str) -> str:
    """Return the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    css = (resources.files("exporter") / "report" / "page.css").read_text(encoding="utf-8")
    parts = []
    for target, recovery in sections(rows):
        lines = []
        for group in groups_at(rows, target, recovery):
            words = cells(group)
            lines.append({"cells": words, "note": "" if group[0].status == "ok" else words[1]})
        parts.append({"title": title(target, recovery), "lines": lines})
    return environment.from_string(_PAGE).render(
        css=Markup(css),
        setting=setting,
        claims=claims(rows),
        charts=[Markup(_inline(svg)) for _, svg in _drawings(rows).values()],  # drawn here, names escaped
        parts=parts,
        head=HEAD,
        columns=COLUMNS,
    )


def _inline(svg: str) -> str:
    """Return an SVG document as an element of a page: no prolog, no namespaces, no links of the kind of old."""
    element = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    return element.replace("xlink:href=", "href=")


def _drawings(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Return file name -> heading and SVG document: before recovery, and after the short one.

    Rows after the long recovery were taken on more prompts than what would stand beside them.
    """
    references = [row for row in rows if row.name in REFERENCES]
    found = {}
    for recovery in sorted({0, short_recovery(rows)}):
        ok = [row for row in rows if row.status == "ok" and row.name not in REFERENCES and row.seed == 0]
        # A schedule and the plain sampler are never trained: their rows stand beside those that are.
        trained = {row.name for row in ok if row.recovery}
        chosen = [row for row in ok if row.recovery == recovery or (recovery and row.name not in trained)]
        if chosen:
            told = f"after {recovery:,} steps of recovery" if recovery else "before recovery"
            heading = f"Latency against fidelity, {told}"
            found[f"recovered-{recovery}" if recovery else "before"] = (
                heading,
                latency_against_fidelity([*references, *chosen], heading),
            )
    return found

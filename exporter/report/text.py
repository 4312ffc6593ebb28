"""The summary for the command line: verdict, table state x target, and what went wrong; plain text."""

from __future__ import annotations

import textwrap

from exporter.report.formatting import measured, printable
from exporter.report.record import RunRecord
from exporter.report.table import COLUMNS, LATENCY_COLUMN, Entry, Row, build
from exporter.report.verdict import judge, place

WIDTH = 120
_NAME_WIDTH = 16
_CELL_WIDTH = 13
_WORDS = {
    "stopped": "STOPPED",
    "failed": "FAILED",
    "missed": "MISSED",
    "unmeasured": "NOT MEASURED",
    "not run": "not run",
    "built": "built, not run",
    "slower": "NOT FASTER",
}
_MARKS = {"missed": "!", "not measured": "?"}


def render_text(record: RunRecord) -> str:
    """Return the summary of a run: at most 120 columns, no colour codes, ends with a line end.

    ``!`` marks a value that misses its gate, ``?`` a gated value that was not measured.
    """
    verdict = judge(record)
    lines = _wrapped(f"{record.name}: {verdict.headline} ({verdict.exit})", "")
    lines.append("; ".join(verdict.counts))
    if record.cells:
        lines += ["", *_table(record)]
    if verdict.problems:
        lines.append("")
    for problem in verdict.problems:
        where = f"{_WORDS[problem.kind]} {problem.where}".rstrip()
        lines += _wrapped(f"{where}: {problem.text}", "  ")
    for note in record.notes:
        lines += _wrapped(f"note: {note}", "  ")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _table(record: RunRecord) -> list[str]:
    table = build(record)
    names = [(_cut(row.cell.state), _cut(row.cell.target)) for row in table.rows]
    widths = [max(len(head), *(len(name[index]) for name in names)) for index, head in enumerate(("state", "target"))]
    head = f"{'state':{widths[0]}}  {'target':{widths[1]}}"
    lines = [head + "".join(f"{column.title.lower():>{_CELL_WIDTH}} " for column in COLUMNS)]
    lines.append("-" * min(WIDTH, len(lines[0])))
    marks = set()
    for row, (state, target) in zip(table.rows, names, strict=True):
        shown = f"{state if row.is_first else '':{widths[0]}}  {target:{widths[1]}}"
        lines.append((shown + _values(row))[:WIDTH])
        marks |= {entry.status for entry in row.entries[: len(COLUMNS)]} & set(_MARKS)
    legend = {"missed": "! misses its gate", "not measured": "? gated, but not measured: not passed"}
    if marks:
        lines.append("   ".join(legend[mark] for mark in sorted(marks)))
    ratios = [text for row in table.rows if (text := _ratio(row))]
    if ratios:  # medians of two states were taken minutes apart; these were taken in turns
        lines += ["", *_wrapped(f"latency, timed in pairs: {'; '.join(ratios)}", "  ")]
    if reused := _reused(record):
        lines += ["", *_wrapped(reused, "  ")]
    return lines


def _reused(record: RunRecord) -> str:
    """Return which figures an earlier run took and when; empty where all are of this run."""
    found: dict[str, list[str]] = {}
    for cell in record.cells:
        if cell.reused:
            found.setdefault(measured(cell), []).append(place(cell.state, cell.target))
    return "; ".join(f"{told}: {', '.join(places)}" for told, places in found.items())


def _ratio(row: Row) -> str:
    """Return ``1-pruned on ort 0.85 × 0-dense [0.84, 0.87]``, empty where no pair was timed."""
    if not row.cell.has_engine:
        return ""
    details = row.entries[COLUMNS.index(LATENCY_COLUMN)].details
    found = [index for index, detail in enumerate(details) if " × " in detail]
    return " ".join([place(row.cell.state, row.cell.target), *details[found[0] : found[0] + 2]]) if found else ""


def _values(row: Row) -> str:
    if not row.cell.has_engine:
        first = printable(row.cell.error or "no reason was recorded").strip().partition("\n")[0]
        return f"  {row.cell.status.upper() if row.cell.status == 'failed' else row.cell.status}: {first}"
    return "".join(_value(entry) for entry in row.entries[: len(COLUMNS)])


def _value(entry: Entry) -> str:
    text = entry.value if entry.is_measured else "not measured"
    return f"{text:>{_CELL_WIDTH}}{_MARKS.get(entry.status, ' ')}"


def _cut(text: str) -> str:
    clean = " ".join(printable(text).split())
    return clean if len(clean) <= _NAME_WIDTH else f"{clean[: _NAME_WIDTH - 1]}…"


def _wrapped(text: str, indent: str) -> list[str]:
    clean = " ".join(printable(text).split())
    return textwrap.wrap(clean, WIDTH, subsequent_indent=indent) or [""]

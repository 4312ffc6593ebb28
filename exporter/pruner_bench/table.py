"""The rows of a bench as a Markdown table: one line a contestant, latency and recovery; seeds as mean and range."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.pruner_bench.rows import ERRORS, REFERENCES, Row, Value, short_recovery

HEAD = (
    "method",
    "loop",
    "batch 1",
    "PSNR dB, mean / worst",
    "SSIM",
    "right prompt",
    "change, points",
    "KID",
    "parameters",
    "GMACs",
    "MB",
    "s",
)


def markdown(rows: Sequence[Row]) -> str:
    """Return the table of all rows, a part per latency and recovery."""
    parts = []
    for target, recovery in sections(rows):
        lines = [f"**{title(target, recovery)}**", "", _line(HEAD), _line(["---"] * len(HEAD))]
        lines += [_line(cells(group)) for group in groups_at(rows, target, recovery)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def overview(rows: Sequence[Row]) -> str:
    """Return one line a contestant: at each latency its loop, teacher-forced PSNR, and the right-prompt rate.

    The rate is that of the first seed, before recovery and after the short one.
    """
    targets = list(dict.fromkeys(target for target, _ in sections(rows)))
    short = short_recovery(rows)
    head = ["method", *("of one size" if target is None else f"at {target:g}x" for target in targets)]
    lines = [_line(head), _line(["---"] * len(head))]
    for group in grouped([row for row in rows if row.name not in REFERENCES]):
        has_sizes = any(row.target is not None for row in group)
        missing = ["not measured" if has_sizes and target is not None else "" for target in targets]
        here = [[row for row in group if row.target == target] for target in targets]
        told = (_glance(found, short) or lack for found, lack in zip(here, missing, strict=True))
        lines.append(_line([group[0].name, *told]))
    return "\n".join(lines) + "\n"


def _glance(rows: Sequence[Row], short: int) -> str:
    """Return what a contestant reached at one latency: ``0.51x, 27.1 / 24.0 dB, 3.7 to 92.2 %``."""
    if not rows:
        return ""
    before = [row for row in rows if not row.recovery]
    if rows[0].status != "ok" or not before:
        return _sentence(rows[0])
    told = [f"{before[0].values['latency_ratio'].value:.2f}x"] if "latency_ratio" in before[0].values else []
    errors = [[row.values[name].value for row in before if name in row.values] for name in ERRORS]
    if all(errors):
        told.append(" / ".join(f"{sum(values) / len(values):.1f}" for values in errors) + " dB")
    rates = [
        row.values["judge_rate"].value
        for row in (*before[:1], *(row for row in rows if row.recovery == short and short))
        if row.status == "ok" and "judge_rate" in row.values
    ]
    told += [" to ".join(f"{100 * rate:.1f}" for rate in rates) + " %"] if rates else []
    return ", ".join(told)


def sections(rows: Sequence[Row]) -> list[tuple[float | None, int]]:
    """Return the pairs of latency and recovery that there are: highest latency first, those of one size last."""
    found = {(row.target, row.recovery) for row in rows if row.name not in REFERENCES}
    return sorted(found, key=lambda pair: (pair[0] is None, -(pair[0] or 0), pair[1]))


def groups_at(rows: Sequence[Row], target: float | None, recovery: int) -> list[list[Row]]:
    """Return the rows of each contestant in one section, behind those that all are compared with.

    Rows after the long recovery were taken on more prompts than these, and stand alone.
    """
    beside = [row for row in rows if row.name in REFERENCES] if recovery <= short_recovery(rows) else []
    here = [row for row in rows if (row.target, row.recovery) == (target, recovery) and row.name not in REFERENCES]
    return grouped([*beside, *here])


def title(target: float | None, recovery: int) -> str:
    """Return what a section is called."""
    size = "of one size" if target is None else f"at {target:g}x of dense's loop"
    return f"{size}, {f'after {recovery:,} steps of recovery' if recovery else 'before recovery'}"


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of each contestant together, in the order of their first."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    return list(by_name.values())


def cells(rows: Sequence[Row]) -> list[str]:
    """Return the cells of one line: the mean over seeds, and their range where they differ."""
    first = rows[0]
    if first.status != "ok":
        return [first.name, _sentence(first), *[""] * (len(HEAD) - 2)]
    values = {name: [row.values[name] for row in rows if name in row.values] for name in first.values}

    def shown(name: str, form: str, scale: float = 1.0) -> str:
        return spread([value.value * scale for value in values.get(name, [])], form)

    return [
        first.name,
        shown("latency_ratio", ".2f"),
        shown("latency_ratio_batch_1", ".2f"),
        f"{shown('psnr_mean_db', '.1f')} / {shown('psnr_worst_db', '.1f')}" if "psnr_mean_db" in values else "-",
        shown("ssim", ".3f"),
        shown("judge_rate", ".3f"),
        _change(values.get("judge_change", [])),
        shown("kid", ".3f"),
        shown("parameters", ".1f", 1e-6) + (" M" if "parameters" in values else ""),
        shown("macs", ".2f", 1e-9),
        shown("size_bytes", ".1f", 1e-6),
        shown("seconds", ".0f"),
    ]


def spread(values: Sequence[float], form: str) -> str:
    """Return the mean and, where seeds differ, the range behind it; ``-`` for nothing measured."""
    if not values:
        return "-"
    low, high = (format(limit(values), form) for limit in (min, max))
    mean = format(sum(values) / len(values), form)
    return mean if low == high else f"{mean} ({low} to {high})"


def _change(values: Sequence[Value]) -> str:
    """Return the change of the right-prompt rate with the interval's ends; of several seeds the widest."""
    if not values:
        return "-"
    low = min(value.value if value.low is None else value.low for value in values)
    high = max(value.value if value.high is None else value.high for value in values)
    return f"{sum(value.value for value in values) / len(values):+.1f} ({low:+.1f} to {high:+.1f})"


def _sentence(row: Row) -> str:
    if row.status == "failed":
        return f"failed: {row.note}"
    return row.note if row.note.startswith("not reachable") else f"not reachable: {row.note}"


def _line(words: Sequence[str]) -> str:
    return "| " + " | ".join(word.replace("|", "/").replace("\n", " ") for word in words) + " |"

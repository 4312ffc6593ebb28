"""Every pruning method on one model, at one measured latency of one target, with one budget of recovery."""

from __future__ import annotations

from pathlib import Path

from exporter.errors import RecipeError
from exporter.progress import Progress


def compare_pruners(  # noqa: PLR0913 - the command's flags
    out: Path,
    *,
    names: tuple[str, ...] | None,
    latencies: str,
    images: tuple[int, int],
    seeds: int,
    recovery: tuple[int, int],
    progress: Progress,
) -> str:
    """Carry out the bench, write its pages and return its table.

    Args:
        out: folder of the bench; what is finished there is not done again.
        names: lines of the table; None for all.
        latencies: fractions of dense's latency, comma-separated.
        images: prompts that are drawn and judged, and as many after the long recovery.
        seeds: before recovery, and after the long one.
        recovery: optimizer steps of the short and the long one.
        progress: what long work reports to.

    Raises:
        RecipeError: no such line, or no such fraction.
        ExporterError: the dense model cannot be measured.
    """
    from exporter.pruner_bench.bench import Plan, bench_pruners, in_order
    from exporter.pruner_bench.contestants import chosen
    from exporter.pruner_bench.page import write_pages
    from exporter.pruner_bench.running import Setting
    from exporter.pruner_bench.table import markdown

    setting = Setting(out, images[0])
    plan = Plan(chosen(names), _fractions(latencies), seeds, *recovery, images[1])
    rows = in_order(bench_pruners(plan, setting, progress))
    sentence = setting.sentence()
    if plan.long_recovery and images[1] != images[0]:
        sentence += f" Rows after {plan.long_recovery:,} steps of recovery: {images[1]:,} prompts."
    write_pages(rows, sentence, out)
    return f"{markdown(rows)}\nPage: {out / 'bench.html'}"


def _fractions(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < value < 1 for value in found):
        got = f"bench pruners: --latencies: got '{text}', expected numbers between 0 and 1."
        raise RecipeError(f"{got} Write --latencies 0.75,0.5.")
    return found

"""Takes a finished bench of pruning methods into the repository: ``python ci/show_bench.py BENCH_FOLDER``.

Rows, table and drawings go to ``exporter/pruner_bench/measured``; the README gets what lies between its two marks.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from exporter.pruner_bench.bench import in_order
from exporter.pruner_bench.claims import claims
from exporter.pruner_bench.page import write_pages
from exporter.pruner_bench.rows import Row, read_rows
from exporter.pruner_bench.table import overview

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "exporter" / "pruner_bench" / "measured"
BEGIN, END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"


def main(bench: Path) -> None:
    """Write everything that shows the rows of a bench."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{readme}: got no {BEGIN.strip()} and {END.strip()}, expected both lines. Put them back.")
    setting = json.loads((bench / "bench.json").read_text(encoding="utf-8"))["setting"]
    rows = in_order(read_rows(bench))
    shutil.rmtree(MEASURED, ignore_errors=True)
    MEASURED.mkdir()
    write_pages(rows, setting, MEASURED)
    (MEASURED / "bench.html").unlink()  # the command makes it; the repository shows the table
    before, _, rest = text.partition(BEGIN)
    readme.write_text(before + BEGIN + shown(rows, setting) + END + rest.partition(END)[2], encoding="utf-8")


def shown(rows: list[Row], setting: str) -> str:
    """Return what the README shows of rows."""
    told = "".join(f"- {claim.line()}\n" for claim in claims(rows))
    return f"{setting}\n\n{overview(rows)}\n{told}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

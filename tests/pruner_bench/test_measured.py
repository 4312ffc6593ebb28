"""What this project shows of its own bench is what the rows say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.pruner_bench.claims import claims
from exporter.pruner_bench.page import write_pages
from exporter.pruner_bench.rows import Row
from exporter.pruner_bench.table import overview


@pytest.fixture
def measured(root: Path) -> Path:
    return root / "exporter" / "pruner_bench" / "measured"


@pytest.fixture
def rows(measured: Path) -> list[Row]:
    return [Row.model_validate(row) for row in json.loads((measured / "bench.json").read_text())["rows"]]


def test_the_readme_shows_the_rows_that_were_measured(rows, root):
    """`ci/show_bench.py` writes it; whoever changes a row, a claim or a number by hand is found out here."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert overview(rows) in readme
    for claim in claims(rows):
        assert claim.line() in readme


def test_the_pages_are_those_of_the_rows(rows, measured, tmp_path):
    write_pages(rows, json.loads((measured / "bench.json").read_text())["setting"], tmp_path)
    assert (tmp_path / "bench.md").read_text() == (measured / "bench.md").read_text()
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in measured.glob("*.svg")}

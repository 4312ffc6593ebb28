"""A target that builds here and runs elsewhere: its cells say so, and nothing about them counts as passed."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import targets
from exporter.progress import Silent
from exporter.report.record import RunRecord
from exporter.report.text import render_text
from exporter.report.writing import read_record
from exporter.run import run_recipe

HERE = targets.target("tensorrt-rtx").capabilities()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HERE.available, reason="needs the extra tensorrt-rtx"),
    pytest.mark.skipif(HERE.runs, reason="this machine has an RTX device"),
]


@pytest.fixture(scope="module")
def run(built: Path) -> tuple[RunRecord, Path]:
    """Two zeros in four on a runtime that runs here and on one that does not. Read only."""
    return read_record(built), built


def cell(record: RunRecord, state: str, target: str) -> Any:
    return next(cell for cell in record.cells if (cell.state, cell.target) == (state, target))


def test_cells_are_built_and_say_why_they_were_not_run(run: tuple[RunRecord, Path]) -> None:
    record, out = run
    for state in ("0-dense", "1-pruned"):
        found = cell(record, state, "rtx")
        assert found.status == "built"
        assert found.error == f"{HERE.reason} Run it on such a device."
        assert (out / found.engine / "unet" / "engine.plan").stat().st_size > 10_000
        assert {layer["precision"] for layer in found.evidence["unet"]["layers"] if layer["type"] == "gemm"} == {"f32"}
        assert cell(record, state, "ort").status == "ok"


def test_gates_hold_for_what_is_known_and_are_not_passed_by_what_is_not(run: tuple[RunRecord, Path]) -> None:
    record, _ = run
    found = {(gate.metric, gate.state): gate.status for gate in record.gates if gate.target == "rtx"}
    assert found == {
        ("size_bytes", "0-dense"): "passed",
        ("size_bytes", "1-pruned"): "passed",
        ("latency.median_ms", "0-dense"): "not measured",
        ("latency.median_ms", "1-pruned"): "not measured",
        ("sparse.chosen", "1-pruned"): "not measured",
    }
    (told,) = (gate.message for gate in record.gates if gate.metric == "sparse.chosen")
    assert "says nothing about it, which is not the same as none" in told
    assert record.exit_code == 0  # unmeasured: warn


def test_the_report_says_built_and_not_run(run: tuple[RunRecord, Path]) -> None:
    record, out = run
    text = " ".join(render_text(record).split())
    assert "4 cells: 2 ok, 2 built" in text
    assert f"built, not run 0-dense on rtx, 1-pruned on rtx: {HERE.reason}" in text
    assert "No gate missed, 3 of" in text
    assert "built, not run" in (out / "report.html").read_text()
    cases = ET.parse(out / "junit.xml").iter("testcase")
    skipped = [case.find("skipped") for case in cases if case.get("name") == "lowered and measured"]
    assert sum(reason is not None for reason in skipped) == 2


def test_a_second_run_does_nothing_again(run: tuple[RunRecord, Path], tiny_recipe: Any) -> None:
    _, out = run
    before = {path: path.stat().st_mtime_ns for path in out.glob("lowered/*/manifest.json")}
    recipe = tiny_recipe(**{key: read_record(out).recipe[key] for key in ("stages", "targets", "gates")})
    assert run_recipe(recipe, out, progress=Silent()).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("lowered/*/manifest.json")} == before

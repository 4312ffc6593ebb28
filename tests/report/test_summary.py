"""The summary on the command line: plain, narrow, and honest about what was not measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from report_samples import gate, measurement, sample_record

from exporter.report.record import CellRecord, RunRecord
from exporter.report.text import WIDTH, render_text


@pytest.fixture
def record() -> RunRecord:
    return sample_record(Path(), images=False)


def test_summary_begins_with_the_verdict_and_holds_the_table(record: RunRecord) -> None:
    lines = render_text(record).splitlines()
    assert lines[0] == "shapes: Failed: 1 cell failed, 1 gate missed (exit code 5: some targets failed)"
    row = next(line for line in lines if line.startswith("1-pruned"))
    assert "0.690!" in row
    assert "10.9 ms" in row


def test_summary_is_narrow_and_plain(record: RunRecord) -> None:
    record.cells.append(
        CellRecord(state="9-" + "x" * 300, target="y" * 300, status="failed", error="\x1b[31m" + "word " * 90)
    )
    text = render_text(record)
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert "\x1b" not in text
    assert text.endswith("\n")


def test_failed_cells_missed_and_unmeasured_gates_are_named(record: RunRecord) -> None:
    text = render_text(record)
    assert "FAILED 1-pruned on ort: " in text
    assert "MISSED 1-pruned on openvino: " in text
    assert "NOT MEASURED 2-tuned on openvino, 2-tuned on ort: " in text


def test_gated_value_that_was_not_measured_is_marked(record: RunRecord) -> None:
    cell = CellRecord(
        state="0-dense",
        target="openvino",
        status="ok",
        measurements=[measurement("fidelity.teacher_forced.psnr_db", None, "dB", note="no recording")],
    )
    gates = [gate("not measured", message="no recording")]
    text = render_text(record.model_copy(update={"cells": [cell], "gates": gates, "exit_code": 0}))
    assert "not measured?" in text
    assert "Nothing proven: no gate was measured" in text
    assert "Passed" not in text


def test_empty_and_interrupted_runs_have_a_summary(record: RunRecord) -> None:
    nothing = {"cells": [], "gates": [], "states": [], "targets": [], "notes": []}
    stopped = record.model_copy(update=nothing | {"complete": False, "exit_code": 130, "stopped": "Ctrl-C"})
    assert render_text(stopped) == (
        "shapes: Interrupted (exit code 130: interrupted)\nno cells; no gates\n\nSTOPPED: Ctrl-C\n"
    )


def test_summary_needs_neither_the_plot_library_nor_torch() -> None:
    code = (
        "import sys, exporter.report.text; print({'matplotlib', 'torch', 'jinja2', 'PIL', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""The verdict: good only when everything that was asked for was measured and passed."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_samples import gate, sample_record

from exporter.errors import EXIT_ORDER
from exporter.report.record import CellRecord, RunRecord
from exporter.report.verdict import EXIT_MEANINGS, judge

OK = CellRecord(state="0-dense", target="openvino", status="ok")
BAD = CellRecord(state="0-dense", target="ort", status="failed", error="it broke")
AWAY = CellRecord(state="0-dense", target="coreml", status="not run", error="needs macOS")


def run(*gates: str, cells: tuple[CellRecord, ...] = (OK,), **changes: object) -> RunRecord:
    found = {"cells": list(cells), "gates": [gate(status) for status in gates], "complete": True, "exit_code": 0}
    return sample_record(Path(), images=False).model_copy(update=found | changes)


@pytest.mark.parametrize(
    ("record", "level", "headline"),
    [
        (run("passed"), "good", "Passed: the gate"),
        (run("passed", "passed"), "good", "Passed: all 2 gates"),
        (run("passed", "not measured"), "warn", "No gate missed, 1 of 2 not measured"),
        (run("not measured"), "warn", "Nothing proven: no gate was measured"),
        (run(), "warn", "Finished: the recipe has no gates"),
        (run(cells=()), "warn", "Nothing was measured"),
        (run("passed", cells=(AWAY,)), "warn", "Nothing was measured"),
        (run("passed", "missed", exit_code=3), "bad", "Failed: 1 gate missed"),
        (run("missed"), "bad", "Failed: 1 gate missed"),
        (run("passed", cells=(OK, BAD), exit_code=5), "bad", "Failed: 1 cell failed"),
        (run("passed", cells=(OK, AWAY), exit_code=4), "bad", "Failed: a tool or device is missing"),
        (run("not measured", recipe={"unmeasured": "fail"}, exit_code=3), "bad", "Failed: 1 gate not measured"),
        (run("passed", complete=False), "warn", "Not finished"),
        (run("missed", complete=False, exit_code=130), "bad", "Interrupted: 1 gate missed"),
        (run("passed", exit_code=77), "bad", "Failed: exit code 77"),
    ],
)
def test_verdict(record: RunRecord, level: str, headline: str) -> None:
    verdict = judge(record)
    assert (verdict.level, verdict.headline) == (level, headline)


def test_reason_shared_by_cells_is_told_once() -> None:
    verdict = judge(run(cells=(OK, AWAY, AWAY.model_copy(update={"state": "1-pruned"})), exit_code=4))
    assert [(problem.where, problem.text) for problem in verdict.problems] == [
        ("0-dense on coreml, 1-pruned on coreml", "needs macOS")
    ]


def test_every_exit_code_of_the_error_tree_has_a_meaning() -> None:
    assert set(EXIT_ORDER) <= set(EXIT_MEANINGS)


def test_gates_of_an_unfinished_run_that_wait_are_counted_as_pending() -> None:
    assert judge(run("passed", complete=False, pending=3)).counts[1] == "4 gates: 1 passed, 3 pending"
    assert judge(run(complete=False, pending=2)).counts[1] == "2 gates: 2 pending"

"""JUnit XML as build servers read it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from report_samples import CELL_ERROR, LPIPS_REASON, gate, sample_record

from exporter.report.junit import render_junit
from exporter.report.record import CellRecord, RunRecord

# The shape that build servers share (junit-10.xsd): element -> (required, optional) attributes.
SHAPE = {
    "testsuites": ({"name"}, {"tests", "failures", "errors", "skipped", "time"}),
    "testsuite": ({"name", "tests"}, {"failures", "errors", "skipped", "time", "timestamp"}),
    "testcase": ({"name", "classname"}, {"time"}),
    "failure": (set(), {"message", "type"}),
    "error": (set(), {"message", "type"}),
    "skipped": (set(), {"message"}),
}
CHILDREN = {"testsuites": {"testsuite"}, "testsuite": {"testcase"}, "testcase": {"failure", "error", "skipped"}}


@pytest.fixture
def record() -> RunRecord:
    return sample_record(Path(), images=False)


def parsed(record: RunRecord) -> ET.Element:
    root = ET.fromstring(render_junit(record).encode())
    check(root)
    return root


def check(element: ET.Element) -> None:
    required, optional = SHAPE[element.tag]
    assert required <= set(element.attrib) <= required | optional
    assert {child.tag for child in element} <= CHILDREN.get(element.tag, set())
    if element.tag in ("testsuites", "testsuite"):
        cases = list(element.iter("testcase"))
        assert int(element.get("tests", "")) == len(cases)
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(element.get(attribute, "")) == sum(case.find(tag) is not None for case in cases)
        assert float(element.get("time", "")) >= 0
    for child in element:
        check(child)


def test_one_suite_per_cell_and_one_for_the_run(record: RunRecord) -> None:
    names = [suite.get("name") for suite in parsed(record)]
    assert names == ["run", *(f"{cell.state} on {cell.target}" for cell in record.cells)]


def test_case_names_are_unique(record: RunRecord) -> None:
    doubled = record.model_copy(update={"gates": [*record.gates, *record.gates]})
    names = [(case.get("classname"), case.get("name")) for case in parsed(doubled).iter("testcase")]
    assert len(names) == len(set(names))


def test_missed_gate_is_a_failure_with_its_sentence(record: RunRecord) -> None:
    failures = list(parsed(record).iter("failure"))
    assert [failure.get("type") for failure in failures] == ["GateMissed"]
    assert "got 0.63" in str(failures[0].get("message"))


def test_gate_that_was_not_measured_is_skipped_with_the_reason(record: RunRecord) -> None:
    skipped = list(parsed(record).iter("skipped"))
    assert [entry.get("message") for entry in skipped] == [f"not measured: {LPIPS_REASON}"] * 2


def test_gate_that_was_not_measured_fails_where_the_recipe_says_so(record: RunRecord) -> None:
    strict = record.model_copy(update={"recipe": {**record.recipe, "unmeasured": "fail"}})
    assert [failure.get("type") for failure in parsed(strict).iter("failure")].count("NotMeasured") == 2


def test_failed_cell_is_an_error_and_a_cell_not_run_is_skipped(record: RunRecord) -> None:
    record.cells.append(CellRecord(state="0-dense", target="coreml", status="not run", error="needs macOS"))
    root = parsed(record)
    assert [error.get("message") for error in root.iter("error")] == [CELL_ERROR]
    assert "needs macOS" in [entry.get("message") for entry in root.iter("skipped")]


@pytest.mark.parametrize(("complete", "code"), [(False, 130), (False, 0), (True, 1)])
def test_unfinished_or_broken_run_is_an_error_of_its_own(record: RunRecord, complete: bool, code: int) -> None:
    broken = record.model_copy(update={"complete": complete, "exit_code": code})
    suite = parsed(broken)[0]
    assert suite.get("errors") == "1"


def test_gate_without_a_cell_is_not_lost(record: RunRecord) -> None:
    lone = record.model_copy(update={"cells": [], "gates": [gate("missed")]})
    assert [suite.get("name") for suite in parsed(lone)] == ["run", "0-dense on openvino"]


def test_hostile_text_still_parses(record: RunRecord) -> None:
    message = "<![CDATA[ ]]> & \x1b[31m \x00 \ud800 \ufffe 赤 🟥 \"'"
    hostile = record.model_copy(update={"name": message, "gates": [gate("missed", message=message)]})
    failure = next(parsed(hostile).iter("failure"))
    assert "<![CDATA[ ]]> & \ufffd[31m \ufffd \ufffd \ufffd 赤 🟥" in str(failure.text)

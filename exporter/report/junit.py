"""The run as JUnit XML: one suite per cell, one case per gate, so that any build server shows the verdict."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from exporter.report.formatting import limit_sign, number, printable
from exporter.report.record import CellRecord, GateRecord, RunRecord
from exporter.report.verdict import is_unmeasured_a_miss, judge, place

Outcome = Literal["passed", "failure", "error", "skipped"]
_OWN_CODES = (0, 3, 5)


@dataclass(frozen=True)
class _Case:
    name: str
    outcome: Outcome
    type: str = ""
    message: str = ""
    seconds: float = 0.0


def render_junit(record: RunRecord) -> str:
    """Return the JUnit XML of a run.

    Suite ``run`` holds whether the run came to its end. Every cell is a suite: the case ``lowered and measured`` (an
    error when the cell failed, skipped when it did not run, or was only built) and one case per gate. A missed gate is
    a failure. One that was not measured is skipped with the reason, or a failure where the recipe says ``unmeasured:
    fail``.
    """
    suites = [("run", [_run_case(record)], 0.0)]
    cells = {(cell.state, cell.target): cell for cell in record.cells}
    pairs = dict.fromkeys([*cells, *((gate.state, gate.target) for gate in record.gates)])
    for pair in pairs:
        cell = cells.get(pair)
        cases = [_cell_case(cell)] if cell else []
        cases += _gate_cases(record, pair)
        suites.append((place(*pair) or "run gates", cases, _took(cell) if cell else 0.0))
    root = ET.Element("testsuites", name=printable(record.name))
    for name, cases, took in suites:
        _append_suite(root, name, cases, took, record)
    every = [case for _, cases, _ in suites for case in cases]
    root.attrib.update(_totals(every), time=f"{record.seconds:.3f}")
    ET.indent(root)
    return f"<?xml version='1.0' encoding='utf-8'?>\n{ET.tostring(root, encoding='unicode')}\n"


def _append_suite(root: ET.Element, name: str, cases: list[_Case], took: float, record: RunRecord) -> None:
    title = printable(name)
    suite = ET.SubElement(root, "testsuite", name=title)
    suite.attrib.update(_totals(cases), time=f"{took:.3f}")
    suite.set("timestamp", printable(record.started))
    for case in cases:
        element = ET.SubElement(suite, "testcase", classname=f"{printable(record.name)}.{title}", name=case.name)
        element.set("time", f"{case.seconds:.3f}")
        if case.outcome == "passed":
            continue
        child = ET.SubElement(element, case.outcome, message=printable(case.message))
        if case.outcome != "skipped":
            child.set("type", case.type)
            child.text = printable(case.message)


def _run_case(record: RunRecord) -> _Case:
    name = "complete"
    if record.complete and record.exit_code in _OWN_CODES:
        return _Case(name, "passed", seconds=record.seconds)
    verdict = judge(record)
    message = f"{verdict.headline}; {verdict.exit}"
    return _Case(name, "error", "Incomplete", message, record.seconds)


def _cell_case(cell: CellRecord) -> _Case:
    name, took = "lowered and measured", _took(cell)
    if cell.status == "failed":
        return _Case(name, "error", "Failed", cell.error or "no reason was recorded", took)
    if cell.status == "not run":
        return _Case(name, "skipped", message=cell.error or "not run; no reason was recorded", seconds=took)
    if cell.status == "built":
        return _Case(name, "skipped", message=f"built, not run: {cell.error}", seconds=took)
    return _Case(name, "passed", seconds=took)


def _gate_cases(record: RunRecord, pair: tuple[str, str]) -> Iterator[_Case]:
    used: dict[str, int] = {}
    for gate in record.gates:
        if (gate.state, gate.target) != pair:
            continue
        name = _gate_name(gate)
        used[name] = used.get(name, 0) + 1
        name = f"{name} ({used[name]})" if used[name] > 1 else name
        if gate.status == "passed":
            yield _Case(name, "passed")
        elif gate.status == "missed":
            yield _Case(name, "failure", "GateMissed", gate.message)
        elif is_unmeasured_a_miss(record):
            yield _Case(name, "failure", "NotMeasured", f"not measured: {gate.message}")
        else:
            yield _Case(name, "skipped", message=f"not measured: {gate.message}")


def _gate_name(gate: GateRecord) -> str:
    limit = "limit not known" if gate.limit is None else f"{limit_sign(gate)} {number(gate.limit, 6)}"
    component = f" of {gate.component}" if gate.component else ""
    return printable(f"{gate.metric}{component} {limit}")


def _took(cell: CellRecord) -> float:
    return sum(cell.seconds.values())


def _totals(cases: list[_Case]) -> dict[str, str]:
    outcomes = [case.outcome for case in cases]
    counts: dict[str, Outcome] = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    return {"tests": str(len(cases))} | {key: str(outcomes.count(outcome)) for key, outcome in counts.items()}

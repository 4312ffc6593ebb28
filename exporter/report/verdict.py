"""The verdict on a run: passed, gates missed, targets failed, or not finished."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from exporter.report.formatting import number, plural
from exporter.report.record import CellRecord, GateRecord, RunRecord

Level = Literal["good", "warn", "bad"]
ProblemKind = Literal["stopped", "failed", "missed", "unmeasured", "not run", "built", "slower"]

EXIT_MEANINGS = {
    0: "fine",
    1: "a bug of the exporter",
    2: "the recipe or an input is wrong",
    3: "a gate was missed",
    4: "a tool or device is missing",
    5: "some targets failed",
    130: "interrupted",
}


_NO_REASON = "no reason was recorded"


@dataclass(frozen=True)
class Problem:
    """One reason why the run is not fine.

    Attributes:
        kind: the run was ``stopped``; a cell ``failed``, was ``not run`` or only ``built``; a gate was ``missed`` or
            ``unmeasured``; a component is ``slower`` quantized than in float.
        where: state and target, such as ``1-pruned on openvino``; several where one text holds for all of them.
        text: the sentence that says what and what to do.
    """

    kind: ProblemKind
    where: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a reader must know before anything else.

    Attributes:
        level: ``good`` only for a complete run whose every gate was measured and passed.
        headline: a few words.
        exit: the exit code and its meaning.
        counts: one phrase each for cells and gates.
        problems: what stopped it, failed cells, missed gates, gates that were not measured, cells that were not run.
    """

    level: Level
    headline: str
    exit: str
    counts: tuple[str, ...]
    problems: tuple[Problem, ...]


def judge(record: RunRecord) -> Verdict:
    """Return the verdict on a run."""
    failed = [cell for cell in record.cells if cell.status == "failed"]
    missed = [gate for gate in record.gates if gate.status == "missed"]
    unmeasured = [gate for gate in record.gates if gate.status == "not measured"]
    level, headline = _headline(record, len(failed), len(missed), len(unmeasured))
    problems = _merged(
        *([Problem("stopped", "", record.stopped)] if record.stopped else []),
        *(Problem("failed", place(cell.state, cell.target), cell.error or _NO_REASON) for cell in failed),
        *(Problem("missed", place(gate.state, gate.target), gate.message) for gate in missed),
        *(Problem("unmeasured", place(gate.state, gate.target), gate.message) for gate in unmeasured),
        *(
            Problem(cell.status, place(cell.state, cell.target), cell.error or _NO_REASON)
            for cell in record.cells
            if cell.status in ("not run", "built")
        ),
        *_slower(record.cells),
    )
    ending = f"exit code {record.exit_code}: {EXIT_MEANINGS.get(record.exit_code, 'unknown')}"
    if not record.complete and record.exit_code == 0:
        ending = "no exit code yet"
    counts = (_cell_counts(record.cells), _gate_counts(record.gates, record.pending))
    return Verdict(level, headline, ending, counts, problems)


def is_unmeasured_a_miss(record: RunRecord) -> bool:
    """Return whether the recipe says ``unmeasured: fail``."""
    return record.recipe.get("unmeasured") == "fail"


def place(state: str, target: str) -> str:
    """Return ``1-pruned on openvino``."""
    return " on ".join(part for part in (state, target) if part)


def _headline(record: RunRecord, failed: int, missed: int, unmeasured: int) -> tuple[Level, str]:
    faults = []
    if failed:
        faults.append(f"{plural(failed, 'cell')} failed")
    if missed:
        faults.append(f"{plural(missed, 'gate')} missed")
    if unmeasured and is_unmeasured_a_miss(record):
        faults.append(f"{plural(unmeasured, 'gate')} not measured")
    unfinished = "Interrupted" if record.exit_code == 130 else "Not finished"
    if not record.complete:
        return ("bad" if faults or record.exit_code else "warn"), ": ".join(
            filter(None, (unfinished, ", ".join(faults)))
        )
    if faults:
        return "bad", "Failed: " + ", ".join(faults)
    if record.exit_code:
        return "bad", f"Failed: {EXIT_MEANINGS.get(record.exit_code, f'exit code {record.exit_code}')}"
    if not any(cell.status == "ok" for cell in record.cells):
        return "warn", "Nothing was measured"
    if not record.gates:
        return "warn", "Finished: the recipe has no gates"
    if unmeasured == len(record.gates):
        return "warn", "Nothing proven: no gate was measured"
    if unmeasured:
        return "warn", f"No gate missed, {unmeasured} of {len(record.gates)} not measured"
    return "good", f"Passed: {'the gate' if len(record.gates) == 1 else f'all {len(record.gates)} gates'}"


def _merged(*problems: Problem) -> tuple[Problem, ...]:
    """Return the problems with those of one kind and text as one, such as a reason that holds for every cell."""
    places: dict[tuple[ProblemKind, str], list[str]] = {}
    for problem in problems:
        places.setdefault((problem.kind, problem.text), []).append(problem.where)
    return tuple(Problem(kind, ", ".join(filter(None, where)), text) for (kind, text), where in places.items())


def _slower(cells: list[CellRecord]) -> Iterator[Problem]:
    """Yield what quantization has made no faster: nobody asks for that, so nobody has to set a gate on it."""
    for cell in cells:
        for item in cell.measurements:
            high = item.high if item.high is not None else item.value
            if item.name == "latency.over_float" and high is not None and high >= 1:
                than = item.note.removeprefix("one call over ")
                told = f"{item.component}: no faster quantized: a call takes {number(item.value)} times {than}"
                fix = "Leave in float what is slower so (the evidence says what ran in 8 bits), or leave the stage out."
                yield Problem("slower", place(cell.state, cell.target), f"{told}. {fix}")


def _cell_counts(cells: list[CellRecord]) -> str:
    if not cells:
        return "no cells"
    parts = [(status, sum(cell.status == status for cell in cells)) for status in ("ok", "built", "failed", "not run")]
    return f"{plural(len(cells), 'cell')}: " + ", ".join(f"{amount} {status}" for status, amount in parts if amount)


def _gate_counts(gates: list[GateRecord], pending: int) -> str:
    if not gates and not pending:
        return "no gates"
    parts = [(status, sum(gate.status == status for gate in gates)) for status in ("passed", "missed", "not measured")]
    told = ", ".join(f"{amount} {status}" for status, amount in (*parts, ("pending", pending)) if amount)
    return f"{plural(len(gates) + pending, 'gate')}: {told}"

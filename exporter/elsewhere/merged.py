"""Takes what other hosts found into a run's report, as columns of their own that the recipe's gates hold for too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from exporter.artifact import locked, write_text
from exporter.elsewhere.facts import KITS, Result, checksum_of, read_kit
from exporter.errors import ArtifactError, exit_code_of
from exporter.metrics.gates import evaluate
from exporter.preflight import parse_gates
from exporter.recipe import Recipe
from exporter.report.record import CellRecord, GateRecord, RunRecord
from exporter.report.writing import read_record, write_reports

MERGED = "merged"
"""Of a run's folder: the results that were taken in, one file per target and host."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 64 * 2**20
_SAFE = (0, 3, 4)
"""Exit codes that other hosts' results can change: fine, a gate was missed, a tool is not here."""


def merge(run: Path, file: Path) -> RunRecord:
    """Take a result into the report of a run.

    Args:
        run: its folder.
        file: ``result.json``, as `measure.py` wrote it.

    Returns:
        The record with the host's columns, as it is now in ``report.json``.

    Raises:
        ArtifactError: the file is damaged, of a kit that was altered or of another run, or of other states.
    """
    record = read_record(run)
    result = read_result(file)
    _check(run, file, result, record)
    with locked(run):
        (run / MERGED).mkdir(exist_ok=True)
        write_text(run / MERGED / f"{result.target.name}.json", file.read_text(encoding="utf-8"))
        whole = with_merged(record, run)
        write_reports(whole, run)
    return whole


def read_result(file: Path) -> Result:
    """Read what a host wrote.

    Raises:
        ArtifactError: it is no such file, or was changed since.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ArtifactError(f"{file}: too large; got {file.stat().st_size} bytes, expected a result.json.")
        result = Result.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error}. Give the result.json that measure.py wrote.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(
            f"{file}: not a result of this version: {where}: {first['msg']}. Give the result.json of measure.py."
        ) from error
    if result.checksum != checksum_of(result):
        raise ArtifactError(
            f"{file}: changed after it was written; its checksum does not fit. Copy it again, or measure again."
        )
    return result


def with_merged(record: RunRecord, out: Path) -> RunRecord:
    """Return a record with the columns of all results that were taken in and are of its states.

    Args:
        record: of a run, with or without such columns.
        out: the run's folder.
    """
    here = _without(record)
    digests = {state.id: state.digest for state in here.states}
    results, notes = [], []
    for file in sorted((out / MERGED).glob("*.json")):
        try:
            result = read_result(file)
        except ArtifactError as error:
            notes.append(f"left out: {error}")
            continue
        if all(digests.get(name) == digest for name, digest in result.states.items()):
            results.append(result)
        else:
            notes.append(f"{result.target.name}: left out: what was measured there were other states than these")
    if not results:
        return here.model_copy(update={"notes": [*here.notes, *notes]})
    # Whatever a file says: images and engines of another host are not in this folder.
    bare: dict[str, Any] = {"images": [], "engine": None}
    cells = [cell.model_copy(update=bare) for result in results for cell in result.cells]
    told = [gate for gate in here.gates if not _is_answered(gate, here, cells)]
    whole = here.model_copy(
        update={
            "targets": [*here.targets, *(result.target for result in results)],
            "cells": [*here.cells, *cells],
            "gates": [*told, *_gates(here, results)],
            "notes": [*here.notes, *notes],
            "exit_code_here": here.exit_code,
        }
    )
    return whole.model_copy(update={"exit_code": _exit_code(whole)})


def base_of(target: str) -> str:
    """Return the recipe's name of a target, of a column that was measured elsewhere too."""
    return target.partition("@")[0]


def _without(record: RunRecord) -> RunRecord:
    elsewhere = {target.name for target in record.targets if target.host}
    code = record.exit_code if record.exit_code_here is None else record.exit_code_here
    return record.model_copy(
        update={
            "exit_code": code,
            "exit_code_here": None,
            "targets": [target for target in record.targets if not target.host],
            "cells": [cell for cell in record.cells if cell.target not in elsewhere],
            "gates": [gate for gate in record.gates if gate.target not in elsewhere],
        }
    )


def _is_answered(gate: GateRecord, record: RunRecord, cells: Sequence[CellRecord]) -> bool:
    """Tell whether a gate that could not be measured here was looked at on another host."""
    here = next((c for c in record.cells if (c.state, c.target) == (gate.state, gate.target)), None)
    if gate.status != "not measured" or (here is not None and here.status in ("ok", "failed")):
        return False
    place = (gate.state, gate.target)
    return any(cell.status == "ok" and (cell.state, base_of(cell.target)) == place for cell in cells)


def _gates(record: RunRecord, results: Sequence[Result]) -> list[GateRecord]:
    """Apply the recipe's gates to other hosts' columns: those of all targets, and those of the target by its name."""
    recipe = Recipe.model_validate(record.recipe)
    found = []
    for result in results:
        column = result.target.name
        measurements = [item for cell in result.cells for item in cell.measurements]
        measured = [cell.state for cell in result.cells if cell.has_engine]
        held = [gate for gate in parse_gates(recipe) if gate.targets is None or base_of(column) in gate.targets]
        held = [replace(gate, targets=(column,)) for gate in held]
        for state in measured:
            told = evaluate(held, measurements, recipe.state_ids, (column,), only_state=state)
            found += [GateRecord(**vars(item)) for item in told]
    return found


def _exit_code(record: RunRecord) -> int:
    """Return the exit code of a run with other hosts' columns."""
    if record.exit_code not in _SAFE or not record.complete:
        return record.exit_code
    codes = []
    if any(gate.status == "missed" for gate in record.gates):
        codes.append(3)
    if record.recipe.get("unmeasured") == "fail" and any(gate.status == "not measured" for gate in record.gates):
        codes.append(3)
    if record.exit_code == 4 and any(_is_open(cell, record) for cell in record.cells):
        codes.append(4)
    codes += [5 for cell in record.cells if cell.status == "failed" and "@" in cell.target]
    return exit_code_of(codes)


def _is_open(cell: CellRecord, record: RunRecord) -> bool:
    """Tell whether a cell has no engine here and was measured on no other host either."""
    if cell.has_engine:
        return False
    others = [other for other in record.cells if other.target != cell.target and base_of(other.target) == cell.target]
    return not any(other.has_engine and other.state == cell.state for other in others)


def _check(run: Path, file: Path, result: Result, record: RunRecord) -> None:
    """Refuse a result that is not of this run's states, or of a kit that was not made as it came back."""
    manifest = run / KITS / f"{result.kit}.json"
    if not _DIGEST.fullmatch(result.kit) or not manifest.is_file():
        made = ", ".join(sorted(path.stem[:12] for path in (run / KITS).glob("*.json"))) or "none"
        raise ArtifactError(
            f"{file}: of a kit that this run did not make, or that was altered; got kit {result.kit[:12]}, expected "
            f"one of {made}. Make one with `exporter kit {run}`, and measure that."
        )
    kit = read_kit(manifest)
    column = f"{kit.target}@{result.host}"
    wanted: tuple[object, ...] = (column, kit.type, {state.id: state.digest for state in kit.states})
    got: tuple[object, ...] = (result.target.name, result.target.type, result.states)
    strangers = [cell.state for cell in result.cells if cell.target != column or cell.state not in result.states]
    if got != wanted or strangers or not result.target.host:
        raise ArtifactError(
            f"{file}: does not fit its kit; got {result.target.name} ({result.target.type}) with states "
            f"{', '.join(result.states)}, expected {column} ({kit.type}). Give the result.json as measure.py wrote it."
        )
    digests = {state.id: state.digest for state in record.states}
    for state, digest in result.states.items():
        if digests.get(state) != digest:
            here = digests.get(state, "none")[:12]
            raise ArtifactError(
                f"{file}: of another {state}; got {digest[:12]}, expected {here}, which is what the run has now. "
                f"Make a new kit with `exporter kit {run}`, and measure that."
            )

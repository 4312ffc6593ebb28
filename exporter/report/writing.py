"""The three files of a report, written whole or not at all, and read back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from exporter.artifact import disk_failure, write_text
from exporter.errors import ArtifactError
from exporter.report.junit import render_junit
from exporter.report.page import render_html
from exporter.report.record import SCHEMA_VERSION, RunRecord

_NON_FINITE = ["Infinity", "-Infinity", "NaN"]


def write_reports(record: RunRecord, out: Path) -> None:
    """Write ``report.json``, ``junit.xml`` and ``report.html`` into a folder, each one atomically.

    The record comes first: whatever stops the renderings, the numbers are on the disk.

    Args:
        record: the run.
        out: an existing folder; the paths of images and engines in the record are relative to it.

    Raises:
        ComponentFailed: the disk is full or refuses.
    """
    write_record(record, out)
    _write(out / "junit.xml", render_junit(record))
    _write(out / "report.html", render_html(record, out))


def dump_record(record: RunRecord) -> str:
    """Return ``report.json``: strict JSON, in which infinite and NaN numbers are the strings of `schema`."""
    text = json.dumps(
        strict(record.model_dump(mode="python")), ensure_ascii=False, indent=1, allow_nan=False, default=str
    )
    return f"{text}\n"


def write_record(record: RunRecord, out: Path) -> None:
    """Write ``report.json`` alone, atomically: what a run does after every cell, when pages would cost time.

    Raises:
        ComponentFailed: the disk is full or refuses.
    """
    _write(out / "report.json", dump_record(record))


def read_record(folder: Path) -> RunRecord:
    """Read the ``report.json`` of a run.

    Args:
        folder: of the run, or the file itself.

    Raises:
        ArtifactError: there is none, or it is not one that this version can read.
    """
    path = folder / "report.json" if folder.is_dir() else folder
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read; got {error}, expected a report.json. Give the folder of a run."
        raise ArtifactError(msg) from error
    try:
        found = RunRecord.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        msg = (
            f"{path}: {where}: {first['msg']}; expected a report.json of schema {SCHEMA_VERSION}. Run the recipe again."
        )
        raise ArtifactError(msg) from error
    if found.schema_version != SCHEMA_VERSION:
        msg = (
            f"{path}: schema_version: got {found.schema_version}, expected {SCHEMA_VERSION}. "
            "Read it with the version of the exporter that wrote it."
        )
        raise ArtifactError(msg)
    return found


def schema() -> dict[str, Any]:
    """Return the JSON schema of ``report.json``.

    JSON has no infinite numbers, and a bit-equal image has an infinite PSNR: every number may be one of the strings
    ``Infinity``, ``-Infinity``, ``NaN`` instead.
    """
    made: dict[str, Any] = _widened(RunRecord.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def _widened(node: Any) -> Any:
    if isinstance(node, list):
        return [_widened(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    rest = {key: _widened(value) for key, value in node.items()}
    if rest.get("type") != "number":
        return rest
    rest.pop("type")
    return {**rest, "anyOf": [{"type": "number"}, {"enum": _NON_FINITE}]}


def strict(value: Any) -> Any:
    """Return a value as strict JSON has it: infinite and NaN numbers as the strings of `schema`."""
    if isinstance(value, dict):
        return {str(key): strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _write(path: Path, text: str) -> None:
    # "backslashreplace" turns a lone surrogate, which UTF-8 cannot hold, into the escape that JSON has for it.
    safe = text.encode("utf-8", "backslashreplace").decode("utf-8")
    try:
        write_text(path, safe)
    except OSError as error:
        raise disk_failure(path, error) from error

"""The files of a report: valid against the published schema, whole, and read back without loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest
from report_samples import measurement, sample_record

import exporter.report.writing as writing
from exporter.errors import ArtifactError, ComponentFailed
from exporter.report.record import CellRecord, RunRecord


@pytest.fixture
def record() -> RunRecord:
    return sample_record(Path(), images=False)


def with_values(record: RunRecord, *values: float | None) -> RunRecord:
    measurements = [
        measurement("lowering.psnr_db", value, "dB", low=value, detail={"curve": [[1.0, value]]}) for value in values
    ]
    cell = CellRecord(state="0-dense", target="openvino", status="ok", measurements=measurements)
    return record.model_copy(update={"cells": [cell]})


def test_report_is_valid_against_the_published_schema(record: RunRecord) -> None:
    schema = writing.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(writing.dump_record(record)), schema)
    json.dumps(schema)


def test_schema_refuses_what_is_no_report(record: RunRecord) -> None:
    damaged = json.loads(writing.dump_record(record)) | {"seconds": "long"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(damaged, writing.schema())


def test_infinite_values_are_strict_json_and_come_back(record: RunRecord, tmp_path: Path) -> None:
    odd = with_values(record, math.inf, -math.inf, math.nan, 1e300, 5e-324, None)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    data = json.loads(writing.dump_record(odd), parse_constant=refuse)
    jsonschema.validate(data, writing.schema())
    writing.write_record(odd, tmp_path)
    values = [item.value for item in writing.read_record(tmp_path).cells[0].measurements]
    assert values[:2] == [math.inf, -math.inf]
    assert math.isnan(values[2] or 0.0)
    assert values[3:] == [1e300, 5e-324, None]


def test_record_read_back_is_the_same(record: RunRecord, tmp_path: Path) -> None:
    writing.write_record(record, tmp_path)
    found = writing.read_record(tmp_path)
    assert found == record
    assert writing.dump_record(found) == writing.dump_record(record)
    assert writing.read_record(tmp_path / "report.json") == record


def test_text_that_utf8_cannot_hold_is_written_as_an_escape(record: RunRecord, tmp_path: Path) -> None:
    writing.write_record(record.model_copy(update={"notes": ["赤 \ud800 \x00"]}), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["notes"] == ["赤 \ud800 \x00"]


def test_three_files_and_nothing_else_are_written(tmp_path: Path) -> None:
    writing.write_reports(sample_record(tmp_path, images=False), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["junit.xml", "report.html", "report.json"]


def test_folder_that_is_not_there_is_a_clear_error(record: RunRecord, tmp_path: Path) -> None:
    with pytest.raises(ComponentFailed, match=r"could not be"):
        writing.write_record(record, tmp_path / "gone")


def test_failed_write_leaves_the_old_report(record: RunRecord, tmp_path: Path) -> None:
    writing.write_record(record, tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ComponentFailed):
        writing.write_reports(record, tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["junit.xml", "report.html", "report.json"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "report.json: the file: "),
        ('{"name": 3}', "report.json: name: "),
        ("\x00", "report.json: the file: "),
    ],
)
def test_damaged_report_is_refused_by_place(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=told):
        writing.read_record(tmp_path)


def test_missing_unreadable_and_newer_reports_are_refused(record: RunRecord, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot be read"):
        writing.read_record(tmp_path)
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ArtifactError, match=r"cannot be read"):
        writing.read_record(tmp_path)
    writing.write_record(record.model_copy(update={"schema_version": 99}), tmp_path)
    with pytest.raises(ArtifactError, match=r"schema_version: got 99"):
        writing.read_record(tmp_path)

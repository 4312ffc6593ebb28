"""Values, intervals and sizes as people read them."""

from __future__ import annotations

import math

import pytest
from report_samples import gate

from exporter.metrics.fidelity import PSNR_CAP_DB
from exporter.report import formatting


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "ms", "not measured"),
        (0.0, "ms", "0 ms"),
        (118.4, "ms", "118 ms"),
        (9.876, "ms", "9.88 ms"),
        (1.5e-9, "ms", "1.50e-9 ms"),
        (3.2e12, "ms", "3.20e12 ms"),
        (math.inf, "ms", "∞ ms"),
        (math.nan, "fraction", "NaN"),
        (0.9531, "fraction", "0.953"),
        (31.249, "score", "31.25"),
        (0.0012345, "score", "0.001234"),
        (44.996, "dB", "45.00 dB"),
        (1e30, "dB", "equal"),
        (200.0, "dB", "equal"),
        (-200.0, "dB", "not finite"),
        (1023.0, "bytes", "1023 B"),
        (65_720_236.0, "bytes", "62.7 MiB"),
        (2e15, "bytes", "1819 TiB"),
        (3.0, "images", "3 images"),
        (-1.5, "", "-1.50"),
    ],
)
def test_quantity(value: float | None, unit: str, text: str) -> None:
    assert formatting.quantity(value, unit) == text


def test_equal_answers_are_named_at_the_cap_of_the_metric() -> None:
    assert formatting.EQUAL_DB == PSNR_CAP_DB


def test_value_and_limit_that_differ_never_look_equal() -> None:
    assert formatting.apart(44.9996, 45.0, "dB") == ("44.9996 dB", "45.0000 dB")
    assert formatting.apart(45.0, 45.0, "dB") == ("45.00 dB", "45.00 dB")
    assert len(set(formatting.apart(1048575.0 * 40, 1048576.0 * 40, "bytes"))) == 2


@pytest.mark.parametrize(
    ("took", "text"),
    [
        (0.0, "0 s"),
        (0.0123, "12 ms"),
        (3.14, "3.1 s"),
        (59.97, "1 min 00 s"),
        (252, "4 min 12 s"),
        (7380, "2 h 03 min"),
    ],
)
def test_seconds(took: float, text: str) -> None:
    assert formatting.seconds(took) == text


def test_interval_needs_both_ends_and_leaves_out_the_unit() -> None:
    assert formatting.interval(1.0, None, "ms") == ""
    assert formatting.interval(0.91, 0.9789, "fraction") == "[0.910, 0.979]"
    assert formatting.interval(1.0, 2.0, "ms") == "[1.00, 2.00]"
    assert formatting.interval(1048576.0, 2097152.0, "bytes") == "[1.00 MiB, 2.00 MiB]"


def test_counts_times_and_plurals() -> None:
    assert [formatting.count(value) for value in (0, 9999, 12_914_824, 2_000_000_000)] == [
        "0",
        "9999",
        "12.9 M",
        "2.00 G",
    ]
    assert formatting.moment("2026-11-21T07:24:10+00:00") == "2026-11-21 07:24 UTC"
    assert formatting.moment("yesterday") == "yesterday"
    assert [formatting.plural(amount, "gate") for amount in (0, 1, 2)] == ["0 gates", "1 gate", "2 gates"]
    assert [formatting.timestep(value) for value in (981.0, 0.4375)] == ["981", "0.4375"]


@pytest.mark.parametrize(
    ("given", "changes", "sign"),
    [
        ({"min": 1}, {}, "≥"),
        ({"max": 1, "min": None}, {}, "≤"),
        ({"min": 20, "max": 40}, {"got": 50.0, "limit": 40.0, "status": "missed"}, "≤"),
        ({"min": 20, "max": 40}, {"got": 30.0, "limit": 20.0, "status": "passed"}, "≥"),
        ({"min": 20, "max": 40}, {"got": 10.0, "limit": 20.0, "status": "missed"}, "≥"),
        ({"min": 20, "max": 40}, {"got": None, "limit": 40.0, "status": "not measured"}, "≤"),
    ],
)
def test_sign_of_a_limit(given: dict[str, object], changes: dict[str, object], sign: str) -> None:
    status = str(changes.pop("status", "passed"))
    assert formatting.limit_sign(gate(status, gate=given, **changes)) == sign

"""The top level is fixed: whoever opens the repository finds these entries and no others."""

from __future__ import annotations

ENTRIES = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "Dockerfile",
    "exporter",
    "targets",
    "calibration",
    "tests",
    "ci",
}


def test_the_top_level_holds_what_it_should_and_nothing_else(top_level: set[str]) -> None:
    assert {name for name in top_level if not name.startswith(".")} == ENTRIES

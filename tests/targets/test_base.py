"""What crosses the border to a runtime: evidence, feeds, missing libraries, files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from targets import TARGETS, target
from targets.base import (
    Evidence,
    Layer,
    TargetError,
    TargetMissing,
    TensorSpec,
    check_feeds,
    check_threads,
    installed_version,
    place_file,
    require,
)

SPECS = (TensorSpec("image", "float32", (-1, 3)), TensorSpec("step", "float32", ()))


def test_evidence_counts_most_first() -> None:
    layers = [Layer(str(i), kind, "f32", "", "CPU") for i, kind in enumerate(["Add", "Conv", "Conv", "Act"])]
    found = Evidence("runtime 1", "CPU", "f32", tuple(layers))
    assert list(found.count("type").items()) == [("Conv", 2), ("Act", 1), ("Add", 1)]
    assert found.to_json()["layers"][0]["origin"] == ""


def test_feeds_that_fit_pass() -> None:
    feeds = {"image": np.zeros((5, 3), np.float32), "step": np.array(1, np.float32)}
    check_feeds(SPECS, feeds, "here")


def test_the_message_names_place_input_and_both_sides() -> None:
    with pytest.raises(TargetError, match=r"here: input 'image': wrong shape; got \(5, 4\), expected \(-1, 3\)"):
        check_feeds(SPECS, {"image": np.zeros((5, 4), np.float32), "step": np.array(1, np.float32)}, "here")
    with pytest.raises(TargetError, match=r"got float64, expected float32"):
        check_feeds(SPECS, {"image": np.zeros((5, 3), np.float32), "step": np.array(1.0)}, "here")


def test_a_missing_module_names_the_command() -> None:
    with pytest.raises(TargetMissing, match=r"^target x: 'no_such_module' is not installed .* Run: pip install x$"):
        require("no_such_module", "target x", "pip install x")
    assert installed_version("no-such-distribution") is None
    assert installed_version("numpy") == np.__version__


def test_threads_are_at_least_one() -> None:
    check_threads(None, "here")
    check_threads(4, "here")
    for wrong in (0, -1, True):
        with pytest.raises(TargetError, match="here: threads"):
            check_threads(wrong, "here")


def test_files_are_linked_and_copied_where_linking_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_text("content")
    place_file(source, tmp_path / "linked")
    assert (tmp_path / "linked").samefile(source)

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    place_file(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "content"
    assert not (tmp_path / "copied").samefile(source)


def test_other_failures_of_linking_are_not_hidden(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("content")
    with pytest.raises(FileNotFoundError):
        place_file(source, tmp_path / "no folder" / "linked")


def test_the_registry_makes_targets_and_nothing_else() -> None:
    assert {target(name).type for name in TARGETS} == set(TARGETS)
    with pytest.raises(KeyError):
        target("os:system")

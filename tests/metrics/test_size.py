from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from exporter.errors import ComponentFailed
from exporter.metrics.place import Place
from exporter.metrics.size import (
    load_measurement,
    memory_measurement,
    own_peak_rss_mib,
    run_child,
    size_bytes,
    size_measurement,
)

PLACE = Place("0-dense", "ort")


def test_hard_links_count_once_and_symbolic_links_not_at_all(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    (a / "unet").mkdir(parents=True)
    b.mkdir()
    (a / "unet" / "model.onnx").write_bytes(b"x" * 1000)
    (a / "config.json").write_bytes(b"y" * 10)
    os.link(a / "unet" / "model.onnx", b / "model.onnx")
    (b / "link.onnx").symlink_to(a / "config.json")
    assert size_bytes(a) == 1010
    assert size_bytes(b) == 1000
    assert size_bytes(a, b) == 1010
    assert size_bytes(a / "config.json") == 10
    assert size_measurement(PLACE, a, b).value == 1010.0


def test_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ComponentFailed, match="missing"):
        size_bytes(tmp_path / "none")


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_peak_of_a_child_is_its_own_although_freed_and_although_the_parent_is_large() -> None:
    ballast = bytearray(os.urandom(1 << 20)) * 300
    small = run_child(child("pass"), timeout_s=60).peak_rss_mib
    large = run_child(child("b = bytearray(b'x') * (100 << 20); del b; print('done')"), timeout_s=60)
    assert len(ballast) == 300 << 20
    assert small < 100
    assert 95 < large.peak_rss_mib - small < 130
    assert large.output == "done\n"
    assert large.seconds > 0


def test_failing_child_is_quoted() -> None:
    with pytest.raises(ComponentFailed, match=r"got exit code 3, expected exit code 0\. It said: no such engine"):
        run_child(child("import sys; sys.stderr.write('no such engine'); sys.exit(3)"), timeout_s=60)


def test_a_child_that_dies_by_a_signal_is_named_for_it() -> None:
    with pytest.raises(ComponentFailed, match=r"got SIGSEGV, a crash, expected exit code 0\. It said nothing\."):
        run_child(child("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), timeout_s=60)


def test_child_that_hangs_is_ended() -> None:
    with pytest.raises(ComponentFailed, match=r"ran too long; got 0\.2 s"):
        run_child(child("import time; time.sleep(60)"), timeout_s=0.2)


def test_own_peak_does_not_fall() -> None:
    before = own_peak_rss_mib()
    block = bytearray(b"x") * (64 << 20)
    del block
    assert own_peak_rss_mib() >= before > 5


def test_memory_measurement_has_its_unit() -> None:
    assert memory_measurement(PLACE, 12.5).model_dump(include={"name", "value", "unit"}) == {
        "name": "peak_rss_mib",
        "value": 12.5,
        "unit": "MiB",
    }


def test_load_is_the_median_and_everything_is_closed() -> None:
    opened: list[int] = []
    closed: list[int] = []

    def load() -> int:
        opened.append(len(opened))
        return opened[-1]

    found = load_measurement(PLACE, load, closed.append, repeats=3)
    assert (opened, closed) == ([0, 1, 2], [0, 1, 2])
    assert found.value == sorted(found.detail["samples_ms"])[1]
    assert found.detail["first_ms"] == found.detail["samples_ms"][0]

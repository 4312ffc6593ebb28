"""What is remembered of files: never of one that changed, whatever its times say."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from exporter.memo import MEMO, FileMemo


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"a" * 100)
    return path


def test_a_file_is_read_once_under_all_its_names_and_by_later_processes(file: Path, tmp_path: Path) -> None:
    memo = FileMemo()
    assert memo.sha256(file) == digest(b"a" * 100)
    with memo.relinking([file]):
        os.link(file, tmp_path / "again.bin")
    (tmp_path / MEMO).write_text(memo.text())
    later = FileMemo.load(tmp_path)
    assert later.sha256(tmp_path / "again.bin") == later.sha256(file) == digest(b"a" * 100)
    assert memo.read == [file]
    assert later.read == []
    assert later.asked == 2


def test_a_change_that_keeps_size_and_time_is_noticed(file: Path) -> None:
    memo = FileMemo()
    memo.sha256(file)
    times = file.stat()
    file.write_bytes(b"b" * 100)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert memo.sha256(file) == digest(b"b" * 100)


def test_a_change_right_after_reading_is_noticed(file: Path) -> None:
    """Within one tick of the kernel's clock a file changes without a trace in its times."""
    memo = FileMemo()
    for turn in range(20):
        data = bytes([turn]) * 100
        with file.open("r+b") as stream:
            stream.write(data)
        assert memo.sha256(file) == digest(data)
        with file.open("r+b") as stream:
            stream.write(b"z" * 100)
        assert memo.sha256(file) == digest(b"z" * 100)


def test_a_file_that_changes_while_it_is_read_is_not_remembered(file: Path) -> None:
    memo = FileMemo()

    def slowly() -> str:
        file.write_bytes(b"c" * 100)
        return "old"

    assert memo.recall(file, "sha256", slowly) == "old"
    assert memo.sha256(file) == digest(b"c" * 100)


def test_a_file_from_the_future_is_read_each_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that was set back says nothing of the order of changes."""
    import time

    memo, now = FileMemo(), time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)
    memo.sha256(file)
    memo.sha256(file)
    assert memo.read == [file, file]


def test_a_replaced_file_under_the_same_name_is_read(file: Path, tmp_path: Path) -> None:
    memo = FileMemo()
    memo.sha256(file)
    other = tmp_path / "other"
    shutil.copyfile(file, other)
    other.replace(file)
    memo.sha256(file)
    assert memo.read == [file, file]


def test_a_change_while_links_are_made_is_noticed(file: Path, tmp_path: Path) -> None:
    memo = FileMemo()
    memo.sha256(file)
    with memo.relinking([file]):
        os.link(file, tmp_path / "again.bin")
        file.write_bytes(b"d" * 100)
    assert memo.sha256(file) == digest(b"d" * 100)


@pytest.mark.parametrize("text", ["", "null", "[]", '{"files": 3}', '{"files": {"1:2": 3}}', "[" * 100_000, "\x00"])
def test_a_damaged_memo_is_an_empty_one(file: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / MEMO).write_text(text)
    memo = FileMemo.load(tmp_path)
    assert memo.sha256(file) == digest(b"a" * 100)
    assert memo.read == [file]

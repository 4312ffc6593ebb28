"""What was found out about files, remembered by their identity on disk, so that no byte is read twice for one answer.

A file is the same while device, inode, size, time of change and time of status change (``ctime``, which no program can
set) are. A clock has a grain: a file that changed within it before it was read might change again and look the same,
so it is waited for first (git calls such files racily clean).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found", str, bool)

MEMO = ".files.json"
"""Name of the file in a run's folder that keeps a memo."""

_MOST = 20_000  # entries; those that were asked for longest ago go first
_GRAIN_NS = 20_000_000  # kernels stamp files with the time of their last tick, at most 10 ms ago
_COARSE_NS, _SECOND_NS = 2_000_000_000, 1_000_000_000  # of file systems that store whole seconds


def sha256_of(path: Path) -> str:
    """Return the sha256 hex of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class FileMemo:
    """Answers about files, each found out once.

    Args:
        entries: of an earlier memo, as `text` wrote them.

    Attributes:
        asked: how many answers were asked for.
        read: the files that had to be read for them, in order.
    """

    def __init__(self, entries: dict[str, dict[str, Any]] | None = None) -> None:
        self._entries = dict(entries or {})
        self.asked = 0
        self.read: list[Path] = []

    @classmethod
    def load(cls, out: Path) -> FileMemo:
        """Return the memo of a run's folder; an empty one where there is none that can be read."""
        try:
            entries = json.loads((out / MEMO).read_text(encoding="utf-8"))["files"]
            return cls({str(key): {"mark": list(entry["mark"]), **entry} for key, entry in entries.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()

    def text(self) -> str:
        """Return the memo as JSON, for `load`."""
        return json.dumps({"files": dict(list(self._entries.items())[-_MOST:])}) + "\n"

    def sha256(self, path: Path) -> str:
        """Return the sha256 hex of a file's bytes."""
        return self.recall(path, "sha256", lambda: sha256_of(path))

    def recall(self, path: Path, name: str, find: Callable[[], Found]) -> Found:
        """Return an answer about a file's bytes.

        Args:
            path: the file.
            name: of the question, such as ``sha256``.
            find: reads the file and returns the answer; not called where it is known for this very file.
        """
        self.asked += 1
        stat = path.stat()
        known = self._entries.pop(_place(stat), {"mark": []})
        if known["mark"] != _mark(stat):
            known = {"mark": _mark(stat)}
        if name not in known:
            stat = _settled(path, stat)
            calm = _age_ns(stat) >= _grain_ns(stat)
            self.read.append(path)
            found = find()
            if not calm or _mark(path.stat()) != _mark(stat):
                return found  # it is being changed: true of the bytes that were read, and of nothing later
            known = (known if known["mark"] == _mark(stat) else {"mark": _mark(stat)}) | {name: found}
        self._entries[_place(stat)] = known
        answer: Found = known[name]
        return answer

    @contextmanager
    def relinking(self, files: Iterable[Path]) -> Iterator[None]:
        """Keep what is known of files while links to them are made or removed: that moves ``ctime`` and no byte.

        Only for the block, size and time of change alone say whether a file is the same: it belongs to us meanwhile.
        """
        with ExitStack() as opened:
            held = []
            for file in files:
                before = file.stat()
                if self._entries.get(_place(before), {}).get("mark") == _mark(before):
                    held.append((opened.enter_context(file.open("rb")), before))
            yield
            for stream, before in held:
                after = os.fstat(stream.fileno())
                if (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
                    self._entries[_place(after)]["mark"] = _mark(after)


def _place(stat: os.stat_result) -> str:
    return f"{stat.st_dev}:{stat.st_ino}"


def _mark(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _age_ns(stat: os.stat_result) -> int:
    return time.time_ns() - stat.st_ctime_ns


def _grain_ns(stat: os.stat_result) -> int:
    return _GRAIN_NS if stat.st_ctime_ns % _SECOND_NS else _COARSE_NS


def _settled(path: Path, stat: os.stat_result) -> os.stat_result:
    """Wait until a later change of a file must show in its times; return its state then."""
    left = _grain_ns(stat) - _age_ns(stat)
    if left <= 0:
        return stat
    time.sleep(min(left, _grain_ns(stat)) / 1e9)
    return path.stat()

"""What a method has found out so far, on disk, so that a killed stage goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.artifact import write_text


class Notes:
    """JSON values by name, written whole after each.

    Args:
        path: the file.
        key: of everything that the values depend on; notes of another key are dropped.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._values: dict[str, Any] = self._read()

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """Return what is noted under a name, or find it out and note it."""
        if name not in self._values:
            self._values[name] = find()
            write_text(self._path, json.dumps({"key": self._key, "values": self._values}))
        return self._values[name]

    def _read(self) -> dict[str, Any]:
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return dict(kept["values"]) if isinstance(kept, dict) and kept.get("key") == self._key else {}


@contextmanager
def notes(path: Path, key: str) -> Iterator[Notes]:
    """Notes that are gone when the work is done, and stay when it is not."""
    yield Notes(path, key)
    path.unlink(missing_ok=True)

"""Whether a run's folder holds all that a plan makes: told by names alone, which says what need not be forecast.

It never says that something is right: every artifact is still checked by the run itself.
"""

from __future__ import annotations

import json
from pathlib import Path

from exporter.artifact import MANIFEST, write_text

_FILE = ".finished.json"
_HOLDERS = ("states/*", "recordings/*", "lowered/*", "engines/*/*")


def is_finished(out: Path, key: str) -> bool:
    """Return whether a run with this key came to its end here and nothing that it left is gone."""
    try:
        found = json.loads((out / _FILE).read_text(encoding="utf-8"))
        return found["key"] == key and all((out / name).is_file() for name in found["left"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def note_finished(out: Path, key: str) -> None:
    """Remember that a run with this key came to its end, and what it left."""
    left = [path for holder in _HOLDERS for path in out.glob(f"{holder}/{MANIFEST}")]
    names = sorted(str(path.relative_to(out)) for path in [*left, *out.glob("cells/*/*/*.json")])
    write_text(out / _FILE, json.dumps({"key": key, "left": names}, indent=1) + "\n")


def note_started(out: Path) -> None:
    """Forget a finished run: what begins now may leave less than it did."""
    (out / _FILE).unlink(missing_ok=True)

"""What a run folder no longer needs: files lowered for older recipes, recordings of older states, scratch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exporter.artifact import MANIFEST, locked, remove_tree, write_text
from exporter.errors import ArtifactError
from exporter.memo import MEMO, FileMemo

_HOLDERS = ("lowered", "recordings")


def collect(out: Path, *, dry_run: bool) -> list[dict[str, Any]]:
    """Remove what the last run did not use.

    Args:
        out: folder of a run; states and engines of the last run always stay.
        dry_run: remove nothing.

    Returns:
        ``{"path", "bytes"}`` per folder; bytes that other hard links keep alive are not counted.

    Raises:
        ArtifactError: not the folder of a run, or a run is writing there.
    """
    if not (out / "states").is_dir():
        msg = f"{out}: not the folder of a run; got no 'states' inside, expected one. Give what --out named."
        raise ArtifactError(msg)
    with locked(out):
        used = _used(out)
        gone = [folder for name in _HOLDERS for folder in _folders(out / name) if folder.name not in used]
        gone += _folders(out / "work")
        gone += [folder for folder in _folders(out / "states") if used and folder.name not in used]
        gone += [
            folder
            for holder in ("engines", "cells")
            for state in _folders(out / holder)
            for folder in _folders(state)
            if used and f"{state.name}/{folder.name}" not in used
        ]
        removed = [{"path": str(folder.relative_to(out)), "bytes": _own_bytes(folder)} for folder in gone]
        if not dry_run:
            memo = FileMemo.load(out)
            for folder in gone:
                remove_tree(folder, memo)
            write_text(out / MEMO, memo.text())
    return removed


def remember_used(out: Path, names: list[str]) -> str:
    """Return the text of ``used.json``: names of folders that the run needs."""
    return json.dumps({"used": sorted(names)}, indent=1) + "\n"


def _used(out: Path) -> set[str]:
    try:
        return set(json.loads((out / "used.json").read_text(encoding="utf-8"))["used"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{out / 'used.json'}: not readable, so what is in use is not known. Run the recipe again, then gc."
        raise ArtifactError(msg) from error


def _folders(folder: Path) -> list[Path]:
    return sorted(item for item in folder.iterdir() if item.is_dir()) if folder.is_dir() else []


def _own_bytes(folder: Path) -> int:
    inside = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return sum(path.stat().st_size for path in inside if path.stat().st_nlink == 1)

"""JSON of strangers: read with bounds on size and depth, every key once, and a sentence for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError

MAX_JSON_BYTES = 4 * 1024 * 1024
_MAX_DEPTH = 64


def read_json(path: Path, error: type[ExporterError]) -> Any:
    """Return what a JSON file holds.

    Args:
        path: at most 4 MiB; no duplicate keys, no NaN, at most 64 levels deep.
        error: what to raise where it is not such a file.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise error(
                f"{path}: too large; got {size} bytes, expected at most {MAX_JSON_BYTES}. Restore the original file."
            )
        text = path.read_text(encoding="utf-8")
        _check_depth(text)
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as cause:
        what = str(cause).split("\n", 1)[0][:200]
        raise error(
            f"{path}: not readable JSON; got {what}, expected UTF-8 JSON. Restore the original file."
        ) from cause


def _check_depth(text: str) -> None:
    depth = 0
    for character in text:
        if character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)[:60]!r} stands there twice")
    return found


def _constant(text: str) -> float:
    """Take infinities, which diffusers writes into the configs of its schedulers; refuse NaN, which equals nothing."""
    if text == "NaN":
        raise ValueError(f"{text} is not JSON")
    return float(text)


def read_object(path: Path, error: type[ExporterError]) -> dict[str, Any]:
    """Return the JSON object that a file holds; as `read_json`, and the top must be an object."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object; got {type(value).__name__}. Restore the original file.")
    return value

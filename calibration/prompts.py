"""Prompt sets: a named one, or the user's file (txt, csv, jsonl), with a digest of the text."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration.errors import CalibrationError

COLUMNS = ("prompt", "text")
"""Column or key that holds the prompt; the first that is present counts."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order.

    Attributes:
        name: the named set, or the file's name.
        prompts: the texts, none of them empty.
        digest: sha256 of the texts and their order, hex; the name is no part of it.
    """

    name: str
    prompts: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, name: str, prompts: Sequence[str]) -> PromptSet:
        """Return a set of these prompts.

        Raises:
            CalibrationError: there are none, or one is blank.
        """
        if not prompts:
            msg = f"prompts {name}: empty; got 0 prompts, expected at least 1. Write one prompt per line."
            raise CalibrationError(msg)
        blank = next((index for index, prompt in enumerate(prompts) if not prompt.strip()), None)
        if blank is not None:
            msg = f"prompts {name}: prompt {blank} is blank; got {prompts[blank]!r}, expected text. Remove or fill it."
            raise CalibrationError(msg)
        text = json.dumps(list(prompts), ensure_ascii=True)
        return cls(name, tuple(prompts), hashlib.sha256(text.encode("ascii")).hexdigest())

    def first(self, count: int) -> PromptSet:
        """Return the first `count` prompts as a set of the same name.

        Raises:
            CalibrationError: there are fewer.
        """
        if not 1 <= count <= len(self.prompts):
            msg = (
                f"prompts {self.name}: not as many as asked; got {count}, expected 1 to {len(self.prompts)}. "
                "Ask for fewer, or add prompts."
            )
            raise CalibrationError(msg)
        return self if count == len(self.prompts) else PromptSet.of(self.name, self.prompts[:count])


def load_prompts(source: str | Path, *, named: Mapping[str, Callable[[], list[str]]] | None = None) -> PromptSet:
    """Return the prompts of a named set, or of a file.

    Args:
        source: a name in `named`, or the path of a ``.txt`` (one prompt per line, blank lines skipped), ``.csv`` or
            ``.jsonl`` file (a column or key ``prompt`` or ``text``), UTF-8.
        named: sets that come with the program, each made when asked for.

    Raises:
        CalibrationError: no such set or file, an unknown kind of file, not UTF-8, malformed, or empty.
    """
    sets = named or {}
    if isinstance(source, str) and source in sets:
        return PromptSet.of(source, sets[source]())
    path = Path(source)
    if path.suffix.lower() not in _READERS:
        _refuse_source(str(source), list(sets))
    text = _read(path)
    return PromptSet.of(path.name, _READERS[path.suffix.lower()](text, f"prompts {path}"))


def _refuse_source(source: str, names: list[str]) -> None:
    close = difflib.get_close_matches(source, names, n=1)
    known = f"one of {', '.join(sorted(names))}, or " if names else ""
    fix = f"Did you mean '{close[0]}'?" if close else "Name a set, or a file with one of these endings."
    msg = f"prompts {source}: unknown; got '{source}', expected {known}a path ending in {', '.join(_READERS)}. {fix}"
    raise CalibrationError(msg)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        msg = (
            f"prompts {path}: not UTF-8 text; got byte 0x{error.object[error.start]:02x} at offset {error.start}, "
            "expected UTF-8. Save the file as UTF-8."
        )
        raise CalibrationError(msg) from error
    except OSError as error:
        msg = f"prompts {path}: cannot be read; got '{error.strerror}', expected a readable file. Check the path."
        raise CalibrationError(msg) from error


def _from_txt(text: str, place: str) -> list[str]:
    del place
    return [line.strip() for line in text.splitlines() if line.strip()]


def _from_csv(text: str, place: str) -> list[str]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        column = next((name for name in COLUMNS if name in header), None)
        if column is None:
            msg = f"{place}: no prompt column; got {list(header)}, expected 'prompt' or 'text'. Name one in line 1."
            raise CalibrationError(msg)
        return [_text(row[column], f"{place} line {reader.line_num}") for row in reader]
    except csv.Error as error:
        msg = f"{place} line {reader.line_num}: not CSV; got '{error}', expected quoted text. Mend the line."
        raise CalibrationError(msg) from error


def _from_jsonl(text: str, place: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        here = f"{place} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            msg = f"{here}: not JSON; got '{error}', expected one object per line. Mend the line."
            raise CalibrationError(msg) from error
        keys = list(row) if isinstance(row, dict) else []
        key = next((name for name in COLUMNS if name in keys), None)
        if key is None:
            got = keys if isinstance(row, dict) else type(row).__name__
            msg = f"{here}: no prompt; got {got}, expected an object with 'prompt' or 'text'. Add the key."
            raise CalibrationError(msg)
        prompts.append(_text(row[key], here))
    return prompts


def _text(value: object, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        msg = f"{place}: blank prompt; got {value!r}, expected text. Remove or fill it."
        raise CalibrationError(msg)
    return value.strip()


_READERS: dict[str, Callable[[str, str], list[str]]] = {".txt": _from_txt, ".csv": _from_csv, ".jsonl": _from_jsonl}

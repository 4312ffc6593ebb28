"""Checks data against models and dataclasses, and says what is wrong in the form of every error."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from exporter.errors import RecipeError

_Options = TypeVar("_Options")
KeysAt = Callable[[tuple[int | str, ...]], list[str]]
"""From the path of a mapping to the keys that are allowed there."""


def options_from(cls: type[_Options], given: Mapping[str, Any], place: str) -> _Options:
    """Check the options of a method against its dataclass.

    Args:
        cls: a frozen dataclass; its fields are the allowed keys.
        given: what the recipe says.
        place: key path for the errors, such as ``stages[0].prune``.

    Raises:
        RecipeError: unknown key (with "did you mean"), missing key or wrong value.
    """
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            expected = one_of(known) if known else "no options"
            msg = f"{place}.{key}: unknown key; expected {expected}.{hint(str(key), known)}"
            raise RecipeError(msg)
    try:
        return _adapter(cls).validate_python(dict(given))
    except ValidationError as error:
        raise RecipeError("\n".join(problems(error, "", place, lambda _: known))) from error
    except RecipeError as error:  # a dataclass's own __post_init__, which knows the stage but not where it stands
        kind = place.rpartition(".")[2]
        raise RecipeError(f"{place}{str(error).removeprefix(kind)}") from error


def options_schema(cls: type[object]) -> dict[str, Any]:
    """Return the JSON schema of a method's options."""
    return {**_adapter(cls).json_schema(), "additionalProperties": False}


def _adapter(cls: type[_Options]) -> TypeAdapter[_Options]:
    return TypeAdapter(cls)


def problems(error: ValidationError, place: str, prefix: str, keys_at: KeysAt) -> list[str]:
    """Return one line per problem: ``place: key.path: got X, expected Y``."""
    found = []
    for item in error.errors():
        where = _dotted(prefix, item["loc"])
        found.append(f"{place}: {where}: {_what(item, keys_at)}" if place else f"{where}: {_what(item, keys_at)}")
    return found


def _dotted(prefix: str, loc: tuple[int | str, ...]) -> str:
    text = prefix
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not re.search(r"[\[(]|^(str|int|float|literal|tuple)", str(part)):  # a union's branch, not a key
            text += f".{part}" if text else str(part)
    return text or "recipe"


def _what(item: ErrorDetails, keys_at: KeysAt) -> str:
    kind, got = item["type"], _show(item["input"])
    if kind == "extra_forbidden":
        known = keys_at(item["loc"][:-1])
        return f"unknown key; expected {one_of(known)}.{hint(str(item['loc'][-1]), known)}"
    if kind == "missing":
        return "missing; this key is required. Add it."
    if kind == "value_error":
        return item["msg"].removeprefix("Value error, ") + "."
    text = item["msg"].removeprefix("Input should be ").replace("Input should be", "")
    return f"got {got}, expected {text[:1].lower() + text[1:]}."


def one_of(names: Iterable[str]) -> str:
    """Return names as a choice: ``a | b``."""
    return " | ".join(names)


def hint(got: str, known: Iterable[str]) -> str:
    """Return a "did you mean" with a leading space, or nothing."""
    close = difflib.get_close_matches(got, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def flat(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.split())

"""Checks data against models and dataclasses, and says what is wrong in the form of every error."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

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
    expected = one_of(known) if known else "no options"
    unknown = [key for key in given if key not in known]
    wrong = [f"{place}.{key}: unknown key; expected {expected}.{hint(str(key), known)}" for key in unknown]
    cause: Exception | None = None
    try:
        made = _adapter(cls).validate_python({key: value for key, value in given.items() if key in known})
    except ValidationError as error:
        wrong, cause = wrong + problems(error, "", place, lambda _: known), error
    except RecipeError as error:  # a dataclass's own __post_init__, which knows the stage but not where it stands
        kind = place.rpartition(".")[2]
        wrong, cause = [*wrong, f"{place}{str(error).removeprefix(kind)}"], error
    if wrong:
        raise RecipeError("\n".join(wrong)) from cause
    return made


def options_schema(cls: type[object]) -> dict[str, Any]:
    """Return the JSON schema of a method's options: types, limits from the fields' metadata, texts from the docstring.

    Args:
        cls: a frozen dataclass, whose fields may be such too. The metadata of its fields has limits by their name in
            JSON Schema, such as ``minimum``; the ``Attributes`` of its docstring, one paragraph each, say what a field
            means.
    """
    schema = _adapter(cls).json_schema()
    schema.pop("$defs", None)  # nested options stand in their place: a part of a larger schema has no root to refer to
    told, kinds = described(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        known = {"description": told[field.name]} if field.name in told else {}
        if dataclasses.is_dataclass(kinds[field.name]):
            schema["properties"][field.name] = options_schema(kinds[field.name])
        schema["properties"][field.name] |= {**known, **field.metadata}
    return {**schema, "description": (inspect.getdoc(cls) or "").partition("\n")[0], "additionalProperties": False}


def described(cls: type[object]) -> dict[str, str]:
    """Return what the ``Attributes`` section of a class's docstring says about each attribute, on one line each."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE)
    return {name: flat(text) for name, text in found}


def _adapter(cls: type[_Options]) -> TypeAdapter[_Options]:
    return TypeAdapter(cls)


def problems(error: ValidationError, place: str, prefix: str, keys_at: KeysAt) -> list[str]:
    """Return one line per problem: ``place: key.path: got X, expected Y``."""
    found = []
    for item in error.errors():
        where = _dotted(prefix, item["loc"])
        texts = _what(item, keys_at).split("\n")  # a check of several keys together may say several things
        found += [f"{place}: {where}: {text}" if place else f"{where}: {text}" for text in texts]
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
        return "\n".join(f"{line}." for line in item["msg"].removeprefix("Value error, ").split("\n"))
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

"""What `inspect`, `targets`, `pruners` and `schema` show."""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import exporter.quantizing
import targets
from calibration.schemes import ASKED
from exporter.artifact import MANIFEST, Artifact, open_artifact
from exporter.errors import ArtifactError, RecipeError
from exporter.pruners import PRUNERS, pruner
from exporter.quantizing.options import QuantizeOptions
from exporter.recipe import Recipe
from exporter.report.formatting import count, plural, printable, quantity
from exporter.tuning import TUNERS, tuner
from exporter.validation import flat, hint, one_of, options_schema

_WIDTH = 120
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
_METHODS: Mapping[str, tuple[Mapping[str, str], Callable[[str], Any]]] = MappingProxyType(
    {"prune": (PRUNERS, pruner), "tune": (TUNERS, tuner)}
)
_SCALED = ("size_bytes", "parameters")
"""Facts whose numbers are read in thousands and millions."""


@dataclass(frozen=True)
class Shown:
    """The same facts twice: as data and as text."""

    data: Any
    text: str


def inspect_folder(folder: Path) -> Shown:
    """Hash every file of an artifact, or of all artifacts of a run, and describe them.

    Raises:
        ArtifactError: a file is missing or changed, or there is nothing to inspect.
    """
    if (folder / MANIFEST).is_file():
        found = [open_artifact(folder)]
    else:
        kept = sorted(folder.glob(f"states/*/{MANIFEST}")) + sorted(folder.glob(f"engines/*/*/{MANIFEST}"))
        found = [open_artifact(path.parent) for path in kept]
    if not found:
        msg = f"{folder}: nothing to inspect; expected a state, an engine, or the folder of a run. Check the path."
        raise ArtifactError(msg)
    return Shown([_data(item) for item in found], "\n\n".join(_text(item) for item in found))


def target_rows() -> list[dict[str, Any]]:
    """Return one row per target type: what this machine offers."""
    rows = []
    for name in targets.TARGETS:
        here = targets.target(name).capabilities()
        state = "ready" if here.runs else "builds only" if here.available else "missing"
        place = f" on {here.device}" if here.device else ""
        detail = f"{here.version}{place}, {' '.join(here.precisions)}" if here.available else ""
        if here.reason:
            detail = f"{detail}; {here.reason}" if detail else f"{here.reason} Run: {here.install}"
        rows.append({"type": name, "state": state, "detail": detail, **dataclasses.asdict(here)})
    return rows


def method_rows() -> list[dict[str, Any]]:
    """Return one row per pruning and tuning method: its summary and options with defaults."""
    rows = []
    for stage, (registry, load) in _METHODS.items():
        for name in registry:
            cls = load(name)
            summary = (inspect.getdoc(cls) or "").partition("\n")[0]
            kinds = get_type_hints(cls.options)
            options = ", ".join(_option(field, kinds[field.name]) for field in dataclasses.fields(cls.options))
            rows.append({"stage": stage, "method": name, "summary": summary, "options": options})
    kinds = get_type_hints(QuantizeOptions)
    own = [field for field in dataclasses.fields(QuantizeOptions) if field.name != "scheme"]
    options = ", ".join(_option(field, kinds[field.name]) for field in own)
    schemes = {name: f"{ASKED[name]}." for name in get_args(kinds["scheme"])}
    return rows + [
        {"stage": "quantize", "method": name, "summary": text, "options": options} for name, text in schemes.items()
    ]


def method_options(name: str) -> dict[str, Any]:
    """Return what a method is and what each of its options means, as JSON Schema has it.

    Raises:
        RecipeError: there is no such method.
    """
    schemes = get_args(get_type_hints(QuantizeOptions)["scheme"])
    if name in schemes:
        text = f"{name}: {ASKED[name]}.\n\n{inspect.getdoc(exporter.quantizing)}"
        return {"method": name, "text": text, "options": options_schema(QuantizeOptions)}
    known = [*PRUNERS, *TUNERS, *schemes]
    if name not in known:
        raise RecipeError(f"pruners: got '{name}', expected {one_of(known)}.{hint(name, known)}")
    cls = pruner(name) if name in PRUNERS else tuner(name)
    text = inspect.getdoc(inspect.getmodule(cls)) or ""
    return {"method": name, "text": text, "options": options_schema(cls.options)}


def method_text(found: Mapping[str, Any]) -> str:
    """Return what `method_options` found as text: what the method is, then an entry per option."""
    return "\n".join([found["text"], "", *_entries(found["options"], "")])


def _entries(options: Mapping[str, Any], prefix: str) -> list[str]:
    lines = []
    for name, about in options.get("properties", {}).items():
        lines.append(f"{prefix}{name}: {_kind(about)}{' (required)' if name in options.get('required', []) else ''}")
        lines.append(textwrap.indent(textwrap.fill(about.get("description", ""), _WIDTH - 4), "    "))
        lines += _entries(about, f"{prefix}{name}.")
    return lines


def _kind(about: Mapping[str, Any]) -> str:
    """Return the type, limits and default of an option."""
    kinds = about.get("anyOf", [about])
    words = [
        " | ".join(json.dumps(value) for value in kind["enum"]) if "enum" in kind else str(kind.get("type", "any"))
        for kind in kinds
    ]
    limits = [f"{told} {about[key]:g}" for key, told in _LIMITS.items() if key in about]
    default = [f"default {json.dumps(about['default'])}"] if "default" in about else []
    return ", ".join([" | ".join(words), *limits, *default])


def schema_of(kind: str) -> dict[str, Any]:
    """Return the JSON Schema of ``recipe`` (with the options of every method and target) or ``report``."""
    if kind == "report":
        from exporter.report.writing import schema

        return schema()
    if kind != "recipe":
        msg = f"schema: got '{kind}', expected recipe | report."
        raise RecipeError(msg)
    found = Recipe.model_json_schema()
    definitions = found["$defs"]
    for stage, (registry, load) in _METHODS.items():
        choices = []
        for name in registry:
            options = options_schema(load(name).options)
            options["properties"] = {"method": {"const": name}, **options.get("properties", {})}
            options["required"] = ["method", *options.get("required", [])]
            choices.append(options)
        definitions["StageSpec"]["properties"][stage] = {"oneOf": choices}
    definitions["StageSpec"]["properties"]["quantize"] = options_schema(QuantizeOptions)
    variants = []
    for name in targets.TARGETS:
        options = options_schema(targets.target(name).options)
        options["properties"] = {"type": {"const": name}, **options.get("properties", {})}
        options["required"] = ["type", *options.get("required", [])]
        variants.append(options)
    definitions["TargetSpec"] = {"oneOf": variants, "description": "A named column: a target type and its options."}
    return found


def _option(field: Any, kind: Any) -> str:
    """Return ``cut=channels|blocks``, the default first; ``keep_ratio (required)`` where there is none."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return f"{field.name} (required)"
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    others = [value for value in get_args(kind) if get_origin(kind) is Literal and value != default]
    if dataclasses.is_dataclass(default):
        return f"{field.name}={{{', '.join(inner.name for inner in dataclasses.fields(default))}}}"
    shown = list(default) if isinstance(default, tuple) else default
    return f"{field.name}={'|'.join(str(value) for value in (shown, *others))}"


def _data(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "path": str(artifact.path),
        "kind": manifest.kind,
        "name": manifest.name,
        "digest": manifest.digest,
        "parent": manifest.parent,
        "files": len(manifest.files),
        "bytes": sum(fact.size for fact in manifest.files.values()),
        "facts": manifest.facts,
        "made": manifest.made,
        "intact": True,
    }


def _text(artifact: Artifact) -> str:
    manifest, facts = artifact.manifest, dict(artifact.manifest.facts)
    size = sum(fact.size for fact in manifest.files.values())
    title = f"{manifest.kind} {manifest.name}"
    if manifest.kind == "engine" and "state" in facts:
        title = f"engine of {facts['state']} for {manifest.name}"
    inner = facts.pop("facts", {})
    rows = {"folder": str(artifact.path), "digest": manifest.digest, "parent": manifest.parent, **facts, **inner}
    rows |= {"made with": manifest.made} if manifest.made else {}
    lines = [f"{title}: intact, {plural(len(manifest.files), 'file')}, {quantity(size, 'bytes')}"]
    for name, value in rows.items():
        first, rest = f"  {name.replace('_', ' '):<16} ", " " * 19
        lines += textwrap.wrap(
            _words(name, value), _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False
        )
    return "\n".join(lines)


def _words(name: str, value: Any) -> str:
    """Return a value of a manifest for people: no quotes, no brackets, numbers with their units."""
    if isinstance(value, Mapping):
        parts = [
            f"{key}: {_words(key, inner)}" if isinstance(inner, Mapping) else f"{key} {_words(name, inner)}"
            for key, inner in value.items()
        ]
        return ", ".join(parts) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_words(name, item) for item in value) or "none"
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name in _SCALED:
        return quantity(value, "bytes") if name == "size_bytes" else count(value)
    return f"{value:.6g}" if isinstance(value, float) else flat(printable(value))

"""The surgery record: what was changed in one network, in three verbs, as data; JSON in and out, and composition.

Paths and numbers in a record are those of the edited network; only the entries of `keep` number the original list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from exporter.errors import ArtifactError
from exporter.networks.standins import KINDS

FORMAT = 1

ATTRIBUTES: Mapping[str, str] = {
    "attention_head_dim": "int",
    "channels": "int",
    "cross_attention_dim": "int",
    "dim": "int",
    "embed_dim": "int",
    "embedding_dim": "int",
    "groups": "int",
    "head_dim": "int",
    "heads": "int",
    "in_channels": "int",
    "in_features": "int",
    "inner_dim": "int",
    "inner_kv_dim": "int",
    "normalized_shape": "ints",
    "num_attention_heads": "int",
    "num_channels": "int",
    "num_embeddings": "int",
    "num_groups": "int",
    "num_heads": "int",
    "num_upsamplers": "int",
    "out_channels": "int",
    "out_context_dim": "int",
    "out_dim": "int",
    "out_features": "int",
    "query_dim": "int",
    "scale": "float",
    "sliceable_head_dim": "int",
}
"""The scalar attributes that follow a change of width, and what they hold. Nothing else may be set from a record."""

MAX_BYTES = 4 * 1024 * 1024
MAX_ENTRIES = 20_000
MAX_DIMENSION = 2**20
MAX_ELEMENTS = 2**34
MAX_RANK = 5
MAX_LIST = 4096
MAX_PATH = 256
MAX_WIDTH = 2**16
MAX_SCALE = 1e6

_RESTORE = "Restore the original file."

_PATH = re.compile(r"(?!.*__)[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*\Z")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

Scalar = int | float | tuple[int, ...]
Shape = tuple[int, ...] | None


@dataclass(frozen=True)
class StandIn:
    """One module replaced.

    Attributes:
        kind: one of `exporter.networks.standins.KINDS`.
        positions: for ``gather``, the places its outputs go to; empty for every other kind.
        width: for ``gather`` and for a ``zero`` in the place of a linear layer, the size of the last axis; else 0.
    """

    kind: str
    positions: tuple[int, ...] = ()
    width: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON data."""
        data: dict[str, Any] = {"kind": self.kind}
        if self.positions:
            data["positions"] = list(self.positions)
        if self.width:
            data["width"] = self.width
        return data


@dataclass(frozen=True)
class Resize:
    """Parameters and attributes of one module that no longer have their original size.

    Attributes:
        parameters: name to new shape; None where the parameter is gone.
        attributes: name (a key of `ATTRIBUTES`) to new value.
    """

    parameters: Mapping[str, Shape] = field(default_factory=dict)
    attributes: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Surgery:
    """The structural edits of one network.

    Attributes:
        keep: path of a list to the original indices that stay, in order; a repeated index is a copy with weights of
            its own.
        stand_in: path to what took the module's place.
        resize: path to changed shapes and attributes; the path of the network itself is the empty string.
    """

    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stand_in: Mapping[str, StandIn] = field(default_factory=dict)
    resize: Mapping[str, Resize] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """True where nothing was edited."""
        return not (self.keep or self.stand_in or self.resize)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON data with sorted keys; `from_json` gives it back."""
        stand_ins = {path: entry.to_json() for path, entry in sorted(self.stand_in.items())}
        resizes = {
            path: {
                "attributes": {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(r.attributes.items())},
                "parameters": {k: None if v is None else list(v) for k, v in sorted(r.parameters.items())},
            }
            for path, r in sorted(self.resize.items())
        }
        keeps = {path: list(kept) for path, kept in sorted(self.keep.items())}
        return {"format": FORMAT, "keep": keeps, "resize": resizes, "stand_in": stand_ins}

    @classmethod
    def from_json(cls, obj: object, *, place: str = "surgery.json") -> Surgery:
        """Return the record that JSON data holds; nothing in it is trusted.

        Args:
            obj: what `json.loads` gave.
            place: where it was read, for messages.

        Raises:
            ArtifactError: it is not a record that `to_json` could have written.
        """
        top = _mapping(obj, place, {"format", "keep", "resize", "stand_in"})
        if type(top["format"]) is not int or top["format"] != FORMAT:
            raise ArtifactError(
                f"{place}: format: a record of another version; got {_short(top['format'])}, expected {FORMAT}. "
                "Load it with the version that wrote it."
            )
        keep = {
            path: tuple(_integers(value, f"{place}: keep.{path}", low=0, high=MAX_LIST))
            for path, value in _paths(top["keep"], f"{place}: keep")
        }
        stand_in = {
            path: _stand_in(value, f"{place}: stand_in.{path}")
            for path, value in _paths(top["stand_in"], f"{place}: stand_in")
        }
        resize = {
            path: _resize(value, f"{place}: resize.{path}")
            for path, value in _paths(top["resize"], f"{place}: resize", root=True)
        }
        return cls(keep, stand_in, resize)

    def then(self, other: Surgery) -> Surgery:
        """Return one record equal to this one followed by `other`.

        `other` was taken on the network that this record leads to. Its copies repeat what this record did inside them;
        what it dropped or replaced takes the entries below it along.
        """
        keep = {final: kept for path, kept in self.keep.items() for final in other.final_paths(path)}
        for path, kept in other.keep.items():
            keep[path] = tuple(keep[path][i] for i in kept) if path in keep else kept
        stand_in = {final: entry for path, entry in self.stand_in.items() for final in other.final_paths(path)}
        resize = {final: entry for path, entry in self.resize.items() for final in other.final_paths(path)}
        for path, later in other.resize.items():
            earlier_resize = resize.get(path, Resize())
            resize[path] = Resize(
                {**earlier_resize.parameters, **later.parameters}, {**earlier_resize.attributes, **later.attributes}
            )
        return Surgery(keep, {**stand_in, **other.stand_in}, resize)

    def final_paths(self, path: str) -> Iterator[str]:
        """Yield where a module of the network before this record is after it: nowhere, once, or once per copy.

        Args:
            path: numbered as before this record.
        """
        found: list[str] = [""]
        for part in path.split(".") if path else []:
            step: list[str] = []
            for prefix in found:
                kept = self.keep.get(prefix)
                numbers = [part] if kept is None else [str(i) for i, n in enumerate(kept) if str(n) == part]
                step += [f"{prefix}.{number}" if prefix else number for number in numbers]
            found = [final for final in step if final not in self.stand_in]
        yield from found


def _short(value: object) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, int) and abs(value) > 2**63:  # str() of a huge integer is refused by Python itself
        return "a huge integer"
    return repr(value) if isinstance(value, int | float | None) else type(value).__name__


def _mapping(value: object, place: str, keys: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ArtifactError(f"{place}: not a mapping; got {_short(value)}, expected a JSON object. {_RESTORE}")
    if keys is not None and set(value) != keys:
        raise ArtifactError(
            f"{place}: wrong keys; got {_short(', '.join(sorted(value)))}, expected {', '.join(sorted(keys))}. "
            f"{_RESTORE}"
        )
    return value


def _paths(value: object, place: str, *, root: bool = False) -> Iterator[tuple[str, Any]]:
    entries = _mapping(value, place)
    if len(entries) > MAX_ENTRIES:
        raise ArtifactError(f"{place}: too many entries; got {len(entries)}, expected at most {MAX_ENTRIES}.")
    for path, entry in entries.items():
        valid = len(path) <= MAX_PATH and (_PATH.match(path) or (root and not path))
        if not valid:
            raise ArtifactError(
                f"{place}: not a module path; got {_short(path)}, expected names joined by dots. {_RESTORE}"
            )
        yield path, entry


def _integers(value: object, place: str, *, low: int, high: int, most: int = MAX_LIST) -> list[int]:
    if not isinstance(value, list) or len(value) > most or not all(type(x) is int and low <= x <= high for x in value):
        raise ArtifactError(
            f"{place}: not a list of bounded integers; got {_short(value)}, expected at most {most} integers "
            f"from {low} to {high}. {_RESTORE}"
        )
    return value


def _stand_in(value: object, place: str) -> StandIn:
    entry = _mapping(value, place)
    kind, width = entry.get("kind"), entry.get("width", 0)
    expected = {"gather": ({"kind", "positions", "width"},), "zero": ({"kind"}, {"kind", "width"})}
    if not isinstance(kind, str) or kind not in KINDS or set(entry) not in expected.get(kind, ({"kind"},)):
        raise ArtifactError(
            f"{place}: unknown stand-in; got kind {_short(kind)} with keys {_short(', '.join(sorted(entry)))}, "
            f"expected one of {', '.join(KINDS)} ('positions' and 'width' beside gather only). {_RESTORE}"
        )
    if "width" in entry and not (type(width) is int and 1 <= width <= MAX_WIDTH):
        raise ArtifactError(f"{place}.width: out of range; got {_short(width)}, expected 1 to {MAX_WIDTH}. {_RESTORE}")
    positions = _integers(entry.get("positions", []), f"{place}.positions", low=0, high=MAX_WIDTH - 1, most=MAX_WIDTH)
    if kind == "gather" and (not positions or positions != sorted(set(positions)) or positions[-1] >= width):
        raise ArtifactError(
            f"{place}.positions: not places of the answer; got {len(positions)} entries, expected at least one, "
            f"ascending, without repeats, below the width {width}. {_RESTORE}"
        )
    return StandIn(kind, tuple(positions), width)


def _resize(value: object, place: str) -> Resize:
    entry = _mapping(value, place, {"attributes", "parameters"})
    parameters: dict[str, Shape] = {}
    for name, shape in _mapping(entry["parameters"], f"{place}.parameters").items():
        if len(name) > MAX_PATH or not _NAME.match(name):
            raise ArtifactError(f"{place}.parameters: not a parameter name; got {_short(name)}. {_RESTORE}")
        parameters[name] = None if shape is None else _shape(shape, f"{place}.parameters.{name}")
    attributes = {
        name: _attribute(name, raw, f"{place}.attributes")
        for name, raw in _mapping(entry["attributes"], f"{place}.attributes").items()
    }
    if not parameters and not attributes:
        raise ArtifactError(f"{place}: an empty entry; expected at least one parameter or attribute. {_RESTORE}")
    return Resize(parameters, attributes)


def _shape(value: object, place: str) -> tuple[int, ...]:
    shape = tuple(_integers(value, place, low=1, high=MAX_DIMENSION, most=MAX_RANK))
    elements = 1
    for size in shape:
        elements *= size
    if elements > MAX_ELEMENTS:
        raise ArtifactError(f"{place}: too large; got {elements} elements, expected at most {MAX_ELEMENTS}.")
    return shape


def _attribute(name: str, value: object, place: str) -> Scalar:
    kind = ATTRIBUTES.get(name)
    if kind is None:
        raise ArtifactError(
            f"{place}: an attribute that a record may not set; got {_short(name)}, expected one of "
            f"{', '.join(sorted(ATTRIBUTES))}. {_RESTORE}"
        )
    if kind == "ints":
        return _shape(value, f"{place}.{name}")
    if kind == "float":
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_SCALE:
            return float(value)
    elif type(value) is int and 1 <= value <= MAX_DIMENSION:
        return value
    elif name == "num_upsamplers" and value == 0 and type(value) is int:
        return 0
    raise ArtifactError(
        f"{place}.{name}: out of range; got {_short(value)}, expected a positive {kind} up to {MAX_DIMENSION}. "
        f"{_RESTORE}"
    )

"""``coreml.json``: what lies beside the packages of a component, so that they can be called, chained, looked into."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from targets.base import Array, TargetError

MANIFEST = "coreml.json"
PACKAGE = "model.mlpackage"
DIGEST = "exporter.weights_sha256"
"""Key of a package's metadata: whose weights it holds."""
_FORMAT = 1
FORMS = ("as it is", "channels first", "for each row", "as floats")
"""How a package takes an input: as callers give it, scalars in one axis; text states (rows, tokens, width) as (rows,
width, 1, tokens); one number once for every row; integers as floats."""


@dataclass(frozen=True)
class Port:
    """An input or output.

    Attributes:
        name: as callers know it.
        inside: as the packages call it.
        dtype: numpy's name of the element type.
        shape: of the caller's arrays; Core ML has no scalars, where packages take one number in one axis.
        shapes: further shapes that it may have.
        form: how the packages take it, one of `FORMS`.
    """

    name: str
    inside: str
    dtype: str
    shape: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    form: str = "as it is"

    def taken(self, array: Array, rows: int) -> Array:
        """Return a caller's array as the packages take it.

        Args:
            array: of a shape of the port.
            rows: of the other inputs, for a number that is wanted once for each.
        """
        if self.form == "channels first":
            return np.ascontiguousarray(array.transpose(0, 2, 1)[:, :, None])
        if self.form == "for each row":
            return np.repeat(array.reshape(1), rows)
        return np.ascontiguousarray(np.atleast_1d(array), np.float32 if self.form == "as floats" else None)


@dataclass(frozen=True)
class Manifest:
    """The packages of one component.

    Attributes:
        component: its name.
        deployment: the oldest system that runs them.
        packages: folders, in the order in which they are called; each takes inputs of the component and results of
            those before it.
        inputs: of the component.
        outputs: of the component.
        digest: of the weights that were converted.
        modules: operation of the programs -> path of the torch module that it came from.
        kept_in_float: operations in 32 bits -> the largest magnitude recorded there.
        weights: what became of each weight, and bytes; empty where none was compressed.
    """

    component: str
    deployment: str
    packages: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    digest: str
    modules: Mapping[str, str] = field(default_factory=dict)
    kept_in_float: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it into the folder of the packages."""
        content = {"format": _FORMAT, **asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read what `write` wrote.

        Raises:
            TargetError: it is missing, damaged or of another version, or names a package outside of its folder.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = content.pop("format")
            for ports in ("inputs", "outputs"):
                content[ports] = tuple(_port(entry) for entry in content[ports])
            found = cls(**{**content, "packages": tuple(content["packages"])})
            sound = known == _FORMAT and all(Path(name).name == name for name in found.packages) and found.packages
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TargetError(
                f"target coreml: {path}: not the list of a model's packages; got: {error}. Compile it again."
            ) from error
        if not sound:
            raise TargetError(
                f"target coreml: {path}: of another version, or packages elsewhere; got format {known} and "
                f"{list(found.packages)}, expected format {_FORMAT} and plain names. Compile it again."
            )
        return found


def _port(entry: Mapping[str, Any]) -> Port:
    return Port(**{**entry, "shape": tuple(entry["shape"]), "shapes": tuple(tuple(shape) for shape in entry["shapes"])})

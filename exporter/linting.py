"""What `lint` shows: what in saved Core ML packages speaks against the Neural Engine, and where two of them part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.errors import ArtifactError, ComponentFailed, ToolMissing
from exporter.report.formatting import plural
from targets.base import Array, TargetError, TargetMissing
from targets.coreml.lint import lint
from targets.coreml.package import MANIFEST, Manifest
from targets.mil.package import Package, read_package
from targets.placement import Placement

if TYPE_CHECKING:
    from targets.mil.compare import Divergence

CLOSING = (
    "A lint certifies nothing: Core ML decides on the device where an operation runs, and only its compute plan, on a "
    "Mac, tells."
)
_SEED = 0
_TOKENS = 1000
"""Token ids are below this, and below the length of every table that the program looks into."""


@dataclass(frozen=True)
class _Part:
    """Packages of one component, in the order in which they are called."""

    name: str
    packages: tuple[Path, ...]
    modules: Mapping[str, str]


@dataclass(frozen=True)
class Linted:
    """What was found of one component.

    Attributes:
        component: its name; of a bare package that of the folder.
        packages: paths.
        placement: what speaks against the Neural Engine.
        diverges: the first operation that computes something else than the other engine's; None where none does.
    """

    component: str
    packages: tuple[Path, ...]
    placement: Placement
    diverges: Divergence | None = None


@dataclass(frozen=True)
class Report:
    """What was found of all components, and what they were compared with."""

    found: tuple[Linted, ...]
    against: Path | None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"components": [self._entry(item) for item in self.found], "note": CLOSING}

    def text(self) -> str:
        """Return it to be read."""
        return "\n\n".join([*("\n".join(self._lines(item)) for item in self.found), CLOSING])

    def _entry(self, item: Linted) -> dict[str, Any]:
        placed = item.placement
        entry: dict[str, Any] = {
            "component": item.component,
            "packages": [str(path) for path in item.packages],
            "operations": placed.operations,
            "at_risk": placed.risky,
            "findings": [asdict(finding) for finding in placed.findings],
        }
        if self.against is not None:
            told = None if item.diverges is None else asdict(item.diverges)
            if told is not None and not np.isfinite(told["error"]):
                told["error"] = None  # JSON has no infinity
            entry |= {"against": str(self.against), "diverges": told}
        return entry

    def _lines(self, item: Linted) -> Iterator[str]:
        placed = item.placement
        yield (
            f"{item.component}: {placed.risky} of {plural(placed.operations, 'operation')} at risk on the "
            f"{placed.device}"
        )
        for finding in placed.findings:
            yield f"  {finding.rule} ({finding.strength}): {plural(finding.count, 'operation')}"
            yield f"    source: {finding.source}"
            yield f"    fix: {finding.fix}"
            more = finding.count - len(finding.examples)
            yield f"    {'; '.join(finding.examples)}{f'; and {more} more' if more else ''}"
        if self.against is not None:
            yield f"  {_told(item.diverges)} ({self.against}, same random inputs)"


def lint_place(place: Path, against: Path | None = None) -> Report:
    """Look through packages, and compare them with others of the same components.

    Args:
        place: an engine's folder, a component's folder in it, or a bare package.
        against: likewise, of the same components: converted again, or of another run.

    Raises:
        ArtifactError: no packages there, or other components.
        ToolMissing: what reads or evaluates packages is not installed.
        ComponentFailed: a package is damaged, or cannot be evaluated.
    """
    parts = _parts(place)
    others = _paired(parts, against) if against is not None else {}
    found = []
    with _sentences():
        for part in parts:
            placement = lint([read_package(path) for path in part.packages], part.modules)
            diverges = _compared(part, others[part.name]) if part.name in others else None
            found.append(Linted(part.name, part.packages, placement, diverges))
    return Report(tuple(found), against)


def _told(found: Divergence | None) -> str:
    if found is None:
        return "no operation diverges"
    module = f", {found.module}" if found.module else ""
    return f"first diverging: {found.name} ({found.type}{module}): error {found.error:.3g}, {found.told}"


def _parts(place: Path) -> list[_Part]:
    if (place / "Manifest.json").is_file():
        return [_Part(place.name, (place,), {})]
    listed = [place / MANIFEST] if (place / MANIFEST).is_file() else sorted(place.glob(f"*/{MANIFEST}"))
    if not listed:
        raise ArtifactError(
            f"{place}: got no {MANIFEST}, expected an engine of the target coreml, a component's folder in it, or a "
            "folder *.mlpackage. Check the path."
        )
    with _sentences():
        read = [(path.parent, Manifest.read(path)) for path in listed]
    return [_Part(told.component, tuple(at / name for name in told.packages), told.modules) for at, told in read]


def _paired(parts: list[_Part], against: Path) -> dict[str, _Part]:
    """Return component -> the same of the other place; two that stand alone need not be called alike."""
    others = {part.name: part for part in _parts(against)}
    if len(parts) == len(others) == 1:
        return {parts[0].name: next(iter(others.values()))}
    missing = [part.name for part in parts if part.name not in others]
    if missing:
        raise ArtifactError(
            f"{against}: got {', '.join(others)}, expected {missing[0]} too. Name an engine of the same components."
        )
    return {part.name: others[part.name] for part in parts}


def _compared(part: _Part, other: _Part) -> Divergence | None:
    """Return the first operation of a component that does something else than the other's, on the same inputs."""
    if len(part.packages) != len(other.packages):
        raise ArtifactError(
            f"{part.name}: got {plural(len(part.packages), 'package')} and {len(other.packages)}, expected as many. "
            "Compare engines of the same option chunks."
        )
    from targets.mil.evaluator import Evaluator, first_divergence

    rng, values = np.random.default_rng(_SEED), dict[str, Array]()
    for own, sound in zip(part.packages, other.packages, strict=True):
        reference, suspect = Evaluator(sound), Evaluator(own, modules=part.modules)
        values |= {name: array for name, array in _random(reference.package, rng).items() if name not in values}
        fed = {spec.name: values[spec.name] for spec in reference.inputs}
        found = first_divergence(reference, suspect, fed)
        if found is None:
            values |= reference(fed)
        reference.close()
        suspect.close()
        if found is not None:
            return found
    return None


def _random(package: Package, rng: np.random.Generator) -> dict[str, Array]:
    """Return inputs of a program: normal numbers, tokens that its tables have, and masks that leave everything."""
    tables = [operation.inputs.get("x") for operation in package.operations if operation.type == "gather"]
    rows = [table.shape[0] for table in map(_constant_of(package), tables) if table is not None and table.shape]
    found: dict[str, Array] = {}
    for feature in package.inputs:
        spec = feature.spec
        shape = feature.shapes[0] if feature.shapes else tuple(max(1, size) for size in spec.shape)
        if spec.name.endswith("mask"):
            found[spec.name] = np.ones(shape, spec.dtype)
        elif spec.dtype.startswith("float"):
            found[spec.name] = rng.normal(size=shape).astype(spec.dtype)
        else:
            found[spec.name] = rng.integers(0, min([_TOKENS, *rows]), shape).astype(spec.dtype)
    return found


def _constant_of(package: Package) -> Any:
    def constant(given: Any) -> Any:
        return package.constants.get(given[0]) if isinstance(given, tuple) else given

    return constant


@contextmanager
def _sentences() -> Iterator[None]:
    """Turn what goes wrong with packages into our own errors."""
    try:
        yield
    except TargetMissing as error:
        raise ToolMissing(str(error)) from error
    except TargetError as error:
        raise ComponentFailed(str(error)) from error

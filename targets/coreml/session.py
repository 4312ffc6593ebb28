"""Packages of a component as a session: called in turn, by Core ML where there is one, else by our evaluator."""

from __future__ import annotations

import platform
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from targets.base import (
    Array,
    Evidence,
    Layer,
    TargetError,
    TensorSpec,
    Timed,
    check_feeds,
    installed_version,
)
from targets.coreml import PLACE
from targets.coreml.device import OnDevice
from targets.coreml.lint import lint
from targets.coreml.package import DIGEST, Manifest, Port
from targets.mil.package import read_package

if TYPE_CHECKING:
    from targets.coreml import CoreMlOptions
    from targets.mil.package import Package


class _Runner(Protocol):
    """One package, loaded."""

    package: Package
    inputs: tuple[str, ...]

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]: ...

    def layers(self) -> tuple[Layer, ...]: ...

    def notes(self) -> tuple[str, ...]: ...

    def profile(self, feeds: Mapping[str, Array], calls: int) -> tuple[Timed, ...]: ...

    def close(self) -> None: ...


class CoreMlSession:
    """The packages that a ``coreml.json`` lists.

    Args:
        path: of that file.
        options: what may run them.
        core_ml: run them with Core ML; False evaluates them.

    Raises:
        TargetError: a package is damaged, of another state, or not what the list says.
    """

    def __init__(self, path: Path, options: CoreMlOptions, *, core_ml: bool) -> None:
        self._path, self._options, self._core_ml = path, options, core_ml
        self._lock = threading.Lock()
        self._manifest = manifest = Manifest.read(path)
        self.inputs = tuple(_spec(port) for port in manifest.inputs)
        self.outputs = tuple(_spec(port) for port in manifest.outputs)
        self._ports = {port.name: port for port in manifest.inputs}
        self._runners: tuple[_Runner, ...] | None = tuple(
            _loaded(path.parent / name, manifest, options, core_ml=core_ml) for name in manifest.packages
        )

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once: every package in turn, on the inputs and what those before it answered."""
        check_feeds(self.inputs, feeds, f"{PLACE}: {self._path}")
        with self._lock:
            values = self._inside(feeds)
            for runner in self._open():
                values |= runner({name: values[name] for name in runner.inputs})
        place = f"{PLACE}: {self._path}"
        return {port.name: _outside(values[port.inside], port, place) for port in self._manifest.outputs}

    def evidence(self) -> Evidence:
        """Return the operations of the programs with the types that they declare, and what became of weights.

        Devices are those of Core ML's compute plan, where it runs here.
        """
        with self._lock:
            runners = self._open()
            layers = tuple(layer for runner in runners for layer in runner.layers())
            told = [(name, runner.notes()) for name, runner in zip(self._manifest.packages, runners, strict=True)]
        runtime = f"coremltools {installed_version('coremltools')}"
        how = "evaluated with torch, not Core ML"
        if self._core_ml:
            runtime = f"Core ML of macOS {platform.mac_ver()[0]}, {runtime}"
            how = f"Core ML, units: {self._options.compute_units}"
        notes = [f"for {self._manifest.deployment} and newer; {how}"]
        notes += [f"{name}: {note}" if len(told) > 1 else note for name, said in told for note in said]
        if self._manifest.kept_in_float:
            kept = ", ".join(f"{name} ({value:.4g})" for name, value in list(self._manifest.kept_in_float.items())[:5])
            notes.append(f"kept in 32 bits, since they overflow 16: {len(self._manifest.kept_in_float)}: {kept}")
        notes += weight_notes(self._manifest.weights)
        placement = lint([runner.package for runner in runners], self._manifest.modules)
        return Evidence(runtime, how, self._options.precision, layers, tuple(notes), placement=placement)

    def profile(self, feeds: Mapping[str, Array], calls: int) -> tuple[Timed, ...]:
        """Return what every operation takes here.

        Core ML times no operation: the time of whole calls is shared out by its own estimate, and operations without
        one are left out. What the evaluator takes says nothing of a device.
        """
        check_feeds(self.inputs, feeds, f"{PLACE}: {self._path}")
        found: list[Timed] = []
        with self._lock:
            values = self._inside(feeds)
            for runner in self._open():
                fed = {name: values[name] for name in runner.inputs}
                found += runner.profile(fed, calls)
                values |= runner(fed)
        return tuple(found)

    def close(self) -> None:
        """Free the packages."""
        with self._lock:
            for runner in self._runners or ():
                runner.close()
            self._runners = None

    def _open(self) -> tuple[_Runner, ...]:
        if self._runners is None:
            raise TargetError(f"{PLACE}: {self._path}: the session is closed. Open the engine again.")
        return self._runners

    def _inside(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        rows = max(array.shape[0] for array in feeds.values() if array.ndim)
        return {self._ports[name].inside: self._ports[name].taken(array, rows) for name, array in feeds.items()}


class _Evaluated:
    """A package that our evaluator computes."""

    def __init__(self, path: Path, manifest: Manifest, threads: int | None) -> None:
        from targets.mil.evaluator import Evaluator

        self._evaluator = Evaluator(path, threads=threads, modules=manifest.modules)
        self.package = self._evaluator.package
        self.inputs = tuple(spec.name for spec in self._evaluator.inputs)

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        return self._evaluator(feeds)

    def layers(self) -> tuple[Layer, ...]:
        return self._evaluator.evidence().layers

    def notes(self) -> tuple[str, ...]:
        return ("types are those that the program declares; where a device places an operation is not known",)

    def profile(self, feeds: Mapping[str, Array], calls: int) -> tuple[Timed, ...]:
        return tuple(self._evaluator.profile(feeds, calls))

    def close(self) -> None:
        self._evaluator.close()


def _loaded(path: Path, manifest: Manifest, options: CoreMlOptions, *, core_ml: bool) -> _Runner:
    package = read_package(path)
    held = package.metadata.get(DIGEST, "")
    if held != manifest.digest:
        raise TargetError(
            f"{PLACE}: {path}: a package of another state; got one made from weights {held[:12] or 'unnamed'}, "
            f"expected {manifest.digest[:12]}. Put back the package that was compiled, or compile again."
        )
    if core_ml:
        return OnDevice(package, manifest.modules, options.compute_units)
    return _Evaluated(path, manifest, options.threads)


def weight_notes(told: Mapping[str, Any]) -> list[str]:
    """Return what became of the weights, in sentences; what was left and why, the commonest reasons first."""
    if not told:
        return []
    before, after = told["bytes"]
    forms = ", ".join(f"{form} {count}" for form, count in sorted(told["became"].items(), key=lambda item: -item[1]))
    reasons = Counter(told["left"].values()).most_common(3)
    left = "; ".join(f"{count} because {why}" for why, count in reasons)
    found = [f"weights as {told['asked']}: stored are {forms}; {after / before:.3f} of the bytes in floating point"]
    return [*found, f"of these, otherwise than asked: {left}"] if left else found


def _spec(port: Port) -> TensorSpec:
    shape = port.shape
    if port.shapes:
        axes = zip(*(port.shape, *port.shapes), strict=True)
        shape = tuple(lengths[0] if len(set(lengths)) == 1 else -1 for lengths in axes)
    return TensorSpec(port.name, port.dtype, shape)


def _outside(value: Array, port: Port, place: str) -> Array:
    """Return an answer in the type and shape of its port; Core ML gives scalars an axis.

    Raises:
        TargetError: it has another shape.
    """
    found = np.asarray(value, dtype=port.dtype, order="C")
    if len(found.shape) == len(port.shape) and all(map(_fits, found.shape, port.shape)):
        return found
    if [length for length in found.shape if length != 1] == [length for length in port.shape if length != 1]:
        return found.reshape(port.shape)
    raise TargetError(
        f"{place}: output '{port.name}': got {found.shape}, expected {port.shape} (-1 is any size). Compile it again."
    )


def _fits(length: int, wanted: int) -> bool:
    return wanted in (-1, length)

"""Evaluates a saved ML Program with torch, operation by operation, in the types that it declares."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from targets.base import Array, Evidence, Layer, TargetError, Timed, check_feeds, check_threads
from targets.mil.compare import Divergence, first_divergence
from targets.mil.constants import PACKED_BITS, Constant
from targets.mil.in_place import softmax_in_place
from targets.mil.package import MAIN, Feature, Operation, Package, read_package
from targets.mil.plan import TORCH_TYPES, Constants, Step, build, free_after

__all__ = ["Divergence", "Evaluator", "first_divergence"]

DEVICE = "CPU (evaluated, not Core ML)"
_PLACE = "ML Program evaluator"
_SMALL = 16384
_NO_MODULES: Mapping[str, str] = MappingProxyType({})


class Evaluator:
    """A saved ML Program that torch evaluates; calls from several threads wait for each other.

    Attributes:
        package: what was read.
        inputs: as callers feed them.
        outputs: as calls answer them.
    """

    def __init__(
        self,
        package: Path,
        *,
        threads: int | None = None,
        function: str = MAIN,
        modules: Mapping[str, str] = _NO_MODULES,
    ) -> None:
        """Read the program, check its weights and plan the order of work; nothing is evaluated yet.

        Args:
            package: folder of the saved program.
            threads: of one call; None for torch's own choice.
            function: of the program.
            modules: name of an operation -> torch module that it comes from, for messages and reports.

        Raises:
            TargetMissing: the definition of the format is not installed.
            TargetError: a damaged package, or one with operations, states or types that we do not evaluate.
        """
        check_threads(threads, _PLACE)
        self.package: Package = read_package(package, function)
        self._refuse(self.package)
        self._path, self._threads, self._modules = package, threads, modules
        self.inputs = tuple(feature.spec for feature in self.package.inputs)
        self.outputs = tuple(feature.spec for feature in self.package.outputs)
        self._constants = Constants(self.package)
        self._steps: list[Step] = build(self.package, self._constants, modules)
        self._by_operation = {id(step.operation): step for step in self._steps}
        self._lock = threading.Lock()
        self._open = True
        self._folded: dict[str, Tensor] | None = None
        self._ready: dict[int, Tensor] = {}
        self._plan()

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Results are copies that no later call touches.

        Raises:
            TargetError: wrong feeds, an operation that does not compute, or a session that was closed.
        """
        with self._lock, self._running():
            values = self._fed(feeds) | self._fold()
            for step, frees in zip(self._runtime, self._runtime_frees, strict=True):
                self._run_sparing(step, values, frees)
            return self._answers(values)

    def values(
        self, feeds: Mapping[str, Array], wide: torch.dtype = torch.float32, *, rounds: bool = True
    ) -> Iterator[tuple[Operation, tuple[Tensor, ...]]]:
        """Run once, and give every operation with its results, in order; constants are no operations.

        Decompressions are evaluated anew here, so that theirs are among the results.

        Args:
            feeds: as for a call.
            wide: floats that every operation computes in, before its result is rounded to the declared type.
            rounds: round results to the declared type; without that, it is seen what does not fit into 16 bits.

        Raises:
            TargetError: as a call does.
        """
        with self._lock, self._running():
            values = self._fed(feeds)
        for step, frees in zip(self._steps, self._frees, strict=True):
            with self._lock, self._running():
                results = self._run(step, values, frees, wide, rounds=rounds)
            yield step.operation, results

    def apply(self, operation: Operation, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return one operation's results for given values of what it takes; its constants are this program's.

        Args:
            operation: of this evaluator's package.
            values: name in this program -> value.

        Raises:
            TargetError: it does not compute.
        """
        with self._lock, self._running():
            return tuple(self._by_operation[id(operation)].run(values, self._constant, torch.float32))

    def takes(self, operation: Operation) -> tuple[str, ...]:
        """Return the names of computed values that an operation of this evaluator's package takes."""
        return tuple(self._by_operation[id(operation)].takes())

    def module(self, operation: Operation) -> str:
        """Return the torch module that an operation comes from; empty where that is not known."""
        return self._modules.get(operation.name, "")

    def evidence(self) -> Evidence:
        """Return every operation with the type that the program declares for its result."""
        layers = tuple(self._layer(step.operation) for step in self._steps)
        floats = Counter(layer.precision for layer in layers if layer.precision in ("f16", "f32"))
        weights = Counter(item.dtype for item in self.package.constants.values() if item.file)
        return Evidence(
            runtime=f"our ML Program evaluator, torch {torch.__version__}",
            device=DEVICE,
            requested_precision=floats.most_common(1)[0][0] if floats else "unknown",
            layers=layers,
            notes=(
                f"function {self.package.function}, opset {self.package.opset} ({self.package.deployment} and later)",
                "precisions are those that the program declares; each result is computed in f32 and rounded to them",
                "its times say nothing about any device; which device a layer runs on is decided on the device",
                f"types of stored weights: {', '.join(f'{name} {count}' for name, count in weights.most_common())}",
            ),
        )

    def profile(self, feeds: Mapping[str, Array], calls: int) -> tuple[Timed, ...]:
        """Return what every operation takes here, in ms, the mean of calls; it says nothing about a device."""
        times = [0.0] * len(self._runtime)
        with self._lock, self._running():
            for call in range(calls + 1):  # the first one warms up
                values = self._fed(feeds) | self._fold()
                for index, (step, frees) in enumerate(zip(self._runtime, self._runtime_frees, strict=True)):
                    start = time.perf_counter()
                    self._run_sparing(step, values, frees)
                    times[index] += 1000 * (time.perf_counter() - start) / calls if call else 0.0
        layers = (self._layer(step.operation) for step in self._runtime)
        return tuple(Timed(layer, ms) for layer, ms in zip(layers, times, strict=True))

    def close(self) -> None:
        """Free weights and plan."""
        with self._lock:
            self._open = False
            self._steps, self._runtime, self._folding = [], list[Step](), list[Step]()
            self._by_operation, self._folded, self._ready = {}, None, {}

    @staticmethod
    def _refuse(package: Package) -> None:
        if package.states:
            msg = f"{package.path}: states that it keeps between calls; got {', '.join(package.states)}, expected none."
            raise TargetError(f"{msg} Convert the model with states as inputs and outputs.")
        for feature in (*package.inputs, *package.outputs):
            if feature.spec.dtype not in TORCH_TYPES:
                expected = ", ".join(TORCH_TYPES)
                msg = f"{package.path}: type of '{feature.spec.name}'; got {feature.spec.dtype}, expected {expected}."
                raise TargetError(f"{msg} Convert the model with tensors as inputs and outputs.")

    def _plan(self) -> None:
        """Divide the steps into what is done once and what every call does, and see when values can be freed."""
        outputs = [spec.name for spec in self.outputs]
        self._runtime = [step for step in self._steps if not step.folds]
        self._folding = [step for step in self._steps if step.folds]
        wanted = {name for step in self._runtime for name in step.takes()} | set(outputs)
        folded = {spec.name for step in self._folding for spec in step.operation.outputs}
        self._frees = free_after(self._steps, outputs)
        self._runtime_frees = free_after(self._runtime, {*outputs, *folded})
        self._folding_frees = free_after(self._folding, wanted)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Have torch compute without gradients, on the threads asked for."""
        if not self._open:
            raise TargetError(f"{_PLACE}: {self._path}: the session is closed. Open the package again.")
        before = torch.get_num_threads()
        if self._threads not in (None, before):
            torch.set_num_threads(int(self._threads or before))
        try:
            with torch.inference_mode():
                yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)

    def _fed(self, feeds: Mapping[str, Array]) -> dict[str, Tensor]:
        check_feeds(self.inputs, feeds, _PLACE)
        for feature in self.package.inputs:
            _check_shape(feature, feeds[feature.spec.name].shape)
        return {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}

    def _fold(self) -> dict[str, Tensor]:
        """Return what depends on constants only, decompressions above all; it is evaluated once."""
        if self._folded is None:
            values: dict[str, Tensor] = {}
            for step, frees in zip(self._folding, self._folding_frees, strict=True):
                self._run(step, values, frees)
            self._folded = values
        return self._folded

    def _run(
        self,
        step: Step,
        values: dict[str, Tensor],
        frees: tuple[str, ...],
        wide: torch.dtype = torch.float32,
        *,
        rounds: bool = True,
    ) -> tuple[Tensor, ...]:
        results = tuple(step.run(values, self._constant, wide, rounds=rounds))
        for spec, result in zip(step.operation.outputs, results, strict=True):
            values[spec.name] = result
        for name in frees:
            del values[name]
        return results

    def _run_sparing(self, step: Step, values: dict[str, Tensor], frees: tuple[str, ...]) -> None:
        """Run a step whose arguments nobody but us has: where it saves much memory, over them."""
        table = softmax_in_place(step, values, frees, torch.float32)
        if table is None:
            self._run(step, values, frees)
            return
        values[step.operation.outputs[0].name] = table
        for name in frees:
            del values[name]

    def _constant(self, constant: Constant) -> Tensor:
        """Return a constant; its tensor is made once, over the mapped file where it is not packed."""
        found = self._ready.get(id(constant))
        if found is None:
            found = self._constants.tensor(constant)
            if found.numel() <= _SMALL or constant.dtype not in PACKED_BITS:
                self._ready[id(constant)] = found
        return found

    def _answers(self, values: Mapping[str, Tensor]) -> dict[str, Array]:
        held = self.package.constants
        found = {
            name: self._constant(held[name]) if name in held else values[name]
            for name in (spec.name for spec in self.outputs)
        }
        return {spec.name: np.array(found[spec.name].numpy(), dtype=spec.dtype) for spec in self.outputs}

    def _layer(self, operation: Operation) -> Layer:
        return Layer(operation.name, operation.type, operation.precision, "", DEVICE, self.module(operation))


def _check_shape(feature: Feature, shape: tuple[int, ...]) -> None:
    """Raise TargetError unless an input has one of the shapes, or sizes in the ranges, that the model was made for."""
    place = f"{_PLACE}: input '{feature.spec.name}'"
    if feature.shapes and shape not in feature.shapes:
        msg = f"{place}: wrong shape; got {shape}, expected one of {', '.join(map(str, feature.shapes))}."
        raise TargetError(f"{msg} Feed one of these, or convert the model with this shape among them.")
    for axis, (size, (low, high)) in enumerate(zip(shape, feature.ranges, strict=False)):
        if size < low or (high != -1 and size > high):
            upper = "any" if high == -1 else high
            msg = f"{place}: wrong size of axis {axis}; got {size}, expected {low} to {upper}."
            raise TargetError(f"{msg} Feed such a size, or convert the model with this one.")

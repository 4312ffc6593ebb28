"""What a program's operations take and give, worked out once before the first of them runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from targets.base import TargetError, TensorSpec
from targets.mil.constants import Constant
from targets.mil.kernels import KERNELS, Kernel
from targets.mil.package import Operation, Package
from targets.mil.weights import Weights

TORCH_TYPES: Mapping[str, torch.dtype] = {
    "bool": torch.bool,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "int4": torch.int8,
    # Torch computes little with these: the next larger type holds their values.
    "uint16": torch.int32,
    "uint32": torch.int64,
    **{f"uint{bits}": torch.uint8 for bits in (1, 2, 3, 4, 6)},
}
_WRAPPED = {"uint16": 0xFFFF, "uint32": 0xFFFFFFFF}
_FLOATS = (torch.float16, torch.float32)
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError)


class Constants:
    """Constants of a program as tensors; what lies in a file is mapped, and copied only where it is packed."""

    def __init__(self, package: Package) -> None:
        self._held = package.constants
        self._weights = Weights(package.model.parent, package.path)
        self._weights.check(package.constants.values())

    def tensor(self, constant: Constant) -> Tensor:
        """Return a constant; types below a byte have one byte for each element."""
        array = constant.value if isinstance(constant.value, np.ndarray) else self._weights.read(constant)
        if constant.dtype in _WRAPPED:
            array = array.astype("int32" if constant.dtype == "uint16" else "int64")
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def plain(self, constant: Constant) -> Any:
        """Return a constant as Python's own numbers, strings and lists."""
        return self._weights.read(constant).tolist() if constant.file else constant.plain()

    def named(self, name: str) -> Constant | None:
        """Return a constant of a name, None where a value of that name is computed."""
        return self._held.get(name)


Source = str | Constant
"""The name of a computed value, or a constant."""


@dataclass(eq=False)
class Step:
    """An operation, ready to be run.

    Attributes:
        operation: as the program has it.
        kernel: what computes it.
        place: how errors begin.
        fixed: parameters that are no tensors, with their values.
        tensors: parameters that are tensors -> where they come from.
        computed: parameters that are no tensors but computed -> the name of the value.
        folds: everything that it takes is constant.
    """

    operation: Operation
    kernel: Kernel
    place: str
    fixed: dict[str, Any]
    tensors: dict[str, tuple[Source, ...]]
    computed: dict[str, str]
    folds: bool = False

    def takes(self) -> Iterator[str]:
        """Return the names of computed values that it takes."""
        yield from self.computed.values()
        for sources in self.tensors.values():
            yield from (source for source in sources if isinstance(source, str))

    def run(
        self,
        values: Mapping[str, Tensor],
        constant: Callable[[Constant], Tensor],
        wide: torch.dtype,
        *,
        rounds: bool = True,
    ) -> list[Tensor]:
        """Compute the results, in the types that the program declares.

        Args:
            values: name -> what was computed.
            constant: makes a tensor of a constant.
            wide: the floats that it computes in.
            rounds: round floats to the declared type; otherwise they stay as they were computed.

        Raises:
            TargetError: it does not compute, or gives another shape than the program declares.
        """
        arguments = dict(self.fixed)
        for parameter, name in self.computed.items():
            arguments[parameter] = values[name].tolist()
        for parameter, sources in self.tensors.items():
            found = [values[source] if isinstance(source, str) else constant(source) for source in sources]
            if not self.kernel.exact:
                found = [item.to(wide) if item.dtype in _FLOATS else item for item in found]
            arguments[parameter] = found if parameter in self.kernel.lists else found[0]
        try:
            results = self.kernel.run(**arguments)
        except _FAILURES as error:
            msg = (
                f"{self.place}: does not compute; got {type(error).__name__}: {error}, expected what the program says."
            )
            raise TargetError(f"{msg} Convert the model again.") from error
        listed = [results] if isinstance(results, Tensor) else list(results)
        specs = self.operation.outputs
        if len(listed) != len(specs):
            msg = f"{self.place}: results; got {len(listed)}, expected {len(specs)} as the program declares."
            raise TargetError(f"{msg} Convert the model again.")
        return [self._declared(result, spec, rounds=rounds) for result, spec in zip(listed, specs, strict=True)]

    def _declared(self, result: Tensor, spec: TensorSpec, *, rounds: bool) -> Tensor:
        """Return a result in its declared type; raise TargetError where its shape is another than declared."""
        shape = spec.shape
        if tuple(result.shape) != shape and not (
            result.ndim == len(shape)
            and all(want in (-1, have) for have, want in zip(result.shape, shape, strict=True))
        ):
            msg = f"{self.place}: shape of '{spec.name}'; got {tuple(result.shape)}, expected {shape} as declared."
            raise TargetError(f"{msg} Convert the model again.")
        if spec.dtype in _WRAPPED:
            return result.long().bitwise_and(_WRAPPED[spec.dtype]).to(TORCH_TYPES[spec.dtype])
        kept = not rounds and spec.dtype == "float16" and result.is_floating_point()
        return result if kept else result.to(TORCH_TYPES[spec.dtype])


def fits(found: Sequence[int], declared: Sequence[int]) -> bool:
    """Tell whether a shape is the declared one, whose open axes are -1."""
    return len(found) == len(declared) and all(want in (-1, have) for have, want in zip(found, declared, strict=True))


def build(package: Package, constants: Constants, modules: Mapping[str, str]) -> list[Step]:
    """Return a program's steps in order.

    Raises:
        TargetError: it has operations, parameters or types that we do not know, all of the operations named.
    """
    _refuse_unknown(package, modules)
    steps = [_step(package, operation, constants, modules) for operation in package.operations]
    known: set[str] = set()
    for step in steps:
        step.folds = all(name in known for name in step.takes())
        if step.folds:
            known.update(spec.name for spec in step.operation.outputs)
    _check_order(package, steps)
    return steps


def place_of(package: Package, operation: Operation, modules: Mapping[str, str]) -> str:
    """Return how errors about an operation begin."""
    return f"{package.path}: {_called(operation, modules)}"


def free_after(steps: Sequence[Step], kept: Iterable[str]) -> list[tuple[str, ...]]:
    """Return for each step the names that nothing takes after it, but for those that are kept."""
    last = {spec.name: index for index, step in enumerate(steps) for spec in step.operation.outputs}
    for index, step in enumerate(steps):
        last |= dict.fromkeys(step.takes(), index)
    frees: list[list[str]] = [[] for _ in steps]
    held = set(kept)
    for name, index in last.items():
        if name not in held:
            frees[index].append(name)
    return [tuple(names) for names in frees]


def _called(operation: Operation, modules: Mapping[str, str]) -> str:
    module = modules.get(operation.name)
    result = operation.outputs[0].name if operation.outputs else operation.name
    return f"{operation.type} '{result}'" + (f" of {module}" if module else "")


def _refuse_unknown(package: Package, modules: Mapping[str, str]) -> None:
    unknown = [item for item in package.operations if item.type not in KERNELS or item.blocks]
    if unknown:
        named = "; ".join(_called(item, modules) for item in unknown)
        types = ", ".join(sorted({item.type for item in unknown}))
        raise TargetError(
            f"{package.path}: operations that the evaluator does not know; got {named}, expected none of type {types}. "
            "Write that part of the network in other operations, or check it on a device."
        )


def _step(package: Package, operation: Operation, constants: Constants, modules: Mapping[str, str]) -> Step:
    kernel, place = KERNELS[operation.type], place_of(package, operation, modules)
    given = {**operation.attributes, **operation.inputs}
    strange = sorted(set(given) - kernel.parameters)
    if strange:
        expected = ", ".join(sorted(kernel.parameters))
        msg = f"{place}: parameters that the evaluator does not know; got {', '.join(strange)}, expected {expected}."
        raise TargetError(f"{msg} Check that part of the network on a device.")
    for spec in operation.outputs:
        if spec.dtype not in TORCH_TYPES:
            msg = f"{place}: type of '{spec.name}'; got {spec.dtype}, expected one of {', '.join(TORCH_TYPES)}."
            raise TargetError(f"{msg} Convert the model in another precision.")
    step = Step(operation, kernel, place, {}, {}, {})
    for parameter, value in given.items():
        names = (value,) if isinstance(value, Constant) else value
        sources = tuple(name if isinstance(name, Constant) else constants.named(name) or name for name in names)
        if parameter in kernel.tensors:
            step.tensors[parameter] = sources
        elif len(sources) == 1 and isinstance(sources[0], str):
            step.computed[parameter] = sources[0]
        else:
            listed = [constants.plain(source) for source in sources if isinstance(source, Constant)]
            if len(listed) != len(sources):
                msg = f"{place}: {parameter}: got a list of computed values, expected one value or constants."
                raise TargetError(f"{msg} Check that part of the network on a device.")
            step.fixed[parameter] = listed[0] if isinstance(value, Constant) else listed
    return step


def _check_order(package: Package, steps: Sequence[Step]) -> None:
    """Raise TargetError where a step takes what nothing before it gives."""
    known = {feature.spec.name for feature in package.inputs}
    for step in steps:
        for name in step.takes():
            if name not in known:
                msg = f"{step.place}: takes '{name}'; got nothing of that name before it, expected a value."
                raise TargetError(f"{msg} Convert the model again.")
        known.update(spec.name for spec in step.operation.outputs)

"""Reads a saved ML Program: its inputs, outputs and operations, without evaluating any and without touching weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from targets.base import TargetError, TensorSpec
from targets.mil.constants import Constant, immediate
from targets.mil.proto import messages

MAIN = "main"
_DEPLOYMENTS = {"CoreML5": "iOS15", "CoreML6": "iOS16", "CoreML7": "iOS17", "CoreML8": "iOS18", "CoreML9": "iOS26"}
_ARRAY_TYPES = {65568: "float32", 65600: "float64", 131104: "int32", 131080: "int8", 65552: "float16"}
_SHORT = {"float16": "f16", "float32": "f32", "float64": "f64", "bool": "bool"}
_MANIFEST = "Manifest.json"
_AGAIN = "Save or copy the package again."


@dataclass(frozen=True)
class Feature:
    """An input or output as callers of the model see it.

    Attributes:
        spec: name, type and shape; -1 where an axis is open.
        description: what its maker wrote of it.
        shapes: all shapes that it may have, where they are enumerated, the default first.
        ranges: smallest and largest size of each axis, where it is open; -1 for no upper limit.
    """

    spec: TensorSpec
    description: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of a program; constants are no operations.

    Attributes:
        type: such as ``conv``.
        name: of the operation; of its first output where it has none.
        inputs: parameter -> a constant, or the names of what it takes: one, or several where it takes a list, constants
            among them (see `Package.constants`).
        attributes: parameter -> constant; decompressions of iOS 16 and 17 have their parameters here.
        outputs: name, type and shape of each; -1 where an axis is open.
        blocks: how many programs it holds in turn, as loops and branches do.
    """

    type: str
    name: str
    inputs: Mapping[str, tuple[str, ...] | Constant]
    attributes: Mapping[str, Constant]
    outputs: tuple[TensorSpec, ...]
    blocks: int = 0

    def constant(self, parameter: str) -> Constant | None:
        """Return a parameter that is a constant, None where it is not there or is computed."""
        found = self.inputs.get(parameter, self.attributes.get(parameter))
        return found if isinstance(found, Constant) else None

    @property
    def precision(self) -> str:
        """The type that its first result is declared in, such as ``f16`` or ``i32``; ``unknown`` where it has none."""
        dtype = self.outputs[0].dtype if self.outputs else "unknown"
        return _SHORT.get(dtype, dtype.replace("uint", "u").replace("int", "i"))


@dataclass(frozen=True, eq=False)
class Package:
    """A saved ML Program.

    Attributes:
        path: of the package.
        model: the file of the program, which weights are relative to.
        function: the one that was read.
        functions: all that it holds.
        opset: as the program names it, such as ``CoreML8``.
        deployment: the first system that has this opset, such as ``iOS18``.
        inputs: in the program's order.
        outputs: in the program's order.
        states: names of what the function keeps between calls.
        operations: in execution order.
        constants: by name.
        metadata: what its maker wrote of it, and ``com.github.apple.coremltools.*`` among it.
        specification: version of the file's format.
    """

    path: Path
    model: Path
    function: str
    functions: tuple[str, ...]
    opset: str
    deployment: str
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[str, ...]
    operations: tuple[Operation, ...]
    constants: Mapping[str, Constant]
    metadata: Mapping[str, str]
    specification: int


def read_package(path: Path, function: str = MAIN) -> Package:
    """Read a program.

    Args:
        path: of the package, a folder.
        function: which of its functions.

    Raises:
        TargetMissing: the definition of the format is not installed.
        TargetError: not a package, or damaged, or another type of model, or without such a function.
    """
    model = model_file(path)
    schema = messages()[0]
    stored = schema.Model()
    try:
        stored.ParseFromString(model.read_bytes())
    except Exception as error:
        if type(error).__name__ != "DecodeError":
            raise
        raise TargetError(f"{model}: not a model; got {error}, expected Core ML's format. {_AGAIN}") from error
    kind = stored.WhichOneof("Type")
    if kind != "mlProgram":
        msg = f"{model}: type of the model; got {kind}, expected mlProgram."
        raise TargetError(f"{msg} Convert it with convert_to='mlprogram'.")
    program = stored.mlProgram
    names = tuple(sorted(program.functions))
    if function not in names:
        got = f"got {function!r}, expected one of {', '.join(names)}"
        raise TargetError(f"{path}: no such function; {got}. Name one of these.")
    return _Reader(path, model, stored, function).package(names)


def model_file(path: Path) -> Path:
    """Return the file of a package's program.

    Raises:
        TargetError: not a package, a missing file, or one outside of the package.
    """
    manifest = path / _MANIFEST
    if not manifest.is_file():
        msg = f"{path}: not a package; got no {_MANIFEST}, expected a folder *.mlpackage with one."
        raise TargetError(f"{msg} Name the folder that the converter saved.")
    try:
        told = json.loads(manifest.read_text())
        name = told["itemInfoEntries"][told["rootModelIdentifier"]]["path"]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{manifest}: damaged; got {type(error).__name__} {error}, expected an entry of the root model."
        raise TargetError(f"{msg} {_AGAIN}") from error
    model = path / "Data" / str(name)
    if not model.resolve().is_relative_to(path.resolve()):
        raise TargetError(f"{manifest}: outside of the package; got {name}, expected a file in it. {_AGAIN}")
    if not model.is_file():
        raise TargetError(f"{manifest}: a missing file; got {name}, expected it in {model.parent}. {_AGAIN}")
    return model


@dataclass
class _Reader:
    """Turns messages into what this module describes."""

    path: Path
    model: Path
    stored: Any
    name: str
    constants: dict[str, Constant] = field(default_factory=dict)

    def package(self, names: tuple[str, ...]) -> Package:
        function = self.stored.mlProgram.functions[self.name]
        if function.opset not in function.block_specializations:
            got = f"got {', '.join(sorted(function.block_specializations)) or 'none'}, expected {function.opset}"
            raise TargetError(f"{self.path}: function '{self.name}': its program is not there; {got}. {_AGAIN}")
        block = function.block_specializations[function.opset]
        operations = tuple(self._operations(block.operations))
        types = {spec.name: spec for operation in operations for spec in operation.outputs}
        types |= {item.name: self._spec(item) for item in function.inputs}
        types |= {name: TensorSpec(name, held.dtype, held.shape) for name, held in self.constants.items()}
        told = self._description()
        states = [item.name for item in function.inputs if item.type.WhichOneof("type") == "stateType"]
        takes = (item.name for item in function.inputs if item.name not in states)
        meta = self.stored.description.metadata
        own = {key: getattr(meta, key) for key in ("shortDescription", "versionString", "author", "license")}
        return Package(
            path=self.path,
            model=self.model,
            function=self.name,
            functions=names,
            opset=function.opset,
            deployment=_DEPLOYMENTS.get(function.opset, function.opset),
            inputs=tuple(self._features(takes, told.input, types)),
            outputs=tuple(self._features(block.outputs, told.output, types)),
            states=tuple(states),
            operations=operations,
            constants=self.constants,
            metadata={**{key: value for key, value in own.items() if value}, **meta.userDefined},
            specification=int(self.stored.specificationVersion),
        )

    def _description(self) -> Any:
        """Return what is told of this function's inputs and outputs: models of several have one for each."""
        description = self.stored.description
        for item in description.functions:
            if item.name == self.name:
                return item
        return description

    def _operations(self, stored: Iterable[Any]) -> Iterator[Operation]:
        for item in stored:
            if item.type == "const":
                output = item.outputs[0].name
                self.constants[output] = self._constant(item.attributes["val"], output)
            else:
                yield self._operation(item)

    def _operation(self, item: Any) -> Operation:
        outputs = tuple(self._spec(output) for output in item.outputs)
        attributes = dict(item.attributes)
        first = outputs[0].name if outputs else ""
        name = self._constant(attributes.pop("name"), first).plain() if "name" in attributes else first
        inputs = {key: self._argument(f"{first}.{key}", value.arguments) for key, value in sorted(item.inputs.items())}
        own = {key: self._constant(value, f"{first}.{key}") for key, value in sorted(attributes.items())}
        return Operation(item.type, str(name), inputs, own, outputs, len(item.blocks))

    def _argument(self, place: str, bindings: Any) -> tuple[str, ...] | Constant:
        names = []
        for index, binding in enumerate(bindings):
            name = binding.name
            if binding.WhichOneof("binding") == "value":
                name = place if len(bindings) == 1 else f"{place}.{index}"
                self.constants[name] = self._constant(binding.value, name)
            names.append(name)
        return self.constants[names[0]] if len(names) == 1 and names[0] in self.constants else tuple(names)

    def _constant(self, value: Any, name: str) -> Constant:
        spec = self._type(name, value.type)
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            return Constant(name, spec.dtype, spec.shape, None, str(blob.fileName), int(blob.offset))
        kind = value.immediateValue.WhichOneof("value")
        if kind != "tensor":  # a list, tuple or dictionary: attributes of tools; no parameter of ours
            return Constant(name, str(kind), ())
        held = immediate(value.immediateValue.tensor, spec.dtype, spec.shape, f"{self.model}: '{name}'")
        return Constant(name, spec.dtype, spec.shape, held)

    def _spec(self, item: Any) -> TensorSpec:
        return self._type(item.name, item.type)

    def _type(self, name: str, stored: Any) -> TensorSpec:
        kind = stored.WhichOneof("type")
        if kind != "tensorType":
            return TensorSpec(name, str(kind), ())
        tensor, code = stored.tensorType, messages()[1].DataType
        shape = tuple(
            int(axis.constant.size) if axis.WhichOneof("dimension") == "constant" else -1 for axis in tensor.dimensions
        )
        return TensorSpec(name, code.Name(tensor.dataType).lower(), shape)

    def _features(self, names: Iterable[str], told: Any, types: Mapping[str, TensorSpec]) -> Iterator[Feature]:
        described = {item.name: item for item in told}
        for name in names:
            if name not in types:
                msg = f"{self.model}: function '{self.name}': got no value '{name}', expected it among the results."
                raise TargetError(f"{msg} {_AGAIN}")
            yield _feature(types[name], described.get(name))


def _feature(spec: TensorSpec, told: Any) -> Feature:
    if told is None:
        return Feature(spec)
    kind = told.type.WhichOneof("Type")
    if kind != "multiArrayType":
        return Feature(TensorSpec(spec.name, str(kind).removesuffix("Type"), spec.shape), told.shortDescription)
    array = told.type.multiArrayType
    dtype = _ARRAY_TYPES.get(array.dataType, spec.dtype)
    flexible = array.WhichOneof("ShapeFlexibility")
    shapes, ranges = [tuple(int(size) for size in array.shape)], []
    if flexible == "enumeratedShapes":
        listed = [tuple(int(size) for size in item.shape) for item in array.enumeratedShapes.shapes]
        shapes += [item for item in listed if item not in shapes]
    elif flexible == "shapeRange":
        ranges = [(int(item.lowerBound), int(item.upperBound)) for item in array.shapeRange.sizeRanges]
    return Feature(
        TensorSpec(spec.name, dtype, spec.shape),
        told.shortDescription,
        tuple(shapes) if flexible == "enumeratedShapes" else (),
        tuple(ranges),
    )

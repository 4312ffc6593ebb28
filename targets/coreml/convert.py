"""A torch network to ML Programs: traced, converted, kept in 32 bits where 16 overflow, cut, described, saved.

Runs in a process of its own, since converting loads torch and coremltools and holds several copies of the weights.
"""

from __future__ import annotations

import gc
import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from targets.base import Array, TargetError
from targets.coreml import PLACE, CoreMlOptions, coremltools
from targets.coreml.chunks import chunked
from targets.coreml.names import module_paths
from targets.coreml.operators import TrueQuotients, register_operators
from targets.coreml.package import DIGEST, FORMS, PACKAGE, Manifest, Port
from targets.coreml.passes import pipeline
from targets.coreml.weights import Built, compress
from targets.torch_source import TorchProgram

if TYPE_CHECKING:
    from targets.mil.package import Operation

_LARGEST = 65504.0
"""Of a 16-bit floating-point number."""
_HEADROOM = 0.5
"""Of that: what recorded values may reach before the operation that makes them is kept in 32 bits."""
_CLOCK = ("timestep", "guidance", "time_ids", "resolution", "aspect_ratio", "img_ids", "txt_ids")
"""Inputs that networks take sines of: times, scales, sizes and places, up to a thousand and more."""
_LAYERS = ("linear", "matmul", "conv", "einsum")
"""Operations that end the way from these to their sines: from there on it is an input as any other."""
LARGEST_RANK = 5
_ROUNDED = re.compile(r"_cast_fp(16|32)$")


def convert(program: TorchProgram, out: Path, options: CoreMlOptions) -> None:
    """Write ``coreml.json`` and the packages that it names into a folder.

    Raises:
        TargetMissing: coremltools is not installed.
        TargetError: the network does not convert, or what came of it breaks one of Core ML's limits.
    """
    with warnings.catch_warnings():
        # A model's own folder goes with it, which it remarks on.
        warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)
        _convert(program, out, options)
        gc.collect()


def _convert(program: TorchProgram, out: Path, options: CoreMlOptions) -> None:
    library: Any = coremltools()
    program = _of_floats(program)
    traced = _traced(program)
    kept: dict[str, float] = {}
    path = out / PACKAGE
    while True:
        built = _converted(library, traced, program, options, kept)
        _check_ranks(built, program)
        model, modules, answers = _packed(library, built, program, options)
        model.save(str(path))
        found = _overflowing(path, program) if options.precision == "f16" and program.calls else {}
        if not found.keys() - kept.keys():
            break
        kept |= found
        shutil.rmtree(path)
    del traced
    weights: dict[str, Any] = {}
    if _shrinks(options, program):
        whole = Built(model, partial(_model, library, built, program, options))
        weights = _compressed(whole, path, options, _stored(path, modules, program))
        del whole
    del built, model
    gc.collect()
    packages = chunked(path, options.chunks) if options.chunks > 1 and program.is_denoiser else [path]
    names = tuple(package.name for package in packages)
    inputs = tuple(_ports(program).values())
    outputs = tuple(Port(name, _outside(name, program), "float32", shape) for name, shape in answers.items())
    digest = program.facts.get("weights_sha256", "")
    manifest = Manifest(program.name, options.deployment, names, inputs, outputs, digest, modules, kept, weights)
    manifest.write(out)


def _of_floats(program: TorchProgram) -> TorchProgram:
    """Return a program whose module takes floats where a loader feeds its integers as such."""
    import torch

    forms = [port.form for port in _ports(program).values()]
    if "as floats" not in forms:
        return program

    class OfFloats(torch.nn.Module):
        """Takes integers as floats."""

        def __init__(self) -> None:
            super().__init__()
            self.net = program.module

        def forward(self, *inputs: torch.Tensor) -> Any:
            given = zip(inputs, forms, strict=True)
            return self.net(*(value.int() if form == "as floats" else value for value, form in given))

    return replace(program, module=OfFloats(), prefix=f"net.{program.prefix}")


def _traced(program: TorchProgram) -> Any:
    """Return the network as torch's tracer saw it; its remarks on what depends on shapes are known and meant."""
    import torch

    jit: Any = torch.jit
    examples = tuple(torch.from_numpy(array.copy()) for array in _taken(program, program.inputs).values())
    try:
        with torch.no_grad(), TrueQuotients(), warnings.catch_warnings():
            warnings.simplefilter("ignore", jit.TracerWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return jit.trace(program.module.eval(), examples, strict=False, check_trace=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TargetError(f"{PLACE}: {program.name}: torch cannot trace it; got: {_reason(error)}") from error


def _converted(
    library: Any, traced: Any, program: TorchProgram, options: CoreMlOptions, kept: Mapping[str, float]
) -> Any:
    """Return coremltools' own program, with 16 bits where they are asked for and do."""
    precision = library.precision.FLOAT32
    if options.precision == "f16":
        clock = _Clock({port.inside for name, port in _ports(program).items() if name in _CLOCK})
        precision = library.transform.FP16ComputePrecision(
            op_selector=lambda operation: not clock.drives(operation) and plain_name(operation.name) not in kept
        )
    register_operators()
    takes = [_takes(library, port, program) for port in _ports(program).values()]
    answers = [library.TensorType(name=_outside(name, program), dtype=np.float32) for name in program.outputs]
    try:
        with np.errstate(over="ignore"):  # a mask's least number is minus infinity in 16 bits, and masks as well
            return library.convert(
                traced,
                inputs=takes,
                outputs=answers,
                convert_to="milinternal",
                minimum_deployment_target=_system(library, options),
                compute_precision=precision,
                pass_pipeline=pipeline(rounds=options.precision == "f16"),
            )
    except Exception as error:  # its converter raises whatever its parts raise
        raise TargetError(
            f"{PLACE}: {program.name}: coremltools cannot convert it; got {type(error).__name__}: {_reason(error)} "
            "Leave the component out of this target, or report it with the operation that it names."
        ) from error


def _check_ranks(built: Any, program: TorchProgram) -> None:
    """Raise TargetError where a tensor has more axes than Core ML takes; its converter does not look."""
    operations = built.functions["main"].operations
    deep = [item for item in operations if any(value.rank > LARGEST_RANK for value in item.outputs)]
    if deep:
        first, rank = deep[0], max(value.rank for value in deep[0].outputs)
        place = module_paths([first], program.module).get(first.name) or first.name
        raise TargetError(
            f"{PLACE}: {program.name}: {place} ({first.op_type}): a tensor of {rank} axes; Core ML takes at most "
            f"{LARGEST_RANK}. Split or merge axes there, or leave the component out of this target."
        )


class _Clock:
    """Knows the operations on the way from the timestep, and whatever else is taken sines of, to the first layer.

    A timestep of 999 times a frequency has 11 bits in 16-bit floating point, which leaves a sine of it nearly random.

    Args:
        inputs: names of those, as the program has them.
    """

    def __init__(self, inputs: Collection[str]) -> None:
        self._inputs = inputs
        self._driven: set[str] = set()

    def drives(self, operation: Any) -> bool:
        if operation.op_type in (*_LAYERS, "const") and not _is_outer(operation):
            return False
        given = [value for values in operation.inputs.values() for value in _flat(values)]
        given = [value for value in given if value.op is None or value.op.op_type != "const"]
        driven = bool(given) and all(
            value.name in self._inputs if value.op is None else value.op.name in self._driven or self.drives(value.op)
            for value in given
        )
        if driven:
            self._driven.add(operation.name)
        return driven


def _is_outer(operation: Any) -> bool:
    """Tell whether it multiplies every place with every frequency, which is no layer."""
    return operation.op_type == "matmul" and not operation.transpose_x.val and operation.x.shape[-1] == 1


def _flat(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else [values]


def _packed(
    library: Any, built: Any, program: TorchProgram, options: CoreMlOptions
) -> tuple[Any, dict[str, str], dict[str, tuple[int, ...]]]:
    """Return the program as a model, the module of every operation, and the shape of every output."""
    model = _model(library, built, program, options, library.PassPipeline.EMPTY)
    function = built.functions["main"]
    operations = [operation for operation in function.operations if operation.op_type != "const"]
    shapes = [tuple(_length(axis) for axis in output.shape) for output in function.outputs]
    paths = module_paths(operations, program.module)
    modules = {inside(name): path.removeprefix(program.prefix) for name, path in paths.items()}
    return model, modules, dict(zip(program.outputs, shapes, strict=True))


def _model(library: Any, built: Any, program: TorchProgram, options: CoreMlOptions, passes: Any) -> Any:
    """Return the program as a model that says what it is, some passes run first."""
    model = library.convert(
        built,
        convert_to="mlprogram",
        minimum_deployment_target=_system(library, options),
        compute_precision=library.precision.FLOAT32,  # as the program is: what is in 16 bits is so already
        pass_pipeline=passes,
        skip_model_load=True,
    )
    describe(model, program, options)
    return model


def _shrinks(options: CoreMlOptions, program: TorchProgram) -> bool:
    return options.weights != "float" or any(word != "float" for word in program.stored.values())


def _stored(path: Path, modules: Mapping[str, str], program: TorchProgram) -> dict[str, str]:
    """Return operation -> how its weight is stored, of those whose state says so.

    Raises:
        TargetError: a module that is quantized has no operation of its own in the program.
    """
    from targets.mil.package import read_package

    layers = [item.name for item in read_package(path).operations if item.type in ("conv", "linear")]
    found = {name: program.stored[modules[name]] for name in layers if modules.get(name) in program.stored}
    missing = sorted(program.stored.keys() - {modules[name] for name in found})
    if missing:
        raise TargetError(
            f"{PLACE}: {program.name}: got no layer of {missing[0]} in the program ({len(missing)} such), expected one "
            "for each that is quantized. Report this as a bug."
        )
    return found


def _compressed(whole: Built, path: Path, options: CoreMlOptions, plan: Mapping[str, str]) -> dict[str, Any]:
    """Save a model with smaller weights in its package's place; return what became of them, to be told.

    Weights that their state has rounded hold few values, which are stored as they are.
    """
    shrinks = options.weights != "float"
    if plan:
        found = compress(whole, "float", options.deployment, plan=plan, exact=True)
        if shrinks:  # what the state leaves alone
            whole = replace(whole, model=found.model)
            found = compress(whole, options.weights, options.deployment, group=options.group)
    else:
        found = compress(whole, options.weights, options.deployment, group=options.group)
    shutil.rmtree(path)
    found.model.save(str(path))
    became: dict[str, int] = {}
    for weight in found.weights:
        became[weight.became] = became.get(weight.became, 0) + 1
    return {
        "asked": " and ".join([*(["its state says"] if plan else []), *([options.weights] if shrinks else [])]),
        "became": became,
        "bytes": [sum(weight.before for weight in found.weights), sum(weight.after for weight in found.weights)],
        "left": {weight.op: weight.why for weight in found.weights if weight.why},
    }


def _length(axis: Any) -> int:
    return -1 if str(axis).startswith("is") else int(axis)  # symbols are called is0, is1


def describe(model: Any, program: TorchProgram, options: CoreMlOptions) -> None:
    """Write into a package what it is, whose, and what goes in and out."""
    facts = program.facts
    model.author = facts.get("author", "")
    model.license = options.license or "not stated; see the model that it was made from"
    model.version = facts.get("version", "")
    model.short_description = program.about.get("", program.name)
    model.user_defined_metadata[DIGEST] = facts.get("weights_sha256", "")
    model.user_defined_metadata["exporter.component"] = program.name
    for name in facts.keys() - {"author", "version", "weights_sha256"}:
        model.user_defined_metadata[f"exporter.{name}"] = facts[name]
    for name, port in _ports(program).items():
        model.input_description[port.inside] = program.about.get(name, name)
    for name in program.outputs:
        model.output_description[_outside(name, program)] = program.about.get(name, name)


def _overflowing(path: Path, program: TorchProgram) -> dict[str, float]:
    """Return the 16-bit operations that take or make, unrounded, what comes near their limit -> the largest magnitude.

    Those that take it count too, since what was kept in 32 bits before them would be rounded for them.
    """
    from targets.mil.evaluator import Evaluator

    evaluator, found = Evaluator(path), dict[str, float]()
    for call in program.calls:
        fed = _taken(program, call)
        feeds = {spec.name: np.ascontiguousarray(fed[spec.name], spec.dtype) for spec in evaluator.inputs}
        large: dict[str, float] = {}
        for operation, values in evaluator.values(feeds, rounds=False):
            for spec, value in zip(operation.outputs, values, strict=True):
                largest = float(value.abs().max()) if value.is_floating_point() and value.numel() else 0.0
                if not largest <= _HEADROOM * _LARGEST:
                    large[spec.name] = largest
            is_half = any(spec.dtype == "float16" for spec in operation.outputs) and operation.type != "cast"
            met = [large[name] for name in (*evaluator.takes(operation), *_made(operation)) if name in large]
            if is_half and met:
                name = plain_name(operation.name)
                found[name] = max(found.get(name, 0.0), *met)
    evaluator.close()
    return found


def _made(operation: Operation) -> tuple[str, ...]:
    return tuple(spec.name for spec in operation.outputs)


def inside(name: str) -> str:
    """Return the name that a package gives an operation: letters, digits and underscores, a letter first."""
    cleaned = re.sub(r"[^0-9a-zA-Z_]", "_", name)
    return f"op_{cleaned}" if cleaned[:1].isdigit() else cleaned


def plain_name(name: str) -> str:
    """Return the name of an operation before it was rounded to 16 bits."""
    return inside(_ROUNDED.sub("", name))


def _ports(program: TorchProgram) -> dict[str, Port]:
    """Return the inputs: as callers know them, and as the packages take them."""
    found = {}
    for place, (name, array) in enumerate(program.inputs.items()):
        called, form = program.ports.get(name, (inside(name), FORMS[0]))
        shapes = tuple(shapes[place] for shapes in program.shapes)
        found[name] = Port(name, called, _type(array.dtype).__name__, tuple(array.shape), shapes, form)
    return found


def _outside(name: str, program: TorchProgram) -> str:
    return program.ports.get(name, (inside(name), ""))[0]


def _taken(program: TorchProgram, call: Mapping[str, Array]) -> dict[str, Array]:
    """Return a call as the packages take it, in order."""
    rows = max(array.shape[0] for array in program.inputs.values() if array.ndim)
    return {port.inside: port.taken(call[name], rows) for name, port in _ports(program).items()}


def _takes(library: Any, port: Port, program: TorchProgram) -> Any:
    """Return an input as coremltools is told of it."""
    own = tuple(_taken(program, program.inputs)[port.inside].shape)
    shapes = list(dict.fromkeys([own, *(shape or (1,) for shape in port.shapes)]))
    shape = library.EnumeratedShapes(shapes=shapes, default=own) if len(shapes) > 1 else own
    dtype = np.float32 if port.form == "as floats" else np.dtype(port.dtype).type
    return library.TensorType(name=port.inside, shape=shape, dtype=dtype)


def _type(dtype: np.dtype[Any]) -> Any:
    return np.float32 if dtype.kind == "f" else np.int32


def _system(library: Any, options: CoreMlOptions) -> Any:
    return getattr(library.target, options.deployment)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__

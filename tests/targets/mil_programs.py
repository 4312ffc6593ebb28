"""Saved ML Programs to read and evaluate: built operation by operation with coremltools, or converted from torch."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[Any]
NEEDED = "coremltools writes the packages; it is not installed"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep coremltools' own talk away: warnings raised in it, its log and its progress bars."""
    told = logging.getLogger("coremltools").level
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.filterwarnings("ignore", module=r"coremltools(\.|$)")
            warnings.filterwarnings("ignore", "Implicitly cleaning up <TemporaryDirectory", ResourceWarning)
            yield
    finally:
        logging.getLogger("coremltools").setLevel(told)


def library() -> Any:
    """Return coremltools; skip the test where it is not installed."""
    with quiet():
        return pytest.importorskip("coremltools", reason=NEEDED)


def types_of() -> Mapping[str, Any]:
    """Return coremltools' types by numpy's names."""
    library()
    from coremltools.converters.mil.mil import types

    return {
        "float16": types.fp16,
        "float32": types.fp32,
        "int32": types.int32,
        "int8": types.int8,
        "uint8": types.uint8,
        "bool": types.bool,
    }


Build = Callable[..., Any]


def save_program(
    path: Path,
    inputs: Mapping[str, Array],
    build: Callable[[Any, Mapping[str, Any]], Sequence[Any]],
    opset: str = "iOS17",
) -> Path:
    """Save a program as a package.

    Args:
        path: gets the package.
        inputs: name -> an array of the input's type and shape.
        build: takes coremltools' builder and the inputs; returns the results.
        opset: name of the deployment target.
    """
    ct = library()
    from coremltools.converters.mil.mil import Builder, Function, Program

    with quiet():
        target, program = getattr(ct.target, opset), Program()
        known = types_of()
        holders = {name: Builder.placeholder(array.shape, known[str(array.dtype)]) for name, array in inputs.items()}
        with Function(holders, opset_version=target) as function:
            function.set_outputs(list(build(Builder, function.inputs)))
        program.add_function("main", function)
        pipeline = ct.PassPipeline.EMPTY
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=target,
            pass_pipeline=pipeline,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(path))
        del model
        gc.collect()  # models leave their folders to the collector, which warns of each
    return path


def own_values(inputs: Mapping[str, Array], build: Callable[..., Any], opset: str) -> Any:
    """Return what coremltools itself computes of a program's part, None where it cannot; lists of these for several.

    Args:
        inputs: name -> array.
        build: takes coremltools' builder, and the inputs by name.
        opset: name of the deployment target.
    """
    ct = library()
    from coremltools.converters.mil.mil import Builder, Function

    holder = {"unused": Builder.placeholder((1,), types_of()["float32"])}
    with quiet(), Function(holder, opset_version=getattr(ct.target, opset)):
        # A copy: its own values of some operations are computed in place.
        constants = {name: Builder.const(val=array.copy()) for name, array in inputs.items()}
        try:
            found = build(Builder, **constants)
        except (TypeError, ValueError, AttributeError):  # its own values of some operations are broken
            return None
    return [item.val for item in found] if isinstance(found, (list, tuple)) else found.val


class Halved:
    """coremltools' builder, with constants of 32-bit floats rounded to 16 bits."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(**given: Any) -> Any:
            return getattr(self._builder, name)(**{key: _half(value) for key, value in given.items()})

        return call


def _half(value: Any) -> Any:
    is_single = isinstance(value, (np.ndarray, np.floating)) and value.dtype == np.float32
    return value.astype(np.float16) if is_single else value


def builds(inputs: Mapping[str, Array], build: Callable[..., Any], opset: str, *, half: bool = False) -> bool:
    """Tell whether coremltools accepts a part of a program for inputs of these types and shapes."""
    ct = library()
    from coremltools.converters.mil.mil import Builder, Function

    known = types_of()
    holders = {name: Builder.placeholder(array.shape, known[str(array.dtype)]) for name, array in inputs.items()}
    with quiet(), Function(holders, opset_version=getattr(ct.target, opset)) as function:
        try:
            build(Halved(Builder) if half else Builder, **function.inputs)
        except (TypeError, ValueError, AttributeError, NotImplementedError):
            return False
    return True


def save_torch(path: Path, module: Any, feeds: Mapping[str, Any], opset: str = "iOS18", **options: Any) -> Path:
    """Convert a torch module with tensors as inputs and save it as a package.

    Args:
        path: gets the package.
        module: takes the feeds in order.
        feeds: name -> tensor.
        opset: name of the deployment target.
        **options: `half` for 16-bit floats; `inputs` in place of those made from the feeds.
    """
    ct = library()
    import torch

    with quiet(), torch.no_grad():
        # Conversion starts from a trace, whatever torch thinks of tracing.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(module.eval(), tuple(feeds.values()), check_trace=False)
        given = options.get("inputs") or [
            ct.TensorType(name=name, shape=tuple(value.shape), dtype=_input_type(value))
            for name, value in feeds.items()
        ]
        half = options.get("half", False)
        model = ct.convert(
            traced,
            inputs=given,
            minimum_deployment_target=getattr(ct.target, opset),
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(path))
        del model
        gc.collect()  # models leave their folders to the collector, which warns of each
    return path


def _input_type(value: Any) -> Any:
    return np.float32 if value.is_floating_point() else np.int32

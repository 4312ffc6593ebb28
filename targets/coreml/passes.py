"""coremltools' passes over a program, with the one mended that changes what networks answer.

Products and sums by channel become a ``batch_norm`` of mean 0 and variance 1, whose default epsilon of 1e-5 then
divides everything by 1.000005: behind every group normalization, and by more than all rounding in 32 bits. To leave the
pass out does not help: compressing and cutting a package runs it again.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from targets.coreml import coremltools

_FUSED = "fuse_elementwise_to_batchnorm"
_MENDED = "exporter::exact_batchnorm"


def pipeline() -> Any:
    """Return the default passes, the mended one after the one it mends."""
    library: Any = coremltools()
    _register()
    passes = library.PassPipeline.DEFAULT
    passes.insert_pass(passes.passes.index(f"common::{_FUSED}") + 1, _MENDED)
    return passes


@cache
def _register() -> None:
    """Make the mending pass known, once in a process."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    class ExactBatchnorm(AbstractGraphPass):  # type: ignore[misc]  # the library has no types
        """Makes the variance so much smaller that with epsilon it is 1."""

        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                fused = [item for item in function.operations if item.op_type == "batch_norm" and _is_fused(item)]
                with function:  # leaving it looks through the whole program: once for all
                    for operation in fused:
                        _mend(function, operation)

    register_pass(namespace="exporter", name="exact_batchnorm")(ExactBatchnorm)


def _is_fused(operation: Any) -> bool:
    """Tell whether the pass made it; a network's own normalization has the epsilon that it says."""
    return any(_FUSED in map(str, told) for told in operation.scopes.values())


def _mend(function: Any, operation: Any) -> None:
    from coremltools.converters.mil import Builder

    given = {name: operation.inputs[name] for name in ("x", "mean", "gamma", "beta", "epsilon")}
    smaller = operation.variance.val - operation.epsilon.val
    made = Builder.batch_norm(**given, variance=smaller, name=operation.name, before_op=operation)
    function.replace_uses_of_var_after_op(anchor_op=operation, old_var=operation.outputs[0], new_var=made)
    function.remove_ops([operation])

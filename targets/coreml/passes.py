"""coremltools' passes over a program: the default ones, checked less often, and one mended that changes answers.

After each of about a hundred passes coremltools looks through the whole program for broken ties, which takes as long as
the passes themselves. Here they run in their order as two, before and after numbers are rounded to 16 bits, and the
program is looked through after each of these.

Products and sums by channel become a ``batch_norm`` of mean 0 and variance 1, whose default epsilon of 1e-5 then
divides everything by 1.000005: behind every group normalization, and by more than all rounding in 32 bits. To leave the
pass out does not help: compressing and cutting a package runs it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from targets.coreml import coremltools

_COMMON = "common::"
_FUSED = "fuse_elementwise_to_batchnorm"
_MENDED = "exporter::exact_batchnorm"
_ROUNDS = f"{_COMMON}add_fp16_cast"
_ROUNDS_INTEGERS = f"{_COMMON}add_int16_cast"
_BEFORE, _AFTER = "exporter::before_rounding", "exporter::after_rounding"


def pipeline(*, rounds: bool) -> Any:
    """Return the default passes, the mended one after the one it mends.

    Args:
        rounds: to 16 bits.
    """
    library: Any = coremltools()
    _register()
    passes = library.PassPipeline.DEFAULT
    names = [name for name in passes.passes if rounds or name not in (_ROUNDS, _ROUNDS_INTEGERS)]
    names.insert(names.index(f"{_COMMON}{_FUSED}") + 1, _MENDED)
    cut = names.index(_ROUNDS) if rounds else len(names)
    passes.passes = [_BEFORE, *([_ROUNDS, _AFTER] if rounds else [])]  # options reach the rounding itself by its name
    passes.set_options(_BEFORE, {"names": names[:cut]})
    if rounds:
        passes.set_options(_AFTER, {"names": names[cut + 1 :]})
    return passes


@cache
def _register() -> None:
    """Make our passes known, once in a process."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

    class Several(AbstractGraphPass):  # type: ignore[misc]  # the library has no types
        """Runs passes one after the other.

        Attributes:
            names: of them.
        """

        names: Sequence[str] = ()

        def apply(self, prog: Any) -> None:
            for name in self.names:
                PASS_REGISTRY[name](prog)

    class ExactBatchnorm(AbstractGraphPass):  # type: ignore[misc]  # the library has no types
        """Makes the variance so much smaller that with epsilon it is 1."""

        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                fused = [item for item in function.operations if item.op_type == "batch_norm" and _is_fused(item)]
                with function:  # leaving it looks through the whole program: once for all
                    for operation in fused:
                        _mend(function, operation)

    for name, one in ((_MENDED, ExactBatchnorm), (_BEFORE, Several), (_AFTER, Several)):
        register_pass(namespace="exporter", name=name.partition("::")[2])(one)


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

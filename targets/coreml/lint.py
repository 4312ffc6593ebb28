"""What in a saved ML Program speaks against the Neural Engine, by rules that each tell where they come from.

This lints; it does not certify. Core ML decides on the device where an operation runs, and only its compute plan, on a
Mac, tells (`targets.coreml.device`). A program without findings may still be placed elsewhere, and one with some may
run there all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from targets.base import TensorSpec
from targets.placement import Finding, Placement

if TYPE_CHECKING:
    from targets.mil.package import Operation, Package

Strength = Literal["vendor", "reported", "unofficial"]
COUNTED: tuple[Strength, ...] = ("vendor", "reported")
"""Strengths whose findings make an operation one at risk; unofficial rules only warn."""
_SHOWN = 8
_FORM = "Write neural_engine: true, for U-Nets and CLIP text encoders"
_BYTES = {"float16": 2, "float32": 4, "int32": 4, "bool": 1}
_PACKED = 64
"""Bytes that the last axis is padded to."""
_LARGEST_RANK, _KERNEL, _SEARCHED, _SIDE, _CHANNELS, _OPERAND_BYTES = 5, 13, 2048, 16384, 65536, 2 << 20


@dataclass(frozen=True)
class Rule:
    """Something that speaks against the Neural Engine.

    Attributes:
        name: short.
        strength: who says so: Apple, somebody who read Core ML's compute plan, or reverse engineering.
        source: where it is said.
        fix: what to do about it.
        holds: tells whether an operation breaks it.
    """

    name: str
    strength: Strength
    source: str
    fix: str
    holds: Callable[[Looked], bool]


@dataclass(frozen=True)
class Looked:
    """An operation and the values around it.

    Attributes:
        operation: what is looked at.
        inputs: what it takes that is computed.
        weights: what it takes that is constant, and what was unpacked from constants.
        types: operation types of whatever made its inputs.
    """

    operation: Operation
    inputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...]
    makers: tuple[str, ...]

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it makes."""
        return self.operation.outputs

    def is_any(self, *types: str) -> bool:
        """Tell whether it is one of these operations."""
        return self.operation.type in types

    def sizes(self) -> Iterable[int]:
        """Yield the length of every axis of what it makes."""
        return (size for spec in self.outputs for size in spec.shape)


_ANE = "Apple, Deploying Transformers on the Apple Neural Engine"
_STABLE = "Apple, ml-stable-diffusion"
_PLANS = "compute plans that others published"
_TOPK = f"{_PLANS}: rf-detr 1495"
_GUIDE = "ane-guide and neural-engine, unofficial"
_LOOK = "Look at the compute plan on a Mac."
_LACKING = ("scatter", "scatter_nd", "scatter_along_axis", "reduce_prod", "lstm", "gru", "rnn")


def _is_deep(op: Looked) -> bool:
    return any(len(spec.shape) > _LARGEST_RANK for spec in op.outputs)


def _is_product(op: Looked) -> bool:
    """Tell whether it multiplies otherwise than by one head over (B, C, 1, S), as Apple's form does."""
    if op.is_any("linear", "scaled_dot_product_attention"):
        return True
    return op.is_any("matmul") and not all(len(spec.shape) == 4 for spec in op.inputs)


def _is_behind_topk(op: Looked) -> bool:
    return op.is_any("expand_dims", "tile", "gather_along_axis") and "topk" in op.makers


def _is_long(op: Looked) -> bool:
    sides = (size for spec in op.outputs if len(spec.shape) == 4 for size in spec.shape[2:])
    return max(op.sizes(), default=0) > _CHANNELS or max(sides, default=0) > _SIDE


def _is_wide(op: Looked) -> bool:
    sides = (size for spec in op.weights for size in spec.shape[2:])
    return op.is_any("conv", "conv_transpose") and max(sides, default=0) > _KERNEL


def _is_deep_conv(op: Looked) -> bool:
    return op.is_any("conv", "conv_transpose") and any(len(spec.shape) > 4 for spec in op.outputs)


def _is_float32(op: Looked) -> bool:
    return not op.is_any("cast") and any(spec.dtype == "float32" for spec in op.outputs)


def _is_unpacked(op: Looked) -> bool:
    """Tell whether the last axis is short: it is padded to 64 bytes, 32 numbers of 16 bits."""
    return any(
        len(spec.shape) > 1 and 0 < spec.shape[-1] * _BYTES.get(spec.dtype, 2) < _PACKED / 2
        for spec in op.outputs
        if spec.dtype.startswith("float")
    )


def _is_other_rank(op: Looked) -> bool:
    return any(spec.dtype.startswith("float") and len(spec.shape) != 4 for spec in op.outputs)


def _is_dilated(op: Looked) -> bool:
    held = op.operation.constant("dilations") if op.is_any("conv") else None
    return held is not None and max(held.plain() or [1]) > 1


def _is_long_argmax(op: Looked) -> bool:
    longest = max((size for spec in op.inputs for size in spec.shape), default=0)
    return op.is_any("reduce_argmax", "reduce_argmin") and longest > _SEARCHED


def _is_large(op: Looked) -> bool:
    return any(math.prod(spec.shape) * _BYTES.get(spec.dtype, 2) > _OPERAND_BYTES for spec in op.outputs)


RULES: tuple[Rule, ...] = (
    Rule("rank above 5", "vendor", "coremltools issue 2536", "Split the axes.", _is_deep),
    Rule(
        "32-bit arithmetic",
        "vendor",
        f"{_STABLE}, README; coremltools issue 1761",
        "Write precision: f16; what overflows 16 bits stays, and runs on GPU or CPU.",
        _is_float32,
    ),
    Rule(
        "linear or matmul",
        "vendor",
        f"{_STABLE}, linear_to_conv2d_map",
        f"{_FORM}: they become 1x1 convolutions and products by head.",
        _is_product,
    ),
    Rule(
        "reshape or transpose",
        "vendor",
        f"{_ANE}, principles 2 and 3",
        f"{_FORM}: heads are split instead.",
        lambda op: op.is_any("reshape", "transpose"),
    ),
    Rule("not four axes", "vendor", f"{_ANE}, principle 1", f"{_FORM}: tensors are (B, C, 1, S).", _is_other_rank),
    Rule(
        "short last axis",
        "vendor",
        f"{_ANE}, principle 1",
        "Put the longest axis last: the last one is padded to 64 bytes.",
        _is_unpacked,
    ),
    Rule("top-k", "reported", _TOPK, "Choose outside of the network.", lambda op: op.is_any("topk")),
    Rule("gather behind top-k", "reported", _TOPK, "Choose outside of the network.", _is_behind_topk),
    Rule(
        "embedding lookup",
        "reported",
        f"{_PLANS}: WhisperKit",
        "Expect one hop to the CPU, or look up outside of the network.",
        lambda op: op.is_any("gather", "gather_nd", "gather_along_axis"),
    ),
    Rule("an axis too long", "unofficial", _GUIDE, "Cut the tensor: 16,384 wide or high, 65,536 channels.", _is_long),
    Rule("kernel wider than 13", "unofficial", _GUIDE, "Factor the convolution.", _is_wide),
    Rule("dilated convolution", "unofficial", f"{_GUIDE}; they disagree", _LOOK, _is_dilated),
    Rule("arg-max over more than 2,048", "unofficial", _GUIDE, "Search outside of the network.", _is_long_argmax),
    Rule("an operation it lacks", "unofficial", _GUIDE, _LOOK, lambda op: op.is_any(*_LACKING)),
    Rule("convolution in three dimensions", "unofficial", _GUIDE, "Use two.", _is_deep_conv),
    Rule("an operand above 2 MB", "unofficial", _GUIDE, "Make the image or the batch smaller.", _is_large),
)
"""In the order in which they are told."""


def lint(packages: Sequence[Package], modules: Mapping[str, str]) -> Placement:
    """Look through programs.

    Args:
        packages: of a component.
        modules: operation -> path of the torch module that it came from.
    """
    broken: dict[str, list[str]] = {rule.name: [] for rule in RULES}
    risky = seen = 0
    for package in packages:
        for op in _looked(package):
            rules = [rule for rule in RULES if rule.holds(op)]
            for rule in rules:
                broken[rule.name].append(_named(op.operation, modules))
            seen += 1
            risky += any(rule.strength in COUNTED for rule in rules)
    found = [
        Finding(rule.name, rule.strength, rule.source, rule.fix, len(names), tuple(names[:_SHOWN]))
        for rule in RULES
        if (names := broken[rule.name])
    ]
    return Placement("Neural Engine", tuple(found), risky, seen)


def _named(operation: Operation, modules: Mapping[str, str]) -> str:
    module = modules.get(operation.name, "")
    return f"{operation.name} ({operation.type}{', ' if module else ''}{module})"


def _looked(package: Package) -> Iterable[Looked]:
    """Yield the operations of a program that compute: unpacking of weights is none."""
    known = {feature.spec.name: feature.spec for feature in package.inputs}
    makers: dict[str, str] = {}
    constant = {name: TensorSpec(name, held.dtype, held.shape) for name, held in package.constants.items()}
    for operation in package.operations:
        if operation.type.startswith("constexpr_"):
            constant |= {spec.name: spec for spec in operation.outputs}
            continue
        names = [name for given in operation.inputs.values() if isinstance(given, tuple) for name in given]
        single = [given.name for given in operation.inputs.values() if not isinstance(given, tuple)]
        weights = tuple(constant[name] for name in (*names, *single) if name in constant)
        inputs = tuple(known[name] for name in names if name in known)
        yield Looked(operation, inputs, weights, tuple(makers.get(name, "") for name in names))
        known |= {spec.name: spec for spec in operation.outputs}
        makers |= {spec.name: operation.type for spec in operation.outputs}

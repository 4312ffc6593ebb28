"""What a quantized component is held to: its own graph at its word, and itself in float on the same target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.artifact import Artifact
from exporter.lowering.engine import Column, Workshop, compile_part, export_part
from exporter.networks.quantization import read_quantization
from exporter.states import components_of


@dataclass(frozen=True)
class Quantized:
    """What a quantized component is held to.

    Attributes:
        graph: its own, which says what it means: torch has no answers of such a state.
        floats: precision -> the same component before it was quantized, compiled.
    """

    graph: Path
    floats: Mapping[str, Path]


@dataclass(frozen=True)
class Lowered:
    """A state on a target, and what it is held to there.

    Attributes:
        engine: of all its components.
        fixed: the denoiser compiled with fixed shapes, where the recipe opens them.
        quantized: what its quantized components are held to, by name.
    """

    engine: Artifact
    fixed: Artifact | None
    quantized: Mapping[str, Quantized]


def quantized_of(
    exported: Mapping[str, Artifact], earlier: Sequence[Artifact], column: Column, shop: Workshop
) -> dict[str, Quantized]:
    """Return the components of a state that are quantized, each with its float engines on a target.

    Args:
        exported: the state's components.
        earlier: the states that it was made from, the last one first.
        column: where it is measured.
        shop: what lowering shares.

    Raises:
        ToolMissing, ComponentFailed: as `compile_state`.
    """
    return {
        name: Quantized(onnx.path / "model.onnx", _floats(name, earlier, column, shop))
        for name, onnx in exported.items()
        if "quantized" in onnx.manifest.facts
    }


def _floats(name: str, earlier: Sequence[Artifact], column: Column, shop: Workshop) -> dict[str, Path]:
    """Compile a component as it was in float, at the column's own precision and at the device's fastest."""
    known = ((state, part) for state in earlier for part in components_of(state.path, shop.requested))
    found = next(
        (state, part)
        for state, part in known
        if part.name == name and read_quantization(state.path / part.folder) is None
    )
    onnx = export_part(*found, shop)
    own = getattr(column.options, "precision", "")
    precisions = dict.fromkeys([own, *column.target.capabilities().precisions[-1:]]) if own else {"": None}
    made = {}
    for precision in precisions:
        options = replace(column.options, precision=precision) if precision else column.options
        made[precision] = compile_part(onnx, name, replace(column, options=options), shop).path
    return made

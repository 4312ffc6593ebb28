"""What a quantized component is held to: its own graph at its word, and itself in float on the same target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.artifact import Artifact
from exporter.compiling import float_options
from exporter.lowering.engine import compile_part, export_rivals
from exporter.lowering.workshop import Column, Workshop
from exporter.metrics.sparse import Weighed
from exporter.networks.components import Component
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
        exported: the artifacts that its components were compiled from, by name.
    """

    engine: Artifact
    fixed: Artifact | None
    quantized: Mapping[str, Quantized]
    exported: Mapping[str, Artifact]

    def weighed(self, name: str) -> Weighed:
        """Return what the graph of a component shows of its weights."""
        from exporter.lowering.sparsity_report import weigh  # seconds to import

        return weigh(self.exported[name].path / "model.onnx")


def quantized_of(
    state: Artifact, exported: Mapping[str, Artifact], column: Column, shop: Workshop
) -> dict[str, Quantized]:
    """Return the components of a state that are quantized, each with its float engines on a target.

    Args:
        state: what was exported.
        exported: its components.
        column: where it is measured.
        shop: what lowering shares.

    Raises:
        ToolMissing, ComponentFailed: as `compile_state`.
    """
    found = {}
    for part in components_of(state.path, shop.requested):
        onnx = exported.get(part.name)
        if onnx is not None and "quantized" in onnx.manifest.facts:
            floats = {} if column.target.capabilities().untimed else _floats(state, part, column, shop)
            found[part.name] = Quantized(onnx.path / "model.onnx", floats)
    return found


def _floats(state: Artifact, part: Component, column: Column, shop: Workshop) -> dict[str, Path]:
    """Compile a component as it is in float, in all that it could be served in: precisions of options, or graphs."""
    made = {}
    for scheme, onnx in export_rivals(state, part, column.target, shop).items():
        for precision, options in float_options(column.target, column.options).items():
            name = precision or scheme
            made[name] = compile_part(onnx, part.name, replace(column, options=options), shop).path
    return made

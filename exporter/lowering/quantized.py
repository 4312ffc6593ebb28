"""The graph of a quantized component: exported in float, held to torch, then rounded as its state says."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibration.errors import CalibrationError
from calibration.fitting import Fit
from calibration.qdq import Manner, write_quantized
from calibration.schemes import unit_of
from calibration.sites import sites_of
from exporter.errors import ComponentFailed
from exporter.lowering.options import ExportOptions
from exporter.networks.components import Component
from exporter.networks.quantization import FIT, Quantization

FLOAT_FILE = "model.onnx"


def write_float_graph(component: Component, folder: Path, digest: str, out: Path, options: ExportOptions) -> Path:
    """Export a component in float into a folder of its own, its weights beside it and folded, as they are quantized.

    Args:
        component: of a state.
        folder: its folder in the state.
        digest: of that folder.
        out: made, or emptied.
        options: shapes and opset.

    Returns:
        The ONNX file.
    """
    from exporter.lowering.export import export_component  # seconds to import
    from exporter.lowering.stored import stored_weights
    from exporter.lowering.wrappers import part_of
    from exporter.networks.storage import open_bare
    from targets.selfcontained import write_self_contained

    shutil.rmtree(out, ignore_errors=True)
    pointing = out / "pointing"
    pointing.mkdir(parents=True)
    bare, weights = stored_weights(open_bare(folder, cls=component.cls), digest)
    export_component(component.name, part_of(component, bare), pointing, options, weights=weights)
    write_self_contained(pointing / FLOAT_FILE, out)
    shutil.rmtree(pointing)
    return out / FLOAT_FILE


def write_rounded(graph: Path, folder: Path, told: Quantization, out: Path) -> Mapping[str, Any]:
    """Write the quantized graph of a component and return what became of its layers.

    Args:
        graph: from `write_float_graph`.
        folder: of the component in its state.
        told: how it is quantized.
        out: an existing folder.

    Raises:
        ComponentFailed: the state's ranges are of another network.
    """
    import onnx_ir as ir

    sites = sites_of(ir.load(graph).graph)
    schemes = {name: told.plan[unit] for name in sites if (unit := unit_of(name, told.plan)) is not None}
    try:
        fit = Fit.load(folder / FIT) if (folder / FIT).is_file() else None
        written = write_quantized(graph, out, schemes, fit, Manner(told.group, told.results))
    except CalibrationError as error:
        raise ComponentFailed(str(error)) from error
    counts: dict[str, int] = {}
    for scheme in written.schemes.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    return {"layers": counts, "weight_bytes": written.weight_bytes}

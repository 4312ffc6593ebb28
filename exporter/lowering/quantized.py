"""The graph of a quantized component: exported in float, held to torch, then rounded as its state says."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.errors import CalibrationError
from calibration.fitting import Fit
from calibration.qdq import Manner, write_quantized
from calibration.schemes import FLOAT, NARROW, unit_of
from calibration.sites import sites_of
from exporter.errors import ComponentFailed
from exporter.lowering.options import ExportOptions
from exporter.networks.components import Component
from exporter.networks.quantization import FIT, Quantization

if TYPE_CHECKING:  # seconds to import
    from exporter.lowering.parity import Call

FLOAT_FILE = "model.onnx"


def export_quantized(  # noqa: PLR0913 - a component, how it is rounded, what it is asked, and where all goes
    component: Component,
    folder: Path,
    digest: str,
    quantization: Quantization,
    calls: Sequence[Call],
    places: tuple[Path, Path],
    options: ExportOptions,
) -> Mapping[str, Any]:
    """Export in float, hold that to torch, then round it; what rounding changes is the report's matter, not ours.

    Args:
        component: of a state.
        folder: its folder in the state.
        digest: of that folder.
        quantization: from it.
        calls: that the float graph and torch are asked.
        places: where the float graph is made, for a while, and the folder of the rounded one.
        options: shapes and opset.

    Returns:
        Facts, JSON-ready.

    Raises:
        ComponentFailed: the float graph answers differently from torch, or the state's ranges are of another network.
    """
    from exporter.lowering.parity import compare_answers, torch_answers  # seconds to import
    from exporter.lowering.wrappers import part_of
    from exporter.lowering.zeros import check_zeros
    from exporter.networks.sparsity import load_claims
    from exporter.networks.storage import load_network

    graph, out = places
    write_float_graph(component, folder, digest, graph.parent, options)
    wanted = torch_answers(part_of(component, load_network(folder, cls=component.cls)), calls)
    parity = compare_answers(component.name, wanted, graph, calls)
    told = _write_rounded(graph, folder, quantization, out)
    shutil.rmtree(graph.parent)
    zeros = check_zeros([out / FLOAT_FILE], load_claims(folder), component.name)
    return {"component": component.name, "parity": parity, "zeros": zeros, "quantized": told}


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


def _write_rounded(graph: Path, folder: Path, told: Quantization, out: Path) -> Mapping[str, Any]:
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

    def scheme_of(path: str) -> str:
        unit = unit_of(path, told.plan)
        scheme = FLOAT if unit is None else told.plan[unit]
        return FLOAT if scheme in NARROW and path in told.wide else scheme

    model = ir.load(graph)
    schemes = {name: scheme_of(name) for name in sites_of(model.graph)}
    type_of = scheme_of if {*told.plan.values()} & {*NARROW} else None
    try:
        fit = Fit.load(folder / FIT) if (folder / FIT).is_file() else None
        written = write_quantized(graph, out, schemes, fit, Manner(told.group, told.results, type_of=type_of))
    except CalibrationError as error:
        raise ComponentFailed(str(error)) from error
    counts: dict[str, int] = {}
    for scheme in written.schemes.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    return {"layers": counts, "weight_bytes": written.weight_bytes}

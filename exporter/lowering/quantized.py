"""The graph of a quantized component: the one in float, rounded as its state says."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.errors import CalibrationError
from calibration.fitting import Fit
from calibration.qdq import Manner, write_quantized
from calibration.schemes import FLOAT, NARROW, unit_of
from calibration.sites import sites_of
from exporter.artifact import Artifact, link_file
from exporter.errors import ComponentFailed
from exporter.networks.components import Component
from exporter.networks.quantization import FIT, Quantization
from targets.base import RANGES
from targets.palettes import palettize

FLOAT_FILE = "model.onnx"


def export_quantized(
    component: Component, folder: Path, quantization: Quantization, plain: Artifact, places: tuple[Path, Path]
) -> Mapping[str, Any]:
    """Round the graph of a component as its state says; what rounding changes is the report's matter, not ours.

    Args:
        component: of a state.
        folder: its folder in the state.
        quantization: from it.
        plain: the component exported in float, which was held to torch.
        places: where the float graph lies folded, for a while, and the folder of the rounded one.

    Returns:
        Facts, JSON-ready.

    Raises:
        ComponentFailed: the state's ranges are of another network.
    """
    from exporter.lowering.zeros import check_zeros  # seconds to import
    from exporter.networks.sparsity import load_claims

    work, out = places
    told = _write_rounded(write_folded(plain.path / FLOAT_FILE, work), folder, quantization, out)
    shutil.rmtree(work)
    _link_ranges(plain, out)
    zeros = check_zeros([out / FLOAT_FILE], load_claims(folder), component.name)
    return {"component": component.name, "zeros": zeros, "quantized": told}


def export_narrow(component: Component, scheme: str, plain: Artifact, places: tuple[Path, Path]) -> Mapping[str, Any]:
    """Write a float graph with all of its layers in 16 bits: what a quantized one is timed against, not compared with.

    Args:
        component: of a state.
        scheme: ``fp16`` or ``bf16``.
        plain: the component exported in float.
        places: as for `export_quantized`.
    """
    work, out = places
    graph = write_folded(plain.path / FLOAT_FILE, work)
    schemes = dict.fromkeys(sites_of(ir.load(graph).graph), scheme)
    write_quantized(graph, out, schemes, None, Manner(type_of=lambda path: scheme))
    shutil.rmtree(work)
    _link_ranges(plain, out)
    return {"component": component.name, "scheme": scheme}


def _link_ranges(plain: Artifact, out: Path) -> None:
    if (plain.path / RANGES).is_file():
        link_file(plain.path / RANGES, out / RANGES)


def write_folded(source: Path, out: Path) -> Path:
    """Write a graph whose weights lie in its state with weights of its own, folded, as they are quantized.

    Args:
        source: the ONNX file.
        out: made, or emptied.

    Returns:
        The ONNX file.
    """
    from targets.selfcontained import write_self_contained

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_self_contained(source, out)
    return out / FLOAT_FILE


def _write_rounded(graph: Path, folder: Path, told: Quantization, out: Path) -> Mapping[str, Any]:
    """Write the quantized graph of a component and return what became of its layers.

    Args:
        graph: in float, folded.
        folder: of the component in its state.
        told: how it is quantized.
        out: an existing folder.

    Raises:
        ComponentFailed: the state's ranges are of another network.
    """

    def scheme_of(path: str) -> str:
        unit = unit_of(path, told.plan)
        scheme = FLOAT if unit is None else told.plan[unit]
        return FLOAT if scheme in NARROW and path in told.wide else scheme

    model = ir.load(graph)
    schemes = {name: scheme_of(name) for name in sites_of(model.graph)}
    type_of = scheme_of if {*told.plan.values()} & {*NARROW} else None
    manner = Manner(told.group, told.results, type_of=type_of, palettize=palettize)
    try:
        fit = Fit.load(folder / FIT) if (folder / FIT).is_file() else None
        written = write_quantized(graph, out, schemes, fit, manner)
    except CalibrationError as error:
        raise ComponentFailed(str(error)) from error
    counts: dict[str, int] = {}
    for scheme in written.schemes.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    return {"layers": counts, "weight_bytes": written.weight_bytes}

"""Takes the figures of quantizing a U-Net of Stable Diffusion 1.5's size on this machine, on random weights.

``python ci/bench_real_quantizing.py OUT`` makes a random U-Net (f32), exports it, fits ranges on calls of standard
normal inputs, writes one graph a scheme, compiles for OpenVINO bf16 and times all engines against the float one in
turn, in one run; then it asks the runtime where the time goes. Each step is a process of its own and prints one JSON
line with its most memory, in all and without mapped files. ``--only`` takes some of the variants, ``--steps`` some of
the steps.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bench_real_pruning import Step, carry_out, in_turn, parser_of
from bench_real_size import CLS, TOKENS, clock, emptied
from bench_real_size import STEPS as SIZE_STEPS

VARIANTS: MappingProxyType[str, tuple[str, str]] = MappingProxyType(
    {
        "dense": ("float", "float"),
        "int8": ("int8", "int8"),
        "int8-but-products": ("int8", "float"),
        "int8-weights": ("int8-weights", "float"),
        "int4-weights": ("int4-weights", "float"),
    }
)
"""Name -> the scheme of layers with weights, and that of products of activations."""
TIMESTEPS = (900.0, 100.0)
ROUNDS = 12
SLOWEST = 12


def main() -> int:
    """Run one step of one variant, or all of them in processes of their own; return the exit status."""
    parser = parser_of(__doc__ or "", VARIANTS, "make,float,fit,write,compile,together,layers")
    return carry_out(parser.parse_args(), STEPS, PER_VARIANT)


def _make(given: Namespace, _: str) -> dict[str, Any]:
    given.out.mkdir(parents=True, exist_ok=True)
    return SIZE_STEPS["make"](Namespace(family=given.family, out=given.out / "dense"))


def _float(given: Namespace, _: str) -> dict[str, Any]:
    """Export in float, weights in the forms that they are quantized in."""
    from exporter.lowering.export import export_component
    from exporter.lowering.options import ExportOptions
    from exporter.lowering.quantized import write_folded
    from exporter.lowering.stored import stored_weights
    from exporter.networks.storage import open_bare

    options = ExportOptions(guided=False, latent=given.latent, tokens=TOKENS)
    bare, weights = stored_weights(open_bare(given.out / "dense" / "unet", cls=CLS), "0" * 64)
    with clock() as took:
        export_component("unet", bare, emptied(given.out / "pointing"), options, weights=weights)
        write_folded(given.out / "pointing" / "model.onnx", given.out / "float")
    return {"seconds": took[0], "bytes": _bytes(given.out / "float")}


def _fit(given: Namespace, _: str) -> dict[str, Any]:
    """Fit ranges in two passes over the calls."""
    from calibration.fitting import fit
    from calibration.statistics import Study
    from exporter.quantizing.stage import as_written

    calls = [_feeds(given, timestep) for timestep in TIMESTEPS]
    study = Study(given.out / "float" / "model.onnx", calls, as_written, emptied(given.out / "work"), lambda: None)
    with clock() as took:
        found = fit(study)
    found.save(given.out / "fit.safetensors")
    return {"seconds": took[0], "calls": len(calls), "facts": dict(found.facts)}


def _write(given: Namespace, variant: str) -> dict[str, Any]:
    import onnx_ir as ir

    from calibration.fitting import Fit
    from calibration.qdq import write_quantized
    from calibration.sites import sites_of

    graph, out = given.out / "float" / "model.onnx", emptied(given.out / variant / "onnx")
    layers, products = VARIANTS[variant]
    sites = sites_of(ir.load(graph).graph)
    schemes = {name: products if site.kind == "product" else layers for name, site in sites.items()}
    with clock() as took:
        write_quantized(graph, out, schemes, Fit.load(given.out / "fit.safetensors"))
    size = _bytes(out)
    return {"seconds": took[0], "bytes": size, "of_f32": round(size / _bytes(given.out / "float"), 4)}


def _compile(given: Namespace, variant: str) -> dict[str, Any]:
    target = _target()
    folder = emptied(given.out / variant / "engine")
    with clock() as took:
        target.compile(given.out / variant / "onnx" / "model.onnx", folder, target.options(precision="bf16"))
    return {"seconds": took[0], "engine_bytes": _bytes(folder)}


def _together(given: Namespace, _: str) -> dict[str, Any]:
    """Call every engine once per round; ratios are taken to the float one in the same round."""
    feeds = _feeds(given, 501.0)
    sessions = {variant: _open(given, variant) for variant in given.names}
    return in_turn({variant: partial(session, feeds) for variant, session in sessions.items()}, ROUNDS)


def _layers(given: Namespace, variant: str) -> dict[str, Any]:
    """Ask the runtime what its layers take, by kind and precision, and which are the slowest."""
    timed = _open(given, variant).profile(_feeds(given, 501.0), 3)
    kinds: dict[str, float] = {}
    for item in timed:
        name = f"{item.layer.type} {item.layer.precision}"
        kinds[name] = kinds.get(name, 0.0) + item.ms
    by_time = sorted(kinds.items(), key=lambda entry: -entry[1])[:SLOWEST]
    slowest = sorted(timed, key=lambda item: -item.ms)[:SLOWEST]
    return {
        "ms": {name: round(value, 1) for name, value in by_time},
        "slowest": [[item.layer.name, item.layer.precision, round(item.ms, 1)] for item in slowest],
    }


def _open(given: Namespace, variant: str) -> Any:
    target = _target()
    return target.open(given.out / variant / "engine", target.options(precision="bf16"))


def _target() -> Any:
    import targets

    return targets.target("openvino")


def _feeds(given: Namespace, timestep: float) -> dict[str, Any]:
    """Return standard normal inputs of the graph's shapes; every input but the timestep."""
    import numpy as np
    import onnx_ir as ir

    draw = np.random.default_rng(0).standard_normal
    inputs = ir.load(given.out / "float" / "model.onnx").graph.inputs
    shapes = {value.name or "": value.shape.numpy() for value in inputs if value.shape is not None}
    found: dict[str, Any] = {name: draw(shape, dtype=np.float32) for name, shape in shapes.items() if shape}
    return {**found, "timestep": np.full(shapes["timestep"], timestep, np.float32)}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if not path.name.startswith("."))


PER_VARIANT = ("write", "compile", "layers")
STEPS: MappingProxyType[str, Step] = MappingProxyType(
    {
        "make": _make,
        "float": _float,
        "fit": _fit,
        "write": _write,
        "compile": _compile,
        "together": _together,
        "layers": _layers,
    }
)

if __name__ == "__main__":
    sys.exit(main())

"""Builds engines of a U-Net of Stable Diffusion 1.5's size with TensorRT-RTX, on random weights and without a GPU.

``python ci/bench_real_tensorrt.py OUT`` makes a random U-Net, or takes the embedded one (``--family embedded --latent
8``), prunes a copy of it to two zeros in four, exports both, fits ranges on calls of standard normal inputs, writes a
graph a scheme, looks at its sparsity, holds its answer in ONNX Runtime to the network's in f32, and builds it. Each
step is a process of its own and prints one JSON line with its time and its most memory. No engine is run: what it
computes in is read from the builder's log; how fast it is, or whether a sparse kernel is in it, is not known.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from types import MappingProxyType
from typing import Any

from bench_real_pruning import STEPS as PRUNING_STEPS
from bench_real_pruning import Step, carry_out, parser_of
from bench_real_quantizing import STEPS as QUANTIZING_STEPS
from bench_real_quantizing import TIMESTEPS
from bench_real_size import clock, emptied, feeds_of

SPARSE = "magnitude-2of4"
VARIANTS: MappingProxyType[str, tuple[str, str, tuple[str, ...]]] = MappingProxyType(
    {
        "fp16": ("dense", "fp16", ("8.6",)),
        "2of4-fp16": (SPARSE, "fp16", ("8.6",)),
        "2of4-int8": (SPARSE, "int8", ("8.6",)),
        "fp8": ("dense", "fp8", ("8.9",)),
    }
)
"""Name -> the network, the scheme of all that it has, and the devices."""


def main() -> int:
    """Run one step of one variant, or all of them in processes of their own; return the exit status."""
    steps, families = "make,networks,fit,write,sparsity,parity,build", ("sd15", "narrow", "embedded")
    parser = parser_of(__doc__ or "", VARIANTS, steps, families)
    return carry_out(parser.parse_args(), STEPS, PER_VARIANT)


def _make(given: Namespace, variant: str) -> dict[str, Any]:
    """Make the network: random of a real size, or the embedded model's own."""
    if given.family != "embedded":
        return QUANTIZING_STEPS["make"](given, variant)
    from exporter.reference import SHAPES

    shutil.copytree(SHAPES / "unet", given.out / "dense" / "unet", dirs_exist_ok=True)
    return {"bytes": sum(path.stat().st_size for path in (given.out / "dense" / "unet").iterdir())}


def _networks(given: Namespace, _: str) -> dict[str, Any]:
    """Prune one copy, export both, and fold their weights into the forms that they are quantized in."""
    from exporter.lowering.quantized import write_folded

    PRUNING_STEPS["prune"](given, SPARSE)
    told = {name: PRUNING_STEPS["export"](given, name)["zeros"] for name in ("dense", SPARSE)}
    with clock() as took:
        for name in told:
            write_folded(given.out / name / "onnx" / "model.onnx", given.out / name / "float")
    return {"zeros": told, "fold_s": took[0]}


def _fit(given: Namespace, variant: str) -> dict[str, Any]:
    """Fit ranges in two passes over the calls, where the scheme rounds activations."""
    from calibration.fitting import fit
    from calibration.schemes import ROUNDING
    from calibration.statistics import Study
    from exporter.quantizing.stage import as_written

    network, scheme, _ = VARIANTS[variant]
    if scheme not in ROUNDING:
        return {}
    graph, work = given.out / network / "float" / "model.onnx", emptied(given.out / f"{variant}-work")
    calls = [feeds_of(given.out / "dense" / "unet", given.latent, timestep) for timestep in TIMESTEPS]
    with clock() as took:
        fit(Study(graph, calls, as_written, work, lambda: None)).save(given.out / f"{variant}.safetensors")
    return {"seconds": took[0]}


def _write(given: Namespace, variant: str) -> dict[str, Any]:
    import onnx_ir as ir

    from calibration.fitting import Fit
    from calibration.qdq import Manner, write_quantized
    from calibration.schemes import NARROW
    from calibration.sites import sites_of

    network, scheme, _ = VARIANTS[variant]
    graph, out = given.out / network / "float" / "model.onnx", emptied(given.out / variant / "onnx")
    fitted = given.out / f"{variant}.safetensors"
    manner = Manner(results=True, type_of=(lambda path: scheme) if scheme in NARROW else None)
    with clock() as took:
        schemes = dict.fromkeys(sites_of(ir.load(graph).graph), scheme)
        write_quantized(graph, out, schemes, Fit.load(fitted) if fitted.is_file() else None, manner)
    return {"seconds": took[0], "bytes": sum(path.stat().st_size for path in out.iterdir())}


def _sparsity(given: Namespace, variant: str) -> dict[str, Any]:
    from exporter.lowering.sparsity_report import product_share, sparse_weights, summary

    with clock() as took:
        found = sparse_weights(given.out / variant / "onnx" / "model.onnx")
    having = sum(item.pattern for item in found)
    taken = sum(not item.reason for item in found)
    share = product_share(found)
    told = {"weights": len(found), "2of4": having, "could_be_taken": taken, "product_share": share}
    return {"seconds": took[0], **told, "says": summary(found)[-1]}


def _parity(given: Namespace, variant: str) -> dict[str, Any]:
    """Hold a graph to its network in f32, both as they are written, on a call that no range was fitted on."""
    import numpy as np

    from exporter.metrics.fidelity import compare
    from targets.base import TargetError
    from targets.ort import OnnxRuntime

    network = VARIANTS[variant][0]
    feeds = feeds_of(given.out / "dense" / "unet", given.latent, 401.0, seed=1)
    answers = []
    for folder in (given.out / network / "float", given.out / variant / "onnx"):
        try:
            session = OnnxRuntime().open_as_written(folder / "model.onnx")
            answers.append(session(feeds)["out_sample"].astype(np.float32)[None])
        except TargetError as error:
            return {"psnr_db": None, "because": str(error)[:200]}
        session.close()
    found = compare(*answers)
    return {"psnr_db": round(found.psnr_db[0], 2), "cosine": round(found.cosine[0], 6), "bad": found.bad[0]}


def _build(given: Namespace, variant: str) -> dict[str, Any]:
    import targets

    target, out = targets.target("tensorrt-rtx"), emptied(given.out / variant / "engine")
    with clock() as took:
        options = target.options(devices=VARIANTS[variant][2])
        target.compile(given.out / variant / "onnx" / "model.onnx", out, options)
    evidence = target.built(out)  # type: ignore[attr-defined]
    kinds: dict[str, int] = {}
    for layer in evidence.layers:
        if layer.type in ("gemm", "correlation"):
            kinds[layer.precision] = kinds.get(layer.precision, 0) + 1
    size = (out / target.engine_file).stat().st_size
    return {"seconds": took[0], "engine_bytes": size, "layers": len(evidence.layers), "heavy": kinds}


PER_VARIANT = ("fit", "write", "sparsity", "parity", "build")
STEPS: MappingProxyType[str, Step] = MappingProxyType(
    {
        "make": _make,
        "networks": _networks,
        "fit": _fit,
        "write": _write,
        "sparsity": _sparsity,
        "parity": _parity,
        "build": _build,
    }
)

if __name__ == "__main__":
    sys.exit(main())

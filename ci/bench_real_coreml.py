"""Converts a U-Net of Stable Diffusion 1.5's size to Core ML, on random weights, and evaluates a call of each package.

``python ci/bench_real_coreml.py OUT`` makes a random U-Net, answers a call in torch, converts it in 16 and as 6-bit
palettes, whole and in two chunks each, as a recipe does it (with the search for what overflows, on that call), and lets
our evaluator answer the same call. Each step is a process of its own and prints one JSON line with its time and its
most memory. Core ML itself runs nowhere here: times are those of this machine, and say nothing about a device.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from argparse import Namespace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bench_real_pruning import Step, carry_out, parser_of
from bench_real_quantizing import STEPS as QUANTIZING_STEPS
from bench_real_size import CLS, clock, feeds_of

VARIANTS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "f32": {"precision": "f32"},
        "f16": {},
        "f16-chunks": {"chunks": 2},
        "palette-6": {"weights": "palette-6"},
        "palette-6-chunks": {"weights": "palette-6", "chunks": 2},
    }
)
"""Name -> options of the target."""
_CALLS = 3


def main() -> int:
    """Run one step of one variant, or all of them in processes of their own; return the exit status."""
    parser = parser_of(__doc__ or "", VARIANTS, "make,torch,convert,evaluate")
    return carry_out(parser.parse_args(), STEPS, ("convert", "evaluate"))


def _call(given: Namespace) -> dict[str, Any]:
    found = feeds_of(given.out / "dense" / "unet", given.latent, 401.0, seed=1)
    return {name: array if array.ndim else array.reshape(()) for name, array in found.items()}


def _network(given: Namespace) -> Any:
    from exporter.networks.storage import load_network

    return load_network(given.out / "dense" / "unet", cls=CLS)


def _torch(given: Namespace, _: str) -> dict[str, Any]:
    """Answer the call in torch, in f32, and keep the answer."""
    import numpy as np
    import torch

    from exporter.lowering.wrappers import wrap

    network, feeds, times = wrap(_network(given)), _call(given), []
    for _again in range(_CALLS):
        with clock() as took, torch.inference_mode():
            answer = network(*(torch.from_numpy(array) for array in feeds.values()))
        times.append(took[0])
    np.save(given.out / "answer.npy", answer.numpy(), allow_pickle=False)
    return {"call_s": statistics.median(times)}


def _convert(given: Namespace, variant: str) -> dict[str, Any]:
    from exporter.lowering.pinned import pin_timesteps
    from exporter.lowering.wrappers import signature, wrap
    from targets.coreml import CoreMl
    from targets.coreml.package import Manifest
    from targets.torch_source import TorchProgram

    out = given.out / variant
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    network, feeds = _network(given), _call(given)
    pin_timesteps(network)
    facts = {"weights_sha256": "0" * 64}
    program = TorchProgram(
        "unet", wrap(network), feeds, signature(network).outputs, calls=(feeds,), facts=facts, is_denoiser=True
    )
    del network
    with clock() as took:
        CoreMl().convert(program, out, CoreMl.options(**VARIANTS[variant]))
    manifest = Manifest.read(out / CoreMl.engine_file)
    sizes = {name: _bytes(out / name) for name in manifest.packages}
    return {"seconds": took[0], "packages": sizes, "kept_in_float": len(manifest.kept_in_float)}


def _evaluate(given: Namespace, variant: str) -> dict[str, Any]:
    import numpy as np

    from targets.coreml import CoreMl

    want, times = np.load(given.out / "answer.npy", allow_pickle=False), []
    with clock() as loading:
        session = CoreMl().open(given.out / variant, CoreMl.options(**VARIANTS[variant]))
    for _again in range(_CALLS):
        with clock() as took:
            got = session(_call(given))["out_sample"]
        times.append(took[0])
    placement = session.evidence().placement
    worst = float(np.abs(got - want).max() / np.abs(want).max())
    risky = None if placement is None else [placement.risky, placement.operations]
    return {"load_s": loading[0], "call_s": statistics.median(times), "relative_error": worst, "at_risk": risky}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


STEPS: MappingProxyType[str, Step] = MappingProxyType(
    {"make": QUANTIZING_STEPS["make"], "torch": _torch, "convert": _convert, "evaluate": _evaluate}
)

if __name__ == "__main__":
    sys.exit(main())

"""Takes the figures of a real-size export on this machine: memory, time, and OpenVINO against a hand-written compile.

``python ci/bench_real_size.py sd15 OUT`` makes a random U-Net of SD 1.5's architecture (``sdxl``: of SDXL's) as a state
folder in OUT, each step in a process of its own, and prints one JSON line per step and the ratios at the end (``tiny``
tries the script itself). Everything runs in one go on one machine, so the ratios hold where the absolute numbers do
not. Nothing is downloaded. Torch's own export of SDXL's needs 12 GB and parity as much: leave ``bare`` and ``parity``
out of ``--steps`` where there is less.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

# The published configs of the U-Nets of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0 where they differ from
# the class's defaults.
CONFIGS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "sd15": {"sample_size": 64, "cross_attention_dim": 768},
        "sdxl": {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "narrow": {"sample_size": 16, "cross_attention_dim": 64, "block_out_channels": [32, 64, 128, 128]},
        "tiny": {
            "sample_size": 8,
            "cross_attention_dim": 256,
            "block_out_channels": [64, 128],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 1,
        },
    }
)
CLS = "UNet2DConditionModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TOKENS = 77
BLOCK = 1 << 24


def main() -> int:
    """Run one step, or all of them in processes of their own; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(CONFIGS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", default="make,ours,bare,parity,compile,call,pairs", help="which, in this order")
    parser.add_argument("--latent", type=int, help="side of the latent; the model's own by default")
    parser.add_argument("--precision", default="f32", choices=("f32", "bf16", "f16"), help="of OpenVINO")
    parser.add_argument("--budget-s", type=float, default=120.0, help="time for the latency pairs")
    parser.add_argument("--alone", choices=sorted(STEPS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.latent = given.latent or CONFIGS[given.family]["sample_size"]
    if given.alone:
        return answer(lambda: STEPS[given.alone](given))
    found: dict[str, dict[str, Any]] = {}
    for step in given.steps.split(","):
        found[step] = asked(step)
        say({step: found[step]})
    say({"ratios": _ratios(found), "machine": machine()})
    return 0


def asked(*step: str) -> dict[str, Any]:
    """Have a process of its own carry out one step of this command; return what it answers, and its most memory."""
    from exporter.metrics.size import run_child

    child = run_child([sys.executable, *sys.argv, "--alone", *step], timeout_s=7200, paths=sys.path)
    told: dict[str, Any] = json.loads(child.output.strip().splitlines()[-1])
    return {"peak_rss_mib": round(child.peak_rss_mib), "process_s": round(child.seconds, 1), **told}


def answer(step: Callable[[], dict[str, Any]]) -> int:
    """Carry out one step as a process of its own; return the exit status."""
    watch = _Anonymous()
    watch.start()
    told = step()
    say({"peak_anonymous_mib": watch.peak_mib, **told})
    return 0


def say(told: dict[str, Any]) -> None:
    """Print a line of JSON at once."""
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _ratios(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    if {"ours", "bare"} <= found.keys():
        ours, bare = found["ours"], found["bare"]
        ratios["export_peak_to_bare"] = round(ours["peak_rss_mib"] / bare["peak_rss_mib"], 3)
        ratios["export_wall_to_bare"] = round(ours["seconds"] / bare["seconds"], 3)
        ratios["export_cpu_to_bare"] = round(ours["cpu_s"] / bare["cpu_s"], 3)
        ratios["export_wall_to_bare_and_save"] = round(ours["seconds"] / (bare["seconds"] + bare["save_s"]), 3)
    if "pairs" in found:
        ratios["openvino_to_hand_written"] = found["pairs"]["ratio"]
    return ratios


def machine() -> dict[str, Any]:
    """Return what this machine has."""
    load = os.getloadavg()[0]
    return {"cores": os.cpu_count(), "memory_gib": psutil.virtual_memory().total >> 30, "load": round(load, 1)}


def _make(given: argparse.Namespace) -> dict[str, Any]:
    """Write config and random weights, one tensor in memory at a time; norms are ones, biases zeros."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        module = UNet2DConditionModel(**CONFIGS[given.family])
    folder = given.out / "unet"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**dict(module.config), "_class_name": CLS}, indent=1) + "\n")
    state = dict(sorted(module.state_dict().items()))
    header, end = {}, 0
    for name, tensor in state.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + 4 * tensor.numel()]}
        end += 4 * tensor.numel()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with (folder / WEIGHTS).open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in state.items():
            if tensor.ndim > 1:
                values = torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5
            else:
                values = torch.full(tensor.shape, float(name.endswith("weight")))
            stream.write(values.numpy().data)
    return {"parameters": sum(tensor.numel() for tensor in state.values()), "bytes": end}


def _ours(given: argparse.Namespace) -> dict[str, Any]:
    """Export as a run does: no weights in memory."""
    from exporter.lowering.export import export_component
    from exporter.lowering.stored import stored_weights
    from exporter.networks.storage import open_bare

    out = emptied(given.out / "ours")
    bare = open_bare(given.out / "unet", cls=CLS)
    with clock() as took:
        module, weights = stored_weights(bare, "0" * 64)
        export_component("unet", module, out, _options(given), weights=weights)
    return {"seconds": took[0], "cpu_s": took[1], "graph_bytes": (out / "model.onnx").stat().st_size}


def _bare(given: argparse.Namespace) -> dict[str, Any]:
    """Export as the library's own documentation does it: the module in memory, one call, one save."""
    import torch

    from exporter.lowering.wrappers import Sizes, example_feeds, wrap
    from exporter.networks.storage import load_network

    module = load_network(given.out / "unet", cls=CLS)
    feeds = example_feeds(module, Sizes(1, given.latent, TOKENS))
    with clock() as took, torch.no_grad():
        program = torch.onnx.export(wrap(module), feeds, dynamo=True, opset_version=20, verbose=False)
    out = emptied(given.out / "bare")
    with clock() as saved:
        program.save(str(out / "model.onnx"), external_data=True)
    for path in out.iterdir():
        path.unlink()
    return {"seconds": took[0], "cpu_s": took[1], "save_s": saved[0]}


def _parity(given: argparse.Namespace) -> dict[str, Any]:
    """Hold the export to torch, on standard normal inputs at three timesteps."""
    from exporter.lowering.parity import compare_answers, torch_answers
    from exporter.networks.storage import load_network

    calls = [(timestep, _feeds(given, timestep)) for timestep in (981.0, 501.0, 1.0)]
    with clock() as took:
        wanted = torch_answers(load_network(given.out / "unet", cls=CLS), calls)
        found = compare_answers("unet", wanted, given.out / "ours" / "model.onnx", calls)
    return {"psnr_db": found["psnr_db"], "max_error": found["max_error"], "seconds": took[0]}


def _compile(given: argparse.Namespace) -> dict[str, Any]:
    """Compile with our target."""
    import targets

    target = targets.target("openvino")
    options = target.options(precision=given.precision)
    with clock() as took:
        target.compile(given.out / "ours" / "model.onnx", emptied(given.out / "openvino"), options)
    return {"seconds": took[0]}


def _call(given: argparse.Namespace) -> dict[str, Any]:
    """Load our engine and call it twice: the first call is what a user waits for, the second what every step takes."""
    import targets

    target = targets.target("openvino")
    feeds = _feeds(given, 501.0)
    with clock() as loaded:
        session = target.open(given.out / "openvino", target.options(precision=given.precision))
    with clock() as first:
        session(feeds)
    with clock() as second:
        session(feeds)
    return {"load_s": loaded[0], "first_call_s": first[0], "second_call_s": second[0]}


def _pairs(given: argparse.Namespace) -> dict[str, Any]:
    """Time our engine and a hand-written compile_model of the same ONNX file, pair by pair."""
    import openvino

    import targets
    from exporter.metrics.latency import Timer

    target = targets.target("openvino")
    ours = target.open(given.out / "openvino", target.options(precision=given.precision))
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": given.precision, "PERFORMANCE_HINT": "LATENCY"}
    plain = core.compile_model(str(given.out / "ours" / "model.onnx"), "CPU", settings)
    request, feeds = plain.create_infer_request(), _feeds(given, 501.0)
    pairs = Timer(budget_s=given.budget_s).interleaved(
        lambda: ours(feeds), lambda: request.infer(feeds, share_inputs=True)
    )
    ratio = pairs.ratio("hand-written").model_dump()
    return {"ours_ms": round(pairs.a.median_ms, 1), "hand_ms": round(pairs.b.median_ms, 1), "ratio": ratio}


def _options(given: argparse.Namespace) -> Any:
    from exporter.lowering.options import ExportOptions

    return ExportOptions(guided=False, latent=given.latent, tokens=TOKENS)


def _feeds(given: argparse.Namespace, timestep: float) -> dict[str, Any]:
    return feeds_of(given.out / "unet", given.latent, timestep)


def feeds_of(network: Path, latent: int, timestep: float, seed: int = 0) -> dict[str, Any]:
    """Return standard normal inputs of the shapes that the network takes; every input but the timestep."""
    import numpy as np

    from exporter.lowering.wrappers import Sizes, example_feeds, signature
    from exporter.networks.storage import open_bare

    module, values = open_bare(network, cls=CLS).module, np.random.default_rng(seed)
    shapes = (tuple(feed.shape) for feed in example_feeds(module, Sizes(1, latent, TOKENS)))
    found = {
        name: np.asarray(values.standard_normal(shape, dtype=np.float32))
        for name, shape in zip(signature(module).inputs, shapes, strict=True)
    }
    return {**found, "timestep": np.full_like(found["timestep"], timestep)}


def emptied(folder: Path) -> Path:
    """Return a folder that is there and holds no files."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    return folder


class _Anonymous(threading.Thread):
    """Watches the memory of this process that is no mapped file, where the system tells it: peaks count those too."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mib: int | None = None

    def run(self) -> None:
        """Look fifty times a second, as long as the process lives."""
        status = Path("/proc/self/status")
        while status.is_file():
            lines = status.read_text(encoding="utf-8").splitlines()
            found = [int(line.split()[1]) >> 10 for line in lines if line.startswith("RssAnon:")]
            self.peak_mib = max([*found, self.peak_mib or 0])
            time.sleep(0.02)


@contextmanager
def clock() -> Iterator[list[float]]:
    """Yield a list that holds, afterwards, the seconds that passed and those of processors: others' work counts not."""
    took: list[float] = []
    started, busy = time.monotonic(), time.process_time()
    yield took
    took += [round(time.monotonic() - started, 2), round(time.process_time() - busy, 2)]


STEPS: MappingProxyType[str, Callable[[argparse.Namespace], dict[str, Any]]] = MappingProxyType(
    {
        "make": _make,
        "ours": _ours,
        "bare": _bare,
        "parity": _parity,
        "compile": _compile,
        "call": _call,
        "pairs": _pairs,
    }
)

if __name__ == "__main__":
    sys.exit(main())

"""Takes the figures of pruning a U-Net of Stable Diffusion 1.5's size on this machine, on random weights.

``python ci/bench_real_pruning.py OUT`` makes a random U-Net (f32), prunes it by methods that need no data, exports,
compares with torch, compiles for OpenVINO bf16, and times all engines against the dense one in turn, in one run; then
it measures a latency table of the units and holds it to whole networks. Each step is a process of its own and prints
one JSON line with its most memory, in all and without mapped files. ``--only`` takes some of the variants, ``--steps``
some of the steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bench_real_size import CLS, TOKENS, answer, asked, clock, emptied, feeds_of, machine, say
from bench_real_size import STEPS as SIZE_STEPS

Step = Callable[[Namespace, str], dict[str, Any]]
VARIANTS: MappingProxyType[str, dict[str, Any] | None] = MappingProxyType(
    {
        "dense": None,
        "bk-sdm-base": {"method": "bk-sdm", "preset": "base"},
        "bk-sdm-small": {"method": "bk-sdm", "preset": "small"},
        "bk-sdm-tiny": {"method": "bk-sdm", "preset": "tiny"},
        "snapfusion": {"method": "snapfusion", "preset": "published"},
        "magnitude-2of4": {"method": "magnitude", "cut": "weights", "pattern": "2:4", "keep_ratio": 0.5},
        "schedule": None,
    }
)
DEPTHS = (0, 2, 1, 2)  # of 4 levels, over and over: three graphs
SAMPLER_STEPS = 20
ROUNDS = 12
SETS = (0.1, 0.2, 0.3)  # shares of the units that are removed at random to hold the table to


def main() -> int:
    """Run one step of one variant, or all of them in processes of their own; return the exit status."""
    parser = parser_of(__doc__ or "", VARIANTS, "make,prune,export,parity,compile,together,table")
    parser.add_argument("--precision", default="bf16", choices=("f32", "bf16"), help="of OpenVINO")
    return carry_out(parser.parse_args(), STEPS, PER_VARIANT)


def parser_of(
    description: str, variants: Iterable[str], steps: str, families: Iterable[str] = ("sd15", "narrow")
) -> argparse.ArgumentParser:
    """Return the options of a script that takes figures of variants of one network, step by step."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", default=steps, help="which, in order")
    parser.add_argument("--only", default=",".join(variants), help="variants")
    parser.add_argument("--family", default="sd15", choices=families, help="narrow tries the script itself")
    parser.add_argument("--latent", type=int, default=64, help="side of the latent")
    parser.add_argument("--alone", nargs=2, metavar=("STEP", "VARIANT"), help=argparse.SUPPRESS)
    return parser


def carry_out(given: Namespace, steps: Mapping[str, Step], per_variant: Collection[str]) -> int:
    """Run what was asked for, in processes of their own, or the one step that this process is for."""
    given.names = given.only.split(",")
    if given.alone:
        step, variant = given.alone
        return answer(lambda: steps[step](given, variant))
    for step in given.steps.split(","):
        for variant in given.names if step in per_variant else ("",):
            say({"step": step, "variant": variant, **asked(step, variant)})
    say({"machine": machine()})
    return 0


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Make every call once per round, in rotating order; return its ratio to that of dense in the same round."""
    from exporter.metrics.intervals import median_interval

    for call in calls.values():
        call()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            calls[name]()
            times[name].append(1000 * (time.perf_counter() - started))
    told: dict[str, Any] = {"rounds": rounds, "dense_ms": round(statistics.median(times["dense"]), 1)}
    for name, taken in times.items():
        ratios = [mine / dense for mine, dense in zip(taken, times["dense"], strict=True)]
        told[name] = [round(value, 3) for value in (statistics.median(ratios), *median_interval(ratios))]
    return told


def _make(given: Namespace, _: str) -> dict[str, Any]:
    given.out.mkdir(parents=True, exist_ok=True)
    return SIZE_STEPS["make"](Namespace(family=given.family, out=given.out / "dense"))


def _prune(given: Namespace, variant: str) -> dict[str, Any]:
    """Prune as a stage of a run does: load, edit, tell what changed by comparing, save."""
    import torch

    from exporter.networks.storage import load_network, parameter_count, read_config, save_network
    from exporter.networks.surgery import Snapshot, diff
    from exporter.progress import Silent
    from exporter.pruners import pruner
    from exporter.pruners.base import Context

    stage = VARIANTS[variant]
    if stage is None:
        return {}
    dense, keys = given.out / "dense" / "unet", dict(stage)
    method = pruner(keys.pop("method"))
    with clock() as took:
        network = load_network(dense, cls=CLS)
        before, count = Snapshot.of(network), parameter_count(network)
        context = Context(torch.Generator().manual_seed(0), Silent(), emptied(given.out / "work"))
        outcome = method(method.options(**keys)).prune(network, context)
        surgery = diff(before, network)
    with clock() as saved:
        config = read_config(dense, CLS)
        folder = given.out / variant / "unet"
        save_network(network, folder, surgery=surgery, original_config=config, sparsity=dict(outcome.sparsity))
    kept = parameter_count(network)
    return {"seconds": took[0], "save_s": saved[0], "parameters": kept, "kept": round(kept / count, 4)}


def _export(given: Namespace, variant: str) -> dict[str, Any]:
    """Export as a run does: no weights in memory; graphs of a schedule point into one file of weights."""
    from exporter.lowering.export import export_component
    from exporter.lowering.scheduled import export_patterns
    from exporter.lowering.stored import stored_weights
    from exporter.lowering.zeros import check_zeros
    from exporter.networks.sparsity import load_claims
    from exporter.networks.storage import open_bare

    folder, out = _state(given, variant), emptied(given.out / variant / "onnx")
    with clock() as took:
        module, weights = stored_weights(open_bare(folder, cls=CLS), "0" * 64)
        if variant == "schedule":
            export_patterns(_component(), module, weights, _schedule(), out, _options(given))
        else:
            export_component("unet", module, out, _options(given), weights=weights)
    with clock() as looked:
        zeros = check_zeros(out.glob("*.onnx"), load_claims(folder), "unet")
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return {"seconds": took[0], "bytes": sizes, "zeros": zeros, "zeros_s": looked[0]}


def _parity(given: Namespace, variant: str) -> dict[str, Any]:
    """Hold every graph to torch on standard normal inputs; caches are those that torch makes of the steps in order."""
    from exporter.lowering.parity import compare_answers, torch_answers
    from exporter.networks.storage import load_network

    network, onnx = load_network(_state(given, variant), cls=CLS), given.out / variant / "onnx"
    questions = _questions(given, variant, network)
    found = {}
    for name, (module, calls) in questions.items():
        found[name] = compare_answers("unet", torch_answers(module, calls), onnx / f"{name}.onnx", calls)["psnr_db"]
    return {"psnr_db": {name: round(value, 1) for name, value in found.items()}}


def _questions(given: Namespace, variant: str, network: Any) -> dict[str, tuple[Any, list[tuple[float, Any]]]]:
    """Return what each graph is asked, and the module that it has to answer like."""
    from exporter.lowering.parity import torch_answers
    from exporter.lowering.scheduled import cuts_of
    from exporter.networks.chain import Chain

    if variant != "schedule":
        return {"model": (network, [(501.0, _feeds(given, 501.0))])}
    schedule = _schedule()
    cuts = cuts_of(_component(), network, schedule)
    found: dict[str, tuple[Any, list[tuple[float, Any]]]] = {cut.pattern.name: (cut, []) for cut in cuts}

    def seeing(cut: Any) -> Callable[[Any], Any]:
        def ask(feeds: Any) -> Any:
            timestep = float(feeds["timestep"])
            found[cut.pattern.name][1].append((timestep, dict(feeds)))
            return torch_answers(cut, [(timestep, dict(feeds))])[0]

        return ask

    chain = Chain(schedule, [seeing(cut) for cut in cuts])
    for step in schedule.steps[: len(DEPTHS)]:
        chain(_feeds(given, step.timestep))
    return {name: (cut, calls[:1]) for name, (cut, calls) in found.items()}


def _compile(given: Namespace, variant: str) -> dict[str, Any]:
    import targets

    target, out = targets.target("openvino"), given.out / variant
    told = {}
    for path in sorted((out / "onnx").glob("*.onnx")):
        with clock() as took:
            folder = emptied(out / "engine" / path.stem)
            target.compile(path, folder, target.options(precision=given.precision))
        told[path.stem] = took[0]
    return {"seconds": told}


def _together(given: Namespace, _: str) -> dict[str, Any]:
    """Call every engine once per round, in rotating order; ratios are taken to dense in the same round."""
    import numpy as np

    import targets

    target, feeds = targets.target("openvino"), _feeds(given, 501.0)
    calls: dict[str, Callable[[], Any]] = {}
    for variant in given.names:
        for folder in sorted((given.out / variant / "engine").iterdir()):
            session = target.open(folder, target.options(precision=given.precision))
            extra = {
                spec.name: np.ones([abs(side) for side in spec.shape], np.float32)
                for spec in session.inputs
                if spec.name not in feeds
            }
            label = variant if folder.name == "model" else f"{variant} {folder.name}"
            calls[label] = partial(session, {**feeds, **extra})
    return in_turn(calls, ROUNDS)


def _table(given: Namespace, _: str) -> dict[str, Any]:
    """Time units alone and whole networks without some of them, on the target."""
    import targets
    from exporter.lowering.workshop import Column
    from exporter.networks.storage import load_network
    from exporter.progress import Lines
    from exporter.pruners.base import CutOptions
    from exporter.pruners.blocks import blocks_of, without
    from exporter.pruners.latency_table import LatencyTable, Timed
    from exporter.pruners.snapfusion import PUBLISHED_REMOVED
    from exporter.stopwatch import TargetStopwatch

    target = targets.target("openvino")
    column = Column("openvino", target, target.options(precision=given.precision))
    network = load_network(given.out / "dense" / "unet", cls=CLS)
    watch = TargetStopwatch(column, _options(given), given.out / "watch", Lines())
    blocks = {block.path: block for block in blocks_of(network, CutOptions(1.0))}
    with clock() as took:
        table = LatencyTable.of(watch, network, list(blocks))
    order = list(blocks)
    random.Random(0).shuffle(order)
    sets = [order[: round(share * len(order))] for share in SETS]
    sets += [list(PUBLISHED_REMOVED)] if set(PUBLISHED_REMOVED) <= set(blocks) else []
    seen = []
    for gone in sets:
        with without(network, [blocks[path] for path in gone]):
            seen.append(Timed(frozenset(gone), watch.whole_ms(network)))
    return {"units": len(blocks), "seconds": took[0], "control": watch.control(), **table.facts(seen)}


def _state(given: Namespace, variant: str) -> Path:
    folder: Path = given.out / ("dense" if variant == "schedule" else variant) / "unet"
    return folder


def _component() -> Any:
    from exporter.networks.components import denoiser

    return denoiser("StableDiffusionPipeline")


def _schedule() -> Any:
    from diffusers import DPMSolverMultistepScheduler

    from exporter.networks.schedule import schedule_for

    depths = [DEPTHS[index % len(DEPTHS)] for index in range(SAMPLER_STEPS)]
    return schedule_for(DPMSolverMultistepScheduler(), SAMPLER_STEPS, depths, guided=False, levels=4)


def _options(given: Namespace) -> Any:
    from exporter.lowering.options import ExportOptions

    return ExportOptions(guided=False, latent=given.latent, tokens=TOKENS)


def _feeds(given: Namespace, timestep: float) -> dict[str, Any]:
    return feeds_of(given.out / "dense" / "unet", given.latent, timestep)


PER_VARIANT = ("prune", "export", "parity", "compile")
STEPS: MappingProxyType[str, Step] = MappingProxyType(
    {
        "make": _make,
        "prune": _prune,
        "export": _export,
        "parity": _parity,
        "compile": _compile,
        "together": _together,
        "table": _table,
    }
)

if __name__ == "__main__":
    sys.exit(main())

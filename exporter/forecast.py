"""What a run will take, from the shapes of its networks and a short test of this machine; and what it took.

A run is a sequence of phases. Memory is that of the largest one, time their sum. The constants were fitted to the
seconds of processor time and to the resident memory of every phase of runs of three sizes (a pipeline of 0.3 M
parameters, the embedded model of 17 M, a U-Net of 76 M at 256 px), and looked at on SD 1.5. The record of every run
holds both sides, expected and got, so that they can be fitted again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

import psutil

from calibration.schemes import PALETTE_MIXED, PALETTES
from exporter.costs import MIB, Machine, Network, cost_of, machine
from exporter.lowering.engine import PARITY_CALLS
from exporter.lowering.options import ExportOptions
from exporter.lowering.workshop import Column
from exporter.meter import Took
from exporter.metrics.images import SSIM_BYTES, at_once
from exporter.networks.source import SourceFacts
from exporter.recipe import Recipe, StageSpec
from exporter.states import components_of, is_guided_by_rows, scheduler_of, vae_scale
from targets.torch_source import FromTorch

_DENOISER = "denoiser"
_INLINE_MIB = ExportOptions().external_bytes / MIB  # up to here a graph holds its weights itself

# Memory, MiB.
_LIBRARIES_MIB = 250  # of runtimes, exporter and drawing, which are loaded as the run goes on
_TORCH_WIDE = 8.0  # tensors as wide as the widest that torch has alive at a time
_ENGINE_WIDE = 4.0  # the same of a runtime, which keeps them between two calls
_INLINE_COPIES = 5.5  # of weights in a graph: torch's, the graph's, the file's, the session's
_TRAINED = 5.0  # weights, gradients, two moments and an average
_LOOKED_AT_COPIES, _LOOKED_AT_SCORES = 2.0, 3.0  # of weights and attention scores in a graph that values are watched in
_LEFT_MIB, _LEFT_COPIES, _LEFT_MOST_MIB = 40.0, 2.5, 120.0  # what a state leaves in the heap; larger tensors leave none

_RECORDED = 4  # tensors of a recorded call that are as large as its sample, where there is guidance

# Seconds of one core, on a machine to itself.
_REACHED = {
    "torch": 0.55,
    "openvino": 0.65,
    "onnxruntime": 0.42,
    "coreml": 0.3,
}  # of the test's speed, by whole networks
_REACHED_OTHERS = 0.5
_PIXEL_S = 1e-5  # of comparing two images, SSIM above all
_TORCH_S, _CALL_S, _CALL_WEIGHT_S = 3e-5, 3e-3, 1e-5  # beside the operations: per weight in torch; of an engine's call
_TRACE_S, _EXPORT_S = 0.02, 0.7  # of tracing and tidying: per weight of a network, and for each
_COMPILE_S = 0.3  # of starting a process and its runtime
_CONVERT_S, _CONVERTER_S = 0.019, 3.0  # of converting a network to Core ML: per weight, and of the libraries' import
_CONVERTER_MIB, _CONVERTED_COPIES = 480.0, 2.6  # of the process that does it: libraries, and weights in f32
_OPEN_S = {"openvino": 1.8e-3}  # of opening an engine, per weight; as long again to compile it
_OPEN_OTHERS_S = 8e-4
_START_S, _STATE_S, _CELL_S = 2.0, 0.6, 0.7
_SIZES, _RANGES, _TRIAL = 2.0, 6.0, 2.0  # calls of a graph that is looked at, as calls in torch; of one on trial
_UNITS, _TRIED = 60, 4  # that a plan decides on, and the calls that each is tried on
_TRAINING_S = 2.5  # beside the steps: looking at the student before and after
_BYTES_PER_S = 4e8  # copying, hashing and syncing
_BF16 = 0.6  # of the time in f32

# What `exporter.metrics.latency.Timer` does: calls of warm-up and samples, and the fewest where its budget is short.
_TIMED_CALLS, _FEWEST_CALLS = 42, 4


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take.

    Attributes:
        memory_mib: most resident memory of one process.
        needed_mib: of it, what the process does not have yet.
        disk_mib: written, files that several folders share once.
        seconds: of a run that finds nothing done, beside whatever else this machine does now.
        processor_seconds: of it, what processors work for the run, which others on the machine change little.
        phase: the phase that takes the most memory, in words.
    """

    memory_mib: int
    needed_mib: int
    disk_mib: int
    seconds: int
    processor_seconds: int
    phase: str


@dataclass(frozen=True)
class _Job:
    """What the parts of the estimate are made from.

    Attributes:
        recipe: the recipe.
        networks: of the dense state, by component, the denoiser as such.
        kept: for every measured state, by its id, how much of the dense denoiser is left.
        columns: the usable targets.
        calls: denoiser calls per image.
        pixels: of an image.
    """

    recipe: Recipe
    networks: Mapping[str, Network]
    kept: Mapping[str, float]
    columns: tuple[Column, ...]
    calls: int
    pixels: int

    @property
    def tunes(self) -> list[StageSpec]:
        """The stages that train."""
        return [stage for stage in self.recipe.stages if stage.kind == "tune"]

    @property
    def quantizes(self) -> list[tuple[StageSpec, Network]]:
        """The stages that quantize, each with its network."""
        stages = [stage for stage in self.recipe.stages if stage.kind == "quantize"]
        return [(stage, self.networks[_role(stage)]) for stage in stages if _role(stage) in self.networks]


def compare(forecast: Forecast, took: Took) -> dict[str, dict[str, float]]:
    """Return, for memory, disk and times, what was expected, what happened, and the ratio of the two.

    What nobody could see (None) is left out.
    """
    pairs = {
        "memory_mib": (forecast.memory_mib, took.memory_mib),
        "disk_mib": (forecast.disk_mib, took.disk_mib),
        "seconds": (forecast.seconds, took.seconds),
        "processor_seconds": (forecast.processor_seconds, took.processor_seconds),
    }
    return {
        name: {"expected": float(expected), "got": round(got, 1), "ratio": round(got / max(expected, 1), 3)}
        for name, (expected, got) in pairs.items()
        if got is not None
    }


def forecast(
    recipe: Recipe,
    facts: SourceFacts,
    source: Path,
    *,
    latent: int,
    measured: tuple[str, ...],
    columns: tuple[Column, ...],
) -> Forecast:
    """Return what a run is expected to take.

    Args:
        recipe: the recipe.
        facts: of the source.
        source: its folder.
        latent: side of the latent.
        measured: ids of the states that are lowered and measured.
        columns: the usable targets.
    """
    batch = recipe.sampling.batch
    rows = batch * (2 if is_guided_by_rows(source, recipe.sampling.guidance) else 1)
    networks = {}
    for part in components_of(source, recipe.export.requested):
        role = _DENOISER if part.role == _DENOISER else part.name
        stored = facts.sizes.get(part.name, facts.sizes.get("vae_decoder", 0))  # a VAE's halves share a folder
        networks[role] = cost_of(part, source, stored, rows if role == _DENOISER else batch, latent)
    kept = {state: _kept(recipe, state) for state in measured}
    calls = _calls(recipe, scheduler_of(source))
    job = _Job(recipe, networks, kept, columns, calls, (latent * vae_scale(source)) ** 2)
    here, own = machine(), psutil.Process().memory_info().rss / MIB
    phases = _memory(job)
    phase = max(phases, key=lambda name: phases[name])
    disk = _disk(job)
    files = disk * MIB / _BYTES_PER_S
    seconds = (_seconds(job, here) + files) / here.share
    alone = _seconds(job, replace(here, threads=1, cores=1)) + files
    needed = _LIBRARIES_MIB + phases[phase]
    return Forecast(int(own + needed), int(needed), int(disk), int(seconds), int(alone), phase)


def _kept(recipe: Recipe, state: str) -> float:
    """Return what a state has left of the denoiser's weights, as far as the recipe's ratios tell."""
    done = recipe.stages[: recipe.state_ids.index(state)]
    ratio = 1.0
    for stage in done:
        ratio *= float(stage.options.get("keep_ratio", 1.0)) if _role(stage) == _DENOISER else 1.0
    return ratio


def _calls(recipe: Recipe, own_scheduler: str) -> int:
    """Return how often the denoiser is asked for one image: some schedulers ask more often than they step."""
    steps = recipe.sampling.steps
    if recipe.sampling.scheduler != "source":
        return steps
    return {"PNDMScheduler": steps + 1, "HeunDiscreteScheduler": 2 * steps - 1}.get(own_scheduler, steps)


def _memory(job: _Job) -> dict[str, float]:
    """Return what each phase needs beside the program and its libraries, MiB."""
    networks, denoiser = job.networks, job.networks[_DENOISER]
    whole = sum(network.whole_mib for name, network in networks.items() if name != "vae_encoder")
    left = _LEFT_MIB + _LEFT_COPIES * min(denoiser.mib, _LEFT_MOST_MIB)
    phases = {"drawing with the dense pipeline": whole + _TORCH_WIDE * max(n.widest_mib for n in networks.values())}
    for name, network in networks.items():
        inline = _INLINE_COPIES * network.mib if network.mib <= _INLINE_MIB else 0.0
        phases[f"exporting {name}"] = max(inline, network.whole_mib + _TORCH_WIDE * network.widest_mib)
    # Fidelity asks the decoder in torch for all compared images at once, before any engine is open.
    together = max(1.0, min(job.recipe.measure.calls, job.recipe.measure.images) / job.recipe.sampling.batch)
    beside = max(
        network.whole_mib + _TORCH_WIDE * network.widest_mib * (1.0 if name == _DENOISER else together)
        for name, network in networks.items()
    )
    pixels, images = job.pixels, job.recipe.measure.images
    # Two sets of images in bytes, twice each while they are joined and compared.
    judging = (SSIM_BYTES * at_once(images, pixels) + 2 * 2 * 3 * images) * pixels / MIB
    for column in job.columns:
        if isinstance(column.target, FromTorch):  # a process beside ours, which exports meanwhile
            beside_it = max(phases[f"exporting {name}"] for name in networks)
            phases[f"converting for {column.name}"] = _CONVERTER_MIB + _CONVERTED_COPIES * denoiser.mib + beside_it
        for index, (state, kept) in enumerate(job.kept.items()):
            place = f"measuring {state} on {column.name}"
            open_ones = [
                _session(network, column, kept if name == _DENOISER else 1.0) for name, network in job.networks.items()
            ]
            phases[place] = max(beside, sum(open_ones) + judging) + left * index
            if index:  # timed beside the dense engine, component by component; the earlier ones are closed by then
                pairs = [
                    sum(open_ones[at:]) + _session(network, column, 1.0)
                    for at, network in enumerate(job.networks.values())
                ]
                phases[place] = max(phases[place], max(pairs) + left * index)
    for stage in job.tunes:
        batch = float(stage.options.get("batch", 16))
        rows = job.recipe.sampling.batch * 2
        training = _TRAINED * denoiser.mib + 2 * denoiser.kept_mib * batch / rows
        phases["tuning"] = whole + training + left * max(len(job.kept) - 1, 0)
    for _, network in job.quantizes:
        graph = _LOOKED_AT_COPIES * network.mib + _LOOKED_AT_SCORES * network.scores_mib
        phases["calibrating"] = graph + _TORCH_WIDE * network.widest_mib + left * max(len(job.kept) - 1, 0)
    return phases


def _session(network: Network, column: Column, kept: float) -> float:
    """Return the memory of a loaded engine: weights as the runtime lays them out, and its scratch space."""
    file = _file_mib(network, column)
    scratch = _ENGINE_WIDE * network.widest_mib
    if column.target.type == "onnxruntime":
        weights = 1.25 * network.mib + (file if file < 0.9 * network.mib else 0.0)  # some packed again; widened
        return kept * weights + scratch + 2.5 * network.scores_mib
    narrow = 0.5 if _is_narrow(column) else 1.0
    # Attention is fused, in tiles.
    return kept * (file + narrow * network.mib) + scratch + 0.3 * network.scores_mib


def _file_mib(network: Network, column: Column) -> float:
    """Return the weights in an engine's files: graphs with weights inside hold float32, others point at the state's."""
    options = asdict(column.options)
    if options.get("f16_weights"):
        return network.mib / 2
    return network.mib if network.mib <= _INLINE_MIB or options.get("weights") == "own" else network.stored_mib


def _is_narrow(column: Column) -> bool:
    return str(asdict(column.options).get("precision", "f32")) != "f32"


def _disk(job: _Job) -> float:
    """Return the MiB that are written: states, graphs and engines with weights of their own, recordings, images."""
    recipe, denoiser = job.recipe, job.networks[_DENOISER]
    halves = ("vae_encoder", "vae_decoder")
    states = sum(n.stored_mib * n.whole_mib / n.mib if name in halves else n.stored_mib for name, n in _parts(job))
    for index in range(len(recipe.stages)):
        states += denoiser.stored_mib * _kept(recipe, recipe.state_ids[index + 1])
    lowered = [(network, 1.0) for network in job.networks.values()]
    lowered += [(denoiser, kept) for kept in list(job.kept.values())[1:]]
    graphs = sum(
        share * (network.mib if network.mib * share <= _INLINE_MIB else 0.0) + 1e-3 * network.weights
        for network, share in lowered
    )
    engines = sum(
        share * _file_mib(network, column) + 2e-3 * network.weights
        for column in job.columns
        for network, share in lowered
        if column.target.type != "onnxruntime" or "own" in asdict(column.options).values()
    )
    images = recipe.measure.images
    recorded = images * (job.calls * _RECORDED * denoiser.sample_mib + 2 * denoiser.given_mib)
    drawn = images * (1 + len(job.kept) * len(job.columns)) * job.pixels * 2 / MIB
    return states + graphs + engines + recorded + drawn + 1.5


def _parts(job: _Job) -> list[tuple[str, Network]]:
    """Return the networks whose folders a state has: an autoencoder once."""
    return [(name, network) for name, network in job.networks.items() if name != "vae_encoder"]


def _seconds(job: _Job, here: Machine) -> float:
    """Return the seconds of a run on this machine to itself, without writing its files."""
    recipe, denoiser = job.recipe, job.networks[_DENOISER]
    batches = ceil(recipe.measure.images / recipe.sampling.batch)
    compared = ceil(min(recipe.measure.calls, recipe.measure.images) / recipe.sampling.batch) * job.calls
    torch_s = {name: _torch_call(network, here) for name, network in job.networks.items()}
    once = sum(torch_s.values()) - torch_s[_DENOISER]
    drawing = batches * (job.calls * torch_s[_DENOISER] + once)
    exported = [*job.networks.values(), *[denoiser] * (len(job.kept) - 1)]
    exporting = sum(_EXPORT_S + _TRACE_S * network.weights for network in exported) * here.pace
    parity = 2 * (once + len(job.kept) * min(PARITY_CALLS, job.calls) * torch_s[_DENOISER])
    answers = len(job.kept) * compared * torch_s[_DENOISER] + once * compared / job.calls
    cells = sum(
        _cell(job, here, column, kept, first=index == 0)
        for column in job.columns
        for index, kept in enumerate(job.kept.values())
    )
    row = torch_s[_DENOISER] / (2 * recipe.sampling.batch)
    tuning = sum(_tuning(stage, job.calls, row) for stage in job.tunes)
    quantizing = sum(_quantizing(stage, job, torch_s, network) for stage, network in job.quantizes)
    states = _START_S + _STATE_S * (1 + len(recipe.stages))
    return (states * here.pace) + drawing + exporting + parity + answers + cells + tuning + quantizing


def _quantizing(stage: StageSpec, job: _Job, torch_s: Mapping[str, float], network: Network) -> float:
    """Return the seconds of a quantizing stage: recorded images, passes over calls, and trials of a plan's units."""
    options, call = stage.options, torch_s[_role(stage)]
    given = options.get("calibration", {})
    drawn = ceil(int(given.get("samples", 16)) / job.recipe.sampling.batch) * job.calls * torch_s[_DENOISER]
    passes = {"int8": _SIZES + _RANGES, "fp8": _SIZES + _RANGES, "fp16": _SIZES, "int4-weights": _SIZES}
    seen = int(given.get("calls", 16)) * passes.get(str(options.get("scheme")), 0.0)
    mixed = options.get("scheme") == PALETTE_MIXED
    widths = len(PALETTES) if mixed else int(options.get("limit_db") is not None)
    tried = _UNITS * _TRIED * _TRIAL * widths
    return drawn + (seen + tried) * call + _EXPORT_S + _TRACE_S * network.weights


def _role(stage: StageSpec) -> str:
    name = str(stage.options.get("component", _DENOISER))
    return _DENOISER if name in (_DENOISER, "unet", "transformer") else name


def _torch_call(network: Network, here: Machine) -> float:
    return network.flops / (here.flops * here.threads * _REACHED["torch"]) + _TORCH_S * network.weights * here.pace


def _cell(job: _Job, here: Machine, column: Column, kept: float, *, first: bool) -> float:
    """Return the seconds of one cell: compile, open, answer, draw, time, and open again in a process of its own."""
    recipe, networks = job.recipe, job.networks
    threads = min(asdict(column.options).get("threads") or here.cores, here.cores)
    converted = isinstance(column.target, FromTorch)
    narrow = _BF16 if _is_narrow(column) and not converted else 1.0  # what is evaluated is widened
    reached = _REACHED.get(column.target.type, _REACHED_OTHERS)
    share = {name: kept if name == _DENOISER else 1.0 for name in networks}
    call = {
        name: narrow * share[name] * network.flops / (here.flops * threads * reached)
        + (_CALL_S + _CALL_WEIGHT_S * network.weights) * here.pace
        for name, network in networks.items()
    }
    opened = {
        name: share[name] * network.mib * MIB / _BYTES_PER_S
        + _OPEN_S.get(column.target.type, _OPEN_OTHERS_S) * network.weights * here.pace
        for name, network in networks.items()
    }
    made = networks if first else (_DENOISER,)
    compiling = sum(_COMPILE_S * here.pace + opened[name] for name in made)
    if converted:
        compiling += (_CONVERTER_S * first + _CONVERT_S * sum(networks[name].weights for name in made)) * here.pace
    # Here and in the process that is weighed; dense beside it; for ONNX Runtime's profiler.
    opening = sum(opened.values()) * (2 + (not first) + (column.target.type == "onnxruntime"))
    batches = ceil(recipe.measure.images / recipe.sampling.batch)
    compared = ceil(min(recipe.measure.calls, recipe.measure.images) / recipe.sampling.batch) * job.calls
    # The others are asked for the compared images, for all images, and in the process that is weighed.
    once = (sum(call.values()) - call[_DENOISER]) * (compared / job.calls + batches + 1)
    calls = (compared + batches * job.calls + 1) * call[_DENOISER] + once
    timed = not column.target.capabilities().untimed
    timing = timed * sum(_timing(each * (1 if first else 2), recipe.measure.latency_seconds) for each in call.values())
    judging = _PIXEL_S * job.pixels * recipe.measure.images
    return _CELL_S * here.pace + judging + compiling + opening + calls + timing


def _timing(call: float, budget: float) -> float:
    return call * max(_FEWEST_CALLS, min(_TIMED_CALLS, budget / call))


def _tuning(stage: StageSpec, calls: int, row: float) -> float:
    """Return the seconds of a tuning stage: data from the dense pipeline, then passes of teacher and student."""
    options = stage.options
    made = int(options.get("samples", 128)) * calls * 2 * row if "data" not in options else 0.0
    batch = int(options.get("batch", 16)) * int(options.get("accumulate", 1))
    return _TRAINING_S + made + int(options.get("steps", 0)) * batch * 4 * row

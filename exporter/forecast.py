"""What a run will take, from the shapes of its networks and a short test of this machine; and what it took.

Networks are built without memory and called on the meta device, which tells operations and the widest tensor. The
constants were fitted to runs of the embedded model on two cores; the record of every run holds both sides.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from exporter.lowering.options import ExportOptions
from exporter.lowering.wrappers import Sizes, example_feeds, wrap
from exporter.metrics.size import own_peak_rss_mib
from exporter.networks.components import Component
from exporter.networks.source import SourceFacts
from exporter.networks.storage import build_network
from exporter.recipe import Recipe, StageSpec
from exporter.states import components_of, is_guided_by_rows

MIB = 2**20
_DENOISER = "denoiser"
_FLOAT = 4
_TEST_S, _LEAST_SHARE = 0.4, 0.1
_REACHED = 0.5  # of the test's speed, by whole networks
_TRACE_S = 0.03  # of tracing and tidying, per weight of a network
_CELL_S, _STATE_S, _START_S = 8.0, 2.0, 12.0
_BYTES_PER_S = 4e8  # copying, hashing and syncing
_LIBRARIES_MIB = 500  # of runtimes, judges and drawing, which are loaded as the run goes on
_ENGINE = 2.2  # memory of a loaded engine over its weights: the mapped file, and the runtime's own layout of it
_TUNED = 5.0  # weights, gradients, two moments and an average
_WIDEST = 8.0  # tensors as wide as the widest that are alive at a time
_INLINE = ExportOptions().external_bytes
_TOKENS = 77  # of a text whose encoder does not say


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take.

    Attributes:
        memory_mib: most resident memory of one process, mapped weights counted.
        unmapped_mib: of it, what the system cannot take back.
        disk_mib: written, files that several folders share once.
        seconds: of a run that finds nothing done.
    """

    memory_mib: int
    unmapped_mib: int
    disk_mib: int
    seconds: int


@dataclass(frozen=True)
class Network:
    """What one call of a component costs.

    Attributes:
        flops: floating-point operations, at the recipe's rows and size.
        widest: elements of the widest tensor between two layers.
        weights: how many tensors its state dict has.
        mib: of its weights in float32; `stored_mib` as they are stored.
    """

    flops: float
    widest: int
    weights: int
    mib: float
    stored_mib: float


def compare(forecast: Forecast, *, memory_mib: float, disk_mib: float, seconds: float) -> dict[str, dict[str, float]]:
    """Return, for memory, disk and time, what was expected, what happened, and the ratio of the two."""
    pairs = {
        "memory_mib": (forecast.memory_mib, memory_mib),
        "disk_mib": (forecast.disk_mib, disk_mib),
        "seconds": (forecast.seconds, seconds),
    }
    return {
        name: {"expected": float(expected), "got": round(got, 1), "ratio": round(got / max(expected, 1), 3)}
        for name, (expected, got) in pairs.items()
    }


def forecast(  # noqa: PLR0913 - a plan's parts
    recipe: Recipe, facts: SourceFacts, source: Path, *, latent: int, states: int, measured: int, columns: list[str]
) -> Forecast:
    """Return what a run is expected to take.

    Args:
        recipe: the recipe.
        facts: of the source.
        source: its folder.
        latent: side of the latent.
        states: how many states are made; `measured` how many of them are lowered and measured.
        columns: target types of the usable targets.
        measured: see `states`.
    """
    known = components_of(source)
    rows = recipe.sampling.batch * (2 if is_guided_by_rows(source, recipe.sampling.guidance) else 1)
    networks = {
        _DENOISER if part.role == _DENOISER else part.name: _network(part, source, facts, rows, latent)
        for part in known
    }
    tuned = [stage for stage in recipe.stages if stage.kind == "tune"]
    memory, mapped = _memory(networks, bool(tuned), states)
    disk = _disk(recipe, networks, latent, measured, columns)
    seconds = _seconds(recipe, networks, rows, measured, len(columns)) + disk * MIB / _BYTES_PER_S + states * _STATE_S
    return Forecast(int(memory), int(memory - mapped), int(disk), int(seconds))


def _network(part: Component, source: Path, facts: SourceFacts, rows: int, latent: int) -> Network:
    module = build_network(source / part.folder, cls=part.cls)
    module = nn.Module.to(module, torch.device("meta"), torch.float32).eval()
    flops, widest = _text_cost(module, rows) if part.role == "text" else _traced_cost(module, rows, latent)
    mib = facts.parameters[part.name] * _FLOAT / MIB
    return Network(flops, widest, len(module.state_dict()), mib, facts.sizes[part.name] / MIB)


def _text_cost(module: nn.Module, rows: int) -> tuple[float, int]:
    """Return operations and widest tensor of a text encoder, by its layers: T5 reads its mask's values."""
    tokens = int(getattr(module.config, "max_position_embeddings", _TOKENS))
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    flops = 2.0 * rows * tokens * sum(layer.weight.numel() for layer in layers)
    return flops, rows * tokens * max((layer.out_features for layer in layers), default=0)


def _traced_cost(module: nn.Module, rows: int, latent: int) -> tuple[float, int]:
    widest = [0]

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            widest[0] = max(widest[0], output.numel())

    hooks = [leaf.register_forward_hook(note) for leaf in module.modules() if not list(leaf.children())]
    feeds = example_feeds(module, Sizes(rows, latent, _TOKENS))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        wrap(module)(*feeds)
    for hook in hooks:
        hook.remove()
    return float(counter.get_total_flops()), widest[0]


def _memory(networks: Mapping[str, Network], tunes: bool, states: int) -> tuple[float, float]:
    """Return the most resident MiB of one process and how much of it is mapped weights."""
    whole = sum(network.mib for network in networks.values())
    largest = max(network.mib for network in networks.values())
    wide = max(network.widest for network in networks.values()) * _FLOAT * _WIDEST / MIB
    engines = _ENGINE * whole * (2 if states > 1 else 1)  # each is timed beside the dense one
    measuring = engines + largest
    tuning = whole + _TUNED * largest + wide if tunes else 0.0
    mapped = whole * (2 if states > 1 else 1) if measuring > tuning else 0.0
    return own_peak_rss_mib() + _LIBRARIES_MIB + wide + max(measuring, tuning, whole), mapped


def _disk(recipe: Recipe, networks: Mapping[str, Network], latent: int, measured: int, columns: list[str]) -> float:
    """Return the MiB that are written: states, graphs and engines with weights of their own, recordings, images."""
    whole = sum(network.stored_mib for network in networks.values())
    edited = networks[_DENOISER].stored_mib
    kept, edits = 1.0, []
    for stage in recipe.stages:
        kept *= float(stage.options.get("keep_ratio", 1.0))
        edits.append(edited * kept)
    lowered = [network.mib for network in networks.values()]
    lowered += [size * networks[_DENOISER].mib / edited for size in edits[: max(measured - 1, 0)]]
    own = sum(size for size in lowered if size * MIB <= _INLINE)  # larger ones point into their state
    copies = sum(1 for column in columns if column != "onnxruntime")
    steps, images = recipe.sampling.steps, recipe.measure.images
    recorded = images * (steps * 3 * 4 * latent**2 + 2 * 77 * 1024) * _FLOAT / MIB
    drawn = images * (1 + measured * len(columns)) * (8 * latent) ** 2 * 2 / MIB
    return whole + sum(edits) + own + copies * sum(lowered) + recorded + drawn + 5


def _seconds(recipe: Recipe, networks: Mapping[str, Network], rows: int, measured: int, columns: int) -> float:
    best, share = _speed()
    call = {role: network.flops / (best * _REACHED) + 0.002 for role, network in networks.items()}
    denoiser, once = call[_DENOISER], sum(call.values())
    sampling, measure = recipe.sampling, recipe.measure
    drawing = ceil(measure.images / sampling.batch) * (sampling.steps * denoiser + once)
    answering = ceil(measure.calls / sampling.batch) * sampling.steps * denoiser
    budget = measure.latency_seconds
    timing = sum(min(budget, 80 * each) for each in call.values())
    exported = sum(network.weights for network in networks.values()) + (measured - 1) * networks[_DENOISER].weights
    parity = (measured + 2) * 12 * denoiser
    cells = measured * columns * (_CELL_S + answering + drawing + timing)
    tuning = sum(_tuning(stage, recipe, denoiser / rows) for stage in recipe.stages if stage.kind == "tune")
    work = _START_S + drawing + measured * answering + exported * _TRACE_S + parity + cells + tuning
    return work / share


def _tuning(stage: StageSpec, recipe: Recipe, row: float) -> float:
    """Return the seconds of a tuning stage: data from the dense pipeline, then passes of teacher and student."""
    options = stage.options
    made = int(options.get("samples", 128)) * recipe.sampling.steps * 2 * row if "data" not in options else 0.0
    batch = int(options.get("batch", 16)) * int(options.get("accumulate", 1))
    return made + int(options.get("steps", 0)) * batch * 4 * row


def _speed() -> tuple[float, float]:
    """Return floating-point operations per second of a convolution, the best of some tries, and our share of the time.

    Where others work on the same processors everything takes longer, what is no convolution too.
    """
    image, weight = torch.zeros(2, 64, 32, 32), torch.zeros(64, 64, 3, 3)
    work, best = 2.0 * 2 * 64 * 64 * 9 * 32 * 32, float("inf")
    with torch.no_grad():
        torch.nn.functional.conv2d(image, weight, padding=1)
        begun, busy = time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - begun) < _TEST_S:
            started = time.perf_counter()
            torch.nn.functional.conv2d(image, weight, padding=1)
            best = min(best, time.perf_counter() - started)
    share = (time.process_time() - busy) / passed / torch.get_num_threads()
    return work / best, min(max(share, _LEAST_SHARE), 1.0)

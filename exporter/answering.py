"""What a state answers to the recorded calls, and what dense answered: what every engine of it is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.artifact import Artifact
from exporter.bench import Bench
from exporter.lowering.feeds import denoiser_feeds, recorded_calls
from exporter.lowering.wrappers import MAIN_OUTPUT, part_of, signature, wrap
from exporter.metrics.fidelity import Answer, Answers, Subset, ask, recorded_answers
from exporter.networks.chain import ANSWER
from exporter.networks.components import Component
from exporter.networks.cuts import torch_chain
from exporter.networks.schedule import read_schedule
from exporter.networks.storage import load_network
from exporter.sessions import run_batched
from exporter.states import config_of
from targets.ort import OnnxRuntime

Array = NDArray[Any]
Ask = Callable[[Mapping[str, Array]], dict[str, Array]]


def dense_reference(component: Component, bench: Bench) -> Answers | Array:
    """Return what the dense pipeline answered: recorded, or computed in torch where 8-bit images were recorded."""
    if component.role == "denoiser":
        return recorded_answers(bench.recording, Subset(prompts=len(bench.rows)))
    found: Array = np.asarray(_in_torch(bench.dense, component, bench))
    return found


def own_answers(state: Artifact, component: Component, bench: Bench, graphs: Mapping[str, Path]) -> Answers | Array:
    """Return what a state itself answers: in torch, or, where it is quantized, its graph taken at its word."""
    if component.name not in graphs:
        return _in_torch(state, component, bench)
    graph = graphs[component.name]
    if str(graph) not in bench.torch_answers:
        session = OnnxRuntime().open_as_written(graph)
        try:
            asked = partial(run_batched, session)
            bench.torch_answers[str(graph)] = ask_component(component, asked, state.path, bench)
        finally:
            session.close()
    found: Answers | Array = bench.torch_answers[str(graph)]
    return found


def _in_torch(state: Artifact, component: Component, bench: Bench) -> Answers | Array:
    digest = f"{component.name} {state.part_digest(component.folder)}"  # a VAE's two halves share a folder
    if digest not in bench.torch_answers:
        folder = state.path / component.folder
        network = part_of(component, load_network(folder, cls=component.cls))
        schedule = read_schedule(folder) if component.role == "denoiser" else None
        names, module = signature(network), wrap(network)

        def answer(feeds: Mapping[str, Array]) -> dict[str, Array]:
            with torch.inference_mode():
                found = module(*(torch.from_numpy(np.asarray(feeds[name])) for name in names.inputs))
            outputs = found if isinstance(found, tuple) else (found,)
            return {name: value.numpy() for name, value in zip(names.outputs, outputs, strict=True)}

        asked = answer if schedule is None else torch_chain(network, schedule)
        bench.torch_answers[digest] = ask_component(component, asked, state.path, bench)
    found: Answers | Array = bench.torch_answers[digest]
    return found


def ask_component(component: Component, answer: Ask, state: Path, bench: Bench) -> Answers | Array:
    """Put the recorded calls of the prompts that are compared to a component, and return what it answers."""
    config = config_of(state / component.folder)
    if component.role == "denoiser":
        asked = _denoiser(component, config, answer)
        return ask(bench.recording, asked, Subset(prompts=len(bench.rows)), bench.progress)
    found = answer(next(recorded_calls(component, config, bench.recording, bench.rows)).feeds)
    return found[MAIN_OUTPUT[component.role]]


def _denoiser(component: Component, config: Mapping[str, Any], answer: Ask) -> Answer:
    def ask_denoiser(sample: Array, timestep: float, given: Mapping[str, Array]) -> Array:
        return answer(denoiser_feeds(component.cls, config, sample, timestep, given))[ANSWER]

    return ask_denoiser

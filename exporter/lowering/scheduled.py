"""The graphs of a denoiser whose steps follow a schedule: one per pattern, all pointing into one file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from calibration.recording import Recording
from exporter.lowering.export import export_component
from exporter.lowering.feeds import Fed, recorded_calls, spread
from exporter.lowering.options import ExportOptions
from exporter.lowering.parity import compare_answers, torch_answers
from exporter.lowering.stored import StoredWeights
from exporter.networks.chain import Array, Ask, Chain
from exporter.networks.components import Component
from exporter.networks.cuts import Cut
from exporter.networks.inputs import inputs_of
from exporter.networks.schedule import Schedule


def cuts_of(component: Component, network: nn.Module, schedule: Schedule) -> list[Cut]:
    """Return the patterns of a schedule as functions of tensors."""
    names = inputs_of(component.cls, network.config)  # type: ignore[arg-type]
    return [Cut(network, pattern, names) for pattern in schedule.patterns]


def export_patterns(
    component: Component, bare: nn.Module, weights: StoredWeights, schedule: Schedule, out: Path, options: ExportOptions
) -> None:
    """Write ``out/<pattern>.onnx`` for every pattern, and the state's weight files once beside them.

    Raises:
        ComponentFailed: as `export_component`.
    """
    for cut in cuts_of(component, bare, schedule):
        export_component(component.name, cut, out, options, weights=weights)


def check_patterns(  # noqa: PLR0913 - as for `export_patterns`, and what is fed
    component: Component,
    network: nn.Module,
    schedule: Schedule,
    recording: Recording,
    out: Path,
    rows: range,
    count: int,
) -> dict[str, Any]:
    """Compare every graph with torch, on recorded calls in their order and the caches that torch makes of them.

    Args:
        component: the denoiser.
        network: in torch.
        schedule: of its steps.
        recording: of the dense pipeline, at the schedule's steps.
        out: with the graphs.
        rows: which prompts.
        count: calls per graph.

    Returns:
        Name of the pattern -> as `exporter.lowering.parity.check_parity`.

    Raises:
        ComponentFailed: a graph misses the limits, or the recording is of other steps.
    """
    cuts = cuts_of(component, network, schedule)
    seen: list[list[Fed]] = [[] for _ in cuts]
    chain = Chain(schedule, [_seeing(cut, calls) for cut, calls in zip(cuts, seen, strict=True)])
    for call in recorded_calls(component, network.config, recording, rows):  # type: ignore[arg-type]
        chain(call.feeds)
    found = {}
    for cut, calls in zip(cuts, seen, strict=True):
        feeds = [(fed.timestep, fed.feeds) for fed in spread(calls, count)]
        name = cut.pattern.name
        wanted = torch_answers(cut, feeds)
        found[name] = compare_answers(f"{component.name} {name}", wanted, out / f"{name}.onnx", feeds)
    return found


def _seeing(cut: Cut, calls: list[Fed]) -> Ask:
    def ask(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        fed = Fed(float(feeds["timestep"]), dict(feeds))
        calls.append(fed)
        return torch_answers(cut, [(fed.timestep, fed.feeds)])[0]

    return ask

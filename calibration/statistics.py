"""What the values in front of a graph's quantizable operators reach, summed up inside the graph itself.

A copy of the graph gets a few small outputs per value (the largest magnitude and the mean of every channel; the error
of rounding to 8 bits at several ranges), so that no activation ever leaves the runtime: a call takes the memory of a
call. Calls are denoiser calls along recorded trajectories, and everything is kept call by call, because what a value
reaches at the first step says little about the last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from calibration.errors import CalibrationError
from calibration.sites import Site, sites_of

Floats = NDArray[np.float32]
Feeds = Mapping[str, NDArray[Any]]
Ask = Callable[[Feeds], Mapping[str, NDArray[Any]]]
Opener = Callable[[Path], Ask]
"""Loads an ONNX file and returns what answers its calls."""

CANDIDATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Ranges that are tried, as fractions of the largest magnitude seen."""
SMOOTHING = ".smoothing"
"""Ends the name of what a value is multiplied with, channel by channel, before it is rounded."""
LEVELS = 127.0
RESULT = "out"
"""In place of an input's index, in the names of values."""


@dataclass(frozen=True)
class Study:
    """A graph, what it is asked, and who answers.

    Attributes:
        graph: an ONNX file with folded weights, in a folder of one's own: copies with more outputs are written there.
        calls: recorded, of the steps that matter.
        opener: of the runtime.
        workdir: keeps what was found after every call; of this graph and these calls only.
        told: called after each.
    """

    graph: Path
    calls: Sequence[Feeds]
    opener: Opener
    workdir: Path
    told: Callable[[], None]

    def sites(self) -> dict[str, Site]:
        """Return the graph's sites."""
        return sites_of(ir.load(self.graph).graph)


@dataclass(frozen=True)
class Observed:
    """A value in front of one operator or more.

    Attributes:
        name: the first of the sites that read it, and the index of the input (`RESULT`, where it is what a convolution
            answers and no site reads it); it outlasts another export.
        value: of the graph.
        channels: how many the weights behind it sum over; 1 where there is no weight or it has no axis of its own.
        features: axis of these; -1 for the last.
        smooth: whether linear layers alone read it, so that its channels can be evened out against their weights.
        readers: the sites.
    """

    name: str
    value: ir.Value
    channels: int
    features: int
    smooth: bool
    readers: tuple[Site, ...]


def observed_of(sites: Collection[Site]) -> dict[str, Observed]:
    """Return the values that are quantized before these sites, and what convolutions answer, by name."""
    readers: dict[ir.Value, list[Site]] = {}
    names: dict[ir.Value, str] = {}
    for site in sites:
        for index in site.activations:
            value = site.node.inputs[index]
            assert value is not None
            readers.setdefault(value, []).append(site)
            names.setdefault(value, f"{site.name}#{index}")
    for site in sites:
        if site.kind == "conv":
            readers.setdefault(site.node.outputs[0], [])
            names.setdefault(site.node.outputs[0], f"{site.name}#{RESULT}")
    return {names[value]: _observed(names[value], value, found) for value, found in readers.items()}


def _observed(name: str, value: ir.Value, readers: Sequence[Site]) -> Observed:
    weighted = [site for site in readers if site.weight is not None]
    if not weighted or len(weighted) < len(readers) or len({site.features for site in weighted}) > 1:
        return Observed(name, value, 1, -1, False, tuple(readers))
    first = weighted[0]
    assert first.weight is not None
    assert first.weight.shape is not None
    # A grouped convolution's weight has the channels of one group only.
    sizes = {_inputs_of(site) for site in weighted}
    if len(sizes) > 1 or first.node.attributes.get_int("group", 1) != 1:
        return Observed(name, value, 1, -1, False, tuple(readers))
    return Observed(
        name, value, sizes.pop(), first.features, all(site.kind == "linear" for site in weighted), tuple(readers)
    )


def _inputs_of(site: Site) -> int:
    assert site.weight is not None
    assert site.weight.shape is not None
    inputs = site.weight.shape[1 - site.axis]
    assert isinstance(inputs, int)
    return inputs


@dataclass(frozen=True)
class Reached:
    """What values reached, call by call.

    Attributes:
        largest: value -> (calls, channels) largest magnitude.
        mean: value -> (calls, channels).
    """

    largest: Mapping[str, Floats]
    mean: Mapping[str, Floats]


def reach(study: Study) -> Reached:
    """Return what the values before all sites reach; killed, it goes on at the call it was at.

    Raises:
        CalibrationError: a value is not finite, or zero wherever it was looked at.
    """

    def add(model: ir.Model) -> None:
        for index, item in enumerate(observed_of(sites_of(model.graph).values()).values()):
            flat, axes = _flat(model.graph, item, item.value)
            size = _node(model.graph, "Abs", [flat])
            _output(model.graph, _node(model.graph, "ReduceMax", [size, axes], {"keepdims": 0}), f"largest.{index}")
            _output(model.graph, _node(model.graph, "ReduceMean", [flat, axes], {"keepdims": 0}), f"mean.{index}")

    names, count = list(observed_of(study.sites().values())), len(study.calls)
    found = _gathered(study, add, "reach")
    largest = {name: found[f"largest.{index}"].reshape(count, -1) for index, name in enumerate(names)}
    mean = {name: found[f"mean.{index}"].reshape(count, -1) for index, name in enumerate(names)}
    for name, values in largest.items():
        if not np.isfinite(values).all():
            call = int(np.argmin(np.isfinite(values).all(axis=1)))
            raise CalibrationError(
                f"calibration: {name}: got values that are not finite in call {call}, expected numbers. Look at the "
                "model: what computes them overflows on these inputs."
            )
        if not values.any():
            raise CalibrationError(
                f"calibration: {name}: got nothing but zeros in {count} calls, expected a range to fit. Leave "
                "what reads it in float, or calibrate on other prompts."
            )
    return Reached(largest, mean)


def errors_of(study: Study, ranges: Mapping[str, float], smoothing: Mapping[str, Floats]) -> dict[str, Floats]:
    """Return the relative squared error of rounding each value to 8 bits at every one of the `CANDIDATES`.

    Args:
        study: the graph and its calls.
        ranges: value -> the largest magnitude, after smoothing.
        smoothing: value -> (channels,) what it is divided by.

    Returns:
        value -> (calls, candidates); relative to the mean square of the value in the same call.
    """
    names = list(ranges)

    def add(model: ir.Model) -> None:
        known = observed_of(sites_of(model.graph).values())
        for index, name in enumerate(names):
            value = smoothed(model.graph, known[name], smoothing.get(name))
            everything = _constant(model.graph, np.arange(0, dtype=np.int64), f"{name}.all")
            square = _node(model.graph, "Mul", [value, value])
            _output(
                model.graph, _node(model.graph, "ReduceMean", [square, everything], {"keepdims": 0}), f"power.{index}"
            )
            for number, share in enumerate(CANDIDATES):
                scale = _constant(model.graph, np.float32(share * ranges[name] / LEVELS), f"{name}.scale.{number}")
                zero = _constant(model.graph, np.int8(0), f"{name}.zero.{number}")
                narrow = _node(model.graph, "QuantizeLinear", [value, scale, zero])
                wide = _node(model.graph, "DequantizeLinear", [narrow, scale, zero])
                gap = _node(model.graph, "Sub", [value, wide])
                square = _node(model.graph, "Mul", [gap, gap])
                error = _node(model.graph, "ReduceMean", [square, everything], {"keepdims": 0})
                _output(model.graph, error, f"error.{index}.{number}")

    found = _gathered(study, add, "errors")
    tiny = np.finfo(np.float32).tiny
    return {
        name: np.stack([found[f"error.{index}.{number}"] for number in range(len(CANDIDATES))], axis=1)
        / np.maximum(found[f"power.{index}"], tiny)[:, None]
        for index, name in enumerate(names)
    }


def largest_of_nodes(study: Study) -> dict[str, float]:
    """Return node -> the largest magnitude of any value in floating point that it computes or reads, over all calls.

    Raises:
        CalibrationError: a value is not finite.
    """
    floats = _floats_of(ir.load(study.graph).graph)

    def add(model: ir.Model) -> None:
        for index, value in enumerate(_floats_of(model.graph)):
            everything = _constant(model.graph, np.arange(0, dtype=np.int64), f"size.{index}.axes")
            size = _node(model.graph, "Abs", [value])
            _output(model.graph, _node(model.graph, "ReduceMax", [size, everything], {"keepdims": 0}), f"size.{index}")

    found = _gathered(study, add, "sizes")
    sizes = {value: found[f"size.{index}"] for index, value in enumerate(floats)}
    largest: dict[str, float] = {}
    for value, seen in sizes.items():
        producer = value.producer()
        if not np.isfinite(seen).all():
            place = "an input" if producer is None else producer.name
            raise CalibrationError(
                f"calibration: {place}: got values that are not finite in call {int(np.argmin(np.isfinite(seen)))}, "
                "expected numbers. Look at the model: it overflows in float."
            )
        for node in ([] if producer is None else [producer]) + [node for node, _ in value.uses()]:
            name = node.name or ""
            largest[name] = max(largest.get(name, 0.0), float(seen.max()))
    return largest


def _floats_of(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]


def smoothed(graph: ir.Graph, item: Observed, divisor: Floats | None) -> ir.Value:
    """Return a value divided channel by channel, in front of whatever reads it; the value itself for None."""
    if divisor is None:
        return item.value
    factor = _constant(graph, (1.0 / divisor).astype(np.float32), f"{item.name}{SMOOTHING}")
    return _node(graph, "Mul", [item.value, factor], after=item.value)


def _flat(graph: ir.Graph, item: Observed, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return a form of the value whose channels are what is left when the axes, given too, are reduced."""
    if item.channels == 1:
        return value, _constant(graph, np.arange(0, dtype=np.int64), f"{item.name}.axes")
    if item.features == 1:
        return value, _constant(graph, np.array([0, 2, 3], dtype=np.int64), f"{item.name}.axes")
    shape = _constant(graph, np.array([-1, item.channels], dtype=np.int64), f"{item.name}.rows")
    rows = _node(graph, "Reshape", [value, shape])
    return rows, _constant(graph, np.array([0], dtype=np.int64), f"{item.name}.axes")


def _constant(graph: ir.Graph, values: Any, name: str) -> ir.Value:
    array = np.asarray(values)
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.initializers[name] = value
    return value


def _node(
    graph: ir.Graph,
    kind: str,
    inputs: list[ir.Value],
    attributes: Mapping[str, Any] | None = None,
    after: ir.Value | None = None,
) -> ir.Value:
    node = ir.node(kind, inputs, attributes or {})
    producer = None if after is None else after.producer()
    if after is None:
        graph.append(node)
    elif producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return node.outputs[0]


def _output(graph: ir.Graph, value: ir.Value, name: str) -> None:
    value.name, value.dtype = name, ir.DataType.FLOAT
    graph.outputs.append(value)


def _gathered(study: Study, add: Callable[[ir.Model], None], purpose: str) -> dict[str, Floats]:
    """Put the calls to a copy of the graph with more outputs; what each call answered is kept, and stacked."""
    workdir = study.workdir / purpose
    workdir.mkdir(parents=True, exist_ok=True)
    ask: Ask | None = None
    found: list[dict[str, Floats]] = []
    for index, feeds in enumerate(study.calls):
        kept = workdir / f"call-{index}.safetensors"
        if not kept.is_file():
            ask = ask or study.opener(_written(study.graph, add, purpose))
            answer = {name: np.asarray(value, np.float32) for name, value in ask(feeds).items() if "." in name}
            staging = kept.with_suffix(".partial")
            save_file({name: np.ascontiguousarray(value) for name, value in answer.items()}, staging)
            staging.replace(kept)
        found.append(load_file(kept))
        study.told()
    return {name: np.stack([answer[name] for answer in found]) for name in found[0]}


def _written(graph: Path, add: Callable[[ir.Model], None], purpose: str) -> Path:
    """Write the graph with the outputs that `add` puts in; it reads the same weights."""
    model = ir.load(graph)
    del model.graph.outputs[:]
    add(model)
    path = graph.with_name(f".{graph.stem}-{purpose}.onnx")  # beside its weights, which it points at
    ir.save(model, path)
    return path

"""A float graph with the nodes that make it work in 8 bits, or store its weights in 8 or 4: one file for all runtimes.

Palettes need no nodes: weights of a few values are weights, and a runtime that stores them by code finds them so.

QuantizeLinear and DequantizeLinear, symmetric: signed integers around zero, so that pruned weights stay exactly zero.
Weights have a scale per output channel (8 bits) or per group of inputs (4 bits), activations one each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.errors import CalibrationError
from calibration.fitting import Fit
from calibration.narrowing import narrow
from calibration.schemes import FLOAT, FP8, INT4_WEIGHTS, INT8, INT8_WEIGHTS, NARROW, PALETTES, ROUNDING
from calibration.sites import Site, sites_of
from calibration.statistics import Floats, Observed, observed_of, smoothed

_INT4_OPSET = 21
_LARGEST = {INT8: 127.0, FP8: 448.0, INT8_WEIGHTS: 127.0, INT4_WEIGHTS: 7.0}
"""Largest code; the smallest is its negative, so that there is no zero-point and zero stays zero."""
_TYPES = {INT8: np.int8, FP8: ml_dtypes.float8_e4m3fn, INT8_WEIGHTS: np.int8, INT4_WEIGHTS: ml_dtypes.int4}
DATA_FILE = "model.onnx_data"
_INLINE = 1024


@dataclass(frozen=True)
class Manner:
    """What schemes leave open.

    Attributes:
        group: inputs that share a scale of 4 bits; where it does not divide a layer's inputs, the whole row does.
        results: round what convolutions in `INT8` answer, too. ONNX Runtime and TensorRT have integer kernels for these
            alone; OpenVINO's answer in floating point, which is more exact.
        correct: take from biases what rounding the weights adds to the mean.
        palettize: returns weights with each replaced by one of ``2 ** bits`` values; needed for `PALETTES`.
        type_of: module path -> `FP16` or `BF16` where its floating point has 16 bits; None for float everywhere.
    """

    group: int = 64
    results: bool = False
    correct: bool = True
    type_of: Callable[[str], str] | None = None
    palettize: Callable[[Floats, int], Floats] | None = None


@dataclass(frozen=True)
class Written:
    """What became of the sites.

    Attributes:
        schemes: site -> the scheme its weights or values have in the graph.
        weight_bytes: of all initializers.
    """

    schemes: Mapping[str, str]
    weight_bytes: int


def write_quantized(
    source: Path, out: Path, schemes: Mapping[str, str], fit: Fit | None, manner: Manner | None = None
) -> Written:
    """Write ``model.onnx``, and ``model.onnx_data`` with its larger tensors, into a folder.

    Args:
        source: an ONNX file with folded weights, unchanged.
        out: an existing folder, not the source's.
        schemes: site -> one of `SCHEMES`; sites that are missing stay in float.
        fit: of this graph; needed for `INT8`.
        manner: what schemes leave open.

    Raises:
        CalibrationError: the fit is missing, or is of another graph; a weight is not finite.
    """
    model, told = quantized(source, schemes, fit, manner)
    values = (value.const_value for value in model.graph.initializers.values())
    size = sum(value.nbytes for value in values if value is not None)
    ir.save(model, out / "model.onnx", external_data=DATA_FILE, size_threshold_bytes=_INLINE)
    return Written(told, size)


def quantized(
    source: Path, schemes: Mapping[str, str], fit: Fit | None, manner: Manner | None = None
) -> tuple[ir.Model, dict[str, str]]:
    """Return a graph with some sites quantized, its other weights still where they were, and site -> scheme.

    Args, Raises: as `write_quantized`.
    """
    model = ir.load(source)
    graph, sites = model.graph, sites_of(model.graph)
    writer = _Writer(graph, fit, manner or Manner())
    told = {name: writer.quantize(name, site, schemes.get(name, FLOAT)) for name, site in sites.items()}
    if INT4_WEIGHTS in told.values() and model.opset_imports.get("", 0) < _INT4_OPSET:
        model.opset_imports[""] = _INT4_OPSET  # the first whose DequantizeLinear knows groups and 4 bits
    _drop_unused(graph)
    graph.sort()
    if manner is not None and manner.type_of is not None:
        narrow(model, manner.type_of)
    return model, told


@dataclass(frozen=True)
class OpenSite:
    """A site whose weights are an input of the graph.

    Attributes:
        input: its name.
        weight: what it was before, an initializer.
    """

    input: str
    weight: ir.Value


def with_open_weights(source: Path) -> tuple[ir.Model, dict[str, OpenSite]]:
    """Return a graph that takes the weights of its sites as inputs: opened once, it is asked with many of them.

    Args:
        source: an ONNX file with folded weights, unchanged.
    """
    model = ir.load(source)
    found: dict[str, OpenSite] = {}
    for name, site in sites_of(model.graph).items():
        weight = site.weight
        if weight is None:
            continue
        taken = ir.Value(name=f"weight_{len(found)}", shape=weight.shape, type=weight.type)
        model.graph.inputs.append(taken)
        site.node.replace_input_with(1, taken)
        found[name] = OpenSite(str(taken.name), weight)
    _drop_unused(model.graph)
    return model, found


def palettized(name: str, weight: ir.Value, scheme: str, manner: Manner) -> Floats:
    """Return the weights of a site with each replaced by one of a few values.

    Args:
        name: of the site, for messages.
        weight: an initializer.
        scheme: one of `PALETTES`.
        manner: says how.

    Raises:
        CalibrationError: nothing makes palettes, or the weights do not fit into 16 bits.
    """
    if manner.palettize is None:
        raise CalibrationError(f"quantize: {name}: got no way to make palettes, expected one. Give it.")
    try:
        return manner.palettize(values_of(name, weight), PALETTES[scheme])
    except ValueError as error:
        raise CalibrationError(f"quantize: {name}: {error}; expected smaller weights. Choose float.") from error


class _Writer:
    """Puts nodes into one graph; a value that several sites read is rounded once."""

    def __init__(self, graph: ir.Graph, fit: Fit | None, manner: Manner) -> None:
        self._graph, self._fit, self._manner = graph, fit, manner
        observed = observed_of(sites_of(graph).values())
        self._observed = {item.value: item for item in observed.values()}
        self._rounded: dict[tuple[str, str], ir.Value] = {}

    def quantize(self, name: str, site: Site, scheme: str) -> str:
        """Quantize one site as far as the scheme applies to it; return the scheme it has then."""
        if scheme in NARROW:
            return scheme
        if scheme == FLOAT or (site.kind == "product" and scheme not in ROUNDING):
            return FLOAT
        if scheme == INT4_WEIGHTS and site.kind != "linear":
            scheme = INT8_WEIGHTS
        if scheme in PALETTES:
            assert site.weight is not None
            held = palettized(name, site.weight, scheme, self._manner)
            site.node.replace_input_with(1, self._constant(held, f"{site.weight.name}.palette"))
            return scheme
        item, divisor = self._input(site, 0), None
        if scheme in ROUNDING:
            self._round_inputs(name, site, scheme)
            if self._manner.results and site.kind == "conv":
                self._round_result(name, site, scheme)
            divisor = None if self._fit is None else self._fit.smoothing.get(item.name)
        mean = None if self._fit is None else self._fit.means.get(item.name)
        if site.weight is not None:
            wrong = self._round_weight(name, site, scheme, divisor)
            if self._manner.correct and mean is not None:
                self._correct_bias(site, wrong, mean if divisor is None else mean / divisor)
        return scheme

    def _input(self, site: Site, index: int) -> Observed:
        value = site.node.inputs[index]
        assert value is not None
        return self._observed[value]

    def _round_inputs(self, name: str, site: Site, scheme: str) -> None:
        """Let a site read its inputs rounded; a value that several sites read is rounded once."""
        if self._fit is None:
            raise CalibrationError(f"quantize: {name}: got no fit, expected one for {scheme}. Calibrate first.")
        for index in site.activations:
            item = self._input(site, index)
            known = self._rounded.get((item.name, scheme))
            even = known or smoothed(self._graph, item, self._fit.smoothing.get(item.name))
            site.node.replace_input_with(index, known or self._once(item, even, scheme, name))

    def _round_result(self, name: str, site: Site, scheme: str) -> None:
        assert self._fit is not None
        value = site.node.outputs[0]
        item = self._observed[value]
        if item.name in self._fit.smoothing:
            return  # what reads it rounds another value
        readers = [(node, index) for node, index in value.uses() if node.op_type != "QuantizeLinear"]
        rounded = self._once(item, value, scheme, name)
        for node, index in readers:
            node.replace_input_with(index, rounded)

    def _once(self, item: Observed, value: ir.Value, scheme: str, name: str) -> ir.Value:
        """Return a value rounded, which every reader in the same scheme shares."""
        key = (item.name, scheme)
        if key not in self._rounded:
            self._rounded[key] = self._pair(value, self._scale(item, scheme, name), scheme, item.name)
            self._observed[self._rounded[key]] = item
        return self._rounded[key]

    def _scale(self, item: Observed, scheme: str, name: str) -> float:
        assert self._fit is not None
        if item.name not in self._fit.scales:
            raise CalibrationError(
                f"quantize: {name}: the fit has no range for {item.name}; expected a fit of this network. Fit again."
            )
        # A float's steps grow with its size: there is nothing to gain from clipping, so its range is all there was.
        return self._fit.largest[item.name] / _LARGEST[FP8] if scheme == FP8 else self._fit.scales[item.name]

    def _pair(self, value: ir.Value, scale: float, scheme: str, name: str) -> ir.Value:
        width = self._constant(np.float32(scale), f"{name}.scale")
        zero = self._constant(np.zeros((), _TYPES[scheme]), f"{name}.zero_point")
        narrow = ir.node("QuantizeLinear", [value, width, zero], name=f"{name}/QuantizeLinear")
        wide = ir.node("DequantizeLinear", [narrow.outputs[0], width, zero], name=f"{name}/DequantizeLinear")
        self._graph.extend([narrow, wide])
        return wide.outputs[0]

    def _round_weight(self, name: str, site: Site, scheme: str, divisor: Floats | None) -> Floats:
        """Store a site's weights as integers; return by how much they are off."""
        weight = site.weight
        assert weight is not None
        values = values_of(name, weight)
        if divisor is not None:
            values = values * np.expand_dims(divisor, site.axis)
        grouped = scheme == INT4_WEIGHTS
        codes, scales, block = (
            _by_groups(values, site.axis, self._manner.group) if grouped else (*_by_rows(values, site.axis, scheme), 0)
        )
        narrow = codes.astype(_TYPES[scheme])
        codes = narrow.astype(np.float32)
        held = self._constant(narrow, f"{weight.name}.codes")
        width = self._constant(scales, f"{weight.name}.scale")
        attributes: dict[str, int] = {"axis": 1 - site.axis, "block_size": block} if grouped else {"axis": site.axis}
        wide = ir.node("DequantizeLinear", [held, width], attributes, name=f"{weight.name}/DequantizeLinear")
        wide.outputs[0].shape, wide.outputs[0].type = weight.shape, weight.type
        self._graph.insert_before(self._graph[0], wide)
        site.node.replace_input_with(1, wide.outputs[0])
        return _widened(codes, scales, site.axis, block) - values

    def _correct_bias(self, site: Site, wrong: Floats, mean: Floats) -> None:
        """Take from the bias what weights that are off by `wrong` add to the mean output."""
        place = _bias_of(site)
        if place is None:
            return
        node, index = place
        bias = node.inputs[index]
        assert bias is not None
        assert bias.const_value is not None
        summed = wrong.sum(axis=tuple(range(2, wrong.ndim))) if wrong.ndim > 2 else wrong
        shift = (summed if site.axis == 0 else summed.T) @ mean
        old = bias.const_value.numpy()
        corrected = self._constant(old - shift.reshape(old.shape).astype(old.dtype), f"{bias.name}.corrected")
        node.replace_input_with(index, corrected)

    def _constant(self, values: np.generic | NDArray[Any], name: str) -> ir.Value:
        number, unique = 1, name
        while unique in self._graph.initializers:
            unique, number = f"{name}_{number}", number + 1
        array = np.asarray(values)
        tensor = ir.tensor(array, name=unique)
        value = ir.Value(name=unique, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self._graph.initializers[unique] = value
        return value


def _drop_unused(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def values_of(name: str, weight: ir.Value) -> Floats:
    """Return the numbers of a weight.

    Args:
        name: of its site, for messages.
        weight: an initializer.

    Raises:
        CalibrationError: some are not finite.
    """
    assert weight.const_value is not None
    values = weight.const_value.numpy().astype(np.float32)
    if not np.isfinite(values).all():
        raise CalibrationError(f"quantize: {name}: got weights that are not finite, expected numbers.")
    return values


def _by_rows(values: Floats, axis: int, scheme: str) -> tuple[Floats, Floats]:
    """Return codes of 8 bits, not yet rounded where they are floats, and a scale per output."""
    others = tuple(index for index in range(values.ndim) if index != axis)
    scales = np.maximum(np.abs(values).max(axis=others), np.finfo(np.float32).tiny) / _LARGEST[scheme]
    shape = [-1 if index == axis else 1 for index in range(values.ndim)]
    codes = np.clip(values / scales.reshape(shape), -_LARGEST[scheme], _LARGEST[scheme])
    return (codes if scheme == FP8 else np.rint(codes)), scales.astype(np.float32)


def _by_groups(values: Floats, axis: int, group: int) -> tuple[Floats, Floats, int]:
    """Return codes of 4 bits of a matrix, a scale per output and group of inputs, and how many are in a group."""
    inputs = values.shape[1 - axis]
    size = group if inputs % group == 0 else inputs
    rows = values if axis == 0 else values.T  # (outputs, inputs)
    parts = rows.reshape(rows.shape[0], inputs // size, size)
    scales = np.maximum(np.abs(parts).max(axis=2), np.finfo(np.float32).tiny) / _LARGEST[INT4_WEIGHTS]
    codes = np.clip(np.rint(parts / scales[..., None]), -7, 7).reshape(rows.shape)
    return (codes, scales, size) if axis == 0 else (codes.T, scales.T, size)


def _widened(codes: Floats, scales: Floats, axis: int, block: int) -> Floats:
    """Return what the codes stand for."""
    if block:
        return codes * np.repeat(scales, block, axis=1 - axis)
    return codes * scales.reshape([-1 if index == axis else 1 for index in range(codes.ndim)])


def _bias_of(site: Site) -> tuple[ir.Node, int] | None:
    """Return the node and the input that adds a layer's bias, where it is a constant of its own."""
    node = site.node
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        return (node, 2) if bias.is_initializer() and len(bias.uses()) == 1 else None
    uses = list(node.outputs[0].uses())
    if node.op_type != "MatMul" or len(uses) != 1 or uses[0][0].op_type != "Add":
        return None
    adding, index = uses[0]
    other = adding.inputs[1 - index]
    alone = other is not None and other.is_initializer() and len(list(other.uses())) == 1
    return (
        (adding, 1 - index)
        if alone and other is not None and other.shape is not None and len(other.shape) == 1
        else None
    )

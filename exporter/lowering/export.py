"""One component to one ONNX file, through torch.export: fixed shapes unless asked otherwise, equal bytes every time."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter import __version__
from exporter.errors import ComponentFailed
from exporter.lowering.garbage import collected_seldom
from exporter.lowering.options import ExportOptions
from exporter.lowering.simplify import simplify
from exporter.lowering.stored import INLINE, Held, StoredWeights, give_values, write_pointing
from exporter.lowering.tidy import tidy, unused_initializers
from exporter.lowering.wrappers import Signature, Sizes, example_feeds, signature, wrap
from exporter.networks.cuts import Cut
from exporter.progress import Progress, Silent, task
from targets.base import RANGES

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
_PREFIX = "net."
_SHARED_INLINE = 4096  # bytes; what several graphs of one network may each hold of a tensor
_SMALL = 1024  # bytes; tensors below stay in the graph, where runtimes fold them
_OPSETS = range(18, 24)


def export_component(
    component: str,
    module: nn.Module,
    out: Path,
    options: ExportOptions,
    *,
    weights: StoredWeights | None = None,
    progress: Progress | None = None,
) -> None:
    """Write ``out/model.onnx`` and, where the weights are large, files that it points into beside it.

    A `Cut` of a U-Net becomes ``out/<its pattern>.onnx``, which points into the state's own files however small.

    Args:
        component: its name, for messages and as the graph's name.
        module: the network, pruned or not; unchanged afterwards.
        out: an existing folder.
        options: shapes and opset.
        weights: where the weights of a network on the meta device lie; large ones are not read but pointed at. None
            for a network whose weights are in memory, which are written into ``out/model.onnx_data`` where large.
        progress: three units: export, tidy, write.

    Raises:
        ComponentFailed: torch cannot export the network, or the result is not valid ONNX.
        SourceError: a network of an unknown class.
    """
    names, cut = signature(module), module if isinstance(module, Cut) else None
    if cut is not None:  # graphs that share one file of weights: none of them holds any but small ones
        options = replace(options, external_bytes=0)
        if options.dynamic:
            raise ComponentFailed(
                f"{component}: a schedule's graphs have fixed shapes; got shapes that are open. Leave shapes and "
                "export.dynamic out of the recipe."
            )
    if options.opset not in _OPSETS:
        raise ComponentFailed(
            f"{component}: opset: got {options.opset}, expected {_OPSETS[0]} to {_OPSETS[-1]}. Write opset: 20."
        )
    with task(progress or Silent(), f"Export {component}", 3) as shown, collected_seldom():
        program = _exported(component, module, names, options)
        model = cast("ir.Model", program.model)
        held = Held()
        if weights is not None:
            inline = INLINE if cut is None else _SHARED_INLINE
            held = give_values(model, weights, prefix=_PREFIX, external_bytes=options.external_bytes, inline=inline)
        shown.advance(note="traced")
        with _quiet("onnx_ir"):  # it names every weight that has no value yet
            simplify(model)  # folds transposed weights that are in memory, so that quantizers see them as weights
        named = (cut.net if cut is not None else module).state_dict()
        tidy(model, prefix=_PREFIX, weights={name: tensor.numel() for name, tensor in named.items()})
        _sign(model, component, weights.digest if weights is not None else weights_digest(module))
        if options.dynamic:
            _name_axes(model, names)
        shown.advance(note="tidied")
        path = out / (MODEL_FILE if cut is None else f"{cut.pattern.name}.onnx")
        _write(model, component, path, options, held, whole=cut is not None)
        if options.dynamic and options.batches and options.latents:
            ranges = _ranges(module, names, options, options.batches, options.latents)
            (out / RANGES).write_text(json.dumps(ranges, indent=1) + "\n", encoding="utf-8")
        shown.advance()


def export_function(
    name: str, net: nn.Module, arguments: tuple[Tensor, ...], out: Path, options: ExportOptions
) -> None:
    """Write ``out/model.onnx`` of any module of tensors with the shapes of these arguments: a part of a network.

    Args:
        name: for messages and as the graph's name.
        net: takes `arguments`, which the graph calls ``input_0`` and so on; what it wraps is its attribute ``net``, and
            its weights are in memory. Unchanged afterwards.
        arguments: example tensors.
        out: an existing folder.
        options: opset and where weights go; nothing else of it is read.

    Raises:
        ComponentFailed: torch cannot export it, or the result is not valid ONNX.
    """
    inputs = tuple(f"input_{index}" for index in range(len(arguments)))
    model = cast("ir.Model", _traced(name, net, arguments, Signature(inputs, (), {}), options).model)
    with _quiet("onnx_ir"):
        simplify(model)
    tidy(
        model,
        prefix=_PREFIX,
        weights={path.removeprefix(_PREFIX): tensor.numel() for path, tensor in net.state_dict().items()},
    )
    model.graph.name = name
    _write(model, name, out / MODEL_FILE, options, Held())


def weights_digest(module: nn.Module) -> str:
    """Return the sha256 of a network's state dict: names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _exported(component: str, module: nn.Module, names: Signature, options: ExportOptions) -> Any:
    return _traced(component, wrap(module), _examples(module, names, options), names, options)


def _traced(
    component: str, wrapped: nn.Module, arguments: tuple[Tensor, ...], names: Signature, options: ExportOptions
) -> Any:
    try:
        with _quiet_eval(wrapped), torch.no_grad():
            program = torch.onnx.export(
                wrapped,
                arguments,
                dynamo=True,
                optimize=False,  # done when the initializers have their values
                opset_version=options.opset,
                input_names=list(names.inputs),
                output_names=list(names.outputs) or None,
                dynamic_shapes=_dynamic_shapes(names) if names.dynamic and options.dynamic else None,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise ComponentFailed(
            f"{component}: torch cannot export it; got: {reason[0] if reason else type(error).__name__}. Look at the "
            "part of the network it names, or report it as a bug."
        ) from error
    return program


def _examples(module: nn.Module, names: Signature, options: ExportOptions) -> tuple[Tensor, ...]:
    rows = options.batch * (2 if options.guided and "timestep" in names.inputs else 1)
    if not options.dynamic:
        return example_feeds(module, Sizes(rows, options.latent, options.tokens))
    # One row would fix the batch, and equal sides would become one axis.
    found = example_feeds(module, Sizes(max(rows, 2), options.latent, options.tokens))
    if names.dynamic[names.inputs[0]].get(3):
        first = found[0]
        found = (torch.cat([first, first], dim=3), *found[1:])
    return found


def _ranges(
    module: nn.Module, names: Signature, options: ExportOptions, batches: tuple[int, int], latents: tuple[int, int]
) -> dict[str, list[list[int]]]:
    """Return the smallest, the usual and the largest shape of every input, for runtimes that have to know them."""
    points = [(batches[0], latents[0]), (options.batch, options.latent), (batches[1], latents[1])]
    found: dict[str, list[list[int]]] = {name: [] for name in names.inputs}
    for batch, latent in points:
        fed = _examples(module, names, replace(options, dynamic=False, batch=batch, latent=latent))
        for name, tensor in zip(names.inputs, fed, strict=True):
            found[name].append(list(tensor.shape))
    return found


def _dynamic_shapes(names: Signature) -> tuple[tuple[dict[int, Any] | None, ...]]:
    """Return the open axes of every input; the wrappers take them as one ``*inputs``."""
    return (
        tuple(
            dict.fromkeys(names.dynamic[name], torch.export.Dim.DYNAMIC) if name in names.dynamic else None
            for name in names.inputs
        ),
    )


@contextmanager
def _quiet_eval(module: nn.Module) -> Iterator[None]:
    """Export in evaluation mode and put every module's mode back; torch's notes to its own developers stay unseen."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        # torch.onnx names torchvision's absence, which no component needs.
        with _quiet("torch.onnx"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _sign(model: ir.Model, component: str, digest: str) -> None:
    model.graph.name = component
    model.producer_name, model.producer_version = "diffusion-exporter", __version__
    model.metadata_props["exporter.component"] = component
    model.metadata_props["exporter.weights_sha256"] = digest


def _name_axes(model: ir.Model, names: Signature) -> None:
    """Give the open axes their names, and drop the expressions in which torch wrote those of inner tensors."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        axes = names.dynamic.get(value.name or "", {})
        if value.shape is not None:
            value.shape = ir.Shape([axes.get(index, axis) for index, axis in enumerate(value.shape)])
    ends = {id(value) for value in model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if id(value) not in ends:
                value.shape = None


def _write(
    model: ir.Model, component: str, path: Path, options: ExportOptions, held: Held, *, whole: bool = False
) -> None:
    unused = unused_initializers(model)
    if unused:
        raise ComponentFailed(f"{component}: weights that nothing uses; got {unused[:5]}. This is a bug: report it.")
    if held.values:
        write_pointing(model, path, held, whole=whole)
    else:
        values = (value.const_value for value in model.graph.initializers.values())
        size = sum(value.nbytes for value in values if value is not None)
        external = DATA_FILE if size > options.external_bytes else None
        ir.save(model, path, external_data=external, size_threshold_bytes=_SMALL)
    try:
        onnx.checker.check_model(_without_weights(path))
    except onnx.checker.ValidationError as error:
        raise ComponentFailed(f"{component}: not valid ONNX; got: {error}. This is a bug: report it.") from error


def _without_weights(path: Path) -> onnx.ModelProto:
    """Return a graph whose external weights are inputs: the checker refuses files with several links, as ours are."""
    model = onnx.load(str(path), load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    for tensor in outside:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    inside = [tensor for tensor in model.graph.initializer if not tensor.external_data]
    del model.graph.initializer[:]
    model.graph.initializer.extend(inside)
    return model

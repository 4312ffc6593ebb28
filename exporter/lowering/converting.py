"""Converts components of states for targets that take torch networks, in a process of its own.

``python -m exporter.lowering.converting PARENT`` reads orders (`exporter.lowering.converter`), one JSON line each, and
answers each with one: what went wrong, as `targets.build` does, and the most memory that the process had so far.
It ends with the process PARENT, or with its input.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

import targets
from calibration.errors import CalibrationError
from calibration.recording import Recording
from calibration.schemes import INT8, INT8_WEIGHTS
from exporter import __version__
from exporter.errors import ComponentFailed, ExporterError
from exporter.lowering.converter import Order, end_with
from exporter.lowering.feeds import recorded_calls, spread
from exporter.lowering.garbage import collected_seldom
from exporter.lowering.neural_engine import NETWORKS, neural_engine_form
from exporter.lowering.options import ExportOptions
from exporter.lowering.pinned import pin_timesteps
from exporter.lowering.rounded_network import round_inputs, scheme_of, take_weights
from exporter.lowering.swift import SWIFT_PORTS, check_swift
from exporter.lowering.wrappers import Sizes, example_feeds, part_of, signature, wrap
from exporter.metrics.size import own_peak_rss_mib
from exporter.networks.components import Component
from exporter.networks.quantization import read_quantization
from exporter.networks.storage import load_network
from exporter.states import components_of, config_of
from targets.base import TargetError, TargetMissing
from targets.torch_source import FromTorch, TorchProgram

_ABOUT: Mapping[str, str] = {
    "sample": "latents, scaled as the scheduler wants them",
    "hidden_states": "latents, scaled as the scheduler wants them",
    "timestep": "of the scheduler, the same for every row",
    "encoder_hidden_states": "text states, rows without the prompt first where there is guidance",
    "encoder_attention_mask": "1 where a token of the text counts",
    "attention_mask": "1 where a token counts",
    "text_embeds": "pooled text states",
    "pooled_projections": "pooled text states",
    "time_ids": "sizes and crop of the image, as SDXL has them",
    "timestep_cond": "embedded guidance scale",
    "guidance": "guidance scale",
    "class_labels": "classes to draw",
    "img_ids": "places of the latent's patches",
    "txt_ids": "places of the text",
    "input_ids": "tokens of the text",
    "latent_sample": "latents, divided by the autoencoder's scaling factor",
    "out_sample": "what the denoiser predicts: noise, or velocity",
    "last_hidden_state": "text states",
    "pooler_output": "state of the text's end",
    "latent_parameters": "means of the latents, then logarithms of their variances",
}
_ROLES: Mapping[str, str] = {
    "denoiser": "Denoiser",
    "text": "Text encoder",
    "decoder": "Autoencoder, the decoding half",
    "encoder": "Autoencoder, the encoding half",
}
_AUTHOR = f"diffusion-exporter {__version__}"


def main() -> int:
    """Carry out one order per line of the input until it ends; answer each with a line."""
    end_with(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        found = _told(Order.of(line)) | {"peak_mib": own_peak_rss_mib()}
        answers.write(json.dumps(found) + "\n")
        answers.flush()
    return 0


def _told(order: Order) -> dict[str, Any]:
    """Carry an order out; return what went wrong, as `targets.build` tells it."""
    try:
        _carry_out(order)
    except TargetMissing as error:
        return {"missing": str(error)}
    except (TargetError, ExporterError, CalibrationError) as error:
        return {"failed": str(error)}
    except OSError as error:
        return {"os": [error.errno, error.strerror, str(error.filename or order.out)]}
    finally:
        gc.collect()  # networks and programs hold themselves
    return {}


def _carry_out(order: Order) -> None:
    target = targets.target(order.target)
    assert isinstance(target, FromTorch)
    state = Path(order.state)
    component = next(part for part in components_of(state, order.requested) if part.name == order.component)
    with collected_seldom():
        target.convert(program_of(state, component, order), Path(order.out), target.options(**order.options))


def program_of(state: Path, component: Component, order: Order) -> TorchProgram:
    """Return a component of a state as a target takes it."""
    folder = state / component.folder
    network, swift = part_of(component, load_network(folder, cls=component.cls)), order.options.get("layout") == "swift"
    told = read_quantization(folder) if order.rounded else None
    layers = {} if told is None else take_weights(component.name, network, told, Path(order.rounded))
    if order.options.get("neural_engine") and type(network).__name__ in NETWORKS:
        network = neural_engine_form(component.name, network)
    pin_timesteps(network)
    round_inputs(network, layers)
    export = ExportOptions(**order.export)
    rows = export.batch * (2 if export.guided and component.role == "denoiser" else 1)
    examples = example_feeds(network, Sizes(rows, export.latent, export.tokens))
    names = signature(network)
    recording = Recording.open(Path(order.recording), verify=False)
    calls = recorded_calls(component, config_of(folder), recording, range(min(order.rows, recording.count)))
    if swift:
        check_swift(component, names.inputs, rows, export)
        if component.role == "denoiser":
            cast("Any", network).channels_first_text = True  # the examples above are as callers give them
    inputs = {name: tensor.numpy() for name, tensor in zip(names.inputs, examples, strict=True)}
    fed = [
        {name: _resized(array, inputs[name]) for name, array in call.feeds.items()}
        for call in spread(list(calls), order.calls)
    ]
    about = {name: _ABOUT.get(name, name) for name in (*names.inputs, *names.outputs)}
    about["sample"] = about["sample"] if component.role == "denoiser" else "image, -1 to 1"
    about[""] = f"{_ROLES[component.role]} ({type(network).__name__}), state {state.name}"
    facts = {"author": _AUTHOR, "version": __version__, **order.facts}
    return TorchProgram(
        component.name,
        wrap(network),
        inputs,
        names.outputs,
        shapes=_shapes(component.name, network, rows, export),
        calls=tuple(fed),
        about=about,
        stored={} if told is None else {path: _stored(scheme_of(path, told)) for path in layers},
        ports=SWIFT_PORTS[component.role] if swift else {},
        facts=facts,
        prefix="net.",
        is_denoiser=component.role == "denoiser",
    )


def _stored(scheme: str) -> str:
    """Return the word for how weights of a scheme are stored; they have few values already."""
    return "int8" if scheme in (INT8, INT8_WEIGHTS) else scheme


def _shapes(name: str, network: nn.Module, rows: int, export: ExportOptions) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Return the shapes of the inputs at every size that the recipe names.

    Raises:
        ComponentFailed: it names several batches.
    """
    if not export.dynamic or export.latents is None:
        return ()
    if export.batches is not None and {*export.batches} != {export.batch}:
        raise ComponentFailed(
            f"{name}: shapes.batch: got {export.batches[0]} to {export.batches[1]}, expected only {export.batch}: Core "
            "ML's converter fixes the rows of group normalization. Write shapes.batch with that number alone."
        )
    sides = dict.fromkeys((export.latent, *export.latents))
    fed = [example_feeds(network, Sizes(rows, side, export.tokens)) for side in sides]
    found = tuple(dict.fromkeys(tuple(tuple(tensor.shape) for tensor in tensors) for tensors in fed))
    return found if len(found) > 1 else ()


def _resized(array: np.ndarray[Any, Any], like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a recorded input with as many rows as the network is compiled for; missing ones are repeated."""
    if array.ndim == 0 or len(array) == len(like):
        return array
    return np.resize(array, (len(like), *array.shape[1:]))


if __name__ == "__main__":
    sys.exit(main())

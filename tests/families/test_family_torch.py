"""Networks of every kind of family as torch programs: they answer as ONNX Runtime does on the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from exporter.lowering.export import MODEL_FILE, export_component
from exporter.lowering.options import ExportOptions
from exporter.lowering.wrappers import part_of
from exporter.networks.components import component
from exporter.networks.storage import load_network
from targets.torch_graph import OnnxGraph
from targets.torch_program import Program, Weights

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

NETWORKS = [
    ("StableDiffusionXLPipeline", "unet", 21, False),
    ("StableDiffusionXLPipeline", "text_encoder_2", 20, False),
    ("StableDiffusionXLPipeline", "vae_decoder", 20, True),
    ("DDPMPipeline", "unet", 23, False),
    ("PixArtAlphaPipeline", "transformer", 20, True),
    ("PixArtAlphaPipeline", "text_encoder", 20, False),
    ("DiTPipeline", "transformer", 20, False),
    ("StableDiffusion3Pipeline", "transformer", 23, False),
    ("FluxPipeline", "transformer", 20, False),
    ("FluxPipeline", "transformer", 23, False),
]
SIDES = {"batch": 3, "height": 12, "width": 16}


@pytest.mark.parametrize(("family", "name", "opset", "dynamic"), NETWORKS)
def test_a_network_answers_as_onnx_runtime_does(
    source_of: Callable[[str], Path], tmp_path: Path, family: str, name: str, opset: int, dynamic: bool
) -> None:
    part = component(family, name)
    network = load_network(source_of(family) / part.folder, cls=part.cls)
    options = ExportOptions(opset=opset, dynamic=dynamic, batch=2, guided=False, latent=8, tokens=8)
    export_component(name, part_of(part, network), tmp_path, options)
    runtime = onnxruntime.InferenceSession(str(tmp_path / MODEL_FILE), providers=["CPUExecutionProvider"])
    draw, feeds = np.random.default_rng(0), {}
    for spec in runtime.get_inputs():
        shape = [side if isinstance(side, int) else SIDES[side] for side in spec.shape]
        ids = "int" in spec.type
        feeds[spec.name] = draw.integers(0, 6, shape) if ids else draw.standard_normal(shape, dtype=np.float32)
    wanted = runtime.run(None, feeds)
    graph = OnnxGraph(tmp_path / MODEL_FILE)
    program = Program(graph, tuple(feeds[spec.name].shape for spec in graph.inputs), Weights("cpu"))
    with torch.no_grad():
        found = program.module(*(torch.from_numpy(feeds[spec.name]) for spec in graph.inputs))
    for got, expected in zip(found, wanted, strict=True):
        assert got.numpy().dtype == expected.dtype
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-3, atol=2e-4 * float(np.abs(expected).max()))

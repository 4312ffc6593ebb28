"""Zeros that a state claims, on the initializers of graphs that the real export made, along the axis they are read."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from onnx import numpy_helper
from torch import nn

from exporter.errors import ComponentFailed
from exporter.lowering.export import MODEL_FILE, ExportOptions, export_component
from exporter.lowering.stored import stored_weights
from exporter.lowering.zeros import check_zeros
from exporter.networks.cuts import Cut
from exporter.networks.schedule import Pattern
from exporter.networks.storage import open_bare, save_network
from exporter.networks.surgery import Surgery
from exporter.progress import Silent
from exporter.pruners.base import Context
from exporter.pruners.magnitude import Magnitude

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

OPTIONS = ExportOptions(latent=8, tokens=8)
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight"
CONV = "down_blocks.0.resnets.0.conv2.weight"
TIME = "down_blocks.0.resnets.0.time_emb_proj.weight"


def sparse(network, tmp_path, pattern="2:4", keep_ratio=0.5):
    method = Magnitude(Magnitude.options(keep_ratio, cut="weights", pattern=pattern))
    return method.prune(network, Context(torch.Generator(), Silent(), tmp_path)).sparsity


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=32,
            mid_block_type=None,
        ).eval()


@pytest.fixture(scope="module")
def exported(unet, tmp_path_factory):
    """A 2:4 U-Net whose weights lie in the graph, as small networks are exported, and its claims."""
    folder = tmp_path_factory.mktemp("small")
    network = copy.deepcopy(unet)
    claims = sparse(network, folder)
    export_component("unet", network, folder, OPTIONS)
    return folder / MODEL_FILE, claims


def initializers(path):
    return {tensor.name: tensor for tensor in onnx.load(str(path)).graph.initializer}


def test_every_masked_layer_of_a_small_network_keeps_its_pattern(exported):
    path, claims = exported
    assert len(claims) > 40
    assert {LINEAR, CONV, TIME} <= set(claims)
    found = check_zeros([path], claims, "unet")
    assert found["layers"] == len(claims) <= found["operators"]
    # By numpy, on the layer whose weight the export transposed: inputs are the first axis now.
    held = initializers(path)
    folded = numpy_helper.to_array(held[f"{LINEAR}_transposed"])
    assert ((folded.reshape(-1, 4, folded.shape[1]) != 0).sum(axis=1) == 2).all()
    kernel = numpy_helper.to_array(held[CONV])
    assert ((kernel.reshape(kernel.shape[0], -1, 4, 3, 3) != 0).sum(axis=2) == 2).all()


def test_every_masked_layer_of_weights_outside_of_the_graph_keeps_its_pattern(unet, tmp_path):
    """Large networks: the graph points into the state's own file, through casts where that holds 16 bits."""
    network = copy.deepcopy(unet)
    claims = sparse(network, tmp_path)
    nn.Module.to(network, torch.bfloat16)
    config = dict(network.config)
    save_network(network, tmp_path / "s", surgery=Surgery(), original_config=config, sparsity=claims)
    bare, weights = stored_weights(open_bare(tmp_path / "s", cls="UNet2DConditionModel"), "digest")
    out = tmp_path / "onnx"
    out.mkdir()
    export_component("unet", bare, out, ExportOptions(latent=8, tokens=8, external_bytes=1000), weights=weights)
    assert any(
        tensor.external_data for tensor in onnx.load(str(out / MODEL_FILE), load_external_data=False).graph.initializer
    )
    assert check_zeros([out / MODEL_FILE], claims, "unet")["layers"] == len(claims)


@pytest.mark.parametrize(
    ("held", "claimed"), [(f"{LINEAR}_transposed", LINEAR), (CONV, CONV), (TIME, TIME)], ids=["MatMul", "Conv", "Gemm"]
)
def test_a_lost_zero_names_the_layer(exported, held, claimed, tmp_path):
    path, claims = exported
    model = onnx.load(str(path))
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == held]
    array = numpy_helper.to_array(tensor).copy()
    array.flat[int(np.flatnonzero(array == 0)[0])] = 1.0
    tensor.CopyFrom(numpy_helper.from_array(array, held))
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ComponentFailed, match=rf"unet: {claimed}: 2:4 sparse in the state, but not in the exported gr"):
        check_zeros([tmp_path / "model.onnx"], claims, "unet")


def test_a_weight_transposed_without_its_reader_is_noticed(exported, tmp_path):
    """The same zeros along the other axis are of no use to a compiler."""
    path, claims = exported
    model = onnx.load(str(path))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == f"{name}_transposed"]
    square = numpy_helper.to_array(tensor)
    assert square.shape[0] == square.shape[1]
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(square.T), tensor.name))
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ComponentFailed, match=r"attn1\.to_q\.weight: 2:4 sparse in the state"):
        check_zeros([tmp_path / "model.onnx"], claims, "unet")


def test_a_claim_of_a_layer_that_is_not_in_the_graph_is_lost(exported):
    with pytest.raises(
        ComponentFailed, match=r"gone\.weight: 50 % unstructured sparse .* no Conv, Gemm, MatMul of that"
    ):
        check_zeros([exported[0]], {"gone.weight": (50, 100)}, "unet")


def test_unstructured_zeros_are_counted(exported):
    path, _ = exported
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in onnx.load(str(path)).graph.initializer}
    assert check_zeros([path], {CONV: (sizes[CONV] // 2, sizes[CONV])}, "unet")["layers"] == 1
    with pytest.raises(ComponentFailed, match=r"conv2\.weight: .* got \d+ numbers that are not zero"):
        check_zeros([path], {CONV: (sizes[CONV] // 2 - 1, sizes[CONV])}, "unet")
    with pytest.raises(ComponentFailed, match=r"conv2\.weight: .* got \d+ numbers, expected"):
        check_zeros([path], {CONV: (sizes[CONV], 2 * sizes[CONV])}, "unet")


def test_the_graphs_of_a_schedule_hold_every_layer_between_them(unet, exported, tmp_path):
    """A step that reuses the inner level has a graph without it: its zeros are in the other graph."""
    path, _ = exported
    network = copy.deepcopy(unet)
    claims = sparse(network, tmp_path)
    names = ("sample", "timestep", "encoder_hidden_states")
    export_component("unet", Cut(network, Pattern(1, ()), names), tmp_path, OPTIONS)
    (shallow,) = tmp_path.glob("*.onnx")
    both, one = check_zeros([path, shallow], claims, "unet"), check_zeros([path], claims, "unet")
    assert both["layers"] == one["layers"] == len(claims)
    assert one["operators"] < both["operators"] < 2 * one["operators"]
    with pytest.raises(ComponentFailed, match=r"no Conv, Gemm, MatMul of that name"):
        check_zeros([shallow], claims, "unet")


def test_without_claims_no_graph_is_opened(tmp_path):
    assert check_zeros([tmp_path / "none.onnx"], {}, "unet") == {"layers": 0, "operators": 0}

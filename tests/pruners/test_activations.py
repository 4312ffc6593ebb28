"""What layers are given: the columns give the layers' own answers, norms and Hessians are those of numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from exporter.errors import ComponentFailed
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.pruners import activations, hessians
from exporter.pruners.activations import as_matrix, as_weight, column_norms, columns_of, watch
from exporter.pruners.answers import Exam
from exporter.pruners.base import Context
from exporter.pruners.sparse import SparseLayer, sparse_layers


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(12, 5), (2, 7, 12)),
        (nn.Conv2d(6, 5, 3, padding=1), (2, 6, 8, 8)),
        (nn.Conv2d(6, 5, 3, stride=2), (2, 6, 9, 9)),
        (nn.Conv2d(6, 5, (1, 3), padding=(0, 2), dilation=(1, 2)), (2, 6, 4, 8)),
    ],
    ids=["linear", "conv", "stride", "dilation"],
)
def test_columns_times_the_matrix_are_the_layers_answer(layer, shape):
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    answer = layer(given)
    product = columns_of(layer, given) @ as_matrix(layer.weight).T + layer.bias
    expected = answer.reshape(-1, 5) if answer.dim() == 3 else answer.movedim(1, -1).reshape(-1, 5)
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(as_weight(as_matrix(layer.weight), layer.weight.shape), layer.weight)


def test_consecutive_columns_of_a_convolution_are_channels_at_one_kernel_position():
    weight = torch.arange(2 * 8 * 3 * 3.0).reshape(2, 8, 3, 3)
    matrix = as_matrix(weight)
    assert torch.equal(matrix[1, 8 * 5 + 4 : 8 * 5 + 8], weight[1, 4:8, 1, 2])


@pytest.fixture(scope="module")
def dense(tiny_loan):
    return load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")


@pytest.fixture(scope="module")
def exam(tiny_loan):
    recording = tiny_loan.recording(str(tiny_loan.folder.parent / "prompts.txt"), 3)
    return Exam.of(recording, tiny_loan.form, batch=2)


def some(dense):
    chosen = {"down_blocks.0.resnets.0.conv2", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"}
    layers = [layer for layer in sparse_layers(dense, "2:4", None).layers if layer.path in chosen]
    assert len(layers) == 2
    return layers


def given_to(dense, layers, exam):
    """Every input of the layers, gathered by hooks of the test's own: path -> one array per call."""
    seen = {layer.path: [] for layer in layers}
    for asked in exam.calls:
        handles = [
            layer.module.register_forward_hook(lambda m, a, o, path=layer.path: seen[path].append(a[0].numpy()))
            for layer in layers
        ]
        with torch.no_grad():
            dense(**asked.arguments)
        for handle in handles:
            handle.remove()
    return seen


def patches(array):
    """Rows over (kernel position, channel) of a 3x3 convolution with padding 1, by slicing."""
    padded = np.pad(array, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = array.shape[2:]
    parts = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.concatenate(parts, axis=1).transpose(0, 2, 3, 1).reshape(-1, 9 * array.shape[1])


def test_norms_are_over_every_call_with_and_without_the_prompts(dense, exam):
    layers = some(dense)
    found = column_norms(dense, layers, exam, progress=Silent())
    seen = given_to(dense, layers, exam)
    conv, linear = layers
    rows = np.concatenate([patches(array) for array in seen[conv.path]]).astype(np.float64)
    assert len(rows) == 3 * 3 * 2 * 64  # steps, prompts, rows of guidance, positions
    np.testing.assert_allclose(found[conv.path].numpy(), np.sqrt((rows**2).sum(0)), rtol=1e-5)
    rows = np.concatenate([array.reshape(-1, array.shape[-1]) for array in seen[linear.path]]).astype(np.float64)
    np.testing.assert_allclose(found[linear.path].numpy(), np.sqrt((rows**2).sum(0)), rtol=1e-5)


def test_hessians_weigh_the_steps(dense, exam, tmp_path):
    layers = some(dense)
    context = Context(torch.Generator(), Silent(), tmp_path)
    weights = (1.2, 1.0, 0.8)
    grams = {layer.path: gram for layer, gram in hessians._grams(dense, layers, exam, context, weights)}
    seen = given_to(dense, layers, exam)
    total, counted = 0.0, 0.0
    for asked, array in zip(exam.calls, seen[layers[0].path], strict=True):
        weight = weights[sorted({call.timestep for call in exam.calls}, reverse=True).index(asked.timestep)]
        rows = patches(array).astype(np.float64)
        total, counted = total + weight * rows.T @ rows, counted + weight * len(rows)
    np.testing.assert_allclose(grams[layers[0].path][0].numpy(), 2 * total / counted, rtol=1e-3, atol=1e-5)


def test_layers_too_wide_get_blocks_of_whole_groups(monkeypatch):
    conv = SparseLayer("wide", nn.Conv2d(48, 8, 3), (2, 4))  # 432 columns
    assert hessians._blocks(conv) == 1
    monkeypatch.setattr(hessians, "WIDEST", 200)
    assert hessians._blocks(conv) == 3  # 144 columns: all channels at three kernel positions
    monkeypatch.setattr(hessians, "BUDGET", 4 * 432 * 432 // 3)
    assert [len(part) for part in hessians._parts([conv, conv, conv])] == [1, 1, 1]
    monkeypatch.setattr(hessians, "BUDGET", 2 * 4 * 432 * 432 // 3)
    assert [len(part) for part in hessians._parts([conv, conv, conv])] == [2, 1]


def test_more_rows_than_the_limit_are_thinned_evenly(dense, exam, monkeypatch):
    monkeypatch.setattr(activations, "POSITIONS", 50)
    counts = []
    watch(dense, some(dense), exam, lambda layer, columns, step: counts.append(len(columns)), progress=Silent())
    assert set(counts) == {50}


def test_hooks_are_gone_after_a_failure(dense, exam):
    def fail(*_):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        watch(dense, some(dense), exam, fail, progress=Silent())
    assert not any(module._forward_pre_hooks for module in dense.modules())


def test_inputs_that_are_not_finite_name_the_layer(tiny_loan, exam):
    broken = load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")
    with torch.no_grad():
        broken.down_blocks[0].resnets[0].norm2.bias.fill_(float("nan"))
    with pytest.raises(ComponentFailed, match=r"down_blocks\.0\.resnets\.0\.conv2 was given numbers that are not fin"):
        column_norms(broken, some(broken), exam, progress=Silent())

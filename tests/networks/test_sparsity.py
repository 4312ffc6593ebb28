"""Patterns of zeros and the claims of them: against numpy's own loops, and against what a folder may not say."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from network_samples import config_of, drop_text_layer, network
from torch import nn

from exporter.errors import ArtifactError, SurgeryError
from exporter.networks.sparsity import (
    SPARSITY,
    broken,
    carried,
    check_claims,
    load_claims,
    pattern_mask,
    stated,
    sums_over,
)
from exporter.networks.storage import load_network, save_network
from exporter.networks.surgery import Snapshot, Surgery, diff


def brute(scores, n, m):
    """Keep the n largest of m consecutive inputs, the earlier of equals, one group at a time."""
    array = scores.numpy()
    mask = np.zeros(array.shape, bool)
    for place in np.ndindex(array.shape[0], *array.shape[2:]):
        row = (place[0], slice(None), *place[1:])
        for start in range(0, array.shape[1], m):
            group = array[row][start : start + m]
            mask[row][start + np.array(sorted(range(m), key=lambda i: (-group[i], i))[:n])] = True
    return mask


@pytest.mark.parametrize("shape", [(6, 24), (4, 24, 3, 3), (4, 24, 1, 1)], ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (5, 6), (1, 12)])
def test_masks_are_those_of_loops_along_the_inputs(shape, n, m):
    scores = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(n + m)).float()  # many equals
    mask = pattern_mask(scores, (n, m))
    assert np.array_equal(mask.numpy(), brute(scores, n, m))
    assert not broken(scores.clamp_min(1) * mask, (n, m))


def test_unstructured_masks_keep_the_largest_wherever_they_are():
    scores = torch.tensor([[3.0, 1.0, 1.0, 0.0] * 8, [2.0, 5.0, 0.0, 0.0] * 8, [1.0, 0.0, 4.0, 0.0] * 8])
    mask = pattern_mask(scores, (25, 96))
    order = sorted(range(96), key=lambda i: (-float(scores.flatten()[i]), i))[:25]
    assert sorted(mask.flatten().nonzero().flatten().tolist()) == sorted(order)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ((1, 6), "3 numbers that are not zero in group 1 (inputs 4 to 7) of output 1, expected at most 2 of 4"),
        ((2, 10, 0, 1), "in group 2 (inputs 8 to 11) of output 2 at kernel position (0, 1)"),
    ],
)
def test_a_broken_pattern_is_named_by_output_group_and_kernel_position(place, told):
    shape = (4, 12, 3, 2)[: len(place)]
    weight = torch.ones(shape) * pattern_mask(torch.ones(shape), (2, 4))
    assert not broken(weight, (2, 4))
    weight[place] = 0.5
    assert told in broken(weight, (2, 4))


def test_the_other_axis_is_not_the_reduced_one():
    """2:4 along the outputs, which is what a transposed weight would show, is no 2:4."""
    wrong = torch.ones(8, 8) * pattern_mask(torch.ones(8, 8), (2, 4)).T
    assert broken(wrong, (2, 4))
    assert sums_over(nn.Linear(3, 5)) == 3
    assert sums_over(nn.Conv2d(3, 5, 1)) == 3
    assert sums_over(nn.Conv2d(4, 4, 1, groups=2)) is None


NAME = "down_blocks.0.resnets.0.conv1.weight"


def sparse(cls="UNet2DConditionModel", name=NAME, pattern=(2, 4)):
    net = network(cls)
    weight = net.get_parameter(name)
    with torch.no_grad():
        weight.mul_(pattern_mask(weight.abs(), pattern))
    return net


def saved(net, folder, claims, surgery=None):
    save_network(net, folder, surgery=surgery or Surgery(), original_config=config_of(net), sparsity=claims)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_claim_survives_storage_in_any_precision(dtype, tmp_path):
    net = sparse()
    nn.Module.to(net, dtype)
    folder = saved(net, tmp_path / "net", {NAME: (2, 4)})
    assert load_claims(folder) == {NAME: (2, 4)}
    assert not broken(load_network(folder, cls="UNet2DConditionModel").get_parameter(NAME), (2, 4))


def test_a_dense_network_has_no_file_of_claims(tmp_path):
    folder = saved(sparse(), tmp_path / "net", {NAME: (2, 4)})
    assert not (saved(network("UNet2DConditionModel"), folder, {}) / SPARSITY).exists()


def test_a_false_claim_is_refused_when_written_and_when_read(tmp_path):
    dense = network("UNet2DConditionModel")
    with pytest.raises(SurgeryError, match=rf"{NAME}: claimed to be 2:4 sparse; got [34] numbers .* group 0 .* output"):
        saved(dense, tmp_path / "false", {NAME: (2, 4)})
    folder = saved(dense, tmp_path / "net", {})
    (folder / SPARSITY).write_text(json.dumps({"format": 1, "weights": {NAME: [2, 4]}}))
    with pytest.raises(ArtifactError, match=rf"net: {NAME}: claimed to be 2:4 sparse; got .* Make the state again"):
        load_network(folder, cls="UNet2DConditionModel")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"format": 1}',
        '{"format": 2, "weights": {}}',
        '{"format": 1, "weights": []}',
        '{"format": 1, "weights": {"a.weight": [4, 2]}}',
        '{"format": 1, "weights": {"a.weight": [0, 4]}}',
        '{"format": 1, "weights": {"a.weight": [2, 4, 4]}}',
        '{"format": 1, "weights": {"a.weight": [2.0, 4]}}',
        '{"format": 1, "weights": {"a.weight": [true, 4]}}',
        '{"format": 1, "weights": {"a.weight": [2, 1e99]}}',
        '{"format": 1, "weights": {"a.bias": [2, 4]}}',
        '{"format": 1, "weights": {"a.__class__.weight": [2, 4]}}',
        '{"format": 1, "weights": {"../a.weight": [2, 4]}}',
        '{"format": 1, "weights": {"no.such.weight": [2, 4]}}',
        '{"format": 1, "weights": {"conv_in.weight": [2, 4], "conv_in.weight": [1, 4]}}',
        '{"format": 1, "weights": {"conv_norm_out.weight": [2, 4]}}',
    ],
)
def test_a_file_that_holds_no_claims_is_refused(content, tmp_path):
    folder = saved(network("UNet2DConditionModel"), tmp_path / "net", {})
    (folder / SPARSITY).write_text(content)
    with pytest.raises(ArtifactError, match=r"sparsity\.json|claimed to be"):
        load_network(folder, cls="UNet2DConditionModel")


def test_claims_follow_their_weights_through_a_shortened_list():
    import random

    net = network("CLIPTextModel")
    names = [f"encoder.layers.{i}.mlp.fc1.weight" for i in range(len(net.encoder.layers))]
    with torch.no_grad():
        for name in names:
            weight = net.get_parameter(name)
            weight.mul_(pattern_mask(weight.abs(), (2, 4)))
    held = [net.get_parameter(name) for name in names]
    snapshot = Snapshot.of(net)
    drop_text_layer(net, random.Random(1))
    kept, lost = carried(dict.fromkeys(names, (2, 4)), diff(snapshot, net), net.state_dict())
    assert sorted(kept) == names[: len(names) - 1]
    assert lost == []
    assert all(any(net.get_parameter(name) is weight for weight in held) for name in kept)
    check_claims(net.state_dict(), kept, "text", SurgeryError)


def test_a_cut_takes_the_claims_that_it_breaks_and_counts_unstructured_ones_anew():
    """Narrowing a block's inner width cuts outputs of its first convolution and inputs of its second."""
    net = network("UNet2DConditionModel")
    block = net.down_blocks[0].resnets[0]
    first, second = (f"down_blocks.0.resnets.0.{name}.weight" for name in ("conv1", "conv2"))
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            conv.weight.mul_(pattern_mask(conv.weight.abs(), (2, 4)))
    dense = copy.deepcopy(net)
    snapshot = Snapshot.of(net)
    with torch.no_grad():
        narrow_to_odd(block)
    surgery = diff(snapshot, net)
    kept, lost = carried({first: (2, 4), second: (2, 4)}, surgery, net.state_dict())
    assert kept == {first: (2, 4)}
    assert lost == [second]
    count = dense.get_parameter(second).numel()
    kept, lost = carried({second: (count // 2, count)}, surgery, net.state_dict())
    weight = net.get_parameter(second)
    assert kept == {second: (int(torch.count_nonzero(weight)), weight.numel())}
    assert not lost


def narrow_to_odd(block):
    """Keep three quarters of the inner channels, every fourth gone, so that groups of four are torn."""
    width = block.conv1.out_channels
    keep = torch.tensor([i for i in range(width) if i % 4])
    block.conv1.weight = nn.Parameter(block.conv1.weight[keep])
    block.conv1.bias = nn.Parameter(block.conv1.bias[keep])
    block.time_emb_proj.weight = nn.Parameter(block.time_emb_proj.weight[keep])
    block.time_emb_proj.bias = nn.Parameter(block.time_emb_proj.bias[keep])
    block.norm2.weight, block.norm2.bias = (nn.Parameter(p[keep]) for p in (block.norm2.weight, block.norm2.bias))
    block.conv2.weight = nn.Parameter(block.conv2.weight[:, keep])
    block.conv1.out_channels = block.conv2.in_channels = block.time_emb_proj.out_features = len(keep)
    block.norm2.num_channels = len(keep)


def test_patterns_in_words():
    assert stated((2, 4)) == "2:4"
    assert stated((512, 1024)) == "50 % unstructured"

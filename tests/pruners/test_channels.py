"""Widths: what is cut, that it is exact where it can be, and that nothing but the cut happens."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from exporter.errors import RecipeError
from exporter.networks.probe import run_probe
from exporter.progress import Silent
from exporter.pruners import channels, pruner
from exporter.pruners.base import PARTS, CutOptions, Layer
from exporter.pruners.channels import cut_channels, layers_of
from exporter.pruners.ranking import kept_units, removed_units


def cut(network, keep_ratio=0.5, score=None, **options):
    score = score or (lambda layer: torch.arange(layer.units, dtype=torch.float32))
    cut_channels(network, CutOptions(keep_ratio, **options), score, progress=Silent())
    return network


def layer(units=32, unit_width=1, norm_groups=1):
    return Layer("x", "channels", units, unit_width, norm_groups, ())


@pytest.mark.parametrize(
    ("made", "ratio", "multiple", "expected"),
    [
        (layer(64), 0.7, 8, 48),
        (layer(176), 0.7, 8, 120),
        (layer(64), 0.01, 8, 8),  # never nothing
        (layer(64), 0.99, 8, 64),
        (layer(64), 0.5, 1, 32),
        (layer(36, norm_groups=4), 0.7, 8, 24),  # a multiple of 8 and of the groups
        (layer(320, norm_groups=32), 0.7, 8, 224),
        (layer(11, unit_width=16), 0.5, 8, 6),  # of two equally near the larger
        (layer(5, unit_width=40), 0.2, 64, 5),  # no count of heads gives a multiple of 64
        (layer(1, unit_width=64), 0.3, 8, 1),
    ],
)
def test_widths_are_the_nearest_multiple(made, ratio, multiple, expected):
    assert kept_units(made, CutOptions(ratio, round_to=multiple)) == expected


def test_the_lowest_of_every_norm_group_go():
    scores = torch.tensor([9.0, 1, 8, 2, 0.3, 0.1, 0.2, 0.4])
    assert removed_units(layer(8, norm_groups=2), scores, 4) == [1, 3, 5, 6]
    assert removed_units(layer(8), scores, 4) == [4, 5, 6, 7]
    assert removed_units(layer(4), torch.ones(4), 2) == [2, 3]  # equals: the later go, on every machine


@pytest.mark.parametrize("name", ["unet", "vae", "clip"])
@pytest.mark.parametrize("parts", [("channels", "heads", "neurons"), PARTS], ids=["inner", "all"])
def test_every_cut_width_is_valid(network, name, parts):
    before, after = network(name), cut(network(name), 0.6, parts=parts)
    widths = dict(before.named_parameters())
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in before.parameters())
    for path, parameter in after.named_parameters():
        for now, was in zip(parameter.shape, widths[path].shape, strict=True):
            assert now == was or now % 8 == 0, path
    for path, module in after.named_modules():
        if isinstance(module, nn.GroupNorm):
            assert module.num_channels % module.num_groups == 0, path
        if isinstance(module, Attention):
            assert module.heads >= 1
            assert (
                module.inner_dim == module.to_q.out_features == module.to_k.out_features == module.to_out[0].in_features
            )
            assert module.sliceable_head_dim == module.heads
    assert {k: v.shape for k, v in run_probe(after).items()} == {k: v.shape for k, v in run_probe(before).items()}
    assert all(value.isfinite().all() for value in run_probe(after).values())


def test_what_others_rely_on_is_never_cut(network):
    before, after = network("unet"), cut(network("unet"), 0.3, parts=PARTS)
    assert after.conv_in.in_channels == 4
    assert after.conv_out.out_channels == 4
    for name in ("linear_1", "linear_2"):
        assert getattr(after.time_embedding, name).weight.shape == getattr(before.time_embedding, name).weight.shape
    for path, module in after.named_modules():
        if path.endswith("attn2"):
            assert module.to_k.in_features == module.to_v.in_features == module.cross_attention_dim == 24
    vae, small = network("vae"), cut(network("vae"), 0.3, parts=PARTS)
    assert small.post_quant_conv.weight.shape == vae.post_quant_conv.weight.shape
    assert small.decoder.conv_out.out_channels == 3
    for path, parameter in vae.encoder.named_parameters():
        assert torch.equal(small.encoder.get_parameter(path), parameter)


def test_streams_are_left_alone_unless_named(network):
    inner, everything = cut(network("unet"), 0.5), cut(network("unet"), 0.5, parts=PARTS)
    assert inner.conv_in.out_channels == 32
    assert everything.conv_in.out_channels == 16
    assert everything.down_blocks[0].downsamplers[0].channels == 16  # diffusers asserts on it
    assert everything.down_blocks[0].resnets[0].in_channels == everything.down_blocks[0].resnets[0].out_channels == 16


@pytest.mark.parametrize(
    ("name", "part"), [("unet", "heads"), ("unet", "neurons"), ("clip", "heads"), ("clip", "neurons")]
)
def test_cutting_equals_silencing(network, name, part):
    """A unit whose output weights are zero adds nothing: the cut network must answer as the silenced dense one."""
    options = CutOptions(0.5, parts=(part,))
    dense = network(name)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        scores = {found.path: torch.rand(found.units) for found in layers_of(dense, options)}
    for found in layers_of(dense, options):
        gone = torch.tensor(removed_units(found, scores[found.path], kept_units(found, options)))
        inputs = [share for share in found.shares if share.dim == 1]
        assert len(inputs) == 1
        with torch.no_grad():
            inputs[0].parameter[:, inputs[0].index[gone].flatten()] = 0
    small = cut(network(name), 0.5, score=lambda found: scores[found.path], parts=(part,))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    for key, value in run_probe(dense).items():
        torch.testing.assert_close(run_probe(small)[key], value, rtol=1e-4, atol=1e-5)


def test_a_resnet_keeps_its_channels_in_their_norm_groups(network):
    """Against the block written out by hand with the kept channels alone."""
    dense, options = network("unet"), CutOptions(0.5, parts=("channels",))
    found = next(item for item in layers_of(dense, options) if item.path == "down_blocks.0.resnets.0")
    scores = torch.arange(32.0).flip(0)
    gone = removed_units(found, scores, 16)
    kept = [unit for unit in range(32) if unit not in gone]
    assert [sum(group * 4 <= unit < group * 4 + 4 for unit in kept) for group in range(8)] == [2] * 8
    block = copy.deepcopy(dense.down_blocks[0].resnets[0])
    small = cut(network("unet"), 0.5, score=lambda item: torch.arange(float(item.units)).flip(0), parts=("channels",))
    x, time = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 128)
    with torch.no_grad():
        hidden = F.conv2d(F.silu(block.norm1(x)), block.conv1.weight[kept], block.conv1.bias[kept], padding=1)
        hidden = (
            hidden
            + F.linear(F.silu(time), block.time_emb_proj.weight[kept], block.time_emb_proj.bias[kept])[..., None, None]
        )
        hidden = F.group_norm(hidden, 8, block.norm2.weight[kept], block.norm2.bias[kept], block.norm2.eps)
        expected = x + F.conv2d(F.silu(hidden), block.conv2.weight[:, kept], block.conv2.bias, padding=1)
        torch.testing.assert_close(small.down_blocks[0].resnets[0](x, time), expected, rtol=1e-5, atol=1e-5)


def test_gated_neurons_lose_both_halves(network):
    dense, small = network("unet"), cut(network("unet"), 0.5, parts=("neurons",))
    path = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
    was, now = dense.get_submodule(path).weight, small.get_submodule(path).weight
    assert now.shape[0] == was.shape[0] // 2
    half, kept = was.shape[0] // 2, was.shape[0] // 4
    assert torch.equal(now[:kept], was[kept:half])  # scores rise with the index, so the second half of each stays
    assert torch.equal(now[kept:], was[half + kept :])


@pytest.mark.parametrize("name", ["unet", "vae", "clip"])
def test_tracing_leaves_no_trace(network, name):
    made = network(name)
    next(made.parameters()).requires_grad_(False)
    made.train()
    processors = [m.processor for m in made.modules() if isinstance(m, Attention)]
    flags = {path: parameter.requires_grad for path, parameter in made.named_parameters()}
    layers_of(made, CutOptions(0.5))
    assert all(
        a is b
        for a, b in zip(processors, [m.processor for m in made.modules() if isinstance(m, Attention)], strict=True)
    )
    assert {path: parameter.requires_grad for path, parameter in made.named_parameters()} == flags
    assert all(module.training for module in made.modules())
    assert not any(module._forward_hooks for module in made.modules())
    cut(made)
    assert {path: parameter.requires_grad for path, parameter in made.named_parameters()} == flags


def test_it_works_where_gradients_are_off(network):
    with torch.no_grad():
        cut(network("clip"))


def test_one_network_does_not_leak_into_the_next(network):
    alone = cut(network("unet"), 0.4)
    cut(network("vae"), 0.7)
    cut(network("unet"), 0.9)
    cut(network("clip"), 0.6)
    again = cut(network("unet"), 0.4)
    assert {k: v.shape for k, v in alone.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in alone.state_dict().items())


def test_two_cuts_in_a_row(network):
    made = cut(cut(network("unet"), 0.7), 0.6)
    assert all(value.isfinite().all() for value in run_probe(made).values())
    assert made.down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads == 2  # 4, 3, 2


def test_keeping_all_changes_nothing(network):
    made = network("unet")
    parameters = dict(made.named_parameters())
    cut(made, 1.0)
    assert all(parameter is parameters[path] for path, parameter in made.named_parameters())


def test_protected_modules_stay(network):
    before, after = network("unet"), cut(network("unet"), 0.5, protect=("mid_block", "down_blocks.*.resnets.*"))
    for path, parameter in after.named_parameters():
        if path.startswith("mid_block") or (path.startswith("down_blocks") and ".resnets." in path):
            assert parameter.shape == before.get_parameter(path).shape
    assert after.up_blocks[0].resnets[0].conv1.out_channels == 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protect": ("midblock",)}, ["protect", "'midblock'", "mid_block"]),
        ({"round_to": 512}, ["keep_ratio", "512", "Lower"]),
        ({"protect": ("down_blocks", "mid_block", "up_blocks")}, ["keep_ratio", "protect"]),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_fix(network, options, words):
    made = network("unet")
    before = {path: parameter.shape for path, parameter in made.named_parameters()}
    with pytest.raises(RecipeError) as caught:
        cut(made, 0.5, **options)
    assert all(word in str(caught.value) for word in words)
    assert {path: parameter.shape for path, parameter in made.named_parameters()} == before


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"keep_ratio": 1.3}, "keep_ratio"),
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"keep_ratio": 0.5, "round_to": 0}, "round_to"),
        ({"keep_ratio": 0.5, "cut": "layers"}, "cut"),
        ({"keep_ratio": 0.5, "component": "vae"}, "component"),
        ({"keep_ratio": 0.5, "parts": ("head",)}, "parts"),
        ({"keep_ratio": 0.5, "parts": ()}, "parts"),
    ],
)
def test_impossible_options(options, word):
    with pytest.raises(RecipeError, match=rf"prune\.{word}: got .*expected"):
        CutOptions(**options)


def test_a_processor_with_weights_is_refused(network):
    class Adapter(nn.Module):
        pass

    made = network("unet")
    made.mid_block.attentions[0].transformer_blocks[0].attn1.processor = Adapter()
    with pytest.raises(RecipeError, match="Adapter"):
        cut(made)


def test_the_module_holds_no_state():
    assert not [
        name for name, value in vars(channels).items() if isinstance(value, dict | list) and not name.startswith("__")
    ]
    assert pruner("magnitude") is pruner("magnitude")

"""Channels in another order: the dense network answers as before, and every masked layer keeps at least as much."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import RecipeError
from exporter.networks.probe import run_probe
from exporter.networks.sparsity import broken
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.pruners import permutation, pruner
from exporter.pruners.base import Context
from exporter.pruners.permutation import best_order, kept_by
from exporter.pruners.reordering import reorder
from exporter.pruners.sparse import sparse_layers

SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
TRANSFORMERS = {
    "dit": lambda: DiTTransformer2DModel(**SMALL, out_channels=8),
    "pixart": lambda: PixArtTransformer2DModel(**SMALL, cross_attention_dim=16, caption_channels=12),
    "sd3": lambda: SD3Transformer2DModel(
        **SMALL,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=36,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
    "flux": lambda: FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ),
    "scale-shift": lambda: UNet2DConditionModel(  # the time embedding makes a scale and a shift of every channel
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 80),  # groups of the norm are 6 and 10 wide, no multiple of four
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=24,
        resnet_time_scale_shift="scale_shift",
    ),
}
READERS = {  # what of the masked layers has inputs that can be reordered
    "unet": {"conv2", "to_out.0", "net.2"},
    "vae": {"conv2"},
    "clip": {"out_proj", "fc2"},
    "dit": {"to_out.0", "net.2"},
    "pixart": {"to_out.0", "net.2"},
    "sd3": {"to_out.0", "to_add_out", "net.2"},
    "flux": {"to_out.0", "to_add_out", "net.2", "proj_out"},
    "scale-shift": {"conv2", "to_out.0", "net.2"},
}


def size_of(layer):
    return layer.module.weight.detach().abs()


@pytest.fixture
def uneven(network):
    """Return a float64 network in which no two numbers are alike: fresh norms are all ones, biases all zeros."""

    def build(name):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            made = (TRANSFORMERS[name]() if name in TRANSFORMERS else network(name)).double().eval()
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return made

    return build


def two_largest(weight):
    """Return, by numpy, the sum of the two largest sizes of every four consecutive inputs."""
    sizes = np.abs(np.moveaxis(weight.detach().double().numpy(), 1, -1))
    return np.sort(sizes.reshape(-1, 4), axis=1)[:, 2:].sum()


@pytest.mark.parametrize("name", READERS)
def test_the_network_answers_as_before_and_every_layer_keeps_at_least_as_much(uneven, name):
    plain = uneven(name)
    permuted = copy.deepcopy(plain)
    found = sparse_layers(permuted, "2:4", None)
    told = reorder(permuted, found.layers, size_of, (), progress=Silent())

    before, after = run_probe(plain), run_probe(permuted)
    for key, answer in before.items():
        if answer.is_floating_point():
            torch.testing.assert_close(after[key], answer, rtol=1e-6, atol=1e-6 * float(answer.abs().max()))
    was, now = plain.state_dict(), permuted.state_dict()
    assert {key: value.shape for key, value in was.items()} == {key: value.shape for key, value in now.items()}

    kept = {layer.path: (two_largest(was[layer.name]), two_largest(now[layer.name])) for layer in found.layers}
    assert all(second >= first * (1 - 1e-12) for first, second in kept.values())
    more = {path for path, (first, second) in kept.items() if second > first * (1 + 1e-9)}
    assert more == set(told["layers"])
    assert {end for end in READERS[name] if any(path.endswith(end) for path in more)} == READERS[name]
    whole = sum(float(was[layer.name].abs().sum()) for layer in found.layers)
    assert told["plain"] == pytest.approx(sum(first for first, _ in kept.values()) / whole, abs=1e-5)
    assert told["permuted"] == pytest.approx(sum(second for _, second in kept.values()) / whole, abs=1e-5)


def test_what_is_protected_is_not_touched(uneven):
    network = uneven("unet")
    was = copy.deepcopy(network.state_dict())
    found = sparse_layers(network, "2:4", None, ("down_blocks",))
    told = reorder(network, found.layers, size_of, ("down_blocks",), progress=Silent())
    assert told["layers"]
    now = network.state_dict()
    assert all(torch.equal(was[key], now[key]) for key in was if key.startswith("down_blocks"))


def test_a_weight_that_two_layers_share_stays_as_it_is(uneven):
    network = uneven("unet")
    pair = [f"{block}.attentions.0.transformer_blocks.0.ff.net.2" for block in ("down_blocks.0", "up_blocks.1")]
    first, second = (network.get_submodule(path) for path in pair)
    second.weight = first.weight
    before = run_probe(network)["out_sample"]
    found = sparse_layers(network, "2:4", None)
    told = reorder(network, found.layers, size_of, (), progress=Silent())
    assert any(path.endswith("net.2") for path in told["layers"])
    assert not set(pair) & set(told["layers"])
    torch.testing.assert_close(run_probe(network)["out_sample"], before, rtol=1e-6, atol=1e-6)


def swapped(order, first, second):
    changed = order.clone()
    changed[[first, second]] = order[[second, first]]
    return changed


@given(
    st.integers(0, 2**31),
    st.sampled_from([(2, 4), (1, 2), (1, 4), (3, 4), (2, 8)]),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
)
def test_no_single_swap_keeps_more_than_the_order_found(seed, pattern, groups, classes):
    """Every swap that is allowed is tried, and what it keeps is counted anew."""
    generator = torch.Generator().manual_seed(seed)
    channels = 8 * groups * (2 if classes == 4 else 1)
    scores = torch.rand(channels, 5, generator=generator) ** 4
    members = torch.randperm(channels, generator=generator).reshape(classes, -1)
    order = best_order(scores, pattern, members)

    assert sorted(order.tolist()) == list(range(channels))
    owner = {int(channel): index for index, row in enumerate(members) for channel in row}
    assert all(owner[place] == owner[int(channel)] for place, channel in enumerate(order))
    kept = kept_by(scores[order], pattern)
    assert kept >= kept_by(scores, pattern)
    pairs = (pair for row in members.tolist() for pair in itertools.combinations(row, 2))
    assert all(kept_by(scores[swapped(order, *pair)], pattern) <= kept + 1e-3 for pair in pairs)


def test_large_channels_that_stand_together_are_spread():
    """Half of the channels are large, four in a row: in their own order every other of them goes, spread none does."""
    scores = torch.full((16, 3), 0.1)
    scores[:8] = 1.0
    assert kept_by(scores, (2, 4)) == pytest.approx(3 * (4 * 1 + 4 * 0.1))
    assert kept_by(scores[best_order(scores, (2, 4), torch.arange(16)[None])], (2, 4)) == pytest.approx(3 * 8)


def test_wide_layers_are_searched_a_part_at_a_time(monkeypatch):
    """Large channels fill the first part, so that nothing is gained inside of any: far ones have to be compared too."""
    monkeypatch.setattr(permutation, "TOGETHER", 16)
    scores = torch.full((64, 2), 0.1)
    scores[:32] = 1.0
    assert kept_by(scores[best_order(scores, (2, 4), torch.arange(64)[None])], (2, 4)) == pytest.approx(2 * 32)


def test_an_order_that_only_the_rows_looked_at_favour_is_not_taken(monkeypatch):
    """Rows that are not looked at, a thousand times as large, keep all in the given order and less in the other."""
    monkeypatch.setattr(permutation, "ROWS", 2)
    scores = torch.zeros(8, 5)
    scores[:4, [0, 4]] = 1.0
    scores[2:6, 1:4] = 1000.0
    order = best_order(scores, (2, 4), torch.arange(8)[None])
    assert kept_by(scores[order], (2, 4)) >= kept_by(scores, (2, 4)) == 2 * 2 + 3 * 4000


def prune(name, network, context, **options):
    method = pruner(name)
    return method(method.options(**options)).prune(network, context)


ZEROS = {"cut": "weights", "pattern": "2:4", "keep_ratio": 0.5}


def test_magnitude_keeps_more_of_a_network_whose_channels_it_reordered(network, context):
    kept = {}
    for permute in (False, True):
        pruned = network("unet")
        outcome = prune("magnitude", pruned, context(), permute=permute, **ZEROS)
        assert all(not broken(pruned.get_parameter(key).detach(), claim) for key, claim in outcome.sparsity.items())
        kept[permute] = sum(float(pruned.get_parameter(key).detach().abs().double().sum()) for key in outcome.sparsity)
        whole = sum(float(network("unet").get_parameter(key).detach().abs().double().sum()) for key in outcome.sparsity)
    assert "kept_magnitude" not in prune("magnitude", network("unet"), context(), **ZEROS).facts
    told = outcome.facts["kept_magnitude"]
    assert told["plain"] == pytest.approx(kept[False] / whole, abs=1e-5)
    assert told["permuted"] == pytest.approx(kept[True] / whole, abs=1e-5)
    assert kept[True] > kept[False]


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "obs-diff", "sparsedm"])
def test_methods_that_look_at_inputs_reorder_first(tiny_loan, tmp_path, name):
    unet = load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")
    prompts, few = str(tiny_loan.folder.parent / "prompts.txt"), ("up_blocks", "down_blocks.1", "mid_block.resnets")
    lent = Context(torch.Generator().manual_seed(0), Silent(), tmp_path, tiny_loan)
    outcome = prune(name, unet, lent, prompts=prompts, images=2, protect=few, permute=True)
    told = outcome.facts["kept_magnitude_times_input" if name == "wanda" else "kept_magnitude"]
    assert told["layers"]
    assert all(pair["permuted"] >= pair["plain"] for pair in told["layers"].values())
    assert told["permuted"] > told["plain"]
    assert all(not broken(unet.get_parameter(key).detach(), (2, 4)) for key in outcome.sparsity)


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_orders_of_what_has_no_groups_are_refused(name):
    options = {**ZEROS, "pattern": "unstructured"} if name == "magnitude" else {"pattern": "unstructured"}
    with pytest.raises(RecipeError, match=r"prune\.permute: got true with pattern: unstructured.* leave permute out"):
        pruner(name).options(**{"keep_ratio": 0.5, **options}, permute=True)

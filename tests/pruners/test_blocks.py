"""Blocks: what counts as one, what stays of it, and that the network still works."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from exporter.errors import RecipeError
from exporter.networks.probe import run_probe
from exporter.networks.standins import Bypass, Shortcut
from exporter.pruners.base import CutOptions
from exporter.pruners.blocks import blocks_of, cut_blocks, remove_blocks, without


def cut(network, keep_ratio=0.5, score=None, **options):
    cut_blocks(network, CutOptions(keep_ratio, cut="blocks", **options), score or (lambda block: 0.0))
    return network


def only(*paths):
    """A score under which exactly these paths go first."""
    return lambda block: 0.0 if block.path in paths else 1.0


@pytest.mark.parametrize(("name", "count"), [("unet", 12), ("vae", 7), ("clip", 3)])
def test_every_block_can_go_but_one(network, name, count):
    found = blocks_of(network(name), CutOptions(0.5))
    assert len(found) == count
    made = cut(network(name), 1 / count)
    answers = run_probe(made)
    assert {k: v.shape for k, v in answers.items()} == {k: v.shape for k, v in run_probe(network(name)).items()}
    assert all(value.isfinite().all() for value in answers.values())
    assert len(blocks_of(made, CutOptions(0.5))) == 1


def test_a_resnet_becomes_its_shortcut_or_nothing(network):
    dense = network("unet")
    removed = ("down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "mid_block.attentions.0")
    made = cut(network("unet"), 9 / 12, only(*removed))
    assert isinstance(made.down_blocks[0].resnets[0], Bypass)
    shortcut = made.down_blocks[1].resnets[0]
    assert isinstance(shortcut, Shortcut)
    assert torch.equal(shortcut.conv_shortcut.weight, dense.down_blocks[1].resnets[0].conv_shortcut.weight)
    assert isinstance(made.mid_block.attentions[0], Bypass)
    hidden = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    assert made.mid_block.attentions[0](hidden, return_dict=False)[0] is hidden


def test_a_bypassed_branch_equals_one_that_adds_nothing(network):
    """The last convolution of a residual branch set to zero makes the dense block an identity."""
    dense = network("unet")
    path = "up_blocks.1.attentions.0"
    with torch.no_grad():
        for parameter in dense.get_submodule(path).proj_out.parameters():
            parameter.zero_()
    made = cut(network("unet"), 11 / 12, only(path))
    torch.testing.assert_close(run_probe(made)["out_sample"], run_probe(dense)["out_sample"], rtol=1e-5, atol=1e-6)


def test_layers_of_a_text_encoder_leave_the_stack(network):
    dense, made = network("clip"), cut(network("clip"), 2 / 3, only("encoder.layers.1"))
    assert len(made.encoder.layers) == 2
    assert torch.equal(made.encoder.layers[1].mlp.fc1.weight, dense.encoder.layers[2].mlp.fc1.weight)


def test_transformers_of_several_blocks_lose_single_ones():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
            block_out_channels=(16,),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=8,
            transformer_layers_per_block=2,
        ).eval()
    paths = [block.path for block in blocks_of(made, CutOptions(0.5))]
    gone = ("down_blocks.0.attentions.0.transformer_blocks.0", "down_blocks.0.attentions.0.transformer_blocks.1")
    assert set(gone) < set(paths)
    one = "mid_block.attentions.0.transformer_blocks.0"
    cut(made, 1 - 3 / len(paths), only(*gone, one))
    assert isinstance(made.down_blocks[0].attentions[0], Bypass)  # none left: projections go too
    assert len(made.mid_block.attentions[0].transformer_blocks) == 1
    assert run_probe(made)["out_sample"].isfinite().all()


def test_samplers_are_no_blocks(network):
    for name in ("unet", "vae"):
        assert not [block.path for block in blocks_of(network(name), CutOptions(0.5)) if "samplers" in block.path]
    assert all(block.path.startswith("decoder.") for block in blocks_of(network("vae"), CutOptions(0.5)))


def test_of_equals_the_earlier_stays(network):
    made = cut(network("clip"), 1 / 3)
    assert torch.equal(made.encoder.layers[0].mlp.fc1.weight, network("clip").encoder.layers[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_ratio": 0.97}, ["keep_ratio", "12 blocks", "0.917 or less"]),
        ({"protect": ("down_blocks", "mid_block", "up_blocks")}, ["cut", "no removable block"]),
        ({"protect": ("down_block",)}, ["protect", "'down_block'"]),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_fix(network, options, words):
    with pytest.raises(RecipeError) as caught:
        cut(network("unet"), **options)
    assert all(word in str(caught.value) for word in words)


def test_the_written_fix_works(network):
    cut(network("unet"), 0.917)


def test_keeping_all_changes_nothing(network):
    made = network("clip")
    layers = list(made.encoder.layers)
    cut(made, 1.0)
    assert all(a is b for a, b in zip(layers, made.encoder.layers, strict=True))


@pytest.mark.parametrize("name", ["unet", "vae", "clip"])
def test_a_network_without_blocks_is_the_pruned_one_and_then_itself_again(network, name):
    made, removed = network(name), network(name)
    before = list(made.named_modules(remove_duplicate=False))
    dense = run_probe(made)
    chosen = blocks_of(made, CutOptions(0.5))[1:]
    remove_blocks(removed, blocks_of(removed, CutOptions(0.5))[1:])
    with without(made, chosen):
        for key, value in run_probe(made).items():
            assert torch.equal(value, run_probe(removed)[key])
    with pytest.raises(ValueError, match="whatever happens"), without(made, chosen):
        raise ValueError("whatever happens")
    after = list(made.named_modules(remove_duplicate=False))
    assert [(path, id(module)) for path, module in after] == [(path, id(module)) for path, module in before]
    assert all(torch.equal(value, dense[key]) for key, value in run_probe(made).items())


def test_a_stack_can_be_emptied_for_a_while(network):
    made = network("clip")
    everything = blocks_of(made, CutOptions(0.5))
    stack = made.get_submodule(everything[0].path.rpartition(".")[0])
    with without(made, everything):
        assert not any(module is stack for module in made.modules())
    assert [id(module) for module in stack] == [id(block.module) for block in everything]

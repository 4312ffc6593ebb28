"""Stand-ins answer as what they replace is called, and can be exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network_samples import network, parts, text_encoder, unet, vae
from torch import nn

from exporter.errors import SurgeryError
from exporter.networks.probe import example_inputs, run_probe
from exporter.networks.standins import KINDS, Gather, stand_in
from exporter.networks.surgery import Snapshot, diff


def _replace(net: nn.Module, cls: str, kind: str) -> int:
    """Replace every module of a class that allows it; returns how many."""
    count = 0
    for path, module in list(net.named_modules()):
        if type(module).__name__ == cls and path:
            parent, _, name = path.rpartition(".")
            net.get_submodule(parent)._modules[name] = stand_in(kind, module)
            count += 1
    return count


@pytest.mark.parametrize(
    ("cls", "replaced", "kind"),
    [
        ("UNet2DConditionModel", "Transformer2DModel", "bypass"),
        ("UNet2DConditionModel", "BasicTransformerBlock", "bypass"),
        ("UNet2DConditionModel", "Attention", "zero"),
        ("UNet2DConditionModel", "FeedForward", "zero"),
        ("UNet2DConditionModel", "ResnetBlock2D", "shortcut"),
        ("UNet2DConditionModel", "LayerNorm", "bypass"),
        ("AutoencoderKL", "Attention", "bypass"),
        ("AutoencoderKL", "ResnetBlock2D", "shortcut"),
        ("CLIPTextModel", "CLIPEncoderLayer", "bypass"),
        ("CLIPTextModel", "CLIPAttention", "zero"),
        ("CLIPTextModel", "CLIPMLP", "zero"),
    ],
)
def test_in_the_place_of_every_block_the_network_runs_and_is_recorded(cls: str, replaced: str, kind: str) -> None:
    net = network(cls)
    before = run_probe(net)
    snapshot = Snapshot.of(net)
    count = _replace(net, replaced, kind)
    after = run_probe(net)
    surgery = diff(snapshot, net)
    assert count
    assert len(surgery.stand_in) == count
    assert {entry.kind for entry in surgery.stand_in.values()} == {kind}
    assert {name: value.shape for name, value in after.items()} == {name: v.shape for name, v in before.items()}


def test_samplers_can_be_bypassed_as_a_pair() -> None:
    net = unet(block_out_channels=(16, 16))
    snapshot = Snapshot.of(net)
    net.down_blocks[0].downsamplers[0] = stand_in("bypass", net.down_blocks[0].downsamplers[0])
    net.up_blocks[0].upsamplers[0] = stand_in("bypass", net.up_blocks[0].upsamplers[0])
    assert run_probe(net)["out_sample"].shape == (1, 4, 8, 8)
    assert len(diff(snapshot, net).stand_in) == 2


def test_a_transformer_bypass_answers_in_both_conventions() -> None:
    net = unet()
    bypass: Any = stand_in("bypass", net.mid_block.attentions[0])
    value = torch.randn(1, 24, 4, 4)
    assert bypass(value, encoder_hidden_states=None, return_dict=False)[0] is value
    assert bypass(value, encoder_hidden_states=None).sample is value


def test_a_zeroed_branch_is_the_block_without_it() -> None:
    net = text_encoder()
    layer: Any = net.encoder.layers[0]
    layer.self_attn, layer.mlp = stand_in("zero", layer.self_attn), stand_in("zero", layer.mlp)
    value = torch.randn(1, 3, 16)
    assert torch.equal(layer(value, None), value)


def test_a_zeroed_time_projection_keeps_its_width() -> None:
    block: Any = unet().mid_block.resnets[0]
    zero: Any = stand_in("zero", block.time_emb_proj)
    assert torch.equal(zero(torch.randn(2, 64)), torch.zeros(2, 24))


def test_a_shortcut_is_the_block_with_a_silent_branch() -> None:
    net = unet()
    block: Any = net.up_blocks[1].resnets[0]
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    value, temb = torch.randn(1, block.in_channels, 8, 8), torch.randn(1, 64)
    shortcut: Any = stand_in("shortcut", block)
    assert shortcut.conv_shortcut is block.conv_shortcut
    with torch.no_grad():
        assert torch.equal(shortcut(value, temb), block(value, temb))


def test_a_gather_is_the_layer_with_zeroed_rows() -> None:
    layer = nn.Linear(6, 8)
    positions = (1, 2, 7)
    gather: Any = stand_in("gather", layer, positions=positions)
    with torch.no_grad():
        masked = nn.Linear(6, 8)
        masked.weight.zero_()
        masked.bias.zero_()
        for row in positions:
            masked.weight[row], masked.bias[row] = layer.weight[row], layer.bias[row]
        value = torch.randn(2, 5, 6)
        torch.testing.assert_close(gather(value), masked(value))
    assert gather.linear.weight.shape == (3, 6)


@pytest.mark.parametrize("positions", [(), (1, 1), (2, 1), (-1, 2), (0, 8)])
def test_a_gather_refuses_positions_that_are_no_places(positions: tuple[int, ...]) -> None:
    with pytest.raises(SurgeryError, match="positions"):
        Gather(nn.Linear(6, max(1, len(positions))), positions, 8)


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("zero", nn.Conv2d(2, 2, 1)),
        ("shortcut", nn.Linear(2, 2)),
        ("gather", nn.Conv2d(2, 2, 1)),
        ("skip", nn.Linear(2, 2)),
    ],
)
def test_what_cannot_stand_in_is_refused(kind: str, module: nn.Module) -> None:
    with pytest.raises(SurgeryError, match=r"got|use another"):
        stand_in(kind, module, positions=(0,))


def test_absent_is_none() -> None:
    assert "absent" in KINDS
    assert stand_in("absent", nn.Linear(2, 2)) is None


def _with_every_stand_in() -> nn.Module:
    net = unet()
    net.mid_block.attentions[0] = stand_in("bypass", net.mid_block.attentions[0])
    net.mid_block.resnets[0] = stand_in("shortcut", net.mid_block.resnets[0])
    block = net.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1, block.attn2, block.norm2 = stand_in("zero", block.attn1), None, None
    block.ff.net[2] = stand_in("gather", block.ff.net[2], positions=(0, 3))
    return net


@pytest.mark.slow
def test_torch_export_takes_every_stand_in() -> None:
    net = _with_every_stand_in()
    feeds = example_inputs(net)
    with torch.no_grad():
        program = torch.export.export(net, (), feeds | {"return_dict": False}, strict=False)
        answer = program.module()(**feeds, return_dict=False)
    torch.testing.assert_close(answer[0], run_probe(net)["out_sample"])


def test_vae_decoder_export_keeps_a_bypassed_attention() -> None:
    net = vae()
    net.decoder.mid_block.attentions[0] = stand_in("bypass", net.decoder.mid_block.attentions[0])
    assert len(parts(net.decoder, "Attention")) == 0
    with torch.no_grad():
        program = torch.export.export(net.decoder, (torch.randn(1, 4, 8, 8),), strict=False)
    assert not [name for name in program.state_dict if "attentions" in name]

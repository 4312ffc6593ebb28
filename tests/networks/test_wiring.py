"""Skip connections: dropping a layer with its partner, and refusing what would silently skip something."""

from __future__ import annotations

from typing import Any

import pytest
from network_samples import config_of, unet, vae

from exporter.errors import SurgeryError
from exporter.networks.probe import run_probe
from exporter.networks.surgery import Snapshot, diff
from exporter.networks.wiring import Pair, drop_pair, droppable_pairs, skip_problem

THREE_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}


@pytest.mark.parametrize("options", [{}, THREE_LEVELS, {"layers_per_block": 3}], ids=["two", "three", "deep"])
def test_every_droppable_pair_leaves_a_network_that_runs(options: dict[str, Any]) -> None:
    pairs = droppable_pairs(unet(**options))
    assert pairs
    for pair in pairs:
        net = unet(**options)
        snapshot = Snapshot.of(net)
        drop_pair(net, pair)
        surgery = diff(snapshot, net)
        assert all(path.startswith(("down_blocks", "up_blocks")) for path in surgery.keep)
        assert run_probe(net)["out_sample"].shape == (1, 4, 8, 8)


def test_pairs_can_go_until_one_layer_is_left() -> None:
    net = unet(**THREE_LEVELS)
    snapshot = Snapshot.of(net)
    dropped = 0
    while pairs := droppable_pairs(net):
        drop_pair(net, pairs[0])
        dropped += 1
    diff(snapshot, net)
    assert dropped >= 3
    assert all(len(block.resnets) >= 1 for block in net.up_blocks)


def test_the_partner_is_the_layer_that_takes_the_skip_where_widths_allow() -> None:
    # One width everywhere: the last layer pushed is the first one popped.
    net = unet(block_out_channels=(16, 16))
    assert droppable_pairs(net) == [
        Pair((0, 0), (1, 1)),
        Pair((0, 1), (1, 0)),
        Pair((1, 0), (0, 1)),
        Pair((1, 1), (0, 0)),
    ]


def test_a_layer_that_changes_the_width_cannot_go() -> None:
    net = unet()
    assert not [pair for pair in droppable_pairs(net) if pair.down == (1, 0)]
    with pytest.raises(SurgeryError, match=r"down_blocks\.1\.resnets\.0"):
        drop_pair(net, Pair((1, 0), (0, 0)))


def test_looking_for_pairs_changes_nothing() -> None:
    net = unet()
    snapshot, config = Snapshot.of(net), config_of(net)
    droppable_pairs(net)
    assert diff(snapshot, net).is_empty
    assert config_of(net) == config


def _one_side(net: Any) -> None:
    del net.down_blocks[1].resnets[1]


def _other_side(net: Any) -> None:
    # In one width diffusers runs on and leaves the first skip connection untaken.
    del net.up_blocks[1].resnets[1], net.up_blocks[1].attentions[1]


def _empty(net: Any) -> None:
    # `skips[-0:]` takes them all.
    for block in (net.down_blocks[1], net.up_blocks[0]):
        while len(block.resnets):
            del block.resnets[0]
    del net.up_blocks[1].resnets[2], net.up_blocks[1].attentions[2]


def _attention_only(net: Any) -> None:
    del net.up_blocks[1].attentions[0]


def _mid(net: Any) -> None:
    del net.mid_block.resnets[1]


@pytest.mark.parametrize("edit", [_one_side, _other_side, _empty, _attention_only, _mid], ids=lambda e: e.__name__)
def test_what_diffusers_would_silently_skip_is_refused(edit: Any) -> None:
    net = unet(block_out_channels=(16, 16))
    snapshot = Snapshot.of(net)
    edit(net)
    with pytest.raises(SurgeryError):
        diff(snapshot, net)


def test_a_whole_network_has_no_problem() -> None:
    assert skip_problem(unet()) == ""
    assert diff(Snapshot.of(net := vae()), net).is_empty

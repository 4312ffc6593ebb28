"""Frequencies as constants: what is computed from them is diffusers' own, to the last bit."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import nn

from exporter.lowering.pinned import PinnedTimesteps, pin_timesteps


@pytest.mark.parametrize("channels", [32, 33, 320])
@pytest.mark.parametrize(("flip", "shift", "scale"), [(True, 0, 1), (False, 1, 1), (True, 0, 1000)])
def test_the_waves_are_those_of_diffusers(channels, flip, shift, scale):
    stock = Timesteps(channels, flip, shift, scale)
    timesteps = torch.tensor([0.0, 1.0, 0.125, 499.5, 999.0])
    assert torch.equal(PinnedTimesteps(stock)(timesteps), stock(timesteps))


def test_every_clock_of_a_network_is_pinned_and_nothing_else():
    network = nn.Sequential(Timesteps(8, True, 0), nn.Sequential(nn.Linear(8, 8), Timesteps(8, True, 0)))
    before = network[1][0]
    pin_timesteps(network)
    assert [type(part).__name__ for part in (network[0], network[1][1])] == ["PinnedTimesteps"] * 2
    assert network[1][0] is before
    assert list(network.state_dict()) == ["0.frequencies", "1.0.weight", "1.0.bias", "1.1.frequencies"]

"""Zeros while a student is trained: SR-STE's gradient against autograd, masks that move and then stay, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exporter.networks.sparsity import broken, pattern_mask
from exporter.tuning.zeros import Frozen, Transfer

CLAIMS = {"0.weight": (2, 4)}


def small():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 6), nn.SiLU(), nn.Linear(6, 2))


def inputs():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def transfer(network, **changes):
    return Transfer(network, CLAIMS, **{"decay": 2e-4, "freeze_at": 100, "saliency": {}, **changes})


def formula(network, decay):
    """SR-STE by autograd: the gradient of the loss with regard to w * m, plus decay (1 - m) w."""
    weight = network[0].weight.detach()
    mask = pattern_mask(weight.abs(), (2, 4))
    masked = (weight * mask).requires_grad_(True)
    hidden = F.silu(F.linear(inputs(), masked, network[0].bias.detach()))
    loss = F.linear(hidden, network[2].weight.detach(), network[2].bias.detach()).square().mean()
    (gradient,) = torch.autograd.grad(loss, masked)
    return gradient + decay * ~mask * weight


@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.3])
def test_the_gradient_is_srste(decay):
    network = small()
    dense = network[0].weight.detach().clone()
    zeros = transfer(network, decay=decay)
    expected = formula(network, decay)
    zeros.enter(0)
    assert not broken(network[0].weight, (2, 4))
    network(inputs()).square().mean().backward()
    zeros.gradients()
    torch.testing.assert_close(network[0].weight.grad, expected)
    assert torch.equal(network[0].weight, dense)


def test_saliency_weighs_the_sizes():
    network = small()
    saliency = torch.tensor([[1.0, 1, 1e6, 1e6] * 2])
    zeros = transfer(network, saliency={"0.weight": saliency})
    zeros.enter(0)
    kept = network[0].weight != 0
    assert torch.equal(kept, torch.tensor([False, False, True, True] * 2).expand(6, 8))


def run(zeros_of, steps=12, optimizer=torch.optim.AdamW):
    network = small()
    target = torch.ones(5, 2)
    zeros = zeros_of(network)
    steered = optimizer(network.parameters(), lr=0.05, weight_decay=0.1)
    average = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    masks = []
    for step in range(steps):
        zeros.enter(step)
        steered.zero_grad()
        (network(inputs()) - target).square().mean().backward()
        zeros.gradients()
        steered.step()
        for name, parameter in network.named_parameters():
            average[name].lerp_(parameter.detach(), 0.3)
        zeros.leave(average)
        masks.append(pattern_mask(network[0].weight.detach().abs(), (2, 4)))
    return network, average, masks


def test_masks_move_until_they_are_frozen_and_end_in_weights_and_average():
    network, average, masks = run(lambda net: transfer(net, freeze_at=8, decay=0.05))
    assert any(not torch.equal(one, masks[0]) for one in masks[:8])
    assert all(torch.equal(one, masks[8]) for one in masks[8:])
    for weight in (network[0].weight, average["0.weight"]):
        assert not broken(weight.detach(), (2, 4))
        assert torch.equal(weight != 0, masks[-1])


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam])
def test_frozen_zeros_stay_whatever_the_optimizer_and_its_decay_do(optimizer):
    start = small()
    with torch.no_grad():
        start[0].weight.mul_(pattern_mask(start[0].weight.abs(), (2, 4)))
    where = start[0].weight == 0

    def frozen(network):
        network.load_state_dict(start.state_dict())
        return Frozen(network, ["0.weight"])

    network, average, _ = run(frozen, optimizer=optimizer)
    assert torch.equal(network[0].weight == 0, where)
    assert not torch.equal(network[0].weight, start[0].weight)
    assert torch.equal(average["0.weight"] == 0, where)


def test_releasing_gives_the_dense_weights_back():
    network = small()
    dense = copy.deepcopy(network.state_dict())
    zeros = transfer(network)
    zeros.enter(0)
    assert not torch.equal(network[0].weight, dense["0.weight"])
    zeros.release()
    assert torch.equal(network[0].weight, dense["0.weight"])

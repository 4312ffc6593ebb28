"""Random and magnitude: which units and blocks go."""

from __future__ import annotations

import pytest
import torch

from exporter.pruners.base import CutOptions
from exporter.pruners.blocks import blocks_of
from exporter.pruners.channels import layers_of
from exporter.pruners.magnitude import Magnitude
from exporter.pruners.random_ import Random


def weights_of(network):
    return {path: parameter.detach().clone() for path, parameter in network.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("cut", ["channels", "blocks"])
def test_random_follows_its_seed_alone(network, context, cut):
    results = []
    for seed in (1, 1, 2):
        made = network("unet")
        Random(CutOptions(0.5, cut=cut)).prune(made, context(seed))
        results.append(weights_of(made))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


def test_magnitude_removes_the_smallest(network, context):
    made = network("unet")
    options = CutOptions(0.5, round_to=1)
    small = {}
    with torch.no_grad():
        for layer in layers_of(made, options):
            # every other unit, so that each norm group has as many small ones as must go
            small[layer.path] = torch.arange(0, layer.units, 2)
            for share in layer.shares:
                index = share.index[small[layer.path]].flatten()
                share.parameter.movedim(share.dim, 0)[index] *= 1e-3
    large = {layer.path: [share.rows()[1::2].clone() for share in layer.shares] for layer in layers_of(made, options)}
    assert len(large) > 10
    Magnitude(options).prune(made, context())
    for layer in layers_of(made, options):
        for share, rows in zip(layer.shares, large[layer.path], strict=True):
            assert torch.equal(share.rows(), rows), (layer.path, share.path)


def test_magnitude_does_not_depend_on_a_layers_scale(network):
    """Doubling one of the coupled layers must not let it decide alone."""
    options = CutOptions(0.5, parts=("neurons",))
    plain, scaled = network("clip"), network("clip")
    with torch.no_grad():
        scaled.encoder.layers[0].mlp.fc2.weight *= 100
    for a, b in zip(layers_of(plain, options), layers_of(scaled, options), strict=True):
        method = Magnitude(options)
        torch.testing.assert_close(method.of_units(a), method.of_units(b))


def test_magnitude_removes_the_weakest_blocks(network, context):
    made = network("clip")
    with torch.no_grad():
        for parameter in made.encoder.layers[1].parameters():
            parameter *= 0.01
    Magnitude(CutOptions(0.67, cut="blocks")).prune(made, context())
    kept = [layer.mlp.fc1.weight for layer in made.encoder.layers]
    dense = network("clip").encoder.layers
    assert torch.equal(kept[0], dense[0].mlp.fc1.weight)
    assert torch.equal(kept[1], dense[2].mlp.fc1.weight)


def test_wide_blocks_do_not_look_weak(network):
    """Freshly initialised blocks of 32 and of 64 channels: every score lies within a factor of two."""
    method = Magnitude(CutOptions(0.5, cut="blocks"))
    scores = [method.of_block(block) for block in blocks_of(network("unet"), CutOptions(0.5))]
    assert max(scores) < 2 * min(scores)


@pytest.mark.parametrize("method", [Random, Magnitude])
def test_a_constant_network_has_a_definite_answer(network, context, method):
    """Equal weights everywhere, zeros included, give no division by zero and no chance."""
    made = network("clip")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    method(CutOptions(0.5)).prune(made, context())
    assert made.encoder.layers[0].mlp.fc1.out_features == 32

"""Ranking over all layers: one budget, whole steps, and no layer without a unit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporter.errors import ComponentFailed, RecipeError
from exporter.networks.probe import run_probe
from exporter.progress import Silent
from exporter.pruners.base import PARTS, CutOptions, Layer
from exporter.pruners.channels import cut_channels, layers_of
from exporter.pruners.magnitude import Magnitude
from exporter.pruners.ranking import allotted, removals


def layer(path, units, unit_width=1, norm_groups=1):
    return Layer(path, "channels", units, unit_width, norm_groups, ())


def globally(layers, scores, keep_ratio, **options):
    found = CutOptions(keep_ratio, **{"round_to": 1, "ranking": "global", **options})
    named = {item.path: torch.as_tensor(values) for item, values in zip(layers, scores, strict=True)}
    return removals(layers, found, lambda item: named[item.path])


def test_the_lowest_of_all_layers_go():
    """Against the whole list of relative scores, sorted by numpy; random scores, no two equal."""
    random = np.random.default_rng(0)
    layers = [layer(str(i), size) for i, size in enumerate((40, 25, 35))]
    scores = [
        random.gamma(shape, size=item.units) * 10**i
        for i, (item, shape) in enumerate(zip(layers, (1, 9, 3), strict=True))
    ]
    relative = np.concatenate([values / values.mean() for values in scores])
    wanted = set(np.argsort(relative)[:40])
    found = globally(layers, scores, 0.6)
    offsets = np.cumsum([0, 40, 25])
    assert {unit + offset for units, offset in zip(found, offsets, strict=True) for unit in units} == wanted
    assert len({len(units) for units in found}) == 3


def test_every_layer_keeps_its_narrowest_width():
    layers = [layer("dull", 32, norm_groups=4), layer("keen", 32), layer("head", 4, unit_width=8)]
    scores = [torch.ones(32), torch.arange(32.0) ** 4, torch.tensor([1.0, 2, 3, 100])]
    found = globally(layers, scores, 0.28, round_to=8)
    kept = [item.units - len(units) for item, units in zip(layers, found, strict=True)]
    assert kept == [8, 8, 1]  # 8 + 8 + 8 of 96 channels; one more step is farther from 0.28
    dull = set(range(32)) - set(found[0])
    assert [sum(group * 8 <= unit < group * 8 + 8 for unit in dull) for group in range(4)] == [2] * 4
    assert set(range(32)) - set(found[1]) == set(range(24, 32))
    with pytest.raises(
        RecipeError, match=r"keep_ratio: got 0\.1, expected at least 0\.250, which the narrowest widths"
    ):
        globally(layers, scores, 0.1, round_to=8)


def test_a_ratio_that_would_empty_a_layer_is_refused_with_the_least_that_would_not():
    layers = [layer("wide", 64), layer("whole", 8), layer("heads", 4, unit_width=8)]
    options = CutOptions(0.1, round_to=8)

    def ones(item):
        return torch.ones(item.units)

    with pytest.raises(
        RecipeError, match=r"got 0\.1, which would empty heads \(4 units, .* are 1\).* at least 0\.125\."
    ):
        removals(layers, options, ones)
    assert [len(units) for units in removals(layers, CutOptions(0.125, round_to=8), ones)] == [56, 0, 3]


def test_costs_weigh_on_the_budget():
    """Of two layers of equal scores, the budget is spent where the scores per cost were made higher."""
    layers = [layer("cheap", 10), layer("dear", 10)]
    scores = [torch.full((10,), 2.0), torch.full((10,), 1.0)]
    counts = allotted(layers, scores, [1.0, 9.0], CutOptions(0.55, round_to=1), least=[0, 0])
    assert counts == [10, 5]  # 10 + 45 of 100


def test_what_does_not_fit_leaves_room_for_the_smaller():
    layers = [layer("wide", 2, unit_width=60), layer("narrow", 20)]
    scores = [torch.tensor([5.0, 4.0]), torch.ones(20)]
    counts = allotted(layers, scores, [60.0, 1.0], CutOptions(0.55, round_to=1), least=[1, 0])
    assert counts == [1, 17]  # 77 of 140


@pytest.mark.parametrize("name", ["unet", "vae", "clip"])
def test_a_global_cut_is_valid_and_keeps_the_ratio(network, name):
    dense, made = network(name), network(name)
    options = CutOptions(0.6, round_to=8, ranking="global")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        scores = {item.path: torch.rand(item.units) * torch.rand(1) ** 2 + 0.01 for item in layers_of(made, options)}
    cut_channels(made, options, lambda item: scores[item.path], progress=Silent())
    was = {item.path: item.units * item.unit_width for item in layers_of(dense, CutOptions(0.6, parts=PARTS[:3]))}
    now = {item.path: item.units * item.unit_width for item in layers_of(made, CutOptions(0.6, parts=PARTS[:3]))}
    narrow = [path for path in was if path not in now]  # a single head is no width any more
    kept = sum(now.values()) + sum(8 for _ in narrow)
    assert abs(kept / sum(was.values()) - 0.6) < 0.05
    assert len({round(now[path] / was[path], 2) for path in now}) > 1
    assert all(value.isfinite().all() for value in run_probe(made).values())


def test_magnitude_takes_it(network, context):
    local, overall = network("unet"), network("unet")
    with torch.no_grad():
        for made in (local, overall):  # a layer of which every other channel is small gives more than one of equals
            made.mid_block.resnets[0].conv1.weight[::2] *= 1e-3
            made.mid_block.resnets[0].time_emb_proj.weight[::2] *= 1e-3
            made.mid_block.resnets[0].conv2.weight[:, ::2] *= 1e-3
    Magnitude(CutOptions(0.75)).prune(local, context())
    Magnitude(CutOptions(0.75, ranking="global")).prune(overall, context())
    assert overall.mid_block.resnets[0].conv1.out_channels < local.mid_block.resnets[0].conv1.out_channels == 48


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_a_score_that_is_no_number_is_refused(network, ranking):
    options = CutOptions(0.5, ranking=ranking)
    with pytest.raises(
        ComponentFailed, match=r"1 of 4 scores of down_blocks\.0\.attentions\.0\..*attn1 are not finite"
    ):
        cut_channels(
            network("unet"),
            options,
            lambda item: torch.tensor([float("nan"), *[1.0] * (item.units - 1)]),
            progress=Silent(),
        )

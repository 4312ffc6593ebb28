"""LAPTOP-Diff: scores against plain torch, the budget, what is measured whole, and going on after a kill."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from fake_stopwatch import REST, FakeStopwatch

from exporter.errors import RecipeError
from exporter.networks.standins import Bypass, Shortcut, stand_in
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.pruners.additivity import Pair, additivity, pearson, random_sets, spearman
from exporter.pruners.answers import Exam
from exporter.pruners.base import Context
from exporter.pruners.blocks import blocks_of
from exporter.pruners.laptop_diff import LaptopDiff, LaptopDiffOptions


@pytest.fixture(scope="module")
def dense(tiny_loan):
    return load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")


@pytest.fixture
def prune(tiny_loan, dense, tmp_path):
    """Return a function that prunes a fresh copy and returns it with the facts."""

    def run(loan=tiny_loan, **given):
        prompts = str(tiny_loan.folder.parent / "prompts.txt")
        options = LaptopDiffOptions(**{"prompts": prompts, "images": 2, "timesteps": 2, "sets": 6, **given})
        network = copy.deepcopy(dense)
        context = Context(torch.Generator().manual_seed(0), Silent(), tmp_path, loan)
        return network, LaptopDiff(options).prune(network, context).facts

    return run


def size(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_scores_are_the_change_of_the_answer_in_plain_torch(prune, dense, tiny_loan):
    _, facts = prune(keep_ratio=0.8, rescore=False, sets=0)
    path = "up_blocks.1.attentions.1"
    other = copy.deepcopy(dense)
    other.up_blocks[1].attentions[1] = stand_in("bypass", other.up_blocks[1].attentions[1])
    recording = tiny_loan.recording(str(tiny_loan.folder.parent / "prompts.txt"), 2)
    errors = []
    for step in (0, 2):
        call = recording.calls(step)
        text = torch.from_numpy(call.given["encoder_hidden_states"])
        with torch.no_grad():
            answer = other(torch.from_numpy(call.sample), call.timestep, text)[0].numpy()
        errors.append(np.square(answer - call.cond).mean())
    assert facts["scores"][path] == pytest.approx(np.mean(errors), rel=1e-3)
    assert len(facts["scores"]) == len(blocks_of(dense, LaptopDiffOptions()))


def test_the_best_layers_go_until_the_parameters_fit(prune, dense):
    network, facts = prune(keep_ratio=0.6)
    assert size(network) <= 0.6 * size(dense)
    gone = [p for p in facts["scores"] if isinstance(network.get_submodule(p), Bypass | Shortcut)]
    assert sorted(gone) == sorted(facts["removed"])
    assert facts["additivity"]["sets"] == 6
    assert set(facts["rescored"]) < set(facts["scores"])


def test_without_rescoring_no_other_set_of_as_many_parameters_has_less_summed_loss(prune, dense):
    network, facts = prune(keep_ratio=0.7, rescore=False, sets=0)
    weights = {
        block.path: sum(p.numel() for n, p in block.module.named_parameters() if not n.startswith("conv_shortcut"))
        for block in blocks_of(dense, LaptopDiffOptions())
    }
    need = 0.3 * size(dense)
    best = sum(facts["scores"][path] for path in facts["removed"])
    generator = np.random.default_rng(0)
    for _ in range(3000):  # sets of every size
        chosen = [path for path in weights if generator.random() < 0.5]
        if sum(weights[path] for path in chosen) >= need:
            assert sum(facts["scores"][path] for path in chosen) >= best - 1e-9
    assert size(network) <= 0.7 * size(dense)


@pytest.mark.parametrize("extra", [0.0, 0.4])
def test_a_latency_budget_holds_for_the_whole_network(prune, dense, tiny_loan, extra):
    """Where whole networks cost less than their units, removals save less than the table says: the budget is raised."""
    fake = FakeStopwatch(dense, extra)
    network, facts = prune(
        dataclasses.replace(tiny_loan, stopwatch=fake), keep_ratio=0.5, budget="latency", rescore=False, sets=0
    )
    assert fake.whole_ms(network) <= 0.5 * fake.whole_ms(dense)
    kept = facts["kept"]
    assert kept["of"] == "ms of one call"
    assert kept["left"] == pytest.approx(fake.whole_ms(network), rel=1e-5)
    assert kept["asked"] == pytest.approx(0.5 * fake.whole_ms(dense), rel=1e-5)
    assert kept["met"] is True
    told = facts["latency"]
    assert told["per_call_ms"] == pytest.approx(extra, abs=0.05)
    assert told["control"] == {"whole": [1.0, 0.9, 1.1]}
    assert told["predicted_and_measured_ms"][-1][1] <= 0.5 * told["whole_ms"]


def test_what_cannot_be_reached_names_the_least_that_can(prune, dense, tiny_loan):
    with pytest.raises(RecipeError, match=r"got 0\.05 of the parameters, expected 0\.\d+ or more\. Raise it"):
        prune(keep_ratio=0.05, sets=0, images=1, timesteps=1)
    fake = FakeStopwatch(dense)
    least = REST / fake.whole_ms(dense)
    with pytest.raises(RecipeError, match=rf"of the latency, expected {least + 0.0005:.3f} or more"):
        prune(dataclasses.replace(tiny_loan, stopwatch=fake), keep_ratio=0.01, budget="latency", sets=0, rescore=False)
    with pytest.raises(RecipeError, match="latencies are asked for; got none: no target here"):
        prune(keep_ratio=0.5, budget="latency")


def test_a_killed_search_goes_on(prune, monkeypatch, tmp_path):
    few = {"keep_ratio": 0.8, "sets": 2, "protect": ("down_blocks", "up_blocks.1")}
    whole, facts = prune(**few)
    real, calls = Exam.loss, []

    def dies(self, network, place="prune"):
        calls.append(place)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(self, network, place)

    monkeypatch.setattr(Exam, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        prune(**few)
    assert list(tmp_path.iterdir())
    again, told = prune(**few)
    assert told == facts
    assert calls.count(calls[0]) == 1  # found out before the kill, and not again
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert not list(tmp_path.iterdir())


def test_correlations_are_those_of_the_textbook():
    a, b = [1.0, 2.0, 2.0, 4.0, 9.0], [2.0, 1.0, 5.0, 3.0, 4.0]
    ranks_a, ranks_b = [1, 2.5, 2.5, 4, 5], [2, 1, 5, 3, 4]
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-4)
    assert spearman(a, b) == pytest.approx(np.corrcoef(ranks_a, ranks_b)[0, 1], abs=1e-4)
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None


def test_additivity_is_told_for_every_size_apart():
    """Over all sizes larger sets have larger losses, which alone correlates; within one size only the choice does."""
    pairs = [Pair(1, 1.0, 3.0), Pair(1, 2.0, 2.0), Pair(1, 3.0, 1.0), Pair(9, 10.0, 30.0), Pair(9, 20.0, 40.0)]
    told = additivity(pairs)
    assert told["by_size"]["1"]["spearman"] == -1
    assert told["by_size"]["9"]["spearman"] == 1
    assert 0 < told["spearman"] < 1
    assert told["joint_over_summed"] == 2.0


def test_random_sets_are_of_the_sizes_asked_for():
    found = random_sets(["a", "b", "c", "d"], [2, 3], 5, torch.Generator().manual_seed(0))
    assert [len(entry) for entry in found] == [2, 2, 2, 3, 3]
    assert all(len(set(entry)) == len(entry) for entry in found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio: got 0, expected"),
        ({"budget": "macs"}, "budget: got 'macs', expected one of parameters, latency"),
        ({"timesteps": 0}, "timesteps: got 0, expected a whole number of at least 1"),
        ({"sets": -1}, "sets: got -1"),
        ({"images": 0}, "images: got 0"),
    ],
)
def test_impossible_options(given, words):
    with pytest.raises(RecipeError, match=words):
        LaptopDiffOptions(**given)

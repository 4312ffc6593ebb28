"""Guided sensitivity: greedy as defined, scored again as blocks go, interrupted and gone on, by either budget."""

from __future__ import annotations

import copy

import pytest
import torch

from exporter.errors import RecipeError, ToolMissing
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.pruners.answers import Exam
from exporter.pruners.base import Context
from exporter.pruners.blocks import blocks_of, remove_blocks, without
from exporter.pruners.improved_techniques import ImprovedTechniques, ImprovedTechniquesOptions
from exporter.pruners.quality import loss_of


@pytest.fixture
def prompts(tiny_loan):
    return str(tiny_loan.folder.parent / "prompts.txt")


@pytest.fixture
def unet(tiny_loan):
    return load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")


@pytest.fixture
def context(tiny_loan, tmp_path):
    return Context(torch.Generator().manual_seed(0), Silent(), tmp_path, tiny_loan)


def size(network):
    return sum(parameter.numel() for parameter in network.parameters())


FEW = {"protect": ("up_blocks", "down_blocks.0")}
"""Leaves a handful of blocks in question."""


def prune(network, context, **options):
    return ImprovedTechniques(ImprovedTechniquesOptions(images=2, **{**FEW, **options})).prune(network, context)


def test_blocks_go_by_guided_loss_per_parameter_and_are_scored_again(unet, context, prompts):
    """The same search, written down plainly."""
    dense, plain = size(unet), copy.deepcopy(unet)
    exam = Exam.of(context.loan.recording(prompts, 2), context.loan.form, batch=2)
    known = {block.path: block for block in blocks_of(plain, ImprovedTechniquesOptions(**FEW))}
    gone: list[str] = []
    while True:
        with without(plain, [known[path] for path in gone]):
            if size(plain) <= 0.78 * dense:
                break
        scores = {}
        for path in known.keys() - set(gone):
            with without(plain, [known[name] for name in [*gone, path]]):
                cost = sum(parameter.numel() for _, parameter in known[path].branch)
                scores[path] = exam.loss(plain).mean_guided / cost
        gone.append(min(scores, key=lambda path: scores[path]))
    made = prune(unet, context, prompts=prompts, keep_ratio=0.78, reevaluate=1)
    assert [entry["unit"] for entry in made.facts["removed"]] == gone
    kept = made.facts["kept"]
    assert (kept["of"], kept["before"], kept["left"]) == ("parameters", dense, size(unet))
    assert size(unet) <= 0.78 * dense
    assert len(gone) > 1


def test_a_kill_between_two_scores_changes_nothing(unet, context, prompts, monkeypatch):
    undisturbed, told = copy.deepcopy(unet), []
    apart = Context(torch.Generator(), Silent(), context.workdir / "apart", context.loan)
    apart.workdir.mkdir()
    wanted = prune(undisturbed, apart, prompts=prompts, keep_ratio=0.85)

    class Stop(Silent):
        def advance(self, units=1, note=""):
            told.append(note)
            if len(told) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(unet, Context(torch.Generator(), Stop(), context.workdir, context.loan), prompts=prompts, keep_ratio=0.85)
    assert size(unet) > size(undisturbed)
    count = 0
    real = Exam.loss

    def counted(*args):
        nonlocal count
        count += 1
        return real(*args)

    monkeypatch.setattr(Exam, "loss", counted)
    assert prune(unet, context, prompts=prompts, keep_ratio=0.85) == wanted
    assert count == wanted.facts["evaluations"] - 5 + 1
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), undisturbed.parameters(), strict=True))


class Watch:
    """One millisecond for every resnet, ten for everything else."""

    def whole_ms(self, network):
        return sum(
            self.units_ms(network, [b.path for b in blocks_of(network, ImprovedTechniquesOptions(**FEW))]).values()
        )

    def units_ms(self, network, paths):
        return {path: 1.0 if "resnets" in path else 10.0 for path in paths}


def test_a_budget_of_latency_is_kept_on_the_whole_graph(unet, context, prompts):
    lent = copy.copy(context.loan)
    object.__setattr__(lent, "stopwatch", Watch())
    watched = Context(context.generator, Silent(), context.workdir, lent)
    dense = Watch().whole_ms(unet)
    made = prune(unet, watched, prompts=prompts, budget="latency", keep_ratio=0.7)
    kept = made.facts["kept"]
    assert (kept["of"], kept["before"], kept["left"]) == ("ms of one call", dense, Watch().whole_ms(unet))
    assert Watch().whole_ms(unet) <= 0.7 * dense
    assert any("attentions" in entry["unit"] for entry in made.facts["removed"])


@pytest.mark.parametrize("metric", ["guided", "latent"])
def test_a_metric_is_nothing_for_the_dense_network_and_grows_with_harm(unet, context, prompts, metric):
    loss = loss_of(metric, context, prompts, 3)
    assert loss(unet) == pytest.approx(0.0, abs=1e-9)
    first = blocks_of(unet, ImprovedTechniquesOptions())
    remove_blocks(unet, first[:1])
    little = loss(unet)
    remove_blocks(unet, blocks_of(unet, ImprovedTechniquesOptions()))
    assert 0 < little < loss(unet)


def test_clip_that_is_not_here_is_said(unet, context, prompts):
    with pytest.raises(ToolMissing, match=r"prune\.metric: got 'clip', but .* Or write metric: guided"):
        prune(unet, context, prompts=prompts, metric="clip")


def test_what_cannot_be_done_is_refused_with_the_fix(unet, context, prompts):
    with pytest.raises(RecipeError, match=r"keep_ratio: blocks alone do not reach it; got 0\.01, expected 0\.\d+ or"):
        prune(unet, context, prompts=prompts, keep_ratio=0.01, reevaluate=99)
    with pytest.raises(RecipeError, match=r"latencies are asked for; got none: no target here\. Add a target"):
        prune(unet, context, prompts=prompts, budget="latency")
    for changes in ({"keep_ratio": 0.0}, {"reevaluate": 0}, {"budget": "macs"}, {"metric": "fid"}, {"images": 0}):
        with pytest.raises(RecipeError, match=rf"prune\.{next(iter(changes))}: got .*expected.*(Write|Choose)"):
            ImprovedTechniquesOptions(**changes)

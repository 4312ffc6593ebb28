"""Methods that put zeros: which layers, which weights by numpy's arithmetic, and what training does to the masks."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from exporter.errors import ComponentFailed, RecipeError
from exporter.networks.probe import example_inputs, run_probe
from exporter.networks.sparsity import broken, pattern_mask
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.pruners import hessians, pruner
from exporter.pruners.activations import column_norms
from exporter.pruners.answers import Exam
from exporter.pruners.base import Context
from exporter.pruners.gain import expected_gain
from exporter.pruners.informed import start
from exporter.pruners.obs_diff import log_decrease
from exporter.pruners.patterns import SparseOptions, pattern_from
from exporter.pruners.sparse import sparse_layers

FEW = ("up_blocks", "mid_block", "down_blocks.1", "down_blocks.0.resnets.1", "down_blocks.0.attentions.1")
"""Left dense where a test needs only some layers."""
HALF = ("up_blocks",)


@pytest.fixture(scope="module")
def dense(tiny_loan):
    return load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")


@pytest.fixture
def unet(dense):
    return copy.deepcopy(dense)


@pytest.fixture
def lent(tiny_loan, tmp_path):
    return Context(torch.Generator().manual_seed(0), Silent(), tmp_path, tiny_loan)


@pytest.fixture(scope="module")
def prompts(tiny_loan):
    return str(tiny_loan.folder.parent / "prompts.txt")


def carry_out(name, network, context, prompts, **options):
    method = pruner(name)
    return method(method.options(prompts=prompts, images=2, **options)).prune(network, context)


def test_layers_that_begin_end_and_embed_stay_dense_and_odd_widths_do(unet):
    unet.mid_block.resnets[0].conv1 = nn.Conv2d(64, 60, 3, padding=1)
    unet.mid_block.resnets[0].conv2 = nn.Conv2d(60, 64, 3, padding=1)
    found = sparse_layers(unet, "2:4", None, ("down_blocks.1",))
    assert found.skipped["conv_in"] == found.skipped["conv_out"] == "takes the input in or makes the answer"
    assert found.skipped["time_embedding.linear_1"] == "embeds time or text"
    assert found.skipped["mid_block.resnets.0.conv1"] == "60 outputs, no multiple of 8 as sparse kernels need"
    assert found.skipped["mid_block.resnets.0.conv2"] == "60 inputs, no multiple of 16 as sparse kernels need"
    assert found.skipped["down_blocks.1.resnets.0.conv1"] == "protected"
    paths = [layer.path for layer in found.layers]
    every = [p for p, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sorted([*paths, *found.skipped]) == sorted(every)
    assert "up_blocks.0.attentions.0.proj_out" in paths  # a projection inside, unlike a transformer's last
    assert "mid_block.resnets.0.conv2" in [layer.path for layer in sparse_layers(unet, "unstructured", 0.5).layers]
    assert "mid_block.resnets.0.conv1" not in [layer.path for layer in sparse_layers(unet, "3:6", None).layers]


@pytest.mark.parametrize(
    ("text", "keep_ratio", "told"),
    [
        ("4:2", None, r"prune\.pattern: got '4:2', expected n:m"),
        ("2:128", None, r"prune\.pattern: got '2:128'"),
        ("124", None, r"prune\.pattern: got '124'"),
        ("2:4", 0.6, r"prune\.keep_ratio: got 0\.6, expected 0\.5, which is what 2:4 keeps"),
        ("unstructured", None, r"prune\.keep_ratio: missing"),
        ("unstructured", 1.3, r"prune\.keep_ratio: got 1\.3"),
    ],
)
def test_patterns_that_cannot_be_are_refused(text, keep_ratio, told):
    with pytest.raises(RecipeError, match=told):
        pattern_from(text, keep_ratio)


def test_a_ratio_that_empties_a_layer_is_refused(unet):
    with pytest.raises(RecipeError, match=r"keeps none; expected one\. Raise keep_ratio"):
        sparse_layers(unet, "unstructured", 1e-5)


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(RecipeError, match=r"no layer of Sequential can be 2:4 sparse; .* Write pattern: unstructured"):
        sparse_layers(nn.Sequential(nn.Linear(6, 6)), "2:4", None)


def test_layers_that_no_sparse_instruction_fills_stay_dense():
    assert "smaller than the 16 inputs and 16 outputs" in skips(nn.Linear(64, 8))
    assert skips(nn.Linear(16, 64)) == skips(nn.Linear(64, 16)) == ""


def skips(layer):
    return sparse_layers(nn.Sequential(nn.Linear(32, 32), layer), "2:4", None).skipped.get("1", "")


def test_layers_narrower_than_asked_for_stay_dense_and_the_error_says_how_wide_they_are(unet):
    found = sparse_layers(unet, "2:4", None, least=64)
    assert all(min(layer.module.weight.shape[:2]) >= 64 for layer in found.layers)
    assert found.skipped["down_blocks.0.resnets.0.conv1"] == "32 inputs or outputs, fewer than the 64 asked for"
    fits = [layer.path for layer in sparse_layers(unet, "2:4", None).layers]
    assert {layer.path for layer in found.layers} == {
        path for path in fits if min(unet.get_submodule(path).weight.shape[:2]) >= 64
    }
    with pytest.raises(
        RecipeError, match=r"prune\.least: no layer of UNet.* got least: 256, expected at most 64, .*: 64"
    ):
        sparse_layers(unet, "2:4", None, least=256)
    every = sparse_layers(unet, "unstructured", 0.5, least=256)
    assert every.layers == sparse_layers(unet, "unstructured", 0.5).layers


def test_a_gain_is_a_bound_on_what_torch_counts(dense):
    """torch's own counter says what a call multiplies; without what is masked that shrinks by the share told."""
    found = sparse_layers(dense, "2:4", None)
    told = expected_gain(dense, found.layers)
    whole, rest = multiplications(dense), multiplications(without(dense, found.layers))
    assert told["share"] == pytest.approx(1 - rest / whole, abs=1e-4)
    assert 0.5 < told["share"] < 1
    assert f"{1 / (1 - told['share'] / 2):.2f} times as fast at the very most" in told["bound"]
    assert told["wide_share"] == 0
    assert "0.0% in layers of 256 inputs and outputs or more" in told["bound"]
    assert expected_gain(dense, sparse_layers(dense, "unstructured", 0.5).layers)["share"] == 0


def multiplications(network):
    network = nn.Module.to(copy.deepcopy(network), "meta")  # of attention on a CPU the counter knows nothing
    feeds = example_inputs(network, size=network.config.sample_size, tokens=77)
    with FlopCounterMode(display=False) as counter:
        run_probe(network, feeds)
    return counter.get_total_flops()


def without(network, layers):
    """Return a copy in which these layers answer zeros of the right shape, and multiply nothing."""
    copied = copy.deepcopy(network)
    for layer in layers:
        parent, _, name = layer.path.rpartition(".")
        copied.get_submodule(parent).register_module(name, Silence(layer.module))
    return copied


class Silence(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]  # no module of this one
        self.weight = layer.weight

    def forward(self, given):
        layer = self.layer[0]
        if isinstance(layer, nn.Linear):
            return given.new_zeros(*given.shape[:-1], layer.out_features)
        sides = [-(-side // stride) for side, stride in zip(given.shape[2:], layer.stride, strict=True)]
        return given.new_zeros(len(given), layer.out_channels, *sides)


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"pattern": "unstructured", "keep_ratio": 0.3}], ids=str)
def test_wanda_keeps_the_largest_of_weight_times_input(unet, dense, lent, prompts, options):
    outcome = carry_out("wanda", unet, lent, prompts, protect=FEW, **options)
    found = sparse_layers(dense, options["pattern"], options.get("keep_ratio"), FEW)
    exam = Exam.of(lent.borrowed.recording(prompts, 2), lent.borrowed.form, batch=2)
    norms = column_norms(dense, found.layers, exam, progress=Silent())
    assert len(outcome.sparsity) == len(found.layers) > 8
    for layer in found.layers:
        weight = layer.module.weight.detach().numpy()
        rows = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1) if weight.ndim == 4 else weight
        scores = np.abs(rows) * norms[layer.path].numpy()
        group = 4 if options["pattern"] == "2:4" else scores.shape[1]
        count = 2 if group == 4 else round(0.3 * group)
        grouped = scores.reshape(len(weight), -1, group)
        lowest = np.sort(grouped, axis=-1)[..., group - count][..., None]
        got = unet.get_parameter(layer.name).detach().numpy()
        kept = (got.transpose(0, 2, 3, 1).reshape(len(weight), -1) if got.ndim == 4 else got).reshape(
            grouped.shape
        ) != 0
        assert (kept == (grouped >= lowest)).all(), layer.path
        assert np.array_equal(got[got != 0], weight[got != 0])


def test_second_order_answers_closer_than_magnitude(unet, dense, lent, prompts):
    loan = lent.borrowed
    exam = Exam.of(loan.recording(prompts, 2), loan.form, batch=2)
    by_size = copy.deepcopy(dense)
    carry_out("sparsedm", by_size, lent, prompts, protect=HALF)
    outcome = carry_out("obs-diff", unet, lent, prompts, protect=HALF)
    assert outcome.facts["eligible"] == len(outcome.sparsity) == len(outcome.facts["masked"]) > 30
    assert exam.loss(unet).mean_guided < 0.7 * exam.loss(by_size).mean_guided
    assert all(not broken(unet.get_parameter(key).detach(), (2, 4)) for key in outcome.sparsity)


def test_weights_of_the_steps_fall_from_the_noisiest():
    found = log_decrease(25)
    assert found[0] == pytest.approx(1.2)
    assert found[-1] == pytest.approx(0.8)
    assert found[-3] == pytest.approx(0.8 + 0.4 * math.log(3) / math.log(25))
    assert log_decrease(1) == [1.2]


def test_a_finished_group_is_not_done_again(unet, dense, lent, prompts, monkeypatch):
    """Killed in the last group, the second attempt takes the others up and ends with the same weights."""
    whole = copy.deepcopy(dense)
    carry_out(
        "sparsegpt", whole, Context(torch.Generator(), Silent(), fresh(lent, "a"), lent.loan), prompts, protect=FEW
    )
    again = Context(torch.Generator(), Silent(), fresh(lent, "b"), lent.loan)
    calls, real = [], hessians._grams

    def counted(network, layers, *rest):
        calls.append(len(layers))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(network, layers, *rest)

    monkeypatch.setattr(hessians, "_grams", counted)
    with pytest.raises(KeyboardInterrupt):
        carry_out("sparsegpt", unet, again, prompts, protect=FEW)
    carry_out("sparsegpt", resumed := copy.deepcopy(dense), again, prompts, protect=FEW)
    assert len(calls) == 5
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def fresh(context, name):
    folder = context.workdir / name
    folder.mkdir()
    return folder


def test_the_most_sensitive_layers_stay_dense(unet, dense, lent, prompts):
    options = SparseOptions(prompts, 2, protect=FEW, keep_dense=2)
    begun = start(unet, options, lent)
    exam = Exam.of(lent.borrowed.recording(prompts, 2), lent.borrowed.form, batch=2, steps=4)
    losses = {}
    for layer in sparse_layers(dense, "2:4", None, FEW).layers:
        alone = copy.deepcopy(dense)
        weight = alone.get_parameter(layer.name)
        with torch.no_grad():
            weight.mul_(pattern_mask(weight.abs(), (2, 4)))
        losses[layer.path] = exam.loss(alone).mean_guided
    expected = sorted(losses, key=lambda path: -losses[path])[:2]
    assert list(begun.found.kept_dense) == expected
    assert not set(expected) & {layer.path for layer in begun.found.layers}
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in dense.state_dict().items())
    assert begun.found.outcome().facts["eligible"] == len(losses)
    assert (lent.workdir / "sensitivity.safetensors").is_file()


def test_keeping_every_layer_dense_changes_nothing(unet, dense, lent, prompts):
    outcome = carry_out("sparsedm", unet, lent, prompts, protect=(*FEW, "down_blocks.0.attentions"), keep_dense=1000)
    assert outcome.sparsity == {}
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("first", ["magnitude", "wanda", "sparsegpt"])
def test_sparsedm_without_training_is_its_first_mask(unet, dense, lent, prompts, first):
    outcome = carry_out("sparsedm", unet, lent, prompts, first=first, protect=FEW)
    plain = copy.deepcopy(dense)
    if first == "magnitude":
        with torch.no_grad():
            for name in outcome.sparsity:
                weight = plain.get_parameter(name)
                weight.mul_(pattern_mask(weight.abs(), (2, 4)))
    else:
        context = Context(torch.Generator(), Silent(), fresh(lent, "plain"), lent.loan)
        carry_out(first, plain, context, prompts, protect=FEW)
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in plain.state_dict().items())


TRAINING = {"steps": 12, "batch": 2, "samples": 6, "learning_rate": 1e-3, "frozen": 0.25, "ema": 0.5}


def test_training_recovers_what_the_first_mask_lost_and_bakes_the_zeros_in(unet, lent, prompts):
    outcome = carry_out("sparsedm", unet, lent, prompts, **TRAINING)
    assert outcome.facts["frozen_from"] == 9
    assert outcome.facts["error_after"] < 0.9 * outcome.facts["error_before"]
    assert all(not broken(unet.get_parameter(name).detach(), (2, 4)) for name in outcome.sparsity)


def test_training_goes_on_after_a_stop_with_the_same_weights(unet, dense, lent, prompts):
    class Stop(Silent):
        def advance(self, units=1, note=""):
            if note.startswith("loss"):
                self.left = getattr(self, "left", 6) - 1
                if not self.left:
                    raise KeyboardInterrupt

    # Both begin from equal generators; only one is stopped, behind a checkpoint in the frozen part.
    options = {**TRAINING, "steps": 6, "batch": 2, "frozen": 0.5, "protect": FEW, "checkpoint_every": 2}
    undisturbed = carry_out("sparsedm", copy.deepcopy(dense), lent, prompts, **options)
    first = Context(torch.Generator().manual_seed(0), Stop(), fresh(lent, "stopped"), lent.loan)
    with pytest.raises(KeyboardInterrupt):
        carry_out("sparsedm", copy.deepcopy(dense), first, prompts, **options)
    second = Context(torch.Generator().manual_seed(0), Silent(), first.workdir, lent.loan)
    resumed = carry_out("sparsedm", unet, second, prompts, **options)
    assert resumed.facts == undisturbed.facts


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", -1),
        ("frozen", 0.0),
        ("decay", -1.0),
        ("ema", 1.0),
        ("learning_rate", 0.0),
        ("samples", 0),
        ("damping", 0.0),
        ("groups", 0),
        ("keep_dense", -1),
        ("images", 0),
        ("least", 8),
    ],
)
def test_options_out_of_range_are_refused(key, value):
    with pytest.raises(RecipeError, match=rf"prune\.{key}: got {value:g}"):
        pruner("sparsedm").options(**{key: value})


def test_scores_that_are_not_finite_name_the_layer(unet, lent, prompts):
    with torch.no_grad():
        unet.down_blocks[0].resnets[0].conv1.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(ComponentFailed, match=r"down_blocks\.0\.resnets\.0\.\w+"):
        carry_out("sparsedm", unet, lent, prompts)

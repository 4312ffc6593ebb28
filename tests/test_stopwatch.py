"""Latencies on a target: what is measured once, what a unit alone answers, what is kept."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel

import targets
from exporter.errors import ComponentFailed
from exporter.lowering.options import ExportOptions
from exporter.lowering.workshop import Column
from exporter.metrics.latency import Timer
from exporter.networks.fingerprint import hooks_of, structure_of
from exporter.networks.standins import Bypass
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.pruners.latency_table import LatencyTable, Timed
from exporter.stopwatch import TargetStopwatch

EXPORT = ExportOptions(batch=1, guided=True, latent=8, tokens=8)
FAST = Timer(samples=3, budget_s=0.1, window=1)
ALIKE = ("down_blocks.0.attentions.0", "down_blocks.0.attentions.1")
OTHER = "mid_block.resnets.0"


class Counting:
    """The real runtime; counts what is opened."""

    def __init__(self, real):
        self._real, self.opened = real, 0

    def __getattr__(self, name):
        return getattr(self._real, name)

    def open(self, engine, options):
        self.opened += 1
        return self._real.open(engine, options)


@pytest.fixture(scope="module")
def network(tiny_pipeline_folder):
    return load_network(tiny_pipeline_folder / "unet", cls="UNet2DConditionModel")


@pytest.fixture
def watch():
    def make(folder):
        target = Counting(targets.target("onnxruntime"))
        return TargetStopwatch(Column("here", target, target.options()), EXPORT, folder, Silent(), FAST), target

    return make


def test_equal_units_are_measured_once_and_kept(network, watch, tmp_path):
    stopwatch, target = watch(tmp_path)
    found = stopwatch.units_ms(network, [*ALIKE, OTHER])
    assert found[ALIKE[0]] == found[ALIKE[1]] > 0
    assert found[OTHER] > 0
    assert target.opened == 4  # two engines: the first against itself, the second against the first
    low, high = stopwatch.control()["units"][1:]
    assert low <= high
    again, target = watch(tmp_path)
    assert again.units_ms(network, [OTHER, *ALIKE]) == found
    assert target.opened == 0
    assert not any(hooks_of(module) for module in network.modules())


def test_a_unit_alone_answers_as_inside_of_the_network(network, watch, tmp_path):
    stopwatch, _ = watch(tmp_path)
    unit = stopwatch._watch(network, [ALIKE[0]])[ALIKE[0]]
    feeds = stopwatch._build_unit(ALIKE[0], unit, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0]
    with torch.no_grad():
        hidden, text = (torch.from_numpy(feeds[f"input_{i}"]) for i in range(2))
        wanted = network.get_submodule(ALIKE[0])(hidden, encoder_hidden_states=text, return_dict=False)[0]
    assert hidden.shape == (2, 32, 8, 8)
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)


def smallest():
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
    ).eval()


def test_latency_goes_by_structure_not_by_weights(watch, tmp_path):
    stopwatch, target = watch(tmp_path)
    network, other = smallest(), smallest()
    whole = stopwatch.whole_ms(network)
    opened = target.opened
    with torch.no_grad():
        other.conv_in.weight.add_(1)
    assert stopwatch.whole_ms(other) == whole
    assert target.opened == opened
    other.mid_block.attentions[0] = Bypass("sample")
    assert stopwatch.whole_ms(other) > 0
    assert target.opened == opened + 2
    assert set(stopwatch.control()) == {"whole"}


def test_structure_is_told_alike_in_every_process(tmp_path):
    """diffusers notes names in an order that differs from process to process, and where a network was loaded from."""
    smallest().save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert "_name_or_path" in loaded.config
    told = json.dumps([structure_of(loaded), structure_of(smallest())])
    assert "_use_default_values" in smallest().config
    assert "_use_default_values" not in told
    assert str(tmp_path) not in told
    assert "norm_num_groups" in told


def test_a_module_that_takes_no_part_is_named(network, watch, tmp_path):
    class Sham(torch.nn.Module):
        pass

    other = copy.deepcopy(network)
    other.mid_block.unused = Sham()
    with pytest.raises(ComponentFailed, match=r"mid_block\.unused takes no part in a forward pass"):
        watch(tmp_path)[0].units_ms(other, ["mid_block.unused"])


UNITS = {"a": 5.0, "b": 3.0, "c": 2.0}


def test_a_table_adds_up():
    table = LatencyTable(UNITS, 12.0, {"c": 0.5})
    assert table.rest == 2.0
    assert table.predict(["a", "c"]) == pytest.approx(12 - 5 - 1.5)
    assert table.predict(["a"], ["b", "b"]) == pytest.approx(12 - 5 + 6)


def test_the_constant_of_a_call_is_found_from_whole_networks():
    """Networks whose units all cost 0.4 less inside than alone, but for what has a remainder that carries it too."""
    seen = [Timed(frozenset("a"), 12 - 4.6), Timed(frozenset("ab"), 12 - 4.6 - 2.6), Timed(frozenset("c"), 12 - 1.5)]
    table = LatencyTable(UNITS, 12.0, {"c": 0.5}).fitted([*seen, Timed(frozenset("a"), 12 - 4.6 + 2.6, ("b",))])
    assert table.per_call == pytest.approx(0.4)
    facts = table.facts(seen)
    assert facts["largest_error"] == pytest.approx(0, abs=1e-3)
    assert facts["rest_ms"] == pytest.approx(12 - 10 + 3 * 0.4)


def test_a_unit_never_pays_to_keep():
    """A saving that noise made negative would have every cut keep it for nothing."""
    table = LatencyTable({"a": 1.0, "b": 0.1}, 3.0, {"b": 0.3})
    assert 0 < table.saving("b") < 0.01

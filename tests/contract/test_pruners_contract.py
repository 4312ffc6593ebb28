"""What holds for every entry of the registry: options, purity, records that can be saved and loaded."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from exporter.errors import RecipeError
from exporter.networks.probe import run_probe
from exporter.networks.storage import load_network, load_surgery, save_network
from exporter.networks.surgery import Snapshot, Surgery, diff, replay
from exporter.progress import Silent
from exporter.pruners import PRUNERS, pruner
from exporter.pruners.base import Context

KEEP = {"keep_ratio": 0.6}
VARIANTS = [
    {"cut": "channels"},
    {"cut": "channels", "parts": ("channels", "heads", "neurons", "streams")},
    {"cut": "blocks"},
]


@functools.cache
def original(cls):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        if cls == "UNet2DConditionModel":
            made = UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=2,
                cross_attention_dim=16,
            )
        elif cls == "AutoencoderKL":
            made = AutoencoderKL(
                block_out_channels=(16, 32),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4,
                sample_size=16,
            )
        else:
            made = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=30,
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    max_position_embeddings=8,
                    bos_token_id=28,
                    eos_token_id=29,
                    pad_token_id=29,
                )
            )
    return made.eval()


def build(cls):
    return copy.deepcopy(original(cls))


CLASSES = ("UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel")


def context(tmp_path, seed=0):
    return Context(torch.Generator().manual_seed(seed), Silent(), tmp_path)


def variants(name):
    known = {field.name for field in dataclasses.fields(pruner(name).options)}
    return [variant for variant in VARIANTS if set(variant) <= known] or [{}]


SCHEDULING = [name for name in PRUNERS if hasattr(pruner(name).options, "of_sampling")]
CUTTING = [name for name in PRUNERS if name not in SCHEDULING]
CASES = [(name, variant, cls) for name in CUTTING for variant in variants(name) for cls in CLASSES]
each_case = pytest.mark.parametrize(
    ("name", "variant", "cls"),
    CASES,
    ids=[f"{n}-{'-'.join([v.get('cut', ''), *v.get('parts', ())])}-{c}" for n, v, c in CASES],
)


def pruned(name, variant, cls, tmp_path, **changes):
    network = build(cls)
    before = Snapshot.of(network)
    method = pruner(name)
    method(method.options(**{**KEEP, **variant, **changes})).prune(network, context(tmp_path))
    return network, diff(before, network)


@pytest.mark.parametrize("name", PRUNERS)
def test_the_class_documents_itself(name):
    method = pruner(name)
    assert inspect.getdoc(method)
    assert (inspect.getdoc(importlib.import_module(method.__module__)) or "").strip()
    assert dataclasses.is_dataclass(method.options)
    assert method.options.__dataclass_params__.frozen
    for field in dataclasses.fields(method.options):
        assert f"{field.name}:" in (inspect.getdoc(method.options) or ""), field.name


@each_case
def test_a_pruned_network_survives_storage_bit_for_bit(name, variant, cls, tmp_path):
    network, surgery = pruned(name, variant, cls, tmp_path)
    assert not surgery.is_empty
    answers = run_probe(network)
    config = original(cls).config
    config = config.to_dict() if cls == "CLIPTextModel" else dict(config)
    save_network(network, tmp_path / "saved", surgery=surgery, original_config=config)
    loaded = load_network(tmp_path / "saved", cls=cls)
    assert load_surgery(tmp_path / "saved") == surgery
    state = network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    # A copy: weights mapped from a file may be aligned otherwise, which changes the last bits of a sum.
    assert all(torch.equal(value, answers[key]) for key, value in run_probe(copy.deepcopy(loaded)).items())


@each_case
def test_the_record_rebuilds_the_network(name, variant, cls, tmp_path):
    network, surgery = pruned(name, variant, cls, tmp_path)
    rebuilt = build(cls)
    replay(rebuilt, Surgery.from_json(json.loads(json.dumps(surgery.to_json()))))
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }


@each_case
def test_equal_seeds_give_equal_networks(name, variant, cls, tmp_path):
    first, second = (pruned(name, variant, cls, tmp_path)[0] for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize("name", CUTTING)
@pytest.mark.parametrize("cls", CLASSES)
def test_keeping_all_leaves_an_empty_record(name, cls, tmp_path):
    for variant in variants(name):
        network, surgery = pruned(name, variant, cls, tmp_path, keep_ratio=1.0)
        assert surgery.is_empty
        assert all(torch.equal(value, original(cls).state_dict()[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", CUTTING)
def test_global_state_is_left_alone(name, tmp_path):
    """No library is changed, nothing is drawn from the global generator, no file is written."""
    classes = {cls: dict(vars(cls)) for cls in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, torch.nn.Module)}
    state, threads, grad = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    network = build("UNet2DConditionModel")
    method = pruner(name)
    method(method.options(**KEEP)).prune(network, context(tmp_path))
    assert {cls: dict(vars(cls)) for cls in classes} == classes
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("name", CUTTING)
def test_two_stages_in_a_row_equal_one_record(name, tmp_path):
    network = build("UNet2DConditionModel")
    method = pruner(name)
    snapshot = Snapshot.of(network)
    method(method.options(keep_ratio=0.8)).prune(network, context(tmp_path))
    first = diff(snapshot, network)
    middle, snapshot = copy.deepcopy(network), Snapshot.of(network)
    method(method.options(keep_ratio=0.6)).prune(network, context(tmp_path, 1))
    both = first.then(diff(snapshot, network))
    rebuilt = build("UNet2DConditionModel")
    replay(rebuilt, both)
    rebuilt.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(run_probe(rebuilt)["out_sample"], run_probe(network)["out_sample"])
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in middle.parameters())


@pytest.mark.parametrize("name", SCHEDULING)
def test_a_method_that_schedules_steps_leaves_network_and_library_as_they_are(name, tiny_loan, tmp_path):
    network = load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")
    before, classes = Snapshot.of(network), {cls: dict(vars(cls)) for cls in (UNet2DConditionModel, torch.nn.Module)}
    weights, answers = copy.deepcopy(network.state_dict()), run_probe(network)
    state = torch.get_rng_state()
    method, given = (
        pruner(name),
        {"prompts": str(tiny_loan.folder.parent / "prompts.txt"), "images": 1, "iterations": 1},
    )
    known = {field.name for field in dataclasses.fields(method.options)}
    options = method.options(**{key: value for key, value in given.items() if key in known})
    found = [
        method(options).prune(network, Context(torch.Generator().manual_seed(0), Silent(), tmp_path, tiny_loan))
        for _ in range(2)
    ]
    assert diff(before, network).is_empty
    assert {cls: dict(vars(cls)) for cls in classes} == classes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert torch.equal(run_probe(network)["out_sample"], answers["out_sample"])
    assert found[0] == found[1]
    assert found[0].schedule is not None
    assert json.loads(json.dumps(found[0].facts)) == found[0].facts


@pytest.mark.parametrize("name", SCHEDULING)
@pytest.mark.parametrize("cls", ["AutoencoderKL", "CLIPTextModel"])
def test_a_method_that_schedules_steps_says_which_networks_it_is_for(name, cls, tiny_loan, tmp_path):
    lent = Context(torch.Generator(), Silent(), tmp_path, tiny_loan)
    with pytest.raises(RecipeError, match=f"schedules of steps are for U-Nets; got {cls}"):
        pruner(name)(pruner(name).options()).prune(build(cls), lent)

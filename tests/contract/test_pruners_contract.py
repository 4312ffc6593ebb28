"""What holds for every entry of the registry: options, purity, records that can be saved and loaded."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from exporter.errors import RecipeError
from exporter.networks.probe import run_probe
from exporter.networks.sparsity import load_claims
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
    {"cut": "weights", "pattern": "unstructured"},
]
ZEROS = {"pattern": "unstructured"}
"""What a method that only puts zeros is told besides."""


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
                cross_attention_dim=32,  # as the pipeline of `tiny_loan` has it
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
LITTLE = {"images": 2, "timesteps": 2, "sets": 2, "steps": 1, "sampler_steps": 2}
"""As little work as a method that takes these options can be given."""


@pytest.fixture
def context(tiny_loan, tmp_path):
    """Return a function that makes a context with a work folder of its own."""
    numbers = itertools.count()

    def made(seed=0):
        workdir = tmp_path / f"work-{next(numbers)}"
        workdir.mkdir()
        return Context(torch.Generator().manual_seed(seed), Silent(), workdir, tiny_loan)

    return made


@pytest.fixture
def options(tiny_loan):
    """Return the options of a method: those given, prompts where it takes some, and little work."""

    def made(name, **given):
        prompts = {"prompts": str(tiny_loan.folder.parent / "prompts.txt")}
        return pruner(name).options(**{**{k: v for k, v in {**LITTLE, **prompts}.items() if k in known(name)}, **given})

    return made


def known(name):
    return {field.name for field in dataclasses.fields(pruner(name).options)}


def variants(name):
    if {"cut", "pattern"} & known(name) == {"pattern"}:
        return [ZEROS]
    return [variant for variant in VARIANTS if set(variant) <= known(name)] or [{}]


def classes(name):
    """What looks at the data of a denoiser prunes nothing else."""
    return CLASSES[:1] if "prompts" in known(name) else CLASSES


SCHEDULING = [name for name in PRUNERS if hasattr(pruner(name).options, "of_sampling")]
METHODS = [name for name in PRUNERS if "keep_ratio" in known(name) and name not in SCHEDULING]
"""What a keep ratio steers; the others hold to the same in tests of their own."""

CASES = [(name, variant, cls) for name in METHODS for variant in variants(name) for cls in classes(name)]
each_case = pytest.mark.parametrize(
    ("name", "variant", "cls"),
    CASES,
    ids=[f"{n}-{'-'.join([v.get('cut', ''), *v.get('parts', ())])}-{c}" for n, v, c in CASES],
)


@pytest.fixture
def pruned(context, options):
    """Return a network that a method pruned, the record, and what is claimed of its zeros."""

    def made(name, variant, cls, **changes):
        network = build(cls)
        before = Snapshot.of(network)
        outcome = pruner(name)(options(name, **{**KEEP, **variant, **changes})).prune(network, context())
        return network, diff(before, network), outcome.sparsity

    return made


def alive(network):
    return sum(int(torch.count_nonzero(parameter)) for parameter in network.parameters())


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
def test_a_pruned_network_survives_storage_bit_for_bit(name, variant, cls, pruned, tmp_path):
    network, surgery, sparsity = pruned(name, variant, cls)
    assert surgery.is_empty == bool(sparsity) == ("pattern" in variant)
    assert alive(network) < alive(original(cls))
    answers = run_probe(network)
    config = original(cls).config
    config = config.to_dict() if cls == "CLIPTextModel" else dict(config)
    save_network(network, tmp_path / "saved", surgery=surgery, original_config=config, sparsity=sparsity)
    loaded = load_network(tmp_path / "saved", cls=cls)
    assert load_surgery(tmp_path / "saved") == surgery
    assert load_claims(tmp_path / "saved") == sparsity
    state = network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    # A copy: weights mapped from a file may be aligned otherwise, which changes the last bits of a sum.
    assert all(torch.equal(value, answers[key]) for key, value in run_probe(copy.deepcopy(loaded)).items())


@each_case
def test_the_record_rebuilds_the_network(name, variant, cls, pruned):
    network, surgery, _ = pruned(name, variant, cls)
    rebuilt = build(cls)
    replay(rebuilt, Surgery.from_json(json.loads(json.dumps(surgery.to_json()))))
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }


@each_case
def test_equal_seeds_give_equal_networks(name, variant, cls, pruned):
    first, second = (pruned(name, variant, cls)[0] for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize(("name", "cls"), [(name, cls) for name in METHODS for cls in classes(name)])
def test_keeping_all_leaves_an_empty_record(name, cls, pruned):
    for variant in variants(name):
        network, surgery, sparsity = pruned(name, variant, cls, keep_ratio=1.0)
        assert surgery.is_empty
        assert not sparsity
        assert all(torch.equal(value, original(cls).state_dict()[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_global_state_is_left_alone(name, context, options, tmp_path):
    """No library is changed, nothing is drawn from the global generator, no file is written but in its work folder."""
    for cls in CLASSES:
        build(cls)  # transformers notes facts on a class when its first instance is made
    classes = {cls: dict(vars(cls)) for cls in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, torch.nn.Module)}
    state, threads, grad = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    network = build("UNet2DConditionModel")
    pruner(name)(options(name, **KEEP, **variants(name)[0])).prune(network, context())
    assert {cls: dict(vars(cls)) for cls in classes} == classes
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["work-0"]


@pytest.mark.parametrize("name", METHODS)
def test_two_stages_in_a_row_equal_one_record(name, context, options):
    network = build("UNet2DConditionModel")
    snapshot = Snapshot.of(network)
    pruner(name)(options(name, **variants(name)[0], keep_ratio=0.8)).prune(network, context())
    first = diff(snapshot, network)
    middle, snapshot = copy.deepcopy(network), Snapshot.of(network)
    pruner(name)(options(name, **variants(name)[0], keep_ratio=0.6)).prune(network, context(1))
    both = first.then(diff(snapshot, network))
    rebuilt = build("UNet2DConditionModel")
    replay(rebuilt, both)
    rebuilt.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(run_probe(rebuilt)["out_sample"], run_probe(network)["out_sample"])
    assert alive(network) < alive(middle)


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

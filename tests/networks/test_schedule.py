"""Schedules: what is computed, what is handed on, in which order; DeepCache against a plain rendering of its paper."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from exporter.errors import ArtifactError, ComponentFailed, RecipeError
from exporter.networks.chain import Chain
from exporter.networks.cuts import cost_shares, levels_of, run_unet, torch_chain
from exporter.networks.probe import example_inputs
from exporter.networks.schedule import (
    Pattern,
    Schedule,
    Step,
    check_sampler,
    read_schedule,
    reuse_of,
    schedule_for,
    write_schedule,
)

BETAS = {"beta_schedule": "linear", "timestep_spacing": "trailing", "clip_sample": False}


def conditional() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
        ).eval()


def pixels() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return UNet2DModel(
            sample_size=16,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            layers_per_block=1,
        ).eval()


def schedule(*depths: int, levels: int = 3) -> Schedule:
    return schedule_for(DDIMScheduler(**BETAS), len(depths), depths, guided=False, levels=levels)


def feeds_at(network: nn.Module, timestep: float, seed: int, size: int = 16) -> dict[str, np.ndarray]:
    found = {name: value.numpy() for name, value in example_inputs(network, batch=2, seed=seed, size=size).items()}
    return {**found, "timestep": np.float32(timestep)}


@pytest.mark.parametrize("size", [16, 12, 10])  # sides that the levels divide, and sides that they do not
def test_a_schedule_without_skips_is_the_plain_network_bit_for_bit(size):
    network = conditional()
    plain = schedule(0, 0, 0)
    chain = torch_chain(network, plain)
    for index, step in enumerate(plain.steps):
        feeds = feeds_at(network, step.timestep, index, size)
        with torch.no_grad():
            wanted = network(**{name: torch.from_numpy(np.asarray(value)) for name, value in feeds.items()}).sample
        assert np.array_equal(chain(feeds)["out_sample"], wanted.numpy())


def test_a_network_of_pixels_is_the_plain_one_too():
    network = pixels()
    feeds = example_inputs(network, batch=2, size=16)
    with torch.no_grad():
        assert torch.equal(run_unet(network, feeds), network(**feeds).sample)


class WatchedUNet:
    """DeepCache as its paper has it, by hooks on the stock network: the deep feature is what an up block is fed."""

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network)
        self.kept: torch.Tensor | None = None

    def __call__(self, feeds: dict[str, np.ndarray], *, cut: int, reuse: bool) -> np.ndarray:
        def swap(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if reuse:
                return args, {**kwargs, "hidden_states": self.kept}
            self.kept = kwargs["hidden_states"]
            return None

        handle = self.network.up_blocks[cut].register_forward_pre_hook(swap, with_kwargs=True)
        try:
            with torch.no_grad():  # inner levels are computed and thrown away: slow, and plainly right
                answer = self.network(**{name: torch.from_numpy(np.asarray(v)) for name, v in feeds.items()}).sample
        finally:
            handle.remove()
        return answer.numpy()


@pytest.mark.parametrize("cut", [1, 2])
def test_a_cut_step_answers_as_deepcache_does(cut):
    network = conditional()
    made = schedule(0, cut, cut, 0, cut)
    chain, other = torch_chain(network, made), WatchedUNet(network)
    for index, step in enumerate(made.steps):
        feeds = feeds_at(network, step.timestep, index)
        wanted = other(feeds, cut=cut, reuse=bool(step.depth))
        np.testing.assert_allclose(chain(feeds)["out_sample"], wanted, atol=1e-6)
        plain = WatchedUNet(network)(feeds, cut=cut, reuse=False)
        assert np.abs(plain - wanted).max() > 1e-3 or not step.depth  # the cache makes a difference


def test_a_shallower_cut_renews_the_features_of_outer_cuts():
    network = conditional()
    made = schedule(0, 1, 2)
    assert made.patterns == (Pattern(0, (1,)), Pattern(1, (2,)), Pattern(2, ()))
    chain, other, third = torch_chain(network, made), WatchedUNet(network), WatchedUNet(network)
    feeds = [feeds_at(network, step.timestep, index) for index, step in enumerate(made.steps)]
    for one in feeds[:2]:
        chain(one)
    other(feeds[0], cut=1, reuse=False)
    seen: list[torch.Tensor] = []
    handle = other.network.up_blocks[2].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    other(feeds[1], cut=1, reuse=True)
    handle.remove()
    third.kept = seen[0]
    np.testing.assert_allclose(chain(feeds[2])["out_sample"], third(feeds[2], cut=2, reuse=True), atol=1e-6)


@pytest.mark.parametrize(
    ("depths", "emits"),
    [
        ((0, 0, 0), {0: ()}),
        ((0, 1, 0, 0), {0: (1,), 1: ()}),
        ((0, 2, 2, 3, 2), {0: (2,), 2: ()}),
        ((0, 1, 2), {0: (1,), 1: (2,), 2: ()}),  # cut 2 of step 0 is overwritten before it is read
        ((0, 2, 1), {0: (1, 2), 1: (), 2: ()}),
        ((0, 3, 3), {0: ()}),
    ],
)
def test_a_pattern_hands_out_only_what_a_later_step_reads(depths, emits):
    assert {pattern.depth: pattern.emits for pattern in schedule(*depths).patterns} == emits


def test_a_new_batch_starts_with_nothing_of_the_last():
    network, made = conditional(), schedule(0, 2, 3)
    first, second = torch_chain(network, made), torch_chain(network, made)
    feeds = [feeds_at(network, step.timestep, index) for index, step in enumerate(made.steps)]
    other = [feeds_at(network, step.timestep, index + 9) for index, step in enumerate(made.steps)]
    for one in other[:2]:  # a batch that was interrupted
        first(one)
    assert [first(one)["out_sample"].tolist() for one in feeds] == [second(one)["out_sample"].tolist() for one in feeds]


def test_steps_in_another_order_or_number_are_refused():
    made = schedule(0, 3, 0)
    chain = Chain(made, [lambda feeds: {"out_sample": feeds["sample"]}])
    sample = np.ones((2, 1), np.float32)
    chain({"sample": sample, "timestep": np.float32(made.steps[0].timestep)})
    with pytest.raises(ComponentFailed, match=r"not made for this list of steps; got timestep 5, expected .* 3 steps"):
        chain({"sample": sample, "timestep": np.float32(5)})
    with pytest.raises(ComponentFailed, match="number of rows changed within a batch; got 1, expected 2"):
        chain({"sample": sample[:1], "timestep": np.float32(made.steps[1].timestep)})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_reusing_an_answer_makes_one_larger_ddim_jump(kind):
    """Three steps of 20 with one answer end where a single DDIM jump over all three ends: its closed form."""
    sampler = DDIMScheduler(**BETAS, prediction_type=kind)
    sampler.set_timesteps(20)
    start, end = float(sampler.timesteps[6]), int(sampler.timesteps[9])
    values = np.random.default_rng(0)
    sample = values.standard_normal((1, 4, 8, 8))
    answer = values.standard_normal((1, 4, 8, 8))
    shares = sampler.alphas_cumprod.double().numpy()
    alpha, sigma = math.sqrt(shares[int(start)]), math.sqrt(1 - shares[int(start)])
    clean, noise = {
        "epsilon": ((sample - sigma * answer) / alpha, answer),
        "sample": (answer, (sample - alpha * answer) / sigma),
        "v_prediction": (alpha * sample - sigma * answer, alpha * answer + sigma * sample),
    }[kind]
    wanted = math.sqrt(shares[end]) * clean + math.sqrt(1 - shares[end]) * noise
    moving = torch.from_numpy(sample)
    for timestep in sampler.timesteps[6:9]:
        a, b = reuse_of(sampler, start, float(timestep))
        moving = sampler.step(torch.from_numpy(a * answer + b * sample), timestep, moving).prev_sample
    np.testing.assert_allclose(moving.numpy(), wanted, atol=1e-5)


def test_a_chain_reuses_the_answer_of_the_last_computed_step():
    made = schedule_for(DDIMScheduler(**BETAS, prediction_type="v_prediction"), 4, [0, 3, 3, 0], guided=False, levels=3)
    asked = []

    def ask(feeds):
        asked.append(feeds)
        return {"out_sample": feeds["sample"] * 2}

    chain = Chain(made, [ask])
    samples = [np.full((1, 1), value, np.float32) for value in (3, 5, 7, 9)]
    got = [
        float(chain({"sample": sample, "timestep": np.float32(step.timestep)})["out_sample"][0, 0])
        for sample, step in zip(samples, made.steps, strict=True)
    ]
    wanted = [6, *(step.reuse[0] * 6 + step.reuse[1] * 3 for step in made.steps[1:3]), 18]
    assert got == pytest.approx(wanted)
    assert len(asked) == 2
    assert made.steps[1].reuse != (1.0, 0.0)


def test_costs_fall_from_the_whole_to_nothing():
    costs = cost_shares(conditional(), 16)
    assert costs[0] == 1
    assert costs[-1] == 0
    assert all(left > right for left, right in itertools.pairwise(costs))


def test_a_network_of_other_blocks_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"schedules of steps are for U-Nets; got Linear, expected one of UNet2DCond"):
        levels_of(nn.Linear(2, 2))
    network = conditional()
    del network.up_blocks[1].resnets[1]
    with pytest.raises(RecipeError, match="cannot be cut inside of level 2; got 4 skip connections, expected 3"):
        levels_of(network)


def test_another_sampler_or_setting_is_refused():
    made = schedule(0, 0)
    check_sampler(made, DDIMScheduler(**BETAS), "engine", RecipeError)
    with pytest.raises(RecipeError, match=r"another sampler; got EulerDiscreteScheduler, expected DDIMScheduler\."):
        check_sampler(made, EulerDiscreteScheduler(), "engine", RecipeError)
    with pytest.raises(RecipeError, match=r"other settings of DDIMScheduler; got beta_end 0.5, expected 0.02\."):
        check_sampler(made, DDIMScheduler(**BETAS, beta_end=0.5), "engine", RecipeError)


def test_a_schedule_survives_its_file(tmp_path):
    sampler = DPMSolverMultistepScheduler(prediction_type="v_prediction")  # its settings hold an infinity
    made = schedule_for(sampler, 4, [0, 2, 3, 1], guided=True, levels=3)
    write_schedule(tmp_path, made)
    assert read_schedule(tmp_path) == made
    check_sampler(made, DPMSolverMultistepScheduler.from_config(sampler.config), "engine", RecipeError)
    assert read_schedule(tmp_path / "nowhere") is None


def _with(**changes: Any) -> dict[str, Any]:
    return {**schedule(0, 2, 3).to_json(), **changes}


HOSTILE: dict[str, Any] = {
    "a list": [1],
    "nothing": {},
    "another key": _with(more=1),
    "format of tomorrow": _with(format=2),
    "format true": _with(format=True),
    "a class from elsewhere": _with(scheduler="os.system"),
    "a class that is a list": _with(scheduler=["DDIMScheduler"]),
    "settings that nest": _with(settings={"a": {"b": 1}}),
    "many settings": _with(settings={str(index): 0 for index in range(100)}),
    "guided by a text": _with(guided="yes"),
    "no levels": _with(levels=0),
    "endless levels": _with(levels=10**9),
    "no steps": _with(steps=[]),
    "endless steps": _with(steps=[[1.0, 0, 1.0, 0.0]] * 5000),
    "a step without its factors": _with(steps=[[1.0, 0]]),
    "a depth below": _with(steps=[[1.0, 0, 1.0, 0.0], [0.0, -1, 1.0, 0.0]]),
    "a depth beyond": _with(steps=[[1.0, 0, 1.0, 0.0], [0.0, 4, 1.0, 0.0]]),
    "a depth that is true": _with(steps=[[1.0, 0, 1.0, 0.0], [0.0, True, 1.0, 0.0]]),
    "a timestep that is text": _with(steps=[["1", 0, 1.0, 0.0]]),
    "a factor that is no number": _with(steps=[[1.0, 0, float("nan"), 0.0]]),
    "a factor beyond": _with(steps=[[1.0, 0, 1e300, 0.0]]),
    "a first step that reuses": _with(steps=[[1.0, 1, 1.0, 0.0]]),
    "five graphs": _with(levels=9, steps=[[float(9 - depth), depth, 1.0, 0.0] for depth in range(5)]),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_schedule_is_refused(data):
    with pytest.raises(ArtifactError, match=r"^schedule\.json: not a schedule: .*Restore the original file\.$"):
        Schedule.from_json(data)


def test_a_hostile_file_is_refused_with_its_place(tmp_path):
    (tmp_path / "schedule.json").write_text('{"format": 1' + "[" * 5000)
    with pytest.raises(ArtifactError, match=r"schedule\.json"):
        read_schedule(tmp_path)
    (tmp_path / "schedule.json").write_text(json.dumps(_with(levels=0)))
    with pytest.raises(ArtifactError, match=r"/schedule\.json: not a schedule: levels"):
        read_schedule(tmp_path)


def test_depths_that_do_not_fit_the_sampler_are_refused():
    with pytest.raises(RecipeError, match="got 2 depths from 0, expected 3 of which the first is 0"):
        schedule_for(DDIMScheduler(**BETAS), 3, [0, 1], guided=False, levels=3)
    assert Step(1.0, 0).reuse == (1.0, 0.0)

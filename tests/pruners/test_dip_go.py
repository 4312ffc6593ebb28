"""DiP-GO: gates with the softmax's gradient, trajectories as diffusers draws them, depths that are the best."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.errors import RecipeError
from exporter.networks.cuts import torch_chain
from exporter.networks.schedule import MAX_PATTERNS
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.pruners import dip_go, pruner
from exporter.pruners.base import Context
from exporter.pruners.deepcache import DeepCache, DeepCacheOptions
from exporter.pruners.depths import GRAIN, best_depths
from exporter.pruners.dip_go import DipGo, DipGoOptions, depths_of, hard_gates
from exporter.pruners.drift import least_error, reuse_errors
from exporter.pruners.sampler import Sampler
from exporter.pruners.supernet import SuperNet


@pytest.fixture
def unet(tiny_loan):
    return load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")


@pytest.fixture
def supernet(tiny_loan, unet):
    unet.requires_grad_(requires_grad=False)
    return SuperNet(unet, Sampler.of(unet, tiny_loan), tiny_loan)


def context(loan, folder: Path, progress=None) -> Context:
    return Context(torch.Generator().manual_seed(3), progress or Silent(), folder, loan)


def prompts_of(loan) -> str:
    return str(loan.folder.parent / "prompts.txt")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.77, 1.0])
def test_depths_are_the_best_of_all_that_the_budget_allows(seed, ratio):
    keep = np.random.default_rng(seed).random((5, 3))
    costs = (1.0, 0.7, 0.4, 0.0)

    def worth(depths):
        return sum(keep[step, depth:].sum() for step, depth in enumerate(depths))

    def price(depths):
        return sum(costs[depth] for depth in depths)

    every = [depths for depths in itertools.product(range(4), repeat=5) if depths[0] == 0]
    best = max(worth(depths) for depths in every if price(depths) <= ratio * 5 + 1e-9)
    found = best_depths(keep, costs, ratio)
    assert price(found) <= ratio * 5 + 1e-9
    assert worth(found) == pytest.approx(best)


@pytest.mark.parametrize("ratio", [0.34, 0.5, 0.8])
def test_without_training_the_reuse_of_least_error_is_chosen(ratio):
    """Against every schedule there is: features are as old as the last whole step, answers as the last computed one."""
    steps, costs = 6, (1.0, 0.6, 0.3, 0.0)
    errors = np.random.default_rng(5).random((steps, 3, 4)).cumsum(axis=2)

    def error(depths):
        total, whole, latest = 0.0, 0, 0
        for step, depth in enumerate(depths):
            age = step - (latest if depth == 3 else whole)
            total += 0 if depth == 0 else errors[step, depth - 1, age - 1] if age <= 4 else np.inf
            whole = whole if depth else step
            latest = latest if depth == 3 else step
        return total

    every = [(0, *depths) for depths in itertools.product(range(4), repeat=steps - 1)]
    afforded = [depths for depths in every if sum(costs[depth] for depth in depths) <= ratio * steps + 1e-9]
    found = least_error(errors, costs, ratio)
    assert sum(costs[depth] for depth in found) <= ratio * steps + 1e-9
    assert error(found) == pytest.approx(min(error(depths) for depths in afforded))


def test_prices_of_reuse_are_the_errors_that_a_chain_makes(tiny_loan, unet, supernet):
    errors = reuse_errors(unet, supernet.sampler, tiny_loan, prompts_of(tiny_loan), 2, Silent())
    assert errors.shape == (3, 2, 8)
    assert np.isinf(errors[1, :, 1:]).all()
    assert np.isfinite(errors[2, :, :2]).all()
    recording = tiny_loan.recording(prompts_of(tiny_loan), 2)
    for depth in (1, 2):
        chain = torch_chain(unet, supernet.sampler.schedule([0, depth, depth]))
        got = []
        for step in range(3):
            call = recording.calls(step)
            states = [side["encoder_hidden_states"] for side in (call.given_uncond, call.given)]
            feeds = {
                "sample": np.concatenate([call.sample] * 2),
                "timestep": np.float32(call.timestep),
                "encoder_hidden_states": np.concatenate(states),
            }
            uncond, cond = np.split(chain(feeds)["out_sample"], 2)
            got.append(np.square(uncond + 3.0 * (cond - uncond) - call.guided).mean())
        assert errors[1, depth - 1, 0] == pytest.approx(got[1], rel=1e-3)
        assert errors[2, depth - 1, 1] == pytest.approx(got[2], rel=1e-3)


def test_order_random_keeps_the_budget_and_follows_from_the_seed(tiny_loan, unet, tmp_path):
    options = DipGoOptions(keep_ratio=0.7, order="random")

    def made(seed):
        context = Context(torch.Generator().manual_seed(seed), Silent(), tmp_path, tiny_loan)
        return DipGo(options).prune(unet, context)

    found = [made(seed) for seed in range(6)]
    assert all(outcome.facts["computed_share"] <= 0.7 for outcome in found)
    assert all(outcome.facts["order"] == "random" for outcome in found)
    assert made(0).schedule == found[0].schedule
    assert len({outcome.schedule.depths for outcome in found}) > 1


def test_order_drift_needs_no_training_and_says_so(tiny_loan, unet, tmp_path):
    options = DipGoOptions(prompts=prompts_of(tiny_loan), images=1, keep_ratio=0.7, order="drift")
    found = DipGo(options).prune(unet, context(tiny_loan, tmp_path))
    assert found.facts["order"] == "drift"
    assert "loss" not in found.facts
    assert 0.3 < found.facts["computed_share"] <= 0.7
    errors = np.full((12, 1, 8), 1.0)
    with pytest.raises(
        RecipeError, match=r"prune\.keep_ratio: got 0.1, expected more: with order: drift nothing older"
    ):
        least_error(errors, (1.0, 0.0), 0.1)


def test_a_deep_network_gets_no_more_graphs_than_allowed():
    keep = np.random.default_rng(0).random((12, 7))
    costs = np.linspace(1, 0, 8)
    found = best_depths(keep, costs, 0.6)
    assert len({depth for depth in found if depth < 7}) <= MAX_PATTERNS
    assert sum(costs[depth] for depth in found) <= 0.6 * 12
    assert sum(costs[depth] for depth in found) > 0.6 * 12 - 1  # and the budget is used


def test_a_budget_below_the_first_step_is_refused():
    with pytest.raises(RecipeError, match=r"prune\.keep_ratio: got 0.1, expected at least 0.2: the first of 5 steps"):
        best_depths(np.ones((5, 1)), (1.0, 0.0), 0.1)
    assert best_depths(np.ones((5, 1)), (1.0, 0.0), 0.2) == [0, 1, 1, 1, 1]
    assert GRAIN >= 1000


def test_gates_are_hard_and_have_the_gradient_of_the_softmax():
    logits = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))
    gates = hard_gates(logits)
    assert torch.equal(gates[1:].argmax(-1), logits[1:].argmax(-1))
    assert set(gates.detach().flatten().tolist()) <= {0.0, 1.0}
    assert gates[0, :, 1].tolist() == [1, 1, 1]  # the first step has nothing to reuse
    (got,) = torch.autograd.grad((gates * weights).sum(), logits)
    (wanted,) = torch.autograd.grad((logits.softmax(-1) * weights)[1:].sum(), logits)
    torch.testing.assert_close(got, wanted)


def test_the_outermost_reuse_takes_the_inner_levels_along():
    skips = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1]])
    assert depths_of(torch.stack([skips, 1 - skips], dim=-1)) == [0, 1, 2, 3]


def test_a_trajectory_is_the_pipelines_own(tiny_loan, supernet):
    start = supernet.start("a cat", 11)
    pipeline = tiny_loan.pipeline()
    wanted = pipeline("a cat", num_inference_steps=3, guidance_scale=3.0, latents=start.noise, output_type="latent")
    with torch.no_grad():
        got = supernet.draw(start)
    torch.testing.assert_close(got, wanted.images, atol=1e-5, rtol=1e-5)
    shown = pipeline.image_processor.postprocess(
        pipeline.vae.decode(got / pipeline.vae.config.scaling_factor)[0].detach()
    )
    assert np.abs(np.asarray(shown[0]) / 255 - supernet.image(got)[0].permute(1, 2, 0).detach().numpy()).max() < 0.01


@pytest.mark.parametrize("depths", [(0, 1, 0), (0, 2, 1), (0, 1, 2)])
def test_hard_gates_draw_what_the_schedule_draws(tiny_loan, supernet, depths):
    """The chain that engines run by, behind diffusers' own loop."""
    start, pipeline = supernet.start("a dog", 5), tiny_loan.pipeline()
    chain = torch_chain(pipeline.unet, supernet.sampler.schedule(depths))

    def answer(sample, timestep, encoder_hidden_states, **_):
        feeds = {"sample": sample, "timestep": timestep.float(), "encoder_hidden_states": encoder_hidden_states}
        return (torch.from_numpy(chain({name: value.numpy() for name, value in feeds.items()})["out_sample"]),)

    pipeline.unet.forward = answer
    wanted = pipeline("a dog", num_inference_steps=3, guidance_scale=3.0, latents=start.noise, output_type="latent")
    skips = torch.tensor([[float(depth == cut) for cut in (1, 2)] for depth in depths])
    with torch.no_grad():
        got = supernet.draw(start, torch.stack([skips, 1 - skips], dim=-1))
    torch.testing.assert_close(got, wanted.images, atol=1e-4, rtol=1e-4)


def test_gradients_of_gates_are_those_of_finite_differences(supernet):
    start = supernet.start("a hat", 2)
    given = {name: value.double() for name, value in start.given.items()}
    start = dataclasses.replace(start, noise=start.noise.double(), given=given)
    supernet.network.double()
    weights = torch.randn(start.noise.shape, generator=torch.Generator().manual_seed(4))
    soft = torch.full((3, 2, 2), 0.5, dtype=torch.float64)

    def value(gates):
        return (supernet.draw(start, gates) * weights).sum()

    gates = soft.clone().requires_grad_()
    (got,) = torch.autograd.grad(value(gates), gates)
    for place in [(1, 0, 0), (1, 1, 1), (2, 0, 1), (2, 1, 0)]:
        step = torch.zeros_like(soft)
        step[place] = 1e-5
        with torch.no_grad():
            slope = float((value(soft + step) - value(soft - step)) / 2e-5)
        assert float(got[place]) == pytest.approx(slope, rel=1e-4), place
    assert not got[0].any()


class Stops(Silent):
    """Ends the work as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, units: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_training_keeps_the_budget_goes_on_where_it_stopped_and_leaves_the_network_whole(
    tiny_loan, unet, tmp_path, monkeypatch
):
    monkeypatch.setattr(dip_go, "_EVERY", 2)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    options = DipGoOptions(
        prompts=prompts_of(tiny_loan), images=3, iterations=4, keep_ratio=0.7, learning_rate=2.0, similarity="latent"
    )
    folders = [tmp_path / name for name in ("whole", "stopped")]
    for folder in folders:
        folder.mkdir()
    whole = DipGo(options).prune(unet, context(tiny_loan, folders[0]))
    with pytest.raises(KeyboardInterrupt):
        DipGo(options).prune(unet, context(tiny_loan, folders[1], Stops(4)))
    again = DipGo(options).prune(unet, context(tiny_loan, folders[1]))
    assert again == whole
    assert whole.schedule is not None
    assert whole.facts["computed_share"] <= 0.7
    assert whole.schedule.depths[0] == 0
    assert len(whole.facts["loss"]) == 4
    assert whole.facts["loss"][-1][1:] != whole.facts["loss"][0][1:]  # the gates have moved
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_ssim_of_decoded_images_trains_too(tiny_loan, unet, tmp_path):
    options = DipGoOptions(prompts=prompts_of(tiny_loan), images=1, iterations=2, learning_rate=30.0)
    found = DipGo(options).prune(unet, context(tiny_loan, tmp_path))
    assert found.facts["loss"][0][1] == pytest.approx(0, abs=1e-6)  # everything is kept at first
    assert found.facts["loss"][1][1] > 1e-4


@pytest.mark.parametrize(
    ("interval", "branch", "depths"), [(2, 0, (0, 1, 0)), (3, 0, (0, 1, 1)), (2, -1, (0, 2, 0)), (1, 0, (0, 0, 0))]
)
def test_deepcache_is_uniform(tiny_loan, unet, tmp_path, interval, branch, depths):
    found = DeepCache(DeepCacheOptions(interval, branch)).prune(unet, context(tiny_loan, tmp_path))
    assert found.schedule is not None
    assert found.schedule.depths == depths
    assert found.schedule.guided
    shallow = found.facts["costs"][depths[1]]
    assert found.facts["computed_share"] == pytest.approx((depths.count(0) + (3 - depths.count(0)) * shallow) / 3, 1e-4)


def test_a_branch_that_the_network_has_not_is_refused(tiny_loan, unet, tmp_path):
    with pytest.raises(
        RecipeError, match=r"prune\.branch: got 1, expected -1 to 0: the U-Net has 2 levels\. Write 0\."
    ):
        DeepCache(DeepCacheOptions(branch=1)).prune(unet, context(tiny_loan, tmp_path))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dip-go", {"keep_ratio": 1.5}),
        ("dip-go", {"keep_ratio": 0}),
        ("dip-go", {"order": "best"}),
        ("dip-go", {"iterations": 0}),
        ("dip-go", {"learning_rate": 0}),
        ("dip-go", {"similarity": "lpips"}),
        ("dip-go", {"sparsity": -1}),
        ("dip-go", {"floor": 2}),
        ("deepcache", {"interval": 0}),
        ("deepcache", {"branch": -2}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    (key,) = options
    with pytest.raises(RecipeError, match=rf"^prune\.{key}: got .*, expected .*\. ?Write "):
        pruner(name).options(**options)
    assert key in {field.name for field in dataclasses.fields(pruner(name).options)}

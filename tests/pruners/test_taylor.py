"""Taylor scores and diff-pruning: gradients as a plain loop has them, scores as written in the papers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from exporter.errors import ComponentFailed, RecipeError
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.pruners import gradients, pruner
from exporter.pruners.base import Context, CutOptions
from exporter.pruners.blocks import blocks_of
from exporter.pruners.channels import layers_of
from exporter.pruners.diff_pruning import SCORES, DiffPruning, DiffPruningOptions
from exporter.pruners.gradients import summed_gradients
from exporter.pruners.ranking import kept_units, removed_units
from exporter.pruners.taylor import Taylor, TaylorOptions, total_of_terms
from exporter.tuning import checkpoint

LEVELS = [0, 333, 666, 999]


@pytest.fixture
def denoiser(tiny_loan):
    return load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")


@pytest.fixture
def prompts(tiny_loan):
    return str(tiny_loan.folder.parent / "prompts.txt")


@pytest.fixture
def data(tiny_loan, prompts):
    return tiny_loan.data(prompts, 3)


@pytest.fixture
def lent(tiny_loan, tmp_path):
    """Return a context that lends the tiny pipeline, so many images at a time."""

    def made(batch=4):
        loan = dataclasses.replace(tiny_loan, sampling={**tiny_loan.sampling, "batch": batch})
        return Context(torch.Generator().manual_seed(3), Silent(), tmp_path, loan)

    return made


def by_hand(network, data, levels):
    """Losses and summed gradients, with diffusers' scheduler and nothing of ours."""
    schedule = DDPMScheduler(beta_schedule="scaled_linear")
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(3))
    parameters = dict(network.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    losses = []
    for level in levels:
        noised = schedule.add_noise(data.latents, noise, torch.tensor([level] * len(noise)))
        text = data.given["encoder_hidden_states"][data.prompt_of]
        loss = F.mse_loss(network(noised, level, text).sample, noise)
        losses.append(float(loss.detach()))
        for name, found in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[name] += found
    return losses, total


@pytest.mark.parametrize("batch", [4, 2], ids=["at once", "in two parts"])
def test_gradients_are_those_of_a_plain_loop(denoiser, data, lent, batch):
    found, facts = summed_gradients(denoiser, data, 4, 0.0, lent(batch))
    losses, wanted = by_hand(denoiser, data, LEVELS)
    assert facts["timesteps_used"] == facts["timesteps_of"] == 4
    assert facts["loss_first"] == pytest.approx(losses[0], rel=1e-4)
    assert facts["loss_last"] == pytest.approx(losses[-1], rel=1e-4)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("batch", [4, 2])
def test_the_sum_ends_before_the_first_level_below_the_share(denoiser, data, lent, batch):
    losses, _ = by_hand(denoiser, data, LEVELS)
    # Random weights: the losses hardly differ, so the share is put right between the second and the third.
    falling = sorted(losses[:2])[0] > losses[2]
    share = (min(losses[:2]) + losses[2]) / 2 / max(losses[:2]) if falling else 0.999999 * min(1, losses[1] / losses[0])
    found, facts = summed_gradients(denoiser, data, 4, share, lent(batch))
    highest, used = losses[0], 1
    for loss in losses[1:]:
        highest = max(highest, loss)
        if loss < share * highest:
            break
        used += 1
    assert facts["timesteps_used"] == used
    _, wanted = by_hand(denoiser, data, LEVELS[:used])
    torch.testing.assert_close(found["conv_in.weight"], wanted["conv_in.weight"], rtol=1e-3, atol=1e-6)


def test_the_cut_leaves_high_noise_out(denoiser, data, lent, monkeypatch):
    """Losses that fall as those of a trained model do: the prefix above the share is summed, no more."""
    falling = {0: 1.0, 333: 0.5, 666: 0.04, 999: 0.9}
    passed = []

    def loss(self, network, level, chunk):
        passed.append(level)
        return falling[level] * network.conv_in.weight.sum() / network.conv_in.weight.sum().detach()

    monkeypatch.setattr(gradients._MiniBatch, "_loss", loss)
    found, facts = summed_gradients(denoiser, data, 4, 0.05, lent())
    assert facts == {"timesteps_used": 2, "timesteps_of": 4, "loss_first": 1.0, "loss_last": 0.5}
    assert passed == [0, 333, 666]
    expected = 1.5 / denoiser.conv_in.weight.detach().sum()
    torch.testing.assert_close(found["conv_in.weight"], expected.expand_as(denoiser.conv_in.weight))


def test_taylor_is_the_slope_of_the_loss_along_a_unit(denoiser, data, lent):
    """Finite differences: a neuron's outgoing weights are scaled a little, nothing is differentiated."""
    network = denoiser
    layer = next(item for item in layers_of(network, CutOptions(0.5)) if item.part == "neurons")
    share = next(item for item in layer.shares if item.dim == 1)
    found, _ = summed_gradients(network, data, 2, 0.0, lent())
    slopes = total_of_terms(share.rows().double() * share.rows(found[share.path]).double())
    unit = int(slopes.argmax())
    network.double()
    wide = dataclasses.replace(
        data,
        latents=data.latents.double(),
        given={name: rows.double() for name, rows in data.given.items()},
    )
    wanted = []
    for sign in (1, -1):
        with torch.no_grad():
            column = network.get_parameter(share.path)[:, share.index[unit]]
            network.get_parameter(share.path)[:, share.index[unit]] = column * (1 + sign * 1e-3)
        schedule = DDPMScheduler(beta_schedule="scaled_linear")
        noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(3)).double()
        total = 0.0
        for level in (0, 999):
            noised = schedule.add_noise(wide.latents, noise, torch.tensor([level] * 3))
            with torch.no_grad():
                answer = network(noised, level, wide.given["encoder_hidden_states"][wide.prompt_of]).sample
            total += float(F.mse_loss(answer, noise))
        wanted.append(total)
        with torch.no_grad():
            network.get_parameter(share.path)[:, share.index[unit]] = column
    assert abs(wanted[0] - wanted[1]) / 2e-3 == pytest.approx(float(slopes[unit]), rel=2e-2)


@pytest.mark.parametrize("name", ["taylor", "absolute", "squares"])
def test_scores_of_a_resnet_are_those_of_the_paper(denoiser, data, lent, prompts, name):
    """Written out for one block: conv1 and the time projection lose rows, the norm entries, conv2 columns."""
    path, ratio = "mid_block.resnets.0", 0.5
    _, gradient = by_hand(denoiser, data, [0, 999])

    def terms(part, columns=False):
        product = (denoiser.get_parameter(f"{path}.{part}").detach() * gradient[f"{path}.{part}"]).double()
        return (product.transpose(0, 1) if columns else product).reshape(64, -1)

    parts = [terms("conv1.weight"), terms("time_emb_proj.weight"), terms("norm2.weight"), terms("conv2.weight", True)]
    form = {
        "taylor": lambda x: x.sum(1).abs(),
        "absolute": lambda x: x.abs().sum(1),
        "squares": lambda x: (x**2).sum(1),
    }[name]
    scores = sum(form(part) for part in parts) / 4
    common = {"keep_ratio": ratio, "prompts": prompts, "images": 3, "timesteps": 2, "parts": ("channels",)}
    layer = next(item for item in layers_of(denoiser, CutOptions(ratio)) if item.path == path)
    gone = removed_units(layer, scores, kept_units(layer, CutOptions(ratio)))
    kept = [unit for unit in range(64) if unit not in gone]
    wanted = denoiser.get_parameter(f"{path}.conv2.weight").detach()[:, kept].clone()
    options = TaylorOptions(**common) if name == "taylor" else DiffPruningOptions(**common, score=name, threshold=0.0)
    method = Taylor(options) if name == "taylor" else DiffPruning(options)
    assert method.prune(denoiser, lent()).facts["timesteps_used"] == 2
    assert torch.equal(denoiser.get_parameter(f"{path}.conv2.weight"), wanted)


def test_published_forms_rank_differently():
    terms = torch.tensor([[0.9, -0.9], [0.5, 0.6], [1.3, 0.0]])
    assert int(total_of_terms(terms).argmin()) == 0
    assert int(SCORES["absolute"](terms).argmin()) == 1
    assert SCORES["squares"](terms).argsort().tolist() == [1, 0, 2]
    assert SCORES["absolute"](terms).argsort().tolist() == [1, 2, 0]


def test_blocks_whose_branch_does_nothing_go_first(denoiser, lent, prompts):
    with torch.no_grad():
        denoiser.up_blocks[1].resnets[1].conv2.weight.zero_()
        denoiser.up_blocks[1].resnets[1].conv2.bias.zero_()
    found = len(blocks_of(denoiser, CutOptions(0.5)))
    options = DiffPruningOptions(1 - 1 / found, cut="blocks", prompts=prompts, images=2, timesteps=2)
    DiffPruning(options).prune(denoiser, lent())
    assert type(denoiser.up_blocks[1].resnets[1]).__name__ == "Shortcut"


def test_nothing_but_weights_is_left_behind(denoiser, data, lent):
    denoiser.train()
    denoiser.conv_in.weight.requires_grad_(False)
    before = {name: value.detach().clone() for name, value in denoiser.named_parameters()}
    summed_gradients(denoiser, data, 2, 0.0, lent())
    assert all(value.grad is None for value in denoiser.parameters())
    assert [name for name, value in denoiser.named_parameters() if not value.requires_grad] == ["conv_in.weight"]
    assert all(module.training for module in denoiser.modules())
    assert all(torch.equal(value, before[name]) for name, value in denoiser.named_parameters())


def test_a_killed_sum_goes_on_where_it_was(denoiser, data, lent, monkeypatch):
    wanted, facts = summed_gradients(denoiser, data, 4, 0.0, lent())
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    real, passed = gradients._MiniBatch.add, []

    def add(self, network, level, losses, threshold):
        passed.append(level)
        if passed == LEVELS[:3]:
            raise KeyboardInterrupt
        return real(self, network, level, losses, threshold)

    monkeypatch.setattr(gradients._MiniBatch, "add", add)
    with pytest.raises(KeyboardInterrupt):
        summed_gradients(denoiser, data, 4, 0.0, lent())
    found, again = summed_gradients(denoiser, data, 4, 0.0, lent())
    assert passed == [0, 333, 666, 666, 999]
    assert again == facts
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("weight", "told"),
    [(float("nan"), "the loss of UNet2DConditionModel at noise level 0 is nan"), (3e38, "not finite|is (nan|inf)")],
)
def test_what_is_not_finite_is_refused(denoiser, lent, prompts, weight, told):
    with torch.no_grad():
        denoiser.up_blocks[1].resnets[0].conv2.weight[0, 0] = weight
    method = DiffPruning(DiffPruningOptions(0.5, prompts=prompts, images=2, timesteps=2))
    with pytest.raises(ComponentFailed, match=told):
        method.prune(denoiser, lent())


def test_a_gradient_that_is_not_finite_is_refused_by_its_name(denoiser, data, lent, monkeypatch):
    def loss(self, network, level, chunk):  # finite, with a slope that is not
        return (network.conv_in.bias * 0).abs().sqrt().sum()

    monkeypatch.setattr(gradients._MiniBatch, "_loss", loss)
    with pytest.raises(ComponentFailed, match=r"the gradient of conv_in\.bias is not finite"):
        summed_gradients(denoiser, data, 1, 0.0, lent())


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("taylor", {"timesteps": 0}, r"prune\.timesteps: got 0, expected"),
        ("taylor", {"images": 0}, r"prune\.images: got 0, expected"),
        ("taylor", {"component": "vae_decoder"}, r"prune\.component: got 'vae_decoder', expected denoiser"),
        ("taylor", {"ranking": "both"}, r"prune\.ranking: got 'both', expected one of local, global"),
        ("diff-pruning", {"threshold": 1.0}, r"prune\.threshold: got 1, expected"),
        ("diff-pruning", {"score": "outside"}, r"prune\.score: got 'outside', expected one of absolute, squares"),
    ],
)
def test_impossible_options(name, options, told):
    with pytest.raises(RecipeError, match=told):
        pruner(name).options(keep_ratio=0.5, **options)

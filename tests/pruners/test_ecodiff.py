"""EcoDiff: masks by their formula, gradients as plain backpropagation has them, removal that equals masking."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention

from exporter.errors import ComponentFailed, RecipeError
from exporter.networks.probe import run_probe
from exporter.networks.storage import load_network
from exporter.networks.surgery import Snapshot, diff, replay
from exporter.progress import Silent
from exporter.pruners import mask_training
from exporter.pruners.base import Context, CutOptions
from exporter.pruners.ecodiff import EcoDiff, EcoDiffOptions, hard_concrete, open_share
from exporter.pruners.magnitude import Magnitude
from exporter.pruners.masks import maskables, masked_weights, remove_masked
from exporter.pruners.trajectory import Trajectory, gradient_along, single_step
from exporter.tuning import checkpoint


@pytest.fixture
def denoiser(tiny_loan):
    return load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")


@pytest.fixture
def small():
    """A denoiser that takes what the tiny pipeline gives, and a quarter of its time."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=32,
        ).eval()


@pytest.fixture
def prompts(tiny_loan):
    return str(tiny_loan.folder.parent / "prompts.txt")


@pytest.fixture
def context(tiny_loan, tmp_path):
    return lambda seed=0: Context(torch.Generator().manual_seed(seed), Silent(), tmp_path, tiny_loan)


@pytest.fixture
def trajectory(tiny_loan, prompts):
    return Trajectory.of(tiny_loan.pipeline(), tiny_loan.form, ["a cat", "a dog"], tiny_loan.drawing, seed=3)


def options(named, **changes):
    return EcoDiffOptions(
        **{"keep_ratio": 0.6, "prompts": named, "images": 2, "steps": 2, "sampler_steps": 1, **changes}
    )


def random_masks(found, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sum(item.layer.units for item in found), generator=generator)


def test_masks_follow_the_published_formula():
    random = np.random.default_rng(1)
    logits, u = random.normal(size=50) * 3, random.random(50)
    for e in (0.5, 0.1):
        s = 1 / (1 + np.exp(-(np.log(u + e) - np.log(1 - u + e) + logits) / 0.83))
        wanted = np.clip(s * 1.2 - 0.1, 0, 1)
        found = hard_concrete(torch.tensor(logits), torch.tensor(u), e)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-9)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert hard_concrete(torch.full((2,), 3.0), ends, 0.5)[0] == pytest.approx(0.99, abs=5e-3)
    assert hard_concrete(torch.zeros(2), ends, 0.5).tolist() == pytest.approx([0.15, 0.85], abs=6e-3)


def test_the_l0_term_is_the_chance_that_a_mask_is_open():
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for logit in (-3.0, -1.0, 0.5):
        open_ones = hard_concrete(torch.full_like(u, logit), u, 1e-9) > 0
        share = open_share(torch.tensor([logit]), torch.ones(1), "l0")
        assert float(share) == pytest.approx(float(open_ones.double().mean()), abs=4e-3)


def test_a_dear_unit_weighs_more():
    logits = torch.tensor([2.0, -2.0], requires_grad=True)
    for form in ("l0", "sigmoid"):
        cheap, dear = (open_share(logits, torch.tensor([1.0, cost]), form) for cost in (1.0, 9.0))
        assert dear < cheap
        (slope,) = torch.autograd.grad(dear, [logits])
        assert bool((slope > 0).all())  # a lower logit is a lower share, at any logit: the L1 norm would turn at 0


def test_a_mask_multiplies_what_a_unit_puts_out(denoiser, tiny_loan):
    """Against hooks that multiply, head by head and neuron by neuron, in front of the layer that reads them."""
    found = maskables(denoiser, EcoDiffOptions().cut, ("heads", "neurons"))
    masks = random_masks(found)
    masks[: found[0].layer.units] = 0  # the first loses all: its bias goes too
    feeds = {
        "sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor(400),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)),
    }
    with torch.no_grad():
        weights = masked_weights(denoiser, found, masks)
        got = torch.func.functional_call(denoiser, weights, (), feeds).sample
        silenced = copy.deepcopy(denoiser)
        for item, mask in zip(found, torch.split(masks, [item.layer.units for item in found]), strict=True):
            module = silenced.get_submodule(item.layer.path)
            reader = module.to_out[0] if isinstance(module, Attention) else module.net[2]
            reader.bias *= mask.max()
            wide = mask.repeat_interleave(item.layer.unit_width)
            reader.register_forward_pre_hook(lambda _, inputs, wide=wide: (inputs[0] * wide,))
        wanted = silenced(**feeds).sample
        assert not torch.allclose(wanted, denoiser(**feeds).sample, atol=1e-3)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", ["guided", "one row"])
def test_the_gradient_is_that_of_backpropagation_through_all_steps(denoiser, tiny_loan, rows):
    """In float64, against one graph over the whole trajectory, its steps written out as DDIM's equation."""
    network = denoiser.double()
    drawing = tiny_loan.drawing if rows == "guided" else dataclasses.replace(tiny_loan.drawing, guidance=1.0)
    trajectory = Trajectory.of(tiny_loan.pipeline(), tiny_loan.form, ["a cat", "a dog"], drawing, seed=3)
    assert (trajectory.guidance is None) == (rows == "one row")
    trajectory = dataclasses.replace(trajectory, given={k: v.double() for k, v in trajectory.given.items()})
    found = maskables(network, EcoDiffOptions().cut, ("heads", "neurons"))
    logits = torch.randn(sum(i.layer.units for i in found), generator=torch.Generator().manual_seed(4)).double()
    uniform = random_masks(found, 5).double()
    noise = trajectory.noise(torch.Generator().manual_seed(6)).double()
    target = torch.randn(noise.shape, generator=torch.Generator().manual_seed(7)).double()

    def answering(masks):
        weights = masked_weights(network, found, masks)
        return lambda feeds: torch.func.functional_call(network, weights, (), {**feeds, "return_dict": False})[0]

    masks = hard_concrete(logits, uniform, 0.5)
    loss, slope = gradient_along(trajectory, noise, masks, answering, lambda z: F.mse_loss(z, target))

    leaf = logits.clone().requires_grad_()
    weights = masked_weights(network, found, hard_concrete(leaf, uniform, 0.5))
    solver = trajectory.solver  # whose factors are float32, as in diffusers
    text, z = trajectory.given["encoder_hidden_states"], noise
    for t in (int(t) for t in solver.timesteps):
        now = solver.alphas_cumprod[t]
        before = solver.alphas_cumprod[t - 333] if t >= 333 else solver.final_alpha_cumprod
        if rows == "guided":
            arguments = (torch.cat([z, z]), torch.tensor(t), text)
            uncond, cond = torch.func.functional_call(network, weights, arguments).sample.chunk(2)
            eps = uncond + 3.0 * (cond - uncond)
        else:
            eps = torch.func.functional_call(network, weights, (z, torch.tensor(t), text)).sample
        z = before.sqrt() * (z - (1 - now).sqrt() * eps) / now.sqrt() + (1 - before).sqrt() * eps
    whole = F.mse_loss(z, target)
    (wanted,) = torch.autograd.grad(whole, [leaf])
    assert loss == pytest.approx(float(whole.detach()), rel=1e-9)
    leaf = logits.clone().requires_grad_()
    (got,) = torch.autograd.grad(hard_concrete(leaf, uniform, 0.5), [leaf], slope)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=float(wanted.abs().max()) * 1e-8)


def test_a_trajectory_is_what_the_pipeline_draws(denoiser, tiny_loan, trajectory):
    pipeline = tiny_loan.pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    trajectory = Trajectory.of(pipeline, tiny_loan.form, ["a cat", "a dog"], tiny_loan.drawing, seed=3)
    noise = trajectory.noise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = trajectory.run(noise, lambda feeds: denoiser(**feeds).sample)[-1]
    wanted = pipeline(
        ["a cat", "a dog"],
        latents=noise,
        num_inference_steps=3,
        guidance_scale=3.0,
        height=64,
        width=64,
        output_type="latent",
    ).images
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_solver_without_history_does_not_start_to_clip(tiny_pipeline_folder):
    from exporter.networks.pipeline import load_pipeline

    multistep = load_pipeline(tiny_pipeline_folder).scheduler
    found = single_step(multistep)
    assert type(multistep).__name__ == "DPMSolverMultistepScheduler"
    assert isinstance(found, DDIMScheduler)
    assert not found.config.clip_sample
    assert torch.equal(found.alphas_cumprod, multistep.alphas_cumprod)
    flow = type(multistep).from_config(multistep.config, prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(RecipeError, match=r"DPMSolverMultistepScheduler \(flow_prediction\); expected a schedule"):
        single_step(flow)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_removed_network_answers_as_the_masked_one(denoiser, context, tiny_loan, seed):
    cut = EcoDiffOptions(round_to=1).cut
    found = maskables(denoiser, cut, ("heads", "neurons"))
    masks = (random_masks(found, seed) > 0.4).float()
    sizes = [item.layer.units for item in found]
    parts = list(torch.split(masks, sizes))
    attention = next(
        i for i, item in enumerate(found) if item.layer.path == "mid_block.attentions.0.transformer_blocks.0.attn1"
    )
    neurons = next(
        i for i, item in enumerate(found) if item.layer.path == "up_blocks.0.attentions.1.transformer_blocks.0.ff"
    )
    parts[attention].zero_(), parts[neurons].zero_()
    assert all(part.sum() > 0 for i, part in enumerate(parts) if i not in (attention, neurons))
    feeds = {
        "sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor(400),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)),
    }
    with torch.no_grad():
        wanted = torch.func.functional_call(
            denoiser, masked_weights(denoiser, found, torch.cat(parts)), (), feeds
        ).sample
        before = Snapshot.of(denoiser)
        gone = [[unit for unit, value in enumerate(part) if not value] for part in parts]
        size = sum(p.numel() for p in denoiser.parameters())
        emptied = remove_masked(denoiser, found, gone, cut, Silent())
        torch.testing.assert_close(denoiser(**feeds).sample, wanted, rtol=1e-4, atol=1e-5)
    assert set(emptied) == {found[attention].layer.path, found[neurons].layer.path}
    record = diff(before, denoiser)
    assert {path: entry.kind for path, entry in record.stand_in.items()} == dict.fromkeys(emptied, "zero")
    # What went is what the costs say, but for the output biases of the two that went whole.
    priced = sum(item.cost * len(units) for item, units in zip(found, gone, strict=True))
    widths = sum(found[i].scaled[0].parameter.shape[0] for i in (attention, neurons))
    assert size - sum(p.numel() for p in denoiser.parameters()) == priced + widths
    # And another method goes on from there.
    now = Snapshot.of(denoiser)
    Magnitude(CutOptions(0.5)).prune(denoiser, context())
    both = record.then(diff(now, denoiser))
    assert set(both.stand_in) == set(emptied)
    rebuilt = load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")
    replay(rebuilt, both)
    rebuilt.load_state_dict(denoiser.state_dict(), strict=True)
    assert torch.equal(run_probe(rebuilt)["out_sample"], run_probe(denoiser)["out_sample"])


def test_units_that_do_nothing_go(small, context, prompts, tiny_loan, monkeypatch):
    """Every second head and neuron is silent in the network to prune: those must be what its masks close."""
    dead = {}
    with torch.no_grad():
        for item in maskables(small, EcoDiffOptions(round_to=1).cut, ("heads", "neurons")):
            share = item.scaled[0]
            share.parameter[:, share.index[::2].flatten()] = 0
            share.parameter[:, share.index[1::2].flatten()] *= 3
            dead[item.layer.path] = item.layer.units
    alike = copy.deepcopy(small)
    real = type(tiny_loan).pipeline

    def pipeline(self):
        made = real(self)
        made.register_modules(unet=alike)
        return made

    monkeypatch.setattr(type(tiny_loan), "pipeline", pipeline)
    kept = {}
    original = mask_training.MaskTraining.facts

    def facts(self):
        kept.update(
            zip(
                [i.layer.path for i in self._found],
                torch.split(self.logits, [i.layer.units for i in self._found]),
                strict=True,
            )
        )
        return original(self)

    monkeypatch.setattr(mask_training.MaskTraining, "facts", facts)
    method = EcoDiff(
        options(prompts, keep_ratio=0.5, round_to=1, steps=16, sampler_steps=2, learning_rate=0.3, sparsity=1e-3)
    )
    found = method.prune(small, context()).facts
    silent = torch.cat([values[::2] for values in kept.values()])
    heard = torch.cat([values[1::2] for values in kept.values()])
    assert float((heard[:, None] > silent[None]).float().mean()) > 0.95  # of a pair, the right one
    assert found["maskable_kept"] == pytest.approx(0.5, abs=0.01)
    removed = {path: module for path, module in small.named_modules() if isinstance(module, FeedForward)}
    survivors = sum(int((m.net[2].weight.abs().sum(0) > 0).sum()) for m in removed.values())
    assert survivors / sum(m.net[2].in_features for m in removed.values()) > 0.9


def test_a_killed_training_goes_on_where_it_was(small, context, prompts, tmp_path, monkeypatch):
    chosen = options(prompts, steps=3)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    undisturbed, killed = copy.deepcopy(small), copy.deepcopy(small)
    wanted = EcoDiff(chosen).prune(undisturbed, dataclasses.replace(context(), workdir=elsewhere)).facts
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    real, done = mask_training.MaskTraining.step, []
    run, drawn = Trajectory.run, []

    def step(self, number):
        done.append(number)
        if done == [0, 1]:
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(mask_training.MaskTraining, "step", step)
    with pytest.raises(KeyboardInterrupt):
        EcoDiff(chosen).prune(killed, context())
    with monkeypatch.context() as patch:  # what the dense denoiser drew is not drawn again
        patch.setattr(Trajectory, "run", lambda self, latents, answer: drawn.append(1) or run(self, latents, answer))
        assert EcoDiff(chosen).prune(killed, context()).facts == wanted
    assert len(drawn) == 2
    assert done == [0, 1, 1, 2]
    assert all(torch.equal(value, killed.state_dict()[name]) for name, value in undisturbed.state_dict().items())


def test_what_was_learnt_serves_another_ratio(small, context, prompts, monkeypatch):
    first = EcoDiff(options(prompts)).prune(copy.deepcopy(small), context()).facts
    monkeypatch.setattr(mask_training.MaskTraining, "step", None)  # not called again
    second = EcoDiff(options(prompts, keep_ratio=0.4, round_to=4)).prune(small, context()).facts
    assert second["curve"] == first["curve"]
    assert second["maskable_kept"] < first["maskable_kept"]


def test_nothing_is_left_behind(small, context, prompts):
    small.train()
    small.conv_in.weight.requires_grad_(False)
    EcoDiff(options(prompts, steps=1)).prune(small, context())
    assert all(value.grad is None for value in small.parameters())
    assert [name for name, value in small.named_parameters() if not value.requires_grad] == ["conv_in.weight"]
    assert all(module.training for module in small.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())


def test_what_is_not_finite_is_refused(denoiser, context, prompts, trajectory):
    with torch.no_grad():
        denoiser.conv_out.bias[0] = float("nan")
    with pytest.raises(ComponentFailed, match="loss on the final latents is not finite"):
        EcoDiff(options(prompts)).prune(denoiser, context())
    with pytest.raises(ComponentFailed, match=r"gradient of the masks at step 3 of 3 is not finite"):
        gradient_along(
            trajectory,
            torch.zeros(trajectory.shape),
            torch.zeros(1),
            lambda values: lambda feeds: feeds["sample"] + values.abs().sqrt() * 0,
            lambda latents: latents.sum(),
        )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"keep_ratio": 0.999}, r"keep_ratio: 0\.999 in multiples of 8 removes nothing"),
        ({"parts": ("modulations",)}, r"prune\.parts: the denoiser has no such units"),
        ({"protect": ("down_block",)}, r"prune\.protect: got 'down_block'"),
        ({"prompts": None}, r"prune\.prompts: missing"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(denoiser, context, prompts, changes, told):
    with pytest.raises(RecipeError, match=told):
        EcoDiff(options(prompts, **changes)).prune(denoiser, context())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("keep_ratio", 0.0),
        ("round_to", 0),
        ("images", 0),
        ("steps", 0),
        ("sampler_steps", 0),
        ("learning_rate", 0.0),
        ("sparsity", -1.0),
        ("regularizer", "l1"),
        ("softness", 1.0),
        ("parts", ("channels",)),
    ],
)
def test_impossible_options(key, value):
    with pytest.raises(RecipeError, match=rf"prune\.{key}: got .*expected"):
        EcoDiffOptions(**{key: value})

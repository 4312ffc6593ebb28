from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import exporter.reference.train as package
from exporter.errors import ArtifactError
from exporter.reference.grammar import is_held_out, negatives, scene_from_prompt, scenes
from exporter.reference.train.data import draw_indices, to_tensor, training_images
from exporter.reference.train.denoiser import DenoiserPlan, build_denoiser, denoiser_loss, prompt_ids, training_latents
from exporter.reference.train.evaluate import wilson
from exporter.reference.train.judge import (
    FACTS,
    JudgePlan,
    all_right,
    build_judge,
    disturb,
    facts_loss,
    facts_of,
    judge_loss,
)
from exporter.reference.train.loop import Plan, Run, step_generator
from exporter.reference.train.optimizer import FIVE, THREE, MuonAdamW, orthogonal
from exporter.reference.train.report import BEGIN, END, thinned_log, write_report
from exporter.reference.train.setup import Setup
from exporter.reference.train.stages import train_vae
from exporter.reference.train.vae import CROP, VaePlan, build_vae, crops, reconstruction_loss, vae_loss
from exporter.reference.train.words import MAX_TOKENS, build_tokenizer

GENERATOR_MODULES = ("data", "denoiser", "folders", "loop", "optimizer", "setup", "stages", "vae", "words")
CPU = torch.device("cpu")


class KilledError(Exception):
    pass


def silent(_line: str) -> None:
    pass


def small_network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))


def small_loss(network: nn.Module, killed_at: int = -1):
    def loss(step, generator):
        if step == killed_at:
            raise KilledError
        ids = torch.randint(0, 5, (8,), generator=generator)
        return {"loss": (network(ids)[:, 0] - ids.float()).square().mean()}

    return loss


@pytest.mark.parametrize("muon", [FIVE, THREE, None])
def test_killed_run_continues_to_the_same_weights(tmp_path, muon):
    plan = Plan("small", steps=12, rate=1e-2, warmup=2, save_every=3, log_every=1, muon=muon)
    whole = Run(plan, small_network(), tmp_path / "whole", seed=4)
    whole.fit(small_loss(whole.model), silent)
    killed = Run(plan, small_network(), tmp_path / "killed", seed=4)
    with pytest.raises(KilledError):
        killed.fit(small_loss(killed.model, killed_at=8), silent)
    resumed = Run(plan, small_network(), tmp_path / "killed", seed=4)
    assert resumed.step == 6
    resumed.fit(small_loss(resumed.model), silent)
    expected, found = load_file(whole.checkpoint), load_file(resumed.checkpoint)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    steps = [json.loads(line)["step"] for line in resumed.log.read_text(encoding="utf-8").splitlines()]
    assert steps == list(range(1, 13))


def test_finished_run_does_nothing_more(tmp_path):
    plan = Plan("small", steps=3, rate=1e-2)
    first = Run(plan, small_network(), tmp_path, seed=4)
    first.fit(small_loss(first.model), silent)
    again = Run(plan, small_network(), tmp_path, seed=4)
    again.fit(small_loss(again.model, killed_at=3), silent)
    assert all(torch.equal(one, other) for one, other in zip(first.weights, again.weights, strict=True))


def test_checkpoint_of_another_run_is_refused(tmp_path):
    plan = Plan("small", steps=2, rate=1e-2)
    run = Run(plan, small_network(), tmp_path, seed=4)
    run.fit(small_loss(run.model), silent)
    with pytest.raises(ArtifactError, match=r"seed 4, expected .* and 5"):
        Run(plan, small_network(), tmp_path, seed=5)
    with pytest.raises(ArtifactError, match="checkpoint of another run"):
        Run(plan, nn.Linear(2, 2), tmp_path, seed=4)


def test_average_lags_behind_and_is_used(tmp_path):
    run = Run(Plan("small", steps=5, rate=1e-1, warmup=1, decay=0.0), small_network(), tmp_path, seed=4)
    run.fit(small_loss(run.model), silent)
    average = [value.clone() for value in run.average]
    assert not torch.equal(run.weights[1], average[1])
    run.use_average()
    assert torch.equal(run.weights[1], average[1])
    assert not run.model.training


def test_rate_warms_up_and_falls_to_zero():
    plan = Plan("x", steps=100, rate=1.0, warmup=10, decay=0.5)
    rates = [plan.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] < 0.01


def test_steps_draw_different_numbers_and_repeat():
    first, again, other = (torch.rand(3, generator=step_generator(1, step, CPU)) for step in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("polynomials", [FIVE, THREE])
def test_orthogonal_brings_singular_values_near_one(polynomials):
    torch.manual_seed(0)
    matrices = torch.randn(2, 16, 64)
    after = torch.linalg.svdvals(orthogonal(matrices, polynomials))
    assert after.min() > 0.1
    assert after.max() < 2.0
    assert (after.std(dim=1) / after.mean(dim=1) < 0.6).all()
    skewed = matrices @ torch.diag(torch.logspace(0, -3, 64))
    before, after = torch.linalg.svdvals(skewed), torch.linalg.svdvals(orthogonal(skewed, polynomials))
    assert (after[:, 0] / after[:, 8] < 0.6 * before[:, 0] / before[:, 8]).all()


def test_embeddings_and_vectors_stay_with_adamw():
    optimizer = MuonAdamW(small_network(), 0.0, THREE)
    assert set(optimizer.matrices) == {"1.weight", "3.weight"}
    assert set(optimizer.others) == {"0.weight", "1.bias", "3.bias"}


def test_training_images_are_rendered_once_and_never_held_out(tmp_path):
    images, drawn = training_images(tmp_path, seed=2, count=20)
    again, same = training_images(tmp_path, seed=2, count=20)
    assert images.shape == (20, 64, 64, 3)
    assert np.array_equal(images, again)
    assert drawn == same
    assert not any(map(is_held_out, drawn))
    tensor = to_tensor(images[:2], CPU)
    assert tensor.shape == (2, 3, 64, 64)
    assert tensor.abs().max() <= 1


def test_crops_hold_a_thing(tmp_path):
    images, _ = training_images(tmp_path, seed=2, count=20)
    generator = step_generator(0, 0, CPU)
    indices = draw_indices(20, 12, generator)
    found = crops(images, indices, generator)
    assert found.shape == (12, CROP, CROP, 3)
    assert all(np.ptp(crop.reshape(-1, 3), axis=0).max() > 40 for crop in found)


def test_reconstruction_loss_is_zero_for_the_right_image_alone():
    target = torch.rand(2, 3, 16, 16) * 2 - 1
    assert reconstruction_loss(target, target) == 0
    assert reconstruction_loss(target + 0.1, target) > 0.1


def test_vae_run_resumes_to_the_same_weights(tmp_path):
    plan = VaePlan("vae", steps=4, rate=1e-3, warmup=1, crop_steps=2, crop_batch=2, batch=2, save_every=1)
    whole = train_vae(Setup(tmp_path / "whole", tmp_path, images=8), plan, silent)
    setup = Setup(tmp_path / "parts", tmp_path, images=8)
    images, _ = training_images(setup.work, setup.seed, setup.images)
    vae = build_vae(setup.seed)
    Run(plan, vae, setup.work, setup.seed).fit(vae_loss(vae, images, plan), silent, until=1)
    parts = train_vae(setup, plan, silent)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


def test_denoiser_run_resumes_to_the_same_weights(tmp_path):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    latents = torch.randn(4, 8, 8, 8)
    ids = prompt_ids(tokenizer, [*(scene.prompt for scene in scenes(1, 4, held_out=False)), ""])
    assert ids.shape == (5, MAX_TOKENS)
    plan = DenoiserPlan("denoiser", steps=2, rate=1e-3, warmup=1, batch=2)
    results = []
    for stops in ((2,), (1, 2)):
        for stop in stops:
            networks = build_denoiser(0, tokenizer)
            run = Run(plan, networks, tmp_path / str(len(stops)), 0)
            run.fit(denoiser_loss(networks, latents, ids, plan), silent, until=stop)
        results.append(load_file(run.checkpoint))
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_latents_have_unit_spread_and_are_kept(tmp_path):
    images, _ = training_images(tmp_path, seed=2, count=6)
    vae = build_vae(1).eval()
    latents = training_latents(vae, images, tmp_path)
    assert latents.shape == (6, 8, 8, 8)
    assert float(latents.std()) == pytest.approx(1, abs=1e-3)
    assert vae.config.scaling_factor != 0.18215
    assert torch.equal(latents, training_latents(vae, images, tmp_path))


def test_judge_run_resumes_to_the_same_weights(tmp_path):
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    plan = JudgePlan("judge", steps=2, rate=1e-3, warmup=1, batch=4)
    results = []
    for stops in ((2,), (1, 2)):
        for stop in stops:
            judge = build_judge(0, tokenizer)
            before = {name: weight.detach().clone() for name, weight in judge.named_parameters()}
            run = Run(plan, judge, tmp_path / str(len(stops)), 0)
            run.fit(judge_loss(judge, tokenizer, plan, 0), silent, until=stop)
        results.append(load_file(run.checkpoint))
        still = [n for n, w in judge.named_parameters() if w.ndim >= 2 and torch.equal(w, before[n])]
        assert still == []
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_facts_say_what_is_where():
    pair = scene_from_prompt("a large red circle left of a small blue star on a gray background")
    single = scene_from_prompt("a small cyan ring on a white background")
    facts = facts_of([pair, pair.canonical, single])
    assert facts[0].tolist() == [1, 0, 0, 0, 1, 1, 1, 4, 3, 2, 0, 0, 0, 0, 0, 0]
    assert facts[2].tolist() == [0, 6, 8, 2] + [0] * 12


def test_scenes_that_look_alike_and_no_others_have_the_same_facts():
    for scene in scenes(5, 100, held_out=False):
        facts = facts_of([scene, scene.canonical, *negatives(scene)])
        assert torch.equal(facts[0], facts[1])
        assert (facts[2:] != facts[0]).any(dim=1).all()


def test_loss_of_the_facts_is_least_for_the_right_answers():
    facts = facts_of(scenes(6, 8, held_out=False))
    parts = [nn.functional.one_hot(facts[:, index], count) for index, count in enumerate(FACTS)]
    right = nn.functional.normalize(torch.cat([*parts, torch.zeros(8, 128 - sum(FACTS))], dim=1), dim=1)
    assert facts_loss(right, facts) < 0.01 < facts_loss(-right, facts)
    assert all_right(right, facts) == 1
    assert all_right(right.roll(1, dims=0), facts) == 0


def test_disturbed_images_stay_in_range_and_recognisable():
    images = torch.rand(6, 3, 64, 64) * 2 - 1
    found = disturb(images, step_generator(0, 0, CPU))
    assert found.shape == images.shape
    assert found.abs().max() <= 1
    assert torch.equal(found, disturb(images, step_generator(0, 0, CPU)))


def test_generator_never_imports_the_judge():
    folder = Path(package.__file__).parent
    for name in GENERATOR_MODULES:
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {item.name for node in ast.walk(tree) if isinstance(node, ast.Import) for item in node.names}
        assert not [module for module in imported if "judge" in module or "evaluate" in module], name


def test_wilson_interval():
    low, high = wilson(1741, 2048)
    assert (round(low, 4), round(high, 4)) == (0.834, 0.8649)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_report_replaces_the_figures_alone(tmp_path):
    share = {"rate": 0.9, "low": 0.88, "high": 0.92, "count": 100}
    figures = {
        "steps": 20,
        "guidance": 3.0,
        "prompts": {"count": 100, "seed": 1, "noise_seed": 5},
        "judge_first_of_17": share,
        "reconstruction_psnr_db": 40.0,
    }
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    (tmp_path / "vae.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 201)), encoding="utf-8")
    write_report(tmp_path, tmp_path, figures)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| 90.0 % | 88.0 to 92.0 % | 100 |" in text
    assert json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))["vae"][-1]["step"] == 200
    assert len(thinned_log(tmp_path / "vae.jsonl")) == 40

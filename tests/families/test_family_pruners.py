"""Methods that look at data, on every family: data as its own pipeline makes it, and a network that still answers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_families import MAKERS

from calibration import calling
from exporter.loan import DenseLoan
from exporter.lowering.export import ExportOptions, export_component
from exporter.lowering.parity import check_parity
from exporter.lowering.wrappers import Sizes, example_feeds, signature
from exporter.networks.components import denoiser
from exporter.networks.inputs import as_arguments
from exporter.networks.probe import probe_inputs, run_probe
from exporter.networks.storage import load_network
from exporter.networks.surgery import Snapshot, diff, replay
from exporter.progress import Silent
from exporter.pruners import pruner
from exporter.pruners.base import Context
from exporter.pruners.ecodiff import EcoDiff, EcoDiffOptions
from exporter.pruners.gradients import summed_gradients
from exporter.pruners.masks import maskables, masked_weights, remove_masked
from exporter.pruners.trajectory import Trajectory, gradient_along

each_family = pytest.mark.parametrize("family", list(MAKERS))


def prompts_of(loan: DenseLoan) -> str:
    return str(loan.folder.parent / "prompts.txt")


def named(family: str, loan: DenseLoan) -> str | None:
    """Prompts for those that do not draw without being asked."""
    return None if family in ("DDPMPipeline", "DDIMPipeline") else prompts_of(loan)


@each_family
def test_diff_pruning_removes_its_blocks(family: str, loan_of: Callable[[str], DenseLoan], tmp_path: Path) -> None:
    loan, part = loan_of(family), denoiser(family)
    network = load_network(loan.dense.path / part.folder, cls=part.cls)
    before, size = Snapshot.of(network), sum(parameter.numel() for parameter in network.parameters())
    method = pruner("diff-pruning")
    options: dict[str, Any] = {"keep_ratio": 0.6, "round_to": 4, "cut": "blocks", "images": 2, "timesteps": 3}
    options["prompts"] = named(family, loan)
    context = Context(torch.Generator().manual_seed(0), Silent(), tmp_path, loan)
    facts = method(method.options(**options)).prune(network, context).facts
    assert facts["timesteps_of"] == 3
    assert not diff(before, network).is_empty
    assert sum(parameter.numel() for parameter in network.parameters()) < size
    assert all(value.isfinite().all() for value in run_probe(network).values())


@pytest.mark.parametrize("family", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_the_loss_of_a_flow_is_on_its_velocity(
    family: str, loan_of: Callable[[str], DenseLoan], tmp_path: Path
) -> None:
    """Against the flow written out: the straight line from data to noise, and its slope."""
    loan, part = loan_of(family), denoiser(family)
    network = load_network(loan.dense.path / part.folder, cls=part.cls)
    data = loan.data(prompts_of(loan), 2)
    context = Context(torch.Generator().manual_seed(4), Silent(), tmp_path, loan)
    found, facts = summed_gradients(network, data, 1, 0.0, context)
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(4))
    share = 1e-3 if family == "FluxPipeline" else 0.003 / (1 + 2 * 0.001)  # its schedule is shifted by 3
    given = {name: rows[data.prompt_of] for name, rows in data.given.items()} | dict(data.shared)
    timestep = torch.full((2,), share if family == "FluxPipeline" else 1000 * share)
    answer = network(hidden_states=share * noise + (1 - share) * data.latents, timestep=timestep, **given)[0]
    loss = F.mse_loss(answer, noise - data.latents)
    assert facts["loss_first"] == pytest.approx(float(loss.detach()), rel=1e-4)
    name, weight = next((n, p) for n, p in network.named_parameters() if n.endswith("to_q.weight"))
    (wanted,) = torch.autograd.grad(loss, [weight])
    torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-6)


def test_a_class_model_is_asked_for_classes(loan_of: Callable[[str], DenseLoan]) -> None:
    loan = loan_of("DiTPipeline")
    data = loan.data(prompts_of(loan), 3)
    labels = data.given["class_labels"]
    assert labels[data.prompt_of].tolist() == [207, 281, 207]
    assert int(labels[-1]) == 1000  # no class
    pipeline = loan.pipeline()
    seeds = [torch.Generator().manual_seed(loan.seed + image) for image in range(3)]
    sampling = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    wanted = pipeline(class_labels=[207, 281, 207], generator=seeds, **sampling).images
    with torch.no_grad():
        drawn = pipeline.vae.decode(data.latents / pipeline.vae.config.scaling_factor).sample
    pixels = (drawn / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(pixels, torch.as_tensor(wanted), rtol=1e-3, atol=1e-4)


def test_a_pipeline_that_is_not_asked_needs_no_prompts(loan_of: Callable[[str], DenseLoan]) -> None:
    loan = loan_of("DDPMPipeline")
    assert loan.recording(None, 3).count == len(loan.data(None, 3).latents) == 3


@each_family
def test_a_trajectory_is_what_the_pipeline_draws(
    family: str, loan_of: Callable[[str], DenseLoan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same noise, with the same solver of one step; for a consistency model with the same noise between."""
    loan = loan_of(family)
    pipeline, texts = loan.pipeline(), loan.texts(named(family, loan)) * 2
    drawing = dataclasses.replace(loan.drawing, steps=2)
    trajectory = Trajectory.of(pipeline, loan.form, texts[:2], drawing, seed=11)
    noise = trajectory.noise(torch.Generator().manual_seed(0))
    network = getattr(pipeline, loan.form.denoiser)
    seen = trajectory.run(noise, lambda feeds: network(**feeds)[0])
    ends: list[torch.Tensor] = []
    step = type(pipeline.scheduler).step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if family == "LatentConsistencyModelPipeline":
            kwargs["generator"] = torch.Generator("cpu").manual_seed(11 + len(ends))
        found = step(self, *args, **kwargs)
        ends.append(found[0] if isinstance(found, tuple) else found.prev_sample)
        return found

    monkeypatch.setattr(type(pipeline.scheduler), "step", watched)
    form = loan.form
    if family in ("DDPMPipeline", "DDIMPipeline", "DiTPipeline"):  # those take no latents
        drawn = sys.modules[type(pipeline).__module__]
        monkeypatch.setattr(drawn, "randn_tensor", lambda *args, **kwargs: noise)
    else:
        form = dataclasses.replace(form, extra={**form.extra, "latents": noise})
    calling.draw(pipeline, form, texts[:2], [0, 1], drawing)
    assert len(ends) == len(seen) - 1 == 2
    wanted = ends[-1].chunk(2)[0] if family == "DiTPipeline" else ends[-1]  # which steps both rows alike
    torch.testing.assert_close(seen[-1], wanted, rtol=1e-4, atol=1e-4)


@each_family
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch.export's own
def test_what_is_masked_and_what_is_removed_answer_alike(
    family: str, loan_of: Callable[[str], DenseLoan], tmp_path: Path
) -> None:
    part = denoiser(family)
    network = load_network(loan_of(family).dense.path / part.folder, cls=part.cls)
    options = EcoDiffOptions(keep_ratio=0.5, round_to=1)
    found = maskables(network, options.cut, options.parts)
    sizes = [item.layer.units for item in found]
    masks = (torch.rand(sum(sizes), generator=torch.Generator().manual_seed(0)) > 0.5).float()
    parts = torch.split(masks, sizes)
    for item, mask in zip(found, parts, strict=True):
        if float(mask.sum()) < item.least:
            mask[0] = 1
    for part_name in ("heads", "neurons"):  # one of each goes whole where that can be
        whole = [
            mask for item, mask in zip(found, parts, strict=True) if item.layer.part == part_name and not item.least
        ]
        if whole:
            whole[-1].zero_()
    assert {item.layer.part for item in found} == KINDS.get(family, {"heads", "neurons"})
    feeds = as_arguments(probe_inputs(network))
    before, size = Snapshot.of(network), sum(parameter.numel() for parameter in network.parameters())
    with torch.no_grad():
        wanted = torch.func.functional_call(network, masked_weights(network, found, masks), (), feeds)[0]
        gone = [[unit for unit, value in enumerate(mask) if not value] for mask in parts]
        emptied = remove_masked(network, found, gone, options.cut, Silent())
        torch.testing.assert_close(network(**feeds)[0], wanted, rtol=1e-4, atol=1e-5)
    assert len(emptied) >= 1
    assert sum(parameter.numel() for parameter in network.parameters()) < size
    record = diff(before, network)
    rebuilt = load_network(loan_of(family).dense.path / part.folder, cls=part.cls)
    replay(rebuilt, record)
    rebuilt.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(run_probe(rebuilt)["out_sample"], run_probe(network)["out_sample"])
    if family == "FluxPipeline":  # whose graph then holds narrower heads, gathered modulations and a branch of zeros
        assert {entry.kind for entry in record.stand_in.values()} == {"gather", "zero"}
        export_component(part.name, rebuilt, tmp_path, ExportOptions(latent=8, tokens=8))
        inputs = zip(signature(rebuilt).inputs, example_feeds(rebuilt, Sizes(2, 8, 8)), strict=True)
        named_feeds = {name: value.numpy() for name, value in inputs}
        found_there = check_parity(part.name, rebuilt, tmp_path / "model.onnx", [(0.0, named_feeds)])
        assert found_there["psnr_db"] > 90


KINDS = {"FluxPipeline": {"heads", "neurons", "modulations"}, "DDPMPipeline": {"heads"}, "DDIMPipeline": {"heads"}}


@pytest.mark.parametrize("family", ["LatentConsistencyModelPipeline", "FluxPipeline"])
def test_the_gradient_along_its_steps_is_that_of_one_graph(family: str, loan_of: Callable[[str], DenseLoan]) -> None:
    loan, part = loan_of(family), denoiser(family)
    network = load_network(loan.dense.path / part.folder, cls=part.cls)
    drawing = dataclasses.replace(loan.drawing, steps=3)
    trajectory = Trajectory.of(loan.pipeline(), loan.form, ["a cat", "a dog"], drawing, seed=7)
    options = EcoDiffOptions()
    found = maskables(network, options.cut, options.parts)
    masks = torch.rand(sum(item.layer.units for item in found), generator=torch.Generator().manual_seed(0))
    noise = trajectory.noise(torch.Generator().manual_seed(1))

    def answering(values: torch.Tensor) -> Callable[[dict[str, Any]], torch.Tensor]:
        weights = masked_weights(network, found, values)
        return lambda feeds: torch.func.functional_call(network, weights, (), feeds)[0]

    loss, slope = gradient_along(trajectory, noise, masks, answering, lambda last: last.square().mean())
    leaf = masks.clone().requires_grad_()
    latents = noise
    for index in range(3):
        latents = trajectory.step(index, latents, answering(leaf))
    whole = latents.square().mean()
    (wanted,) = torch.autograd.grad(whole, [leaf])
    assert loss == pytest.approx(float(whole.detach()), rel=1e-5)
    torch.testing.assert_close(slope, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@each_family
def test_ecodiff_prunes_it(family: str, loan_of: Callable[[str], DenseLoan], tmp_path: Path) -> None:
    loan, part = loan_of(family), denoiser(family)
    network = load_network(loan.dense.path / part.folder, cls=part.cls)
    options = EcoDiffOptions(
        prompts=named(family, loan), images=2, keep_ratio=0.6, round_to=4, steps=2, sampler_steps=2
    )
    context = Context(torch.Generator().manual_seed(0), Silent(), tmp_path, loan)
    before = Snapshot.of(network)
    facts = EcoDiff(options).prune(network, context).facts
    assert facts["maskable_kept"] == pytest.approx(0.6, abs=0.1)
    assert facts["solver"] == SOLVERS.get(family, "DDIMScheduler")
    assert not diff(before, network).is_empty
    assert json.loads(json.dumps(facts)) == facts


SOLVERS = {
    "LatentConsistencyModelPipeline": "LCMScheduler",
    "StableDiffusion3Pipeline": "FlowMatchEulerDiscreteScheduler",
    "FluxPipeline": "FlowMatchEulerDiscreteScheduler",
}

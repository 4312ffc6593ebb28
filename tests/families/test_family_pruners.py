"""Methods that look at data, on every family: data as its own pipeline makes it, and a network that still answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_families import MAKERS

from exporter.loan import DenseLoan
from exporter.networks.components import denoiser
from exporter.networks.probe import run_probe
from exporter.networks.storage import load_network
from exporter.networks.surgery import Snapshot, diff
from exporter.progress import Silent
from exporter.pruners import pruner
from exporter.pruners.base import Context
from exporter.pruners.gradients import summed_gradients

each_family = pytest.mark.parametrize("family", list(MAKERS))


def prompts_of(loan: DenseLoan) -> str:
    return str(loan.folder.parent / "prompts.txt")


@each_family
@pytest.mark.parametrize("cut", ["channels", "blocks"])
def test_diff_pruning_prunes_it(family: str, cut: str, loan_of: Callable[[str], DenseLoan], tmp_path: Path) -> None:
    loan, part = loan_of(family), denoiser(family)
    network = load_network(loan.dense.path / part.folder, cls=part.cls)
    before, size = Snapshot.of(network), sum(parameter.numel() for parameter in network.parameters())
    method = pruner("diff-pruning")
    options: dict[str, Any] = {"keep_ratio": 0.6, "round_to": 4, "cut": cut, "images": 2, "timesteps": 3}
    if family not in ("DDPMPipeline", "DDIMPipeline"):  # those draw without being asked
        options["prompts"] = prompts_of(loan)
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

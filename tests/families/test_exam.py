"""Recorded calls of every family, asked again: the dense network answers as it did, and blocks can be cut by them."""

from __future__ import annotations

import pytest
import torch
from tiny_families import MAKERS

from exporter.networks.storage import load_network
from exporter.networks.surgery import Snapshot, diff, replay
from exporter.progress import Silent
from exporter.pruners.answers import Exam
from exporter.pruners.base import Context
from exporter.pruners.laptop_diff import LaptopDiff, LaptopDiffOptions
from exporter.states import components_of


@pytest.mark.parametrize("family", MAKERS)
def test_layers_of_every_family_go_by_their_output_loss(family, loan_of, tmp_path):
    loan = loan_of(family)
    prompts = str(loan.folder.parent / "prompts.txt")
    part = next(part for part in components_of(loan.dense.path) if part.role == "denoiser")
    network, fresh = (load_network(loan.dense.path / part.folder, cls=part.cls) for _ in range(2))
    exam = Exam.of(loan.recording(prompts, 2), loan.form, batch=2)
    dense = exam.loss(network)
    scale = exam.calls[0].cond.square().mean()
    assert dense.mean_cond < 1e-8 * scale
    assert dense.mean_guided < 1e-7 * scale
    before = Snapshot.of(network)
    options = LaptopDiffOptions(prompts=prompts, images=2, timesteps=2, sets=2, keep_ratio=0.9)
    context = Context(torch.Generator().manual_seed(0), Silent(), tmp_path, loan)
    facts = LaptopDiff(options).prune(network, context).facts
    assert facts["removed"]
    assert facts["loss_joint"] == pytest.approx(
        Exam.of(loan.recording(prompts, 2), loan.form, batch=2, steps=2, guided=False).loss(network).mean_cond, rel=1e-3
    )
    replay(fresh, diff(before, network))
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}

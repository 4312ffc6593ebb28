"""The output loss: numpy's own arithmetic on the dense pipeline's recorded calls."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from exporter.errors import ComponentFailed
from exporter.networks.storage import load_network
from exporter.pruners.answers import Exam


@pytest.fixture(scope="module")
def recording(tiny_loan):
    return tiny_loan.recording(str(tiny_loan.folder.parent / "prompts.txt"), 3)


@pytest.fixture(scope="module")
def dense(tiny_loan):
    return load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")


def worse(dense):
    made = copy.deepcopy(dense)
    with torch.no_grad():
        made.conv_out.bias += torch.tensor([0.1, -0.2, 0.0, 0.3])
    return made


def test_the_dense_network_answers_as_recorded(tiny_loan, recording, dense):
    exam = Exam.of(recording, tiny_loan.form, batch=2)
    loss = exam.loss(dense)
    assert loss.counts == (2, 1) * 3
    assert max(*loss.cond, *loss.guided) < 1e-9
    for asked, (cond, guided) in zip(exam.calls, exam.answers(dense), strict=True):
        assert torch.allclose(cond, asked.cond, atol=1e-5)
        assert torch.allclose(guided, asked.guided, atol=1e-4)


def test_a_constant_error_has_a_known_loss(tiny_loan, recording, dense):
    """A bias on the answer survives guidance unchanged: uncond + g (cond - uncond) moves by the bias itself."""
    loss = Exam.of(recording, tiny_loan.form, batch=3).loss(worse(dense))
    wanted = np.mean(np.square([0.1, -0.2, 0.0, 0.3]))
    assert loss.mean_cond == pytest.approx(wanted, rel=1e-4)
    assert loss.mean_guided == pytest.approx(wanted, rel=1e-4)


def test_guided_answers_are_those_of_two_calls(tiny_loan, recording, dense):
    """Each side asked alone in plain torch, combined in numpy."""
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.mid_block.resnets[0].conv1.weight *= 1.5
    loss = Exam.of(recording, tiny_loan.form, batch=3, steps=2).loss(other)
    wanted = []
    for step in (0, 2):
        call = recording.calls(step)
        with torch.no_grad():
            cond, uncond = (
                other(torch.from_numpy(call.sample), call.timestep, torch.from_numpy(side["encoder_hidden_states"]))[0]
                for side in (call.given, call.given_uncond)
            )
        guided = uncond.numpy() + 3.0 * (cond.numpy() - uncond.numpy())
        wanted.append(np.square(guided - call.guided).mean())
    assert loss.guided == pytest.approx(wanted, rel=1e-3)


def test_asking_with_the_prompts_only_gives_the_same_loss_of_theirs(tiny_loan, recording, dense):
    both = Exam.of(recording, tiny_loan.form, batch=3).loss(worse(dense))
    half = Exam.of(recording, tiny_loan.form, batch=3, guided=False)
    assert half.calls[0].arguments["sample"].shape[0] == 3
    loss = half.loss(worse(dense))
    assert loss.cond == pytest.approx(both.cond, rel=1e-4)
    assert loss.guided == loss.cond


def test_psnr_takes_the_range_of_the_dense_answers(tiny_loan, recording):
    exam = Exam.of(recording, tiny_loan.form, batch=3)
    every = np.stack([recording.calls(step).guided for step in range(3)])
    assert exam.psnr_db(0.01) == pytest.approx(10 * np.log10((every.max() - every.min()) ** 2 / 0.01))
    assert exam.psnr_db(0.0) == 200


def test_an_answer_that_is_no_number_is_refused(tiny_loan, recording, dense):
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.conv_out.bias[0] = float("nan")
    with pytest.raises(ComponentFailed, match=r"without x: the answer at timestep .* not finite.*float32"):
        Exam.of(recording, tiny_loan.form, batch=3).loss(broken, "without x")


def test_the_networks_mode_is_left_alone(tiny_loan, recording, dense):
    training = copy.deepcopy(dense).train()
    Exam.of(recording, tiny_loan.form, batch=3, steps=1).loss(training)
    assert training.training

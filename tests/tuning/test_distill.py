"""Distillation: the student gets closer, nothing else changes, and a kill costs nothing but time."""

from __future__ import annotations

import copy
import json
import os
import signal

import pytest
import torch

from exporter.errors import ComponentFailed, RecipeError, ToolMissing
from exporter.networks.surgery import Snapshot, diff
from exporter.progress import Silent
from exporter.tuning import TUNERS, tuner
from exporter.tuning.base import TuneContext
from exporter.tuning.distill import Distill, DistillOptions, Work, device_of, distill
from exporter.tuning.losses import guided_loss
from exporter.tuning.training import rate_at

CPU = torch.device("cpu")


def options(steps=8, **changes):
    return DistillOptions(**{"steps": steps, "batch": 4, "checkpoint_every": 3, "prompts": "some", **changes})


def work(folder, progress=None, seed=0):
    return Work(folder, progress or Silent(), CPU, seed)


def state_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def hooks_of(network):
    return [path for path, module in network.named_modules() if module._forward_hooks or module._forward_pre_hooks]


class Kill(Silent):
    """Does what an out-of-memory killer does, once so many steps have been reported."""

    def __init__(self, after):
        self._left = after

    def advance(self, units=1, note=""):
        self._left -= units
        if self._left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Stop(Silent):
    def advance(self, units=1, note=""):
        if note:
            raise KeyboardInterrupt


def test_the_student_recovers_and_only_its_weights_change(student, teacher, latents, tmp_path):
    before, dense = state_of(student), state_of(teacher)
    snapshot = Snapshot.of(student)
    teacher.train()
    facts = distill(student, teacher, latents, options(steps=80, learning_rate=3e-3, ema=0.9), work(tmp_path))
    assert facts["error_after"] < 0.5 * facts["error_before"]
    assert facts["loss"][-1][1] < facts["loss"][0][1]
    assert facts["loss"][-1][0] == facts["steps"] == 80
    assert facts["stages_matched"] == 5
    assert facts == json.loads(json.dumps(facts))
    assert not equal(before, state_of(student))
    assert equal(dense, state_of(teacher))
    assert diff(snapshot, student).is_empty
    assert teacher.training
    assert not student.training
    assert not hooks_of(student)
    assert not hooks_of(teacher)


def test_a_kill_at_any_step_changes_nothing(student, teacher, latents, tmp_path):
    straight = copy.deepcopy(student)
    facts = distill(straight, teacher, latents, options(), work(tmp_path / "straight"))
    for after in (1, 5, 5, 7):
        child = os.fork()
        if child == 0:
            distill(copy.deepcopy(student), teacher, latents, options(), work(tmp_path / "killed", Kill(after)))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert distill(student, teacher, latents, options(), work(tmp_path / "killed")) == facts
    assert equal(state_of(student), state_of(straight))
    again = distill(student, teacher, latents, options(), work(tmp_path / "again"))
    assert again["error_before"] == facts["error_after"]


def test_a_finished_run_is_not_trained_again(student, teacher, latents, tmp_path):
    second = copy.deepcopy(student)
    facts = distill(student, teacher, latents, options(), work(tmp_path))
    assert distill(second, teacher, latents, options(), work(tmp_path, Stop())) == facts
    assert equal(state_of(student), state_of(second))


@pytest.mark.parametrize("harm", ["other seed", "other options", "cut short", "not ours"])
def test_only_its_own_intact_checkpoint_is_taken_up(student, teacher, latents, tmp_path, harm):
    fresh = copy.deepcopy(student)
    distill(fresh, teacher, latents, options(), work(tmp_path / "fresh"))
    first, second = copy.deepcopy(student), copy.deepcopy(student)
    changed = options(steps=9) if harm == "other options" else options()
    distill(first, teacher, latents, changed, work(tmp_path / "used", seed=4 if harm == "other seed" else 0))
    checkpoint = tmp_path / "used" / "checkpoint.safetensors"
    if harm == "cut short":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    elif harm == "not ours":
        checkpoint.write_bytes(b"\x00" * 64)
    distill(second, teacher, latents, options(), work(tmp_path / "used"))
    assert equal(state_of(second), state_of(fresh))


@pytest.mark.parametrize("harm", ["stopped", "not finite"])
def test_whatever_happens_the_networks_come_back_clean(student, teacher, latents, tmp_path, harm):
    before, snapshot = state_of(student), Snapshot.of(student)
    if harm == "stopped":
        with pytest.raises(KeyboardInterrupt):
            distill(student, teacher, latents, options(), work(tmp_path, Stop()))
    else:
        with torch.no_grad():
            teacher.conv_in.weight.fill_(float("nan"))
        with pytest.raises(ComponentFailed, match="loss of step 1 is nan"):
            distill(student, teacher, latents, options(), work(tmp_path))
    assert equal(before, state_of(student))
    assert diff(snapshot, student).is_empty
    assert not hooks_of(student)
    assert not hooks_of(teacher)


def test_the_seed_decides(student, teacher, latents, tmp_path):
    results = []
    for number, seed in enumerate((1, 1, 2)):
        trained = copy.deepcopy(student)
        distill(trained, teacher, latents, options(steps=2), work(tmp_path / str(number), seed=seed))
        results.append(state_of(trained))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


def test_frozen_weights_are_trained_and_stay_frozen(student, teacher, latents, tmp_path):
    student.requires_grad_(False)
    before = state_of(student)
    distill(student, teacher, latents, options(steps=2, learning_rate=1e-2), work(tmp_path))
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert not torch.equal(before["conv_in.weight"], student.conv_in.weight)


def test_accumulated_batches_equal_one_large_batch_in_effect(student, teacher, latents, tmp_path):
    facts = distill(student, teacher, latents, options(steps=4, accumulate=2, batch=2), work(tmp_path))
    assert facts["steps"] == 4
    with torch.no_grad():
        assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_without_matching_shapes_the_answer_alone_is_learned(dense, teacher, latents, tmp_path, context_of_streams):
    facts = distill(context_of_streams(copy.deepcopy(dense)), teacher, latents, options(steps=2), work(tmp_path))
    assert facts["stages_matched"] == 0
    assert len(facts["loss"]) == 2


@pytest.fixture
def context_of_streams(tmp_path):
    from exporter.pruners.base import Context, CutOptions
    from exporter.pruners.magnitude import Magnitude

    def cut(network):
        context = Context(torch.Generator(), Silent(), tmp_path)
        Magnitude(CutOptions(0.5, parts=("streams",))).prune(network, context)
        return network

    return cut


def test_the_rate_rises_then_falls_to_nothing():
    rates = [rate_at(step, options(steps=100, learning_rate=1.0)) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 1e-3
    assert rate_at(0, options(steps=1, learning_rate=1.0)) == 1.0


def test_tune_runs_on_a_whole_pipeline(tiny_pipeline_folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, safety_checker=None)
    student = copy.deepcopy(pipeline.unet)
    context = TuneContext(3, Silent(), tmp_path, {"some": ["a red circle", "a blue star"]}.__getitem__, 2, 2.0, 64)
    chosen = options(steps=2, samples=3, batch=2)
    facts = tuner("distill")(chosen).tune(student, pipeline, context)
    assert facts["data"] == "generated"
    assert facts["samples"] == 3
    assert not equal(state_of(student), state_of(pipeline.unet))
    repeated = copy.deepcopy(pipeline.unet)
    assert Distill(chosen).tune(repeated, pipeline, context) == facts
    assert equal(state_of(repeated), state_of(student))


def test_training_on_guided_answers_brings_those_closer_than_training_without(student, teacher, latents, tmp_path):
    def guided_error(network):
        generator = torch.Generator().manual_seed(77)
        batch = latents.batch(12, dropout=0.0, generator=generator, device=CPU, both=True)
        with torch.no_grad():
            answers = [asked(**batch.feeds, return_dict=False)[0] for asked in (network, teacher)]
        return float(guided_loss(*answers, torch.full((12,), 7.5)))

    errors = {}
    for share in (0.0, 1.0):
        trained = copy.deepcopy(student)
        chosen = options(steps=60, learning_rate=3e-3, ema=0.9, guided_share=share, feature_weight=0.0)
        distill(trained, teacher, latents, chosen, work(tmp_path / str(share)))
        errors[share] = guided_error(trained)
    assert errors[1.0] < 0.8 * errors[0.0] < 0.8 * guided_error(student)


def test_guided_answers_of_a_family_without_them_are_refused(tiny_pipeline_folder, tmp_path):
    from diffusers import LatentConsistencyModelPipeline

    pipeline = LatentConsistencyModelPipeline.from_pretrained(tiny_pipeline_folder, safety_checker=None)
    context = TuneContext(3, Silent(), tmp_path, {"some": ["a"]}.__getitem__, 2, 2.0, 64)
    with pytest.raises(RecipeError, match=r"tune\.guided_share: LatentConsistency.*got 0\.5, expected 0\. Remove it"):
        Distill(options(steps=1, guided_share=0.5)).tune(pipeline.unet, pipeline, context)


@pytest.mark.parametrize("name", TUNERS)
def test_every_method_documents_its_options(name):
    method = tuner(name)
    assert method.__doc__
    for field in method.options.__dataclass_fields__:
        assert f"{field}:" in method.options.__doc__, field


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"ema": 1.0}, "ema"),
        ({"prompt_dropout": -0.1}, "prompt_dropout"),
        ({"output_weight": 0.0, "feature_weight": 0.0}, "output_weight"),
        ({"feature_weight": -1.0}, "feature_weight"),
        ({"prompts": None}, "prompts"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"features": "other"}, "features"),
        ({"guided_share": 1.5}, "guided_share"),
        ({"guidance_low": 9.0, "guidance_high": 3.0}, "guidance_low"),
    ],
)
def test_impossible_options(changes, word):
    with pytest.raises(RecipeError, match=rf"tune.*{word}.*expected.*Write"):
        options(**changes)


def test_a_missing_gpu_is_said_before_any_work():
    assert device_of("cpu") == CPU
    if torch.cuda.is_available():
        assert device_of("auto").type == "cuda"
    else:
        assert device_of("auto") == CPU
        with pytest.raises(ToolMissing, match="device: auto"):
            device_of("cuda")

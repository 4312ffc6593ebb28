"""The parts of the training loop: average, feature loss, checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from exporter.tuning.checkpoint import digest_of_tensors, read, write
from exporter.tuning.ema import Ema
from exporter.tuning.losses import feature_loss, guided_loss, stage_outputs, stages_of


def test_the_average_starts_quickly_and_then_keeps_its_decay():
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(0.0)
    average = Ema(network, 0.9)
    with torch.no_grad():
        network.weight.fill_(1.0)
    average.update(network, 0)
    assert float(average.weights["weight"]) == pytest.approx(0.9)  # decay 0.1
    average.update(network, 1000)
    assert float(average.weights["weight"]) == pytest.approx(0.91)  # decay 0.9
    average.copy_to(network)
    assert float(network.weight.detach()) == pytest.approx(0.91)
    assert Ema(network, 0.0).decay_at(5) == 0.0


def test_feature_loss_is_relative_and_skips_what_differs_in_shape():
    teacher = {"a": torch.full((1, 2, 2, 2), 10.0), "b": torch.full((1, 2, 2, 2), 0.1), "c": torch.ones(1, 4, 2, 2)}
    student = {"a": torch.zeros(1, 2, 2, 2), "b": torch.zeros(1, 2, 2, 2), "c": torch.ones(1, 3, 2, 2)}
    loss, matched = feature_loss(student, teacher)
    assert matched == 2
    assert float(loss) == pytest.approx(1.0)
    assert float(feature_loss(teacher, teacher)[0]) == 0.0
    assert feature_loss({}, teacher) == (None, 0)


def test_plain_features_are_drowned_by_the_largest_stage_and_normalized_ones_are_not():
    teacher = {"large": torch.full((1, 2, 2, 2), 10.0), "small": torch.full((1, 2, 2, 2), 0.1)}
    without_large = {**teacher, "large": torch.zeros(1, 2, 2, 2)}
    without_small = {**teacher, "small": torch.zeros(1, 2, 2, 2)}
    plain = [float(feature_loss(gone, teacher, normalized=False)[0]) for gone in (without_large, without_small)]
    assert plain == pytest.approx([100.0, 0.01])
    even = [float(feature_loss(gone, teacher)[0]) for gone in (without_large, without_small)]
    assert even == pytest.approx([0.5, 0.5])


def test_the_guided_loss_is_that_of_the_guided_answers():
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 6, 2, 4, 4, generator=generator)
    scale = torch.tensor([1.0, 2.0, 7.5])
    guided = [
        torch.stack([rows[i] + scale[i] * (rows[3 + i] - rows[i]) for i in range(3)]) for rows in (student, teacher)
    ]
    wanted = [((guided[0][i] - guided[1][i]) ** 2).mean() / (w**2 + (1 - w) ** 2) for i, w in enumerate(scale)]
    assert float(guided_loss(student, teacher, scale)) == pytest.approx(float(sum(wanted)) / 3, rel=1e-5)


def test_errors_that_are_independent_count_the_same_at_any_scale():
    errors = torch.randn(2000, 8, 4, 4, generator=torch.Generator().manual_seed(2))
    for w in (1.0, 4.0, 14.0):
        found = float(guided_loss(errors, torch.zeros_like(errors), torch.full((1000,), w)))
        assert found == pytest.approx(1.0, abs=0.03)


def test_every_stage_is_seen_and_no_hook_stays(teacher):
    paths = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert sorted(stages_of(teacher)) == sorted(paths)
    with stage_outputs(teacher) as seen:
        teacher(torch.zeros(1, 2, 4, 4), 3, torch.zeros(1, 5, 8))
        assert sorted(seen) == sorted(paths)
        assert seen["down_blocks.0"].shape == (1, 16, 2, 2)
    with pytest.raises(RuntimeError), stage_outputs(teacher):
        teacher(torch.zeros(1, 3, 4, 4), 3, torch.zeros(1, 5, 8))
    assert not any(module._forward_hooks for module in teacher.modules())


def test_a_checkpoint_is_found_by_its_key_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    assert read(path, key="k") is None
    write(path, {"a.x": torch.arange(3), "b.y": torch.zeros(2).t()}, key="k", step=7)
    found = read(path, key="k")
    assert found is not None
    assert found.step == 7
    assert found.part("a")["x"].tolist() == [0, 1, 2]
    assert read(path, key="other") is None
    assert [item.name for item in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_digest_sees_names_shapes_and_values():
    base = {"a": torch.zeros(2, 2)}
    others = [
        {"b": torch.zeros(2, 2)},
        {"a": torch.zeros(4)},
        {"a": torch.zeros(2, 2, dtype=torch.int32)},
        {"a": torch.tensor([[0.0, 0], [0, 1e-30]])},
        {"a": torch.zeros(2, 2, dtype=torch.bfloat16)},
    ]
    assert digest_of_tensors(base) == digest_of_tensors({"a": torch.zeros(2, 2)})
    assert len({digest_of_tensors(base), *(digest_of_tensors(other) for other in others)}) == 6

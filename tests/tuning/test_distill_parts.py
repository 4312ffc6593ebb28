"""The parts of the training loop: average, feature loss, checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from exporter.tuning.checkpoint import digest_of_tensors, read, write
from exporter.tuning.ema import Ema
from exporter.tuning.losses import feature_loss, stage_outputs, stages_of


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

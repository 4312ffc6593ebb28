"""Whole networks, saved for every opset and evaluated, against torch; open shapes, functions, and planted faults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mil_damage import Damage
from mil_programs import Array, library, quiet, save_program, save_torch

SINGLE, HALF = 1e-5, 5e-3
"""Largest error over the largest output, by the floats of a package."""


def _unet() -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(4)
        net = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=16,
        )
    return net.eval().requires_grad_(False)


def _plain(net: Any) -> Any:
    import torch

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
            return self.net(sample, timestep, states, return_dict=False)[0]

    return Plain().eval()


def _feeds() -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([37.0]),
        "states": torch.randn(1, 5, 16, generator=generator),
    }


def _arrays(feeds: Mapping[str, Any]) -> dict[str, Array]:
    return {name: value.numpy() for name, value in feeds.items()}


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library()
    return _plain(_unet())


@pytest.fixture(scope="module")
def package(unet: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_torch(tmp_path_factory.mktemp("unet") / "sound.mlpackage", unet, _feeds())


def _error(found: Array, wanted: Array) -> float:
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(("opset", "half"), [("iOS16", False), ("iOS17", True), ("iOS18", True)])
def test_a_saved_network_is_what_torch_computes(unet: Any, tmp_path: Path, opset: str, half: bool) -> None:
    from targets.mil.evaluator import Evaluator

    path = save_torch(tmp_path / "unet.mlpackage", unet, _feeds(), opset, half=half)
    evaluator = Evaluator(path, threads=1)
    (found,) = evaluator(_arrays(_feeds())).values()
    wanted = unet(*_feeds().values()).numpy()
    assert evaluator.package.deployment == opset
    assert found.dtype == (np.float16 if half else np.float32)
    assert 0 < _error(found, wanted) <= (HALF if half else SINGLE)
    told = evaluator.evidence()
    assert told.count("precision")["f16" if half else "f32"] > 300
    assert told.requested_precision == ("f16" if half else "f32")
    assert told.device == "CPU (evaluated, not Core ML)"
    assert any("say nothing" in note for note in told.notes)


def test_the_evaluator_adds_no_more_than_torch_itself_does(unet: Any, package: Path) -> None:
    import torch

    from targets.mil.evaluator import Evaluator

    evaluator = Evaluator(package, threads=1)
    feeds = _arrays(_feeds())
    pairs = zip(evaluator.values(feeds), evaluator.values(feeds, torch.float64), strict=True)
    last = [(single[1][0], wide[1][0]) for single, wide in pairs][-1]
    assert 0 < _error(last[0].numpy(), last[1].numpy()) <= 2e-6


def test_a_session_answers_profiles_and_closes(package: Path) -> None:
    from targets.base import TargetError
    from targets.mil.evaluator import Evaluator

    evaluator, feeds = Evaluator(package, threads=1), _arrays(_feeds())
    first, second = evaluator(feeds), evaluator(feeds)
    (name,) = first
    np.testing.assert_array_equal(first[name], second[name])
    assert not np.shares_memory(first[name], second[name])
    timed = evaluator.profile(feeds, 2)
    assert len(timed) == len(evaluator.package.operations)
    assert sum(item.ms for item in timed) > 0
    with pytest.raises(TargetError, match="wrong shape; got"):
        evaluator({**feeds, "sample": feeds["sample"][:, :3]})
    evaluator.close()
    with pytest.raises(TargetError, match="the session is closed"):
        evaluator(feeds)


def test_16_bit_floats_are_rounded_after_every_operation(tmp_path: Path) -> None:
    library()
    from targets.mil.evaluator import Evaluator

    def build(mb: Any, given: Any) -> list[Any]:
        half = mb.cast(x=given["x"], dtype="fp16")
        summed = mb.reduce_sum(x=half, axes=[1], keep_dims=True)
        return [mb.cast(x=mb.mul(x=summed, y=np.float16(3)), dtype="fp32", name="out")]

    x = np.random.default_rng(0).normal(size=(4, 999)).astype(np.float32)
    evaluator = Evaluator(save_program(tmp_path / "half.mlpackage", {"x": x}, build), threads=1)
    summed = x.astype(np.float16).astype(np.float64).sum(1, keepdims=True).astype(np.float16)
    wanted = (summed.astype(np.float32) * 3).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(evaluator({"x": x})["out"], wanted)
    large = evaluator({"x": np.full((4, 999), 90, np.float32)})["out"]
    assert np.isinf(large).all()  # 89,910 is no 16-bit float


def test_enumerated_shapes_are_evaluated_and_others_refused(tmp_path: Path) -> None:
    ct = library()
    import torch

    from targets.base import TargetError
    from targets.mil.evaluator import Evaluator

    class Folds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.norm = torch.nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            n, c, h, w = y.shape
            rows = self.norm(y.reshape(n, c, h * w).transpose(1, 2))
            back = rows.transpose(1, 2).reshape(n, c, h, w)
            return torch.nn.functional.interpolate(back, scale_factor=2.0, mode="nearest")

    module, shapes = Folds().eval(), [(1, 3, 8, 8), (1, 3, 8, 12)]
    with quiet():
        told = ct.TensorType(name="x", shape=ct.EnumeratedShapes(shapes=shapes, default=shapes[0]), dtype=np.float32)
    x = torch.randn(shapes[0])
    path = save_torch(tmp_path / "shapes.mlpackage", module, {"x": x}, "iOS17", inputs=[told])
    evaluator = Evaluator(path, threads=1)
    assert evaluator.package.inputs[0].shapes == tuple(shapes)
    assert evaluator.inputs[0].shape[-1] == -1
    for shape in shapes:
        x = torch.randn(shape)
        (found,) = evaluator({"x": x.numpy()}).values()
        with torch.no_grad():
            assert _error(found, module(x).numpy()) <= SINGLE
    with pytest.raises(TargetError, match=r"got \(1, 3, 8, 9\), expected one of"):
        evaluator({"x": np.zeros((1, 3, 8, 9), np.float32)})


def test_one_of_several_functions_is_evaluated(tmp_path: Path) -> None:
    ct = library()
    from targets.base import TargetError
    from targets.mil.evaluator import Evaluator

    x = np.array([[1.5, -2.0]], np.float32)
    first = save_program(tmp_path / "a.mlpackage", {"x": x}, lambda mb, i: [mb.relu(x=i["x"], name="y")], "iOS18")
    second = save_program(tmp_path / "b.mlpackage", {"x": x}, lambda mb, i: [mb.square(x=i["x"], name="y")], "iOS18")
    with quiet():
        described = ct.utils.MultiFunctionDescriptor()
        described.add_function(str(first), "main", "main")
        described.add_function(str(second), "main", "squares")
        described.default_function_name = "main"
        ct.utils.save_multifunction(described, str(tmp_path / "both.mlpackage"))
    both = tmp_path / "both.mlpackage"
    np.testing.assert_array_equal(Evaluator(both)({"x": x})["y"], [[1.5, 0]])
    squares = Evaluator(both, function="squares")
    assert squares.package.functions == ("main", "squares")
    np.testing.assert_array_equal(squares({"x": x})["y"], [[2.25, 4]])
    with pytest.raises(TargetError, match="got 'cubes', expected one of main, squares"):
        Evaluator(both, function="cubes")


@pytest.fixture
def damage(package: Path, tmp_path: Path) -> Iterator[Damage]:
    return Damage(package, tmp_path)


def _found(damage: Damage, modules: Mapping[str, str] | None = None) -> Any:
    from targets.mil.evaluator import Evaluator, first_divergence

    sound = Evaluator(damage.package, threads=1)
    suspect = Evaluator(damage.save(), threads=1, modules=modules or {})
    feeds = _arrays(_feeds())
    assert first_divergence(sound, sound, feeds) is None
    recorded = first_divergence(list(sound.values(feeds)), suspect, feeds)
    assert first_divergence(sound, suspect, feeds) == recorded
    return recorded


def test_a_gelu_of_another_mode_is_named(damage: Damage) -> None:
    gelu = damage.find("gelu")
    mode = damage.constant(gelu, "mode")
    mode.immediateValue.tensor.strings.values[0] = "TANH_APPROXIMATION"
    name = gelu.attributes["name"].immediateValue.tensor.strings.values[0]
    found = _found(damage, {name: "down_blocks.0.attentions.0.ff"})
    assert (found.name, found.type, found.module) == (name, "gelu", "down_blocks.0.attentions.0.ff")
    assert 1e-6 < found.error < 1e-2


def test_another_epsilon_is_named(damage: Damage) -> None:
    norm = damage.find("layer_norm", 1)
    (given,) = norm.inputs["epsilon"].arguments
    own = damage.constant(norm, "epsilon")  # the others share it: this one gets a value of its own, in its argument
    given.value.CopyFrom(own)
    given.value.immediateValue.tensor.floats.values[0] = 1e-3
    found = _found(damage)
    assert (found.name, found.type) == (norm.attributes["name"].immediateValue.tensor.strings.values[0], "layer_norm")


def test_swapped_keys_and_values_are_named(damage: Damage) -> None:
    attention = damage.find("scaled_dot_product_attention", 1)
    key, value = (attention.inputs[name].arguments[0] for name in ("key", "value"))
    key.name, value.name = value.name, key.name
    assert _found(damage).name == attention.attributes["name"].immediateValue.tensor.strings.values[0]


def test_a_wrong_transpose_is_named_with_what_it_gives(damage: Damage) -> None:
    moved = damage.find("transpose")
    order = damage.constant(moved, "perm").immediateValue.tensor.ints.values
    order[-2], order[-1] = order[-1], order[-2]
    found = _found(damage)
    assert (found.type, found.error) == ("transpose", float("inf"))
    assert "shape of" in found.told


def test_a_missing_operation_is_named(damage: Damage) -> None:
    silu = damage.find("silu")
    silu.type = "relu"
    found = _found(damage)
    assert found.told == f"another operation: got relu '{found.name}', expected silu '{found.name}'"


def test_one_wrong_entry_of_a_palette_is_named(package: Path, tmp_path: Path) -> None:
    from targets.mil.constants import from_bytes
    from targets.mil.evaluator import Evaluator, first_divergence

    ct = library()
    import struct

    with quiet():
        config = ct.optimize.coreml.OptimizationConfig(
            ct.optimize.coreml.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=500)
        )
        model = ct.models.MLModel(str(package), skip_model_load=True)
        small = ct.optimize.coreml.palettize_weights(model, config)
        for name in ("sound", "damaged"):
            small.save(str(tmp_path / f"{name}.mlpackage"))
        plain = ct.optimize.coreml.decompress_weights(small)
        plain.save(str(tmp_path / "plain.mlpackage"))
        del model, small, plain
        import gc

        gc.collect()
    sound = Evaluator(tmp_path / "sound.mlpackage", threads=1)
    (theirs,) = Evaluator(tmp_path / "plain.mlpackage", threads=1)(_arrays(_feeds())).values()
    (ours,) = sound(_arrays(_feeds())).values()
    np.testing.assert_array_equal(ours, theirs)

    bent = [item for item in sound.package.operations if item.type == "constexpr_lut_to_dense"][3]
    lut = bent.constant("lut")
    assert lut is not None
    weights = next((tmp_path / "damaged.mlpackage").rglob("weight.bin"))
    data = bytearray(weights.read_bytes())
    (start,) = struct.unpack_from("<Q", data, lut.offset + 16)
    entry = from_bytes(bytes(data[start : start + 4]), "float32", (1,))[0]
    data[start : start + 4] = np.float32(entry * 1.01).tobytes()
    weights.write_bytes(bytes(data))
    found = first_divergence(sound, Evaluator(tmp_path / "damaged.mlpackage", threads=1), _arrays(_feeds()))
    assert found is not None
    assert (found.name, found.type) == (bent.name, bent.type)
    assert found.error == pytest.approx(0.01, rel=0.05) or found.error < 0.01

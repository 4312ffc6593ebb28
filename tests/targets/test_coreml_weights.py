"""Compressed ML Programs, read back: their forms, their sizes and, by coremltools' own unpacking, their values."""

from __future__ import annotations

import contextlib
import gc
import io
import warnings
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from targets.base import TargetError
from targets.coreml.stored import operations_of, stored_weights
from targets.coreml.weights import BLOCK, LEAST, WORDS, Built, Compressed, Weight, check_weights, compress

pytest.importorskip("coremltools")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep away what coremltools says of its own files and of torch, and its progress bars."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", module=r"coremltools(\.|$)")
        warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)
        yield
        gc.collect()


def two_of_four(weight: Any) -> None:
    """Set the two smallest of each four inputs' weights to zero."""
    groups = weight.view(weight.shape[0], -1, 4, *weight.shape[2:])
    groups.scatter_(2, groups.abs().argsort(dim=2)[:, :, :2], 0.0)


def unet() -> Any:
    """Return a small U-Net whose convolutions have two zeros in four."""
    import torch
    from diffusers import UNet2DConditionModel

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = UNet2DConditionModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                layers_per_block=1,
                block_out_channels=(32, 64),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("UpBlock2D", "UpBlock2D"),
                mid_block_type=None,
                cross_attention_dim=32,
                attention_head_dim=4,
                norm_num_groups=8,
            )

        def forward(self, x: Any, t: Any, c: Any) -> Any:
            return self.net(x, t, c, return_dict=False)[0]

    net = Plain()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels % 4 == 0:
            two_of_four(module.weight.data)
    return net


def converted(net: Any, example: dict[str, tuple[int, ...]], system: str) -> Any:
    """Return a network as a 16-bit ML Program."""
    import torch

    torch.manual_seed(0)
    with quiet(), torch.no_grad():
        import coremltools as ct

        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        inputs = tuple(torch.randn(shape) for shape in example.values())
        traced = torch.jit.trace(net.eval(), inputs, check_trace=False)
        types = [ct.TensorType(name, shape) for name, shape in example.items()]
        target = getattr(ct.target, system)
        return ct.convert(traced, inputs=types, minimum_deployment_target=target, skip_model_load=True)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    net, example = unet(), {"x": (1, 4, 8, 8), "t": (1,), "c": (1, 5, 32)}
    return {system: converted(net, example, system) for system in ("iOS16", "iOS18")}


@pytest.fixture(scope="module")
def little() -> Any:
    """Return a pruned convolution and one that is not, for iOS 16."""
    import torch

    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3), torch.nn.Conv2d(32, 16, 3))
    two_of_four(net[0].weight.data)
    return converted(net, {"x": (1, 32, 8, 8)}, "iOS16")


def compressed(model: Any, weights: str, system: str, **more: Any) -> Compressed:
    """Return a model with smaller weights; the one given stays as it is."""
    with quiet():
        import coremltools as ct
        from coremltools.converters.mil.frontend.milproto.load import load

        spec = model.get_spec()
        program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)

        def pack(passes: Any) -> Any:
            target = getattr(ct.target, system)
            single = ct.precision.FLOAT32
            return ct.convert(
                program,
                minimum_deployment_target=target,
                compute_precision=single,
                pass_pipeline=passes,
                skip_model_load=True,
            )

        return compress(Built(model, pack), weights, system, **more)


def values_of(model: Any) -> dict[str, np.ndarray]:
    """Return operation -> its weight, unpacked by coremltools."""
    from coremltools.optimize import coreml

    with quiet():
        known = coreml.get_weights_metadata(coreml.decompress_weights(model), weight_threshold=LEAST)
    return {child.name: each.val for each in known.values() for child in each.child_ops}


def file_size(model: Any, folder: Path) -> int:
    model.save(str(folder / "model.mlpackage"))
    return next(folder.rglob("weight.bin")).stat().st_size


def many(item: Weight) -> int:
    return int(np.prod(item.shape))


class TestCheck:
    @pytest.mark.parametrize(
        ("weights", "system", "group", "told"),
        [
            ("palette-5", "iOS18", 0, "got 'palette-5', expected one of float, palette-2"),
            ("palette-4", "iOS15", 0, "deployment: got 'iOS15', expected one of iOS16, iOS17, iOS18"),
            ("palette-4", "iOS18", -1, "group: got -1, expected a number of channels"),
            ("int8", "iOS18", 16, "group: got 16 for int8, expected a palette. Leave group out"),
            ("int4", "iOS17", 0, "got int4 for iOS17, expected at least iOS18 for it. Write deployment: iOS18"),
            ("sparse-palette-4", "iOS16", 0, "at least iOS18"),
            ("palette-4", "iOS17", 16, "palette-4 in groups of 16 for iOS17.*or leave group out"),
        ],
    )
    def test_refused_with_the_fix(self, weights: str, system: str, group: int, told: str) -> None:
        with pytest.raises(TargetError, match=f"^target coreml: weights: .*{told}"):
            check_weights(weights, system, group)

    @pytest.mark.parametrize("word", WORDS)
    def test_what_a_system_brought_the_next_one_has(self, word: str) -> None:
        check_weights(word, WORDS[word])
        check_weights(word, "iOS18")


class TestEveryWord:
    @pytest.fixture(scope="class")
    @classmethod
    def told(cls, models: dict[str, Any]) -> tuple[Compressed, dict[str, np.ndarray]]:
        """Return one program in which operations take turns with all words, and its values."""
        large = [item for item in stored_weights(models["iOS18"]) if np.prod(item.shape) > LEAST]
        dense = cycle(word for word in WORDS if not word.startswith("sparse"))
        thin = cycle(word for word in WORDS if word.startswith("sparse"))
        plan, turn = {}, cycle([False, True])
        for item in large:
            pruned = item.kind == "conv" and item.shape[1] % 4 == 0
            plan[item.op] = next(thin) if pruned and next(turn) else next(dense)
        found = compressed(models["iOS18"], "float", "iOS18", plan=plan, group=16)
        assert set(WORDS) == {item.asked for item in found.weights if item.op in plan}
        return found, values_of(found.model)

    def test_each_became_what_was_asked(self, told: tuple[Compressed, Any]) -> None:
        for item in told[0].weights:
            assert item.became == item.asked or item.why
            inputs_fit = item.asked != "int4" or item.shape[1] % BLOCK == 0
            assert item.became == item.asked or not inputs_fit or item.shape[0] % 16, item

    def test_operations_in_the_saved_program(self, told: tuple[Compressed, Any]) -> None:
        kinds = {operation.type for operation in operations_of(told[0].model)}
        assert {
            "constexpr_lut_to_dense",
            "constexpr_blockwise_shift_scale",
            "constexpr_sparse_to_dense",
            "constexpr_lut_to_sparse",
            "constexpr_sparse_blockwise_shift_scale",
        } <= kinds

    def test_values_follow_the_definition(self, told: tuple[Compressed, Any], models: dict[str, Any]) -> None:
        before = values_of(models["iOS18"])
        for item in told[0].weights:
            if many(item) <= LEAST:
                continue
            was, now = (values[item.op].astype(np.float64) for values in (before, told[1]))
            form = item.became
            if form in ("float", "sparse"):
                assert np.array_equal(was, now)
            if form.startswith("sparse"):
                assert np.mean(was == 0) >= 0.5
                assert np.array_equal(was == 0, now == 0) or "int8" in form
                assert not now[was == 0].any()
            rows = was.reshape(len(was), -1)
            rounded = np.abs(was).max() * 2**-10  # scales and values have 16 bits
            if form.endswith("int8"):
                half_scale = np.abs(rows).max(axis=1) / 127 / 2
                assert np.all(np.abs(was - now).reshape(rows.shape).max(axis=1) <= half_scale + rounded)
            if form == "int4":
                blocks = was.reshape(len(was), -1, BLOCK, *was.shape[2:])
                half_scale = np.abs(blocks).max(axis=tuple(range(2, blocks.ndim))) / 7 / 2
                wrong = np.abs(was - now).reshape(blocks.shape).max(axis=tuple(range(2, blocks.ndim)))
                assert np.all(wrong <= half_scale + rounded)
            if "palette" in form:
                size = 2 ** int(form[-1])
                groups = now.reshape(item.tables, -1)
                assert item.tables == len(now) // 16
                assert all(len(np.unique(each[each != 0])) <= size for each in groups)
                assert all(len(np.unique(each)) <= size for each in groups) or form.startswith("sparse")

    def test_bytes_are_those_of_the_theory(self, told: tuple[Compressed, Any]) -> None:
        for item in told[0].weights:
            kept = 0.5 + 0.5 * (item.shape[1] % 4 != 0)
            bits = {"float": 16, "int8": 8, "int4": 4, "sparse": 1 + 16 * kept, "sparse-int8": 1 + 8 * kept}
            if "palette" in item.became:
                width = int(item.became[-1])
                table = item.tables * 2**width * 2
                size = many(item) * (1 + width * kept if "sparse" in item.became else width) / 8 + table
            else:
                size = many(item) * bits[item.became] / 8
            assert (
                size
                <= item.after
                <= size * 1.03 + 4 * len(item.shape) + 4 * item.shape[0] * max(1, item.shape[1] // BLOCK)
            )


class TestFiles:
    @pytest.mark.parametrize(("word", "bits"), [("palette-2", 2), ("palette-6", 6), ("int8", 8)])
    def test_size_on_disk(self, models: dict[str, Any], tmp_path: Path, word: str, bits: int) -> None:
        whole = file_size(models["iOS16"], tmp_path)
        found = compressed(models["iOS16"], word, "iOS16")
        saved = sum(many(item) * (16 - bits) / 8 for item in found.weights if item.became == word)
        tables = sum(2 ** (bits + 1) if "palette" in word else 3 * item.shape[0] for item in found.weights)
        (tmp_path / "small").mkdir()
        assert file_size(found.model, tmp_path / "small") == pytest.approx(whole - saved + tables, rel=0.03)
        assert {item.became for item in found.weights} == {word, "float"}
        assert all(many(item) <= LEAST for item in found.weights if item.became == "float")

    def test_old_form_of_sparse_is_exact(self, little: Any) -> None:
        found = compressed(little, "sparse", "iOS16")
        assert [item.became for item in found.weights] == ["sparse", "float"]
        assert [item.why for item in found.weights] == ["", "too few zeros for a sparse form to be smaller than float"]
        before, after = values_of(little), values_of(found.model)
        assert all(np.array_equal(before[item.op], after[item.op]) for item in found.weights)


class TestExact:
    def test_what_has_few_values_is_kept_and_the_rest_refused(self, little: Any) -> None:
        from coremltools.optimize import coreml

        first = compressed(little, "palette-4", "iOS16")
        with quiet():
            plain = coreml.decompress_weights(first.model)
        again = compressed(plain, "palette-4", "iOS16", exact=True)
        assert [item.after for item in again.weights] == [item.after for item in first.weights]
        before, after = values_of(first.model), values_of(again.model)
        assert len(before) == 2
        assert all(np.array_equal(before[name], after[name]) for name in before)
        with (
            quiet(),
            pytest.raises(TargetError, match=r"16 different values, expected at most 4, each exact in 16 bits"),
        ):
            compressed(plain, "palette-2", "iOS16", exact=True)


class TestShared:
    def test_a_bias_of_two_operations_with_different_weights(self) -> None:
        with quiet():
            import coremltools as ct
            from coremltools.converters.mil import Builder

            rng = np.random.default_rng(0)
            first, second = (rng.normal(size=(64, 64)).astype(np.float16) for _ in range(2))

            @Builder.program(input_specs=[Builder.TensorSpec(shape=(1, 64))], opset_version=ct.target.iOS18)
            def program(x: Any) -> Any:
                bias = np.ones(64, np.float16)
                x = Builder.cast(x=x, dtype="fp16")
                return Builder.linear(x=Builder.linear(x=x, weight=first, bias=bias), weight=second, bias=bias)

            model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
        one = stored_weights(model)[0].op
        found = compressed(model, "palette-4", "iOS18", plan={one: "palette-6"})
        assert [item.became for item in found.weights] == ["palette-6", "palette-4"]


class TestRefusals:
    def test_plans(self, little: Any) -> None:
        op = stored_weights(little)[0].op
        with pytest.raises(TargetError, match=f"plan: got '{op}s', expected an operation.*Did you mean '{op}'"):
            compressed(little, "float", "iOS16", plan={f"{op}s": "int8"})
        with pytest.raises(TargetError, match="got int4 for iOS16"):
            compressed(little, "float", "iOS16", plan={op: "int4"})

    def test_another_system(self, little: Any) -> None:
        with pytest.raises(TargetError, match="got a model for iOS16, expected one for iOS18"):
            compressed(little, "int4", "iOS18")

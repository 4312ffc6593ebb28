"""Rules of the lint for the Neural Engine: each fires on a program that breaks it, and not on one that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from targets.base import TensorSpec
from targets.coreml.lint import COUNTED, RULES, lint
from targets.mil.constants import Constant
from targets.mil.package import Feature, Operation, Package

Shape = tuple[int, ...]
GOOD = (1, 64, 1, 64)


def operation(kind: str, made: Shape, dtype: str = "float16", name: str = "", **inputs: Any) -> Operation:
    own = name or kind
    return Operation(kind, own, inputs, {}, (TensorSpec(f"{own}_out", dtype, made),))


def package(*operations: Operation, takes: Shape = GOOD, **constants: Constant) -> Package:
    given = (Feature(TensorSpec("given", "float16", takes)),)
    told = (Path("p"), Path("m"), "main", ("main",), "CoreML7", "iOS17")
    return Package(*told, given, (), (), operations, constants, {}, 8)


def constant(shape: Shape) -> Constant:
    return Constant("weight", "float16", shape, file="weight.bin")


def numbers(*values: int) -> Constant:
    return Constant("numbers", "int32", (len(values),), np.array(values, np.int32))


def moved(made: Shape = GOOD, kind: str = "relu", takes: Shape = GOOD, **more: Any) -> Package:
    return package(operation(kind, made, x=("given",), **more), takes=takes)


def convolved(weight: Constant) -> Package:
    return package(operation("conv", GOOD, x=("given",), weight=weight), weight=weight)


def behind(kind: str, after: str) -> Package:
    first = operation(after, GOOD, x=("given",))
    return package(first, operation(kind, GOOD, x=(f"{after}_out",)))


CASES: dict[str, tuple[Package, Package]] = {
    "rank above 5": (moved((1, 1, 2, 2, 2, 64)), moved((1, 2, 2, 2, 64))),
    "32-bit arithmetic": (
        package(operation("relu", GOOD, "float32", x=("given",))),
        package(operation("cast", GOOD, "float32", x=("given",))),
    ),
    "linear or matmul": (moved(kind="matmul", takes=(64, 64)), moved(kind="matmul")),
    "reshape or transpose": (moved(kind="transpose"), moved(kind="split")),
    "not four axes": (moved((64, 64)), moved()),
    "short last axis": (moved((1, 64, 64, 1)), moved((1, 64, 64, 16))),
    "top-k": (moved(kind="topk"), moved(kind="reduce_max")),
    "gather behind top-k": (behind("gather_along_axis", "topk"), behind("gather_along_axis", "relu")),
    "embedding lookup": (moved(kind="gather"), moved(kind="slice_by_index")),
    "an axis too long": (moved((1, 1, 1, 16385)), moved((1, 65536, 1, 64))),
    "kernel wider than 13": (
        convolved(constant((64, 64, 1, 15))),
        convolved(constant((64, 64, 13, 13))),
    ),
    "dilated convolution": (moved(kind="conv", dilations=numbers(1, 2)), moved(kind="conv", dilations=numbers(1, 1))),
    "arg-max over more than 2,048": (
        moved(kind="reduce_argmax", takes=(1, 1, 1, 2049)),
        moved(kind="reduce_argmax", takes=(1, 1, 1, 2048)),
    ),
    "an operation it lacks": (moved(kind="scatter"), moved(kind="concat")),
    "convolution in three dimensions": (moved((1, 8, 8, 8, 64), "conv"), moved(kind="conv")),
    "an operand above 2 MB": (moved((1, 1025, 16, 64)), moved((1, 1024, 16, 64))),
}


def test_there_is_a_case_for_every_rule() -> None:
    assert list(CASES) == [rule.name for rule in RULES]
    assert all(rule.source and rule.fix for rule in RULES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_fires_on_what_breaks_it_and_not_beside_it(name: str) -> None:
    breaks, keeps = CASES[name]
    found = {finding.rule: finding for finding in lint([breaks], {}).findings}
    assert found[name].count == 1
    assert name not in {finding.rule for finding in lint([keeps], {}).findings}


@pytest.mark.parametrize("name", CASES)
def test_unofficial_rules_do_not_count(name: str) -> None:
    rule = next(rule for rule in RULES if rule.name == name)
    found = lint([CASES[name][0]], {})
    others = {finding.rule for finding in found.findings if finding.strength in COUNTED}
    assert (rule.strength == "unofficial") == (name not in others)
    assert bool(found.risky) == bool(others)
    if name in ("an axis too long", "kernel wider than 13", "an operation it lacks", "an operand above 2 MB"):
        assert found.risky == 0, "an unofficial rule alone"


def test_operations_are_told_once_with_their_modules_and_unpacking_of_weights_is_none() -> None:
    unpacked = Operation("constexpr_lut_to_dense", "w", {}, {}, (TensorSpec("w", "float16", (64, 64, 1, 15)),))
    used = operation("conv", (64, 1), name="c", x=("given",), weight=("w",))
    found = lint([package(unpacked, used), moved()], {"c": "net.first"})
    assert (found.operations, found.risky) == (2, 1)
    rules = {finding.rule: finding.examples for finding in found.findings}
    assert rules["kernel wider than 13"] == ("c (conv, net.first)",)
    assert {"not four axes", "short last axis"} <= rules.keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_stock_u_net_has_far_more_at_risk_than_its_form_for_the_neural_engine(tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'diffusion-exporter[coreml]'")
    import torch
    from diffusers import UNet2DConditionModel

    from exporter.lowering.neural_engine import neural_engine_form
    from exporter.lowering.wrappers import Sizes, example_feeds, signature, wrap
    from targets.coreml import CoreMl, CoreMlOptions
    from targets.torch_source import TorchProgram

    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=32,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
    ).eval()
    found = {}
    for name in ("stock", "form"):
        net = net if name == "stock" else neural_engine_form("unet", net)
        told, examples = signature(net), example_feeds(net, Sizes(1, 32, 32))
        inputs = {key: tensor.numpy() for key, tensor in zip(told.inputs, examples, strict=True)}
        (tmp_path / name).mkdir()
        CoreMl().convert(TorchProgram("unet", wrap(net), inputs, told.outputs), tmp_path / name, CoreMlOptions())
        session = CoreMl().open(tmp_path / name, CoreMlOptions())
        found[name] = session.evidence().placement
    stock, form = found["stock"], found["form"]
    assert stock is not None
    assert form is not None
    assert form.risky < stock.risky / 3  # 76 of 339 operations instead of 336 of 403
    counts = [{finding.rule: finding.count for finding in item.findings} for item in (stock, form)]
    for rule in ("linear or matmul", "reshape or transpose", "not four axes"):
        assert counts[1].get(rule, 0) < counts[0][rule] / 2

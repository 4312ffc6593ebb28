"""Plans: the file, units, order of stages, and the search against trying everything."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration.sites import Site
from exporter.errors import RecipeError
from exporter.quantizing.checks import check_order, check_schemes
from exporter.quantizing.options import QuantizeOptions, quantize_options
from exporter.quantizing.plan import check_units, plan_text, read_plan, schemes_of
from exporter.quantizing.search import Found, fastest, search
from exporter.quantizing.trial import decibels
from exporter.quantizing.units import unit_ms, units_of
from exporter.recipe import StageSpec
from targets.base import Layer, Timed

SITES = ("conv_in", "down.0.conv1", "down.0.conv2", "down.1.attn.to_q", "down.1.attn.scores")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "plan.txt"
    path.write_text(text)
    return path


def test_a_plan_is_the_same_after_it_was_written_and_read(tmp_path):
    plan = {"conv_in": "float", "down.0": "int8", "down.1.attn.scores": "int8-weights", "": "int4-weights"}
    text = plan_text(plan, {"alone_db": {"down.0": "41.2"}})
    assert read_plan(written(tmp_path, text)) == plan
    lines = text.splitlines()
    assert lines[0].split() == ["#", "unit", "scheme", "alone_db"]
    assert lines[2].split() == ["down.0", "int8", "41.2"]
    assert lines[-1].split() == ["*", "int4-weights"]


def test_remarks_and_empty_lines_are_passed_over(tmp_path):
    assert read_plan(written(tmp_path, "# all\n\n  conv_in float # first layer\n")) == {"conv_in": "float"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conv_in\n", r"plan\.txt:1: scheme: got '', expected float \| fp16 \| bf16 \| int8"),
        ("a int8\nconv_in int9\n", r"plan\.txt:2: scheme: got 'int9', expected .* Did you mean 'int8'\?"),
        ("a int8\na float\n", r"plan\.txt:2: a stands there twice"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        read_plan(written(tmp_path, text))


def test_a_plan_that_is_missing_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"quantize\.plan: .*nowhere\.txt: cannot be read"):
        read_plan(tmp_path / "nowhere.txt")


def test_units_may_be_layers_or_whatever_holds_them():
    check_units({"": "int8", "down": "float", "down.1.attn": "int8", "down.0.conv2": "float"}, SITES, "plan.txt")
    with pytest.raises(
        RecipeError, match=r"plan\.txt: down\.0\.conv3: no such unit; .* Did you mean 'down\.0\.conv[12]'\?"
    ):
        check_units({"down.0.conv3": "int8"}, SITES, "plan.txt")


def test_the_innermost_line_decides():
    found = schemes_of({"": "int8", "down": "float", "down.1.attn.to_q": "int4-weights"}, SITES)
    assert found == dict(zip(SITES, ["int8", "float", "float", "int4-weights", "float"], strict=True))


def site(name: str, operator: str) -> Site:
    kind = "product" if name.endswith(("scores", "mixed")) else "conv"
    return Site(name, kind, ir.node(operator.rpartition("/")[2].partition("_")[0], [], name=operator), ())


def test_units_are_blocks_layers_outside_of_blocks_and_products():
    names = {
        "conv_in": "conv_in/Conv",
        "down_blocks.0.resnets.1.conv1": "down_blocks.0.resnets.1.conv1/Conv",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "q/MatMul",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.scores": "s/MatMul",
        "mid_block.resnets.0.conv2": "mid_block.resnets.0.conv2/Conv",
        "transformer_blocks.7.attn.to_out.0": "o/MatMul",
    }
    assert list(units_of({name: site(name, node) for name, node in names.items()})) == [
        "conv_in",
        "down_blocks.0.resnets.1",
        "down_blocks.0.attentions.0",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.scores",
        "mid_block.resnets.0",
        "transformer_blocks.7",
    ]


def test_milliseconds_go_to_the_operators_in_a_layer_and_else_to_the_block():
    known = {
        "b.0.conv": site("b.0.conv", "b.0.conv/Conv"),
        "b.0.attn.scores": site("b.0.attn.scores", "b.0.attn/MatMul"),
        "b.0.attn.mixed": site("b.0.attn.mixed", "b.0.attn/MatMul_1"),
    }

    def layer(ms: float, name: str, origin: str = "") -> Timed:
        return Timed(Layer(name, "any", "f32", "", "CPU", origin), ms)

    profile = [
        layer(4.0, "b.0.conv/Conv/WithoutBiases", "b.0.conv/Conv/WithoutBiases,Multiply_1"),
        layer(2.0, "fused", "b.0.attn/MatMul,b.0.attn/Softmax,b.0.attn/MatMul_1"),
        layer(1.0, "b.0.norm/Mul"),
        layer(0.5, "b.0.conv#0/QuantizeLinear"),
        layer(0.25, "Reorder_12"),
    ]
    units = units_of(known)
    assert unit_ms(profile, known, units) == {"b.0": 5.5, "b.0.attn.scores": 1.0, "b.0.attn.mixed": 1.0, "": 0.25}


def by_trying_all(errors: dict[str, list[float]], gains: dict[str, float], allowed: float) -> float:
    best = 0.0
    for size in range(len(gains) + 1):
        for chosen in combinations(gains, size):
            if all(sum(errors[unit][call] for unit in chosen) <= allowed for call in range(2)):
                best = max(best, sum(gains[unit] for unit in chosen))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_where_errors_add_up_the_search_comes_near_the_best_there_is(seed):
    draw = np.random.default_rng(seed)
    names = [f"unit{index}" for index in range(9)]
    errors = {name: list(10 ** draw.uniform(-6, -4, 2)) for name in names}
    gains = {name: float(value) for name, value in zip(names, draw.uniform(-0.5, 3, 9), strict=True)}

    def together(chosen: tuple[str, ...]) -> list[float]:
        return [sum(errors[unit][call] for unit in chosen) for call in range(2)]

    found = search(errors, gains, 42.0, together)
    best = by_trying_all(errors, {name: gain for name, gain in gains.items() if gain > 0}, 10**-4.2)
    assert found is not None
    assert max(together(found.units)) <= 10**-4.2
    assert all(gains[unit] > 0 for unit in found.units)
    assert sum(gains[unit] for unit in found.units) >= 0.8 * best
    assert found.worst_db == pytest.approx(decibels(max(together(found.units))))


def test_a_plan_that_the_sums_promised_wrongly_is_mended():
    errors = {f"unit{index}": [1e-5] for index in range(10)}
    asked = []

    def together(chosen: tuple[str, ...]) -> list[float]:
        asked.append(len(chosen))
        return [2.5e-5 * len(chosen)]  # much more than the sum

    found = search(errors, dict.fromkeys(errors, 1.0), 40.0, together)
    assert found is not None
    assert asked[0] == 10
    assert len(found.units) <= 4
    assert found.worst_db >= 40
    assert [entry[0] for entry in found.tries] == asked


def test_there_may_be_no_plan():
    assert search({"a": [0.1]}, {"a": 1.0}, 40.0, lambda chosen: [0.1]) is None
    assert search({"a": [1e-9]}, {"a": -1.0}, 40.0, lambda chosen: [1e-9]) is None


def test_a_plan_that_is_slower_than_promised_competes_with_others():
    slow, twin, better, never = (Found(units, 40.0, ()) for units in (("a", "b"), ("a", "b"), ("a",), ()))
    times = {slow.units: 0.95, better.units: 0.8, never.units: 0.1}
    asked = []

    def measure(plan: Found) -> float:
        asked.append(plan.units)
        return times[plan.units]

    found = fastest([slow, twin, better, never], lambda plan: 0.6 if "b" in plan.units else 0.79, measure)
    assert asked == [("a", "b"), ("a",)]
    assert [(item.plan.units, item.promised, item.measured) for item in found] == [
        (("a",), 0.79, 0.8),
        (("a", "b"), 0.6, 0.95),
    ]


def stages(*specs: dict[str, dict[str, object]]) -> list[StageSpec]:
    return [StageSpec.model_validate(spec) for spec in specs]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            [{"quantize": {"scheme": "int8"}}, {"prune": {"method": "magnitude"}}],
            r"stages\[1\]\.prune: got prune after the denoiser was quantized in stages\[0\], expected quantiz",
        ),
        (
            [{"quantize": {"scheme": "int8"}}, {"tune": {"method": "distill", "component": "unet"}}],
            r"stages\[1\]\.tune: got tune after the denoiser was quantized in stages\[0\]",
        ),
        (
            [{"prune": {"method": "deepcache"}}, {"quantize": {"scheme": "int8"}}],
            r"stages\[1\]\.quantize: got a denoiser with a schedule of steps \(deepcache\)",
        ),
    ],
)
def test_what_cannot_stand_beside_quantization_is_refused(specs, message):
    with pytest.raises(RecipeError, match=message):
        check_order(stages(*specs))


def test_another_quantization_takes_the_place_of_the_one_before():
    check_order(stages({"quantize": {"scheme": "int8"}}, {"quantize": {"scheme": "int4-weights", "component": "unet"}}))


def test_two_components_may_be_quantized():
    check_order(stages({"quantize": {"scheme": "int8"}}, {"quantize": {"scheme": "int8", "component": "text_encoder"}}))


def test_a_scheme_that_a_target_does_not_run_is_refused_also_in_a_plan(tmp_path):
    small = {"a (small)": {"int8-weights": ""}}
    offered = {**small, "b (large)": {"int8": "", "int8-weights": ""}}
    check_schemes(QuantizeOptions("int8-weights"), "stages[0].quantize", offered)
    plan = str(written(tmp_path, "conv_in int8\n"))
    with pytest.raises(
        RecipeError,
        match=r"stages\[0\]\.quantize\.scheme: target a \(small\) does not run int8; .* expected int8-weights\.",
    ):
        check_schemes(QuantizeOptions("int8-weights", plan=plan), "stages[0].quantize", small)
    only_some = {"a (rtx)": {"fp8": "capability 8.6 has no units for it", "int8": ""}}
    with pytest.raises(RecipeError, match=r"does not run fp8: capability 8\.6 has no .*; got 'fp8', expected int8\."):
        check_schemes(QuantizeOptions("fp8"), "stages[0].quantize", only_some)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": "int7"}, r"stages\[0\]\.quantize\.scheme: got 'int7', expected 'int8', 'int8-weights', "),
        (
            {"scheme": "int8", "smoothness": 2},
            r"quantize\.smoothness: got 2, expected a number from 0 to 1",
        ),
        (
            {"scheme": "int8", "calibration": {"calls": 0}},
            r"calibration\.calls: got 0, expected a whole number",
        ),
        ({"scheme": "int8", "calibration": {"steps": 3}}, r"calibration\.steps"),
        ({"scheme": "int8", "plam": "x"}, r"quantize\.plam: unknown key; .* Did you mean 'plan'\?"),
    ],
)
def test_a_key_that_is_wrong_is_named(given, message):
    with pytest.raises(RecipeError, match=message):
        quantize_options(given, "stages[0].quantize", None)

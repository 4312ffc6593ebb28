from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import RecipeError
from exporter.metrics.gates import Gate, GateResult, Limit, evaluate
from exporter.metrics.measurement import Measurement, Ratio
from exporter.metrics.names import METRICS
from exporter.report.record import GateRecord

STATES = ("0-dense", "1-pruned", "2-tuned")
TARGETS = ("openvino", "ort")
PSNR = "fidelity.teacher_forced.psnr_db"


def gate(**spec: Any) -> Gate:
    return Gate.parse(spec, "recipe.yaml: gates[0]")


def taken(
    name: str, value: float | None, state: str = "1-pruned", target: str = "openvino", **more: Any
) -> Measurement:
    return Measurement(name=name, value=value, unit=METRICS[name].unit, state=state, target=target, **more)


def judge(spec: dict[str, Any], *measurements: Measurement, **more: Any) -> list[GateResult]:
    return evaluate([gate(**spec)], measurements, STATES, TARGETS, **more)


def one(spec: dict[str, Any], *measurements: Measurement) -> GateResult:
    """The result for 1-pruned on openvino."""
    (found,) = judge({"targets": ["openvino"], "state": "1-pruned", **spec}, *measurements)
    return found


@pytest.mark.parametrize(
    ("text", "factor", "offset"),
    [
        (45, None, 45.0),
        (0.5, None, 0.5),
        (-3, None, -3.0),
        ("45", None, 45.0),
        (" -2.5e1 ", None, -25.0),
        ("dense", 1.0, 0.0),
        ("0.95 * dense", 0.95, 0.0),
        ("1.05*dense", 1.05, 0.0),
        (".9 * dense", 0.9, 0.0),
        ("dense - 2", 1.0, -2.0),
        ("dense + 0.5", 1.0, 0.5),
        ("  2. * dense-1e-3 ", 2.0, -0.001),
    ],
)
def test_limits_that_are_understood(text: object, factor: float | None, offset: float) -> None:
    limit = Limit.parse(text, "here")
    assert limit == Limit(factor, offset)
    assert limit.relative == (factor is not None)
    assert limit.resolve(10.0) == pytest.approx(offset if factor is None else factor * 10 + offset)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Dense",
        "dense *",
        "dense * 0.9",
        "0.9 dense",
        "0.9 * denser",
        "0.9 ** dense",
        "-0.9 * dense",
        "dense - dense",
        "dense / 2",
        "0.9 * dense - 1 - 1",
        "1e999",
        "1e999 * dense",
        "nan",
        "inf",
        float("nan"),
        float("inf"),
        True,
        None,
        [1],
        {"a": 1},
        "__import__('os')",
        "٣ * dense",
    ],
)
def test_limits_that_are_refused_with_the_key_path(text: object) -> None:
    with pytest.raises(
        RecipeError, match=r"^recipe\.yaml: gates\[3\]\.min: not a limit; got .*, expected a number, or"
    ):
        Limit.parse(text, "recipe.yaml: gates[3].min")


@given(st.text())
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        limit = Limit.parse(text, "here")
    except RecipeError:
        return
    assert limit.resolve(1.0) is not None


@given(st.floats(0, 1e6), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_written_limits_mean_what_they_say(factor: float, offset: float, dense: float) -> None:
    text = f"{factor!r} * dense {'-' if offset < 0 else '+'} {abs(offset)!r}"
    assert Limit.parse(text, "here").resolve(dense) == pytest.approx(factor * dense + offset)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"metric": PSNR}, r"gates\[0\]: no limit; got neither"),
        ({"metric": PSNR, "min": None, "max": None}, "no limit"),
        ({"min": 3}, r"gates\[0\]\.metric: unknown metric; got 'None'"),
        ({"metric": "fidelity.judge_rat", "min": 3}, r"Did you mean 'fidelity\.judge_rate'\?"),
        ({"metric": PSNR, "mim": 3}, r"gates\[0\]\.mim: unknown key; .* Did you mean 'min'\?"),
        ({"metric": PSNR, "min": "much"}, r"gates\[0\]\.min: not a limit; got 'much'"),
        ({"metric": PSNR, "max": "0.9 dense"}, r"gates\[0\]\.max: not a limit"),
        ({"metric": PSNR, "min": 3, "targets": []}, r"gates\[0\]\.targets: not target names"),
        ({"metric": PSNR, "min": 3, "targets": [1]}, r"gates\[0\]\.targets: not target names"),
        ({"metric": PSNR, "min": 3, "targets": 4}, r"gates\[0\]\.targets: not target names"),
    ],
)
def test_bad_gates_are_refused_with_the_key_path(spec: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        gate(**spec)


def test_names_that_the_recipe_does_not_have() -> None:
    gate(metric=PSNR, min=3, targets="all", state="final").check(STATES, TARGETS, "g")
    gate(metric=PSNR, min=3, targets=["ort"], state="2-tuned").check(STATES, TARGETS, "g")
    with pytest.raises(RecipeError, match=r"g\.state: no such state; got '2-tune', .* Did you mean '2-tuned'\?"):
        gate(metric=PSNR, min=3, state="2-tune").check(STATES, TARGETS, "g")
    with pytest.raises(RecipeError, match=r"g\.targets: no such target; got 'coreml'"):
        gate(metric=PSNR, min=3, targets="coreml").check(STATES, TARGETS, "g")


@pytest.mark.parametrize(
    ("bound", "limit", "value", "status"),
    [
        ("min", 28, 28.0, "passed"),
        ("min", 28, 27.9999, "missed"),
        ("max", 28, 28.0, "passed"),
        ("max", 28, 28.0001, "missed"),
        ("min", 28, -200.0, "missed"),
    ],
)
def test_absolute_limits(bound: str, limit: float, value: float, status: str) -> None:
    found = one({"metric": PSNR, bound: limit}, taken(PSNR, value))
    assert (found.status, found.limit, found.got) == (status, 28.0, value)


def test_unfavourable_end_of_the_interval_is_compared() -> None:
    rate = taken("fidelity.judge_rate", 0.86, low=0.81, high=0.90)
    found = one({"metric": "fidelity.judge_rate", "min": 0.85}, rate)
    assert (found.status, found.got) == ("missed", 0.81)
    assert "got 0.81 (low end of the interval of 0.86), limit 0.85" in found.message
    assert one({"metric": "fidelity.judge_rate", "min": 0.80}, rate).status == "passed"
    slow = taken("latency.median_ms", 9.0, low=8.5, high=10.5)
    found = one({"metric": "latency.median_ms", "max": 10}, slow)
    assert (found.status, found.got) == ("missed", 10.5)
    assert "got 10.50 (high end of the interval of 9.00), limit 10.00" in found.message


def test_both_limits_give_a_result_each() -> None:
    found = judge(
        {"metric": "size_bytes", "min": 10, "max": 20, "targets": ["ort"], "state": "0-dense"},
        taken("size_bytes", 25.0, "0-dense", "ort"),
    )
    assert [(result.limit, result.status) for result in found] == [(10.0, "passed"), (20.0, "missed")]


def test_relative_without_a_pair_uses_denses_value_on_the_same_target() -> None:
    measurements = [
        taken("size_bytes", 100.0, "0-dense", "openvino"),
        taken("size_bytes", 500.0, "0-dense", "ort"),
        taken("size_bytes", 90.0, "1-pruned", "openvino"),
        taken("size_bytes", 460.0, "1-pruned", "ort"),
    ]
    found = judge({"metric": "size_bytes", "max": "0.9 * dense", "state": "1-pruned"}, *measurements)
    assert [(r.target, r.status, r.limit, r.got) for r in found] == [
        ("openvino", "passed", 90.0, 90.0),
        ("ort", "missed", 450.0, 460.0),
    ]
    assert "limit 450 (0.9 * dense, where dense has 500)" in found[1].message


@pytest.mark.parametrize(
    ("bound", "limit", "value", "status"),
    [
        ("min", "dense - 2", 28.0, "passed"),
        ("min", "dense - 2", 27.0, "missed"),
        ("max", "dense + 0.5", 30.5, "passed"),
        ("max", "dense + 0.5", 30.6, "missed"),
    ],
)
def test_relative_by_difference(bound: str, limit: str, value: float, status: str) -> None:
    name = "fidelity.clip_score"
    assert one({"metric": name, bound: limit}, taken(name, 30.0, "0-dense"), taken(name, value)).status == status


def paired(name: str, value: float, ends: tuple[float, float], **more: Any) -> Measurement:
    ratio = Ratio(to="0-dense", value=value / 10.0, low=ends[0], high=ends[1], pairs=30)
    return taken(name, value, ratio=ratio, **more)


def test_relative_latency_uses_the_unfavourable_end_of_the_paired_ratio() -> None:
    name = "latency.median_ms"
    dense = taken(name, 10.0, "0-dense", low=9.0, high=11.0)
    # The interval of the median alone reaches beyond the limit; the pairs do not.
    sure = one({"metric": name, "max": "0.9 * dense"}, dense, paired(name, 8.5, (0.84, 0.87), low=7.0, high=12.0))
    assert (sure.status, sure.limit, sure.got) == ("passed", 9.0, pytest.approx(8.7))
    unsure = one({"metric": name, "max": "0.9 * dense"}, dense, paired(name, 8.5, (0.80, 0.93)))
    assert (unsure.status, unsure.got) == ("missed", pytest.approx(9.3))
    assert "got 9.30 (high end of the paired ratio to dense; measured 8.50), limit 9.00" in unsure.message
    assert one({"metric": name, "max": 9}, dense, paired(name, 8.5, (0.80, 0.93))).got == 8.5


def test_relative_rate_uses_the_low_end_of_its_ratio() -> None:
    name = "fidelity.judge_rate"
    dense = taken(name, 0.9, "0-dense", low=0.8, high=0.95)
    ratio = Ratio(to="0-dense", value=0.99, low=0.96, high=1.02, pairs=100)
    cell = taken(name, 0.891, low=0.80, high=0.94, ratio=ratio)
    assert one({"metric": name, "min": "0.95 * dense"}, dense, cell).status == "passed"
    assert one({"metric": name, "min": "0.97 * dense"}, dense, cell).status == "missed"
    assert one({"metric": name, "min": "dense - 0.02"}, dense, cell).status == "missed"


def test_a_ratio_to_dense_in_torch_counts() -> None:
    """Images are paired with those of the dense pipeline in torch, whatever the target made of dense."""
    name = "fidelity.judge_rate"
    ratio = Ratio(to="0-dense in torch", value=0.99, low=0.96, high=1.02, pairs=100)
    cell = taken(name, 0.891, low=0.80, high=0.94, ratio=ratio)
    dense = taken(name, 0.9, "0-dense")
    assert one({"metric": name, "min": "0.95 * dense"}, dense, cell).status == "passed"
    assert one({"metric": name, "min": "0.97 * dense"}, dense, cell).status == "missed"


def test_a_ratio_to_something_else_than_dense_is_not_used() -> None:
    name = "latency.median_ms"
    ratio = Ratio(to="1-other", value=0.5, low=0.4, high=0.6, pairs=30)
    cell = taken(name, 9.5, ratio=ratio)
    assert one({"metric": name, "max": "0.9 * dense"}, taken(name, 10.0, "0-dense"), cell).got == 9.5


def test_dense_is_not_compared_with_itself_but_has_absolute_limits() -> None:
    name = "fidelity.judge_rate"
    dense = [taken(name, 0.5, "0-dense", target) for target in TARGETS]
    assert judge({"metric": name, "min": "0.95 * dense", "state": "0-dense"}, *dense) == []
    assert [r.status for r in judge({"metric": name, "min": 0.6, "state": "0-dense"}, *dense)] == ["missed"] * 2
    both = judge({"metric": name, "min": "0.95 * dense", "max": 1, "state": "0-dense"}, *dense)
    assert [r.limit for r in both] == [1.0, 1.0]


def test_states_and_targets_of_a_gate() -> None:
    cells = [taken(PSNR, 30.0, state, target) for state in STATES for target in TARGETS]

    def where(**spec: Any) -> list[tuple[str, str]]:
        return [(r.state, r.target) for r in judge({"metric": PSNR, "min": 20, **spec}, *cells)]

    assert sorted(where()) == sorted((state, target) for state in STATES for target in TARGETS)
    assert where(state="all", targets="all") == where()
    assert where(state="final") == [("2-tuned", "openvino"), ("2-tuned", "ort")]
    assert where(state="1-pruned", targets=["ort"]) == [("1-pruned", "ort")]
    assert where(targets="ort", state="final") == [("2-tuned", "ort")]


def test_only_one_state_is_judged_while_the_run_goes_on() -> None:
    cells = [taken(PSNR, 30.0, "0-dense", target) for target in TARGETS]
    found = judge({"metric": PSNR, "min": 20}, *cells, only_state="0-dense")
    assert [(r.state, r.status) for r in found] == [("0-dense", "passed")] * 2
    assert judge({"metric": PSNR, "min": 20, "state": "final"}, *cells, only_state="0-dense") == []


def test_what_is_missing_is_never_passed() -> None:
    nothing = one({"metric": PSNR, "min": -1e9})
    assert (nothing.status, nothing.got, nothing.limit) == ("not measured", None, -1e9)
    assert "Reason: nothing was measured here" in nothing.message
    reason = one(
        {"metric": "fidelity.image.lpips", "max": 1e9}, taken("fidelity.image.lpips", None, note="no weights. ")
    )
    assert (reason.status, reason.got) == ("not measured", None)
    assert reason.message.endswith("not measured; expected max 1e+09. Reason: no weights.")
    silent = one({"metric": PSNR, "min": 1}, taken(PSNR, None))
    assert "no reason was given" in silent.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_not_measured(value: float) -> None:
    assert one({"metric": "latency.median_ms", "max": 1e9}, taken("latency.median_ms", value)).status == "not measured"


def test_interval_end_that_is_nan_misses() -> None:
    cell = taken("latency.median_ms", 1.0, high=float("nan"))
    assert one({"metric": "latency.median_ms", "max": 5}, cell).status == "missed"


def test_relative_without_dense_is_not_measured() -> None:
    name = "size_bytes"
    for dense in ([], [taken(name, None, "0-dense")], [taken(name, 5.0, "0-dense", "ort")]):
        found = one({"metric": name, "max": "0.9 * dense"}, *dense, taken(name, 1.0))
        assert (found.status, found.limit) == ("not measured", None)
        assert "dense was not measured on openvino, so '0.9 * dense' has no value" in found.message


def test_latencies_of_different_modes_are_not_compared() -> None:
    name = "latency.p90_ms"
    dense = taken(name, 10.0, "0-dense", detail={"mode": {"threads": 2, "load": 0.1}})
    same = taken(name, 5.0, detail={"mode": {"threads": 2, "load": 3.0}})
    other = taken(name, 5.0, detail={"mode": {"threads": 4, "load": 0.1}})
    assert one({"metric": name, "max": "0.9 * dense"}, dense, same).status == "passed"
    found = one({"metric": name, "max": "0.9 * dense"}, dense, other)
    assert found.status == "not measured"
    assert "timed under another mode" in found.message
    assert one({"metric": name, "max": 9}, dense, other).status == "passed"


def test_every_component_is_judged_and_named() -> None:
    name = "lowering.psnr_db"
    cells = [taken(name, value, component=part) for part, value in (("unet", 50.0), ("vae_decoder", 40.0))]
    found = judge({"metric": name, "min": 45, "targets": ["openvino"], "state": "1-pruned"}, *cells)
    assert [(r.component, r.status) for r in found] == [("unet", "passed"), ("vae_decoder", "missed")]
    assert found[1].message.startswith(
        "gate lowering.psnr_db, state 1-pruned, target openvino, component vae_decoder: got 40.0, limit 45.0."
    )
    only = one({"metric": name, "min": 45, "component": "unet"}, *cells)
    assert only.status == "passed"
    absent = one({"metric": name, "min": 45, "component": "text_encoder"}, *cells)
    assert (absent.status, absent.component) == ("not measured", "text_encoder")


def test_relative_limits_pair_components() -> None:
    name = "size_bytes"
    cells = [
        taken(name, value, state, component=part)
        for state, part, value in (
            ("0-dense", "unet", 100.0),
            ("0-dense", "vae_decoder", 10.0),
            ("1-pruned", "unet", 70.0),
            ("1-pruned", "vae_decoder", 10.0),
        )
    ]
    found = judge({"metric": name, "max": "0.9 * dense", "targets": ["openvino"], "state": "1-pruned"}, *cells)
    assert [(r.component, r.limit, r.status) for r in found] == [
        ("unet", 90.0, "passed"),
        ("vae_decoder", 9.0, "missed"),
    ]


def test_missed_psnr_names_the_timestep() -> None:
    cell = taken(PSNR, 24.1, "2-tuned", timestep=41.0, component="unet")
    (found,) = judge({"metric": PSNR, "min": 28.0, "targets": ["openvino"], "state": "final"}, cell)
    assert (found.status, found.timestep, found.component) == ("missed", 41.0, "unet")
    assert found.message.startswith(
        "gate fidelity.teacher_forced.psnr_db, state 2-tuned, target openvino, component unet: "
        "got 24.1 at timestep 41, limit 28.0. "
    )
    assert found.message.endswith("or change the limit.")


def test_timestep_is_found_in_the_curve_when_the_measurement_names_none() -> None:
    cell = taken(PSNR, 24.1, detail={"curve": [[900.0, 31.0], [41.0, 24.1], [1.0, 30.0]]})
    assert one({"metric": PSNR, "min": 28}, cell).timestep == 41.0
    assert one({"metric": PSNR, "min": 28}, taken(PSNR, 24.1, detail={"curve": []})).timestep is None


def test_a_miss_by_less_than_the_digits_shown_is_readable() -> None:
    found = one({"metric": PSNR, "min": 28}, taken(PSNR, 27.97))
    assert "got 27.97, limit 28.0." in found.message


def test_passed_gates_say_so_without_advice() -> None:
    found = one({"metric": PSNR, "min": 28}, taken(PSNR, 31.25))
    assert found.message == f"gate {PSNR}, state 1-pruned, target openvino: got 31.2, limit 28.0."


def test_results_have_the_fields_of_the_reports_record() -> None:
    found = one({"metric": PSNR, "min": 28}, taken(PSNR, 31.25))
    assert {field.name for field in fields(found)} == set(GateRecord.model_fields)
    record = GateRecord(**vars(found))
    assert record.gate == {"metric": PSNR, "min": 28, "targets": ["openvino"], "state": "1-pruned"}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_can_be_gated_and_says_what_to_do(name: str) -> None:
    found = one({"metric": name, "max": 1e-12}, taken(name, 1e20))
    assert found.status == "missed"
    assert found.message.endswith((".", "limit."))
    assert METRICS[name].advice in found.message

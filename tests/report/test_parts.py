"""What the renderings are built from: table, difference maps, curves and charts."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from report_samples import gate, measurement, sample_record

from exporter.report import evidence, images, page, plots, table
from exporter.report.charts import Axes, Line, Point, line_chart, scatter_chart
from exporter.report.record import CellRecord, RunRecord


@pytest.fixture
def record() -> RunRecord:
    return sample_record(Path(), images=False)


def cell(*measurements: object) -> CellRecord:
    return CellRecord.model_validate(
        {"state": "0-dense", "target": "openvino", "status": "ok", "measurements": measurements}
    )


def test_value_of_the_whole_pipeline_decides_before_those_of_components() -> None:
    found = [measurement("lowering.psnr_db", 20.0, component="unet"), measurement("lowering.psnr_db", 50.0)]
    assert table.deciding(found, table.COLUMNS[-1]) == found[1]


def test_worst_component_decides_on_fidelity_and_the_denoiser_on_latency() -> None:
    fidelity = [
        measurement(table.FIDELITY, value, "dB", component=name)
        for name, value in (("unet", 40.0), ("vae_decoder", 20.0))
    ]
    latency = [
        measurement("latency.median_ms", value, component=name) for name, value in (("unet", 4.0), ("vae_decoder", 9.0))
    ]
    assert table.deciding(fidelity, table.FIDELITY_COLUMN) == fidelity[1]
    assert table.deciding(latency, table.LATENCY_COLUMN) == latency[0]


def test_measured_value_decides_before_a_missing_one() -> None:
    found = [
        measurement(table.FIDELITY, None, component="unet"),
        measurement(table.FIDELITY, 30.0, component="vae_decoder"),
    ]
    assert table.deciding(found, table.FIDELITY_COLUMN) == found[1]
    assert table.deciding(found[:1], table.FIDELITY_COLUMN) == found[0]
    assert table.deciding([], table.FIDELITY_COLUMN) is None


def test_missed_gate_of_another_component_marks_the_cell_and_names_it(record: RunRecord) -> None:
    found = cell(measurement("latency.median_ms", 4.0, "ms", component="unet"))
    missed = gate("missed", metric="latency.median_ms", gate={"max": 5}, limit=5.0, got=9.0, component="vae_decoder")
    one = table.build(record.model_copy(update={"cells": [found], "gates": [missed]}))
    entry = next(entry for entry in one.rows[0].entries if entry.column == table.LATENCY_COLUMN)
    assert entry.status == "missed"
    assert entry.limits[0].text == "≤ 5.00 ms vae_decoder"


def test_a_limit_relative_to_dense_stands_in_the_recipes_words_beside_a_value_of_another_moment(
    record: RunRecord,
) -> None:
    found = cell(measurement("latency.median_ms", 52.2, "ms", component="unet"))
    words = {"metric": "latency.median_ms", "max": "0.95 * dense"}
    passed = gate("passed", metric="latency.median_ms", gate=words, limit=41.1, got=38.3, component="unet")
    one = table.build(record.model_copy(update={"cells": [found], "gates": [passed]}))
    entry = next(entry for entry in one.rows[0].entries if entry.column == table.LATENCY_COLUMN)
    assert entry.limits[0].text == "≤ 0.95 × dense"


def test_gated_metric_outside_the_usual_columns_gets_its_own(record: RunRecord) -> None:
    assert table.build(record).columns[-1].metric == "fidelity.image.lpips"


def test_difference_map_is_the_absolute_difference_times_four_and_clipped() -> None:
    dense = np.array([[[10, 200, 0]]], dtype=np.uint8)
    other = np.array([[[0, 210, 255]]], dtype=np.uint8)
    assert images.difference(other, dense).tolist() == [[[40, 40, 255]]]
    assert images.difference(dense, other).tolist() == [[[40, 40, 255]]]


def test_distance_of_images_is_the_usual_psnr() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (8, 8, 3)).astype(np.uint8) for _ in range(2))
    error = np.mean((first.astype(float) - second.astype(float)) ** 2)
    assert images.psnr_db(first, second) == pytest.approx(20 * np.log10(255) - 10 * np.log10(error))
    assert math.isinf(images.psnr_db(first, first))


def test_curve_is_read_in_the_order_of_denoising_and_survives_odd_entries() -> None:
    odd = {"curve": [[1, 30.0], [999, "Infinity"], ["x", 1.0], [5], None, [500, None], [400, True]]}
    assert plots.curve_of(measurement("a", 1.0, detail=odd)) == ((999.0, math.inf), (1.0, 30.0))
    assert plots.curve_of(measurement("a", 1.0)) == ()


def test_equal_and_missing_values_are_named_below_the_chart(record: RunRecord) -> None:
    curve = [[999.0, 200.0], [500.0, 40.0]]
    found = [
        measurement(table.FIDELITY, 200.0, "dB", component="unet", detail={"curve": curve}),
        measurement("latency.median_ms", 4.0, "ms", component="unet"),
    ]
    nothing = CellRecord(state="1-pruned", target="openvino", status="ok")
    one = record.model_copy(update={"cells": [cell(*found), nothing], "gates": []})
    assert plots.tradeoffs(one) == ()
    notes = [chart.notes for chart in plots.timesteps(one)]
    assert notes == [("0-dense: 1 timestep of 2 equal or not finite, not drawn", "1-pruned: not measured per timestep")]


@pytest.mark.parametrize("points", [(), ((1.0, math.nan),), ((1.0, 2.0),), ((0.0, 1e300), (1.0, -1e300))])
def test_line_charts_of_odd_data_are_well_formed(points: tuple[tuple[float, float], ...]) -> None:
    lines = [Line("<b>&$x^2$", 11, points, "11")]
    root = ET.fromstring(line_chart(lines, Axes("a", "x $", "y", "<described>")))
    assert root.get("aria-label") == "<described>"
    assert [title.text for title in root.iter("title")] == ["<b>&$x^2$"]


def test_charts_have_own_ids_and_no_sheet_that_would_reach_the_page() -> None:
    points = [Point(f"p{index}", index, index, "0", 1.0, 2.0, (0.5, 1.5), (math.nan, 3.0)) for index in range(9)]
    root = ET.fromstring(scatter_chart(points, Axes("one", "x", "y", "d", limit=2.5)))
    assert all(value.startswith("one-") for value in (element.get("id") for element in root.iter()) if value)
    assert not list(root.iter("style"))
    assert not list(root.iter("metadata"))
    assert len(list(root.iter("title"))) == 9


def test_evidence_of_any_shape_is_counted(record: RunRecord) -> None:
    odd = cell()
    odd.evidence = {"unet": {"layers": [{"precision": "f32"}, {"precision": None}, "nonsense"]}, "vae_decoder": {}}
    ((_, parts),) = evidence.build(record.model_copy(update={"cells": [odd]}))
    assert parts[0].precisions == (("f32", 1), ("unknown", 1))
    assert parts[1].total == 0


def test_nested_facts_become_dotted_rows() -> None:
    found = {"a": {"b": [1, 2.5, None, True]}, "c": {}, "d": [{"e": "x"}], "f": list(range(99)), "g": math.inf, "h": []}
    assert page.flat(found) == [
        ("a.b", "1, 2.5, none, yes"),
        ("c", "none"),
        ("d[0].e", "x"),
        ("f", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... 99 in all"),
        ("g", "∞"),
        ("h", "none"),
    ]


def test_tables_of_facts_come_behind_what_fits_on_a_line():
    facts = {"scores": {str(i): i for i in range(70)}, "removed": ["a", "b"], "kept": {"asked": 1, "met": True}}
    shown = page._bounded(page.flat(page._short_first(facts)))
    assert [name for name, _ in shown][:4] == ["removed", "kept.asked", "kept.met", "scores.0"]
    assert shown[-1][0] == "..."


def test_what_a_lint_found_is_told_rule_by_rule(record: RunRecord) -> None:
    linted = cell()
    rule = {"rule": "linear", "strength": "vendor", "source": "Apple", "fix": "Write it so.", "count": 7}
    told = {
        "device": "Neural Engine",
        "risky": 7,
        "operations": 9,
        "findings": [{**rule, "examples": ["a (x)"]}, rule, 3],
    }
    linted.evidence = {"unet": {"placement": told}, "vae_decoder": {"placement": "nonsense"}}
    ((_, parts),) = evidence.build(record.model_copy(update={"cells": [linted]}))
    assert parts[0].notes[0] == "lint for the Neural Engine: 7 of 9 operations break a rule; it certifies nothing"
    assert parts[0].notes[1] == "vendor: linear: 7, such as a (x). Write it so. (Apple)"
    assert len(parts[0].notes) == 3
    assert parts[1].notes == ()

"""Two runs side by side: numbers of both, what differs, and what must not be compared beside the numbers."""

from __future__ import annotations

from typing import Any

import pytest
from report_samples import sample_record

from exporter.report.comparison import Comparison, compare, differences, group_of
from exporter.report.comparison_text import WIDTH, render_comparison
from exporter.report.record import RunRecord


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    found = sample_record(tmp_path_factory.mktemp("sample"))
    environment = {"cpu": "Some CPU", "cores": 2, "libraries": {"torch": "2.13.0"}}
    measure = found.recipe["measure"] | {"prompts": "set", "seed": 0}
    return found.model_copy(update={"environment": environment, "recipe": found.recipe | {"measure": measure}})


def _changed(record: RunRecord, **changes: Any) -> RunRecord:
    return record.model_copy(deep=True, update=changes)


def _faster(record: RunRecord, factor: float) -> RunRecord:
    cells = []
    for cell in record.cells:
        measured = [
            item.model_copy(update={"value": item.value * factor})
            if item.name == "latency.median_ms" and item.value is not None
            else item
            for item in cell.measurements
        ]
        cells.append(cell.model_copy(update={"measurements": measured}))
    return _changed(record, cells=cells)


def _text(found: Comparison) -> str:
    text = render_comparison(found, ("runs/a", "runs/b"))
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    return text


def _pairs(found: Comparison, metric: str) -> list[Any]:
    return [pair for pair in found.pairs if pair.metric == metric and pair.a is not None and pair.b is not None]


def test_a_run_is_the_same_as_itself(record: RunRecord) -> None:
    found = compare(record, record)
    assert found.recipe == ()
    assert found.obstacles == ()
    assert {pair.difference for pair in found.pairs if pair.a is not None} == {0.0}
    text = _text(found)
    assert "The recipes are the same." in text
    assert "NOT COMPARABLE" not in text
    assert "better" not in text


def test_what_differs_is_shown_with_its_direction(record: RunRecord) -> None:
    recipe = record.recipe | {"stages": [{"prune": {"method": "magnitude", "keep_ratio": 0.5}}]}
    found = compare(record, _changed(_faster(record, 0.5), recipe=recipe))
    assert found.obstacles == ()
    latency = _pairs(found, "latency.median_ms")
    assert latency
    assert {pair.ratio for pair in latency} == {0.5}
    assert all(pair.difference == pytest.approx(-pair.a / 2) for pair in latency)
    keys = {difference.key for difference in found.recipe}
    assert any(key.startswith("stages[0].prune") for key in keys)
    text = _text(found)
    assert "0.5 times, better" in text
    assert "keep_ratio" in text
    assert "2 times, worse" in _text(compare(_faster(record, 0.5), record))


OBSTACLES: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "machine": (
        {"environment": {"cpu": "Other", "cores": 8, "libraries": {"torch": "2.13.0"}}},
        "other machine",
        {"latency"},
    ),
    "versions": (
        {"environment": {"cpu": "Some CPU", "cores": 2, "libraries": {"torch": "2.14.0"}}},
        "other versions of libraries",
        {"latency"},
    ),
    "steps": (
        {"sampling": {"scheduler": "dpm-solver++", "steps": 4, "guidance": 4.0, "size": 64}},
        "other sampling",
        {"fidelity", "lowering"},
    ),
    "size": (
        {"sampling": {"scheduler": "dpm-solver++", "steps": 20, "guidance": 4.0, "size": 128}},
        "other image size or batch",
        {"fidelity", "lowering", "latency"},
    ),
    "source": ({"source": {"path": "x", "digest": "0"}}, "other source model", {"fidelity"}),
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_must_not_be_compared_is_said_beside_the_numbers(what: str, record: RunRecord) -> None:
    changes, words, groups = OBSTACLES[what]
    found = compare(record, _changed(record, **changes))
    (obstacle,) = found.obstacles
    assert obstacle.what.startswith(words)
    assert set(obstacle.groups) == groups
    for pair in found.pairs:
        if pair.a is None or pair.b is None:
            continue
        is_refused = group_of(pair.metric) in groups
        assert (words in pair.refused) is is_refused
        assert (pair.difference is None) is is_refused
    text = " ".join(_text(found).split())
    assert f"not compared: {words}" in text
    assert "NOT COMPARABLE" in text


@pytest.mark.parametrize("key", ["seed", "prompts", "images"])
def test_other_prompts_and_seeds_are_not_compared(key: str, record: RunRecord) -> None:
    measure = record.recipe["measure"] | {key: 7}
    found = compare(record, _changed(record, recipe=record.recipe | {"measure": measure}))
    assert [obstacle.what for obstacle in found.obstacles] == ["other prompts or seeds"]
    assert all(pair.refused for pair in _pairs(found, "fidelity.image.psnr_db"))
    assert all(not pair.refused for pair in _pairs(found, "latency.median_ms"))


def test_a_file_of_prompts_that_changed_under_its_name_is_noticed(record: RunRecord) -> None:
    other = _changed(record)
    images = [image.model_copy(update={"prompt": "another"}) for image in other.cells[0].images]
    other.cells[0] = other.cells[0].model_copy(update={"images": images})
    (obstacle,) = compare(record, other).obstacles
    assert obstacle.what == "other prompts or seeds"
    assert "another (seed" in str(obstacle.differences[0].b)


def test_a_cell_that_only_one_run_has_is_shown_with_the_reason(record: RunRecord) -> None:
    other = _changed(record, cells=[cell for cell in record.cells if cell.target != "ort"])
    found = compare(record, other)
    missing = [pair for pair in found.pairs if pair.target == "ort"]
    assert missing
    assert all(pair.b is None and pair.why_b == "no such state or target in this run" for pair in missing)
    failed = [pair for pair in found.pairs if pair.why_a.startswith("failed:")]
    assert failed, "the sample holds a failed cell"
    assert "no such state or target in this run" in _text(found)


def test_differences_are_named_by_path() -> None:
    a, b = {"x": [1, {"y": 2}], "only": 1}, {"x": [1, {"y": 3}, 4]}
    found = [(item.key, item.a, item.b) for item in differences(a, b)]
    assert found == [("x[1].y", 2, 3), ("x[2]", None, 4), ("only", 1, None)]

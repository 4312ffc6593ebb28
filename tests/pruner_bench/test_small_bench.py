"""A bench from beginning to end, as small as it gets; the second call finds everything done."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.progress import Silent
from exporter.pruner_bench.bench import Plan, bench_pruners, in_order
from exporter.pruner_bench.contestants import chosen
from exporter.pruner_bench.running import Setting

pytestmark = pytest.mark.slow


@pytest.mark.timeout(400)
def test_a_bench_measures_every_line_and_resumes(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, 4, batch=4, steps=4, latency_seconds=0.5, source=str(tiny_pipeline_folder))
    plan = Plan(chosen(("fewer-steps", "magnitude 2:4")), (0.5,), seeds=1, recovery=0, long_recovery=0, long_images=4)
    rows = in_order(bench_pruners(plan, setting, Silent()))
    assert [(row.name, row.recovery, row.status) for row in rows] == [
        ("dense", 0, "ok"),
        ("answer of zeros", 0, "ok"),
        ("fewer-steps", 0, "ok"),
        ("magnitude 2:4", 0, "ok"),
    ], [row.note for row in rows]
    dense, zeros, fewer, pruned = rows
    assert dense.values["psnr_worst_db"].value > 100
    assert dense.values["macs"].value == pytest.approx(pruned.values["macs"].value)
    assert zeros.values["psnr_mean_db"].value < pruned.values["psnr_mean_db"].value
    assert fewer.note == "2 steps"
    assert fewer.values["latency_ratio"].value == pytest.approx(0.5, abs=0.25)
    assert pruned.stage["prune"]["pattern"] == "2:4"

    def never(*_: object) -> None:
        raise AssertionError("a finished line is measured again")

    monkeypatch.setattr("exporter.pruner_bench.bench.run_stages", never)
    assert in_order(bench_pruners(plan, setting, Silent())) == rows

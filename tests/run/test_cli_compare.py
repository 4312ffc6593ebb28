"""`exporter compare` on a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def test_compare_shows_two_runs_and_what_must_not_be_compared(call: Any, finished: Path, tmp_path: Path) -> None:
    code, said, _ = call("compare", finished, finished / "report.json")
    assert code == 0
    assert "The recipes are the same." in said
    assert "1-pruned on ort" in said
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(finished / "report.json", other)
    record = json.loads((other / "report.json").read_text())
    record["environment"]["cpu"] = "another"
    record["recipe"]["stages"][0]["prune"]["keep_ratio"] = 0.5
    (other / "report.json").write_text(json.dumps(record))
    code, said, _ = call("compare", finished, other)
    assert code == 0
    assert "stages[0].prune.keep_ratio: 0.75 | 0.5" in said
    assert "not compared: other machine" in said
    found = json.loads(call("compare", finished, other, "--json")[1])
    assert [item["what"] for item in found["obstacles"]] == ["other machine"]
    latency = [pair for pair in found["pairs"] if pair["metric"] == "latency.median_ms"]
    assert latency
    assert all(pair["ratio"] is None and pair["a"] == pair["b"] for pair in latency)


def test_what_is_no_run_is_a_sentence(call: Any, finished: Path, tmp_path: Path) -> None:
    code, _, said = call("compare", finished, tmp_path)
    assert code == 2
    assert "expected a report.json" in said

"""The benchmark scripts run as they stand, on networks small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def lines_of(root: Path, *command: str) -> list[dict[str, Any]]:
    script = [sys.executable, "-W", "ignore", *command]
    done = subprocess.run(script, cwd=root, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_benchmark_prints_every_step_and_the_ratios(root: Path, tmp_path: Path) -> None:
    *steps, end = lines_of(root, "ci/bench_real_size.py", "tiny", str(tmp_path), "--budget-s", "1")
    assert [next(iter(step)) for step in steps] == ["make", "ours", "bare", "parity", "compile", "call", "pairs"]
    figures = {name: facts for step in steps for name, facts in step.items()}
    assert all(facts["peak_rss_mib"] > 10 for facts in figures.values())
    assert figures["parity"]["psnr_db"] > 100
    assert end["ratios"]["export_peak_to_bare"] > 0
    assert end["ratios"]["openvino_to_hand_written"]["pairs"] >= 3


def test_the_pruning_benchmark_holds_every_variant_to_torch_and_to_dense(root: Path, tmp_path: Path) -> None:
    little = ("--family", "narrow", "--latent", "16", "--precision", "f32", "--only", "dense,bk-sdm-tiny,schedule")
    steps = ("--steps", "make,prune,export,parity,compile,together")
    *told, end = lines_of(root, "ci/bench_real_pruning.py", str(tmp_path), *little, *steps)
    found = {(line["step"], line["variant"]): line for line in told}
    assert found["prune", "bk-sdm-tiny"]["kept"] < 0.6
    assert len(found["parity", "schedule"]["psnr_db"]) == 3
    for name in ("dense", "bk-sdm-tiny", "schedule"):
        assert all(value > 100 for value in found["parity", name]["psnr_db"].values())
    ratio, low, high = found["together", ""]["bk-sdm-tiny"]
    assert low <= ratio <= high < 1
    for line in told:  # where the system tells it
        assert 0 < (line["peak_anonymous_mib"] or 1) <= line["peak_rss_mib"]
    assert end["machine"]["cores"] > 0


def test_the_quantizing_benchmark_weighs_and_times_every_scheme(root: Path, tmp_path: Path) -> None:
    little = ("--family", "narrow", "--latent", "16", "--only", "dense,int8,int4-weights")
    *told, end = lines_of(root, "ci/bench_real_quantizing.py", str(tmp_path), *little)
    found = {(line["step"], line["variant"]): line for line in told}
    assert found["fit", ""]["facts"]["calls"] == 2
    assert found["write", "int4-weights"]["of_f32"] < found["write", "int8"]["of_f32"] < 0.3
    ratio, low, high = found["together", ""]["int8"]
    assert 0 < low <= ratio <= high
    assert any("i8" in kind or "u8" in kind for kind in found["layers", "int8"]["ms"])
    assert not any("i8" in kind or "u8" in kind for kind in found["layers", "dense"]["ms"])
    assert end["machine"]["cores"] > 0

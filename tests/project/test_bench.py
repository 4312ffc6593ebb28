"""The benchmark script runs as it stands, on a network small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_benchmark_prints_every_step_and_the_ratios(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "ci/bench_real_size.py", "tiny", str(tmp_path), "--budget-s", "1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    *steps, end = (json.loads(line) for line in done.stdout.splitlines())
    assert [next(iter(step)) for step in steps] == ["make", "ours", "bare", "parity", "compile", "call", "pairs"]
    figures = {name: facts for step in steps for name, facts in step.items()}
    assert all(facts["peak_rss_mib"] > 10 for facts in figures.values())
    assert figures["parity"]["psnr_db"] > 100
    assert end["ratios"]["export_peak_to_bare"] > 0
    assert end["ratios"]["openvino_to_hand_written"]["pairs"] >= 3

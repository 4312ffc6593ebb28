"""What ci/gpu.sh measures, as far as it goes without a GPU: the shapes, the clock, the networks, and the table."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.lowering.wrappers import wrap
from exporter.networks.sparsity import broken
from exporter.random_weights.families import family

GAIN = {"value": 1.3, "low": 1.25, "high": 1.34, "pairs": 50}


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return a function that imports a script of ci/."""
    monkeypatch.syspath_prepend(str(root / "ci"))
    return importlib.import_module


def ran(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


class TestShapes:
    @pytest.fixture(scope="class")
    @classmethod
    def layers(cls, root: Path) -> list[dict[str, Any]]:
        done = ran(root, "ci/gpu_networks.py")
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def test_there_are_at_least_thirty_and_each_once(self, layers: list[dict[str, Any]]) -> None:
        shapes = {(layer["rows"], layer["inputs"], layer["outputs"]) for layer in layers}
        assert len(shapes) == len(layers) >= 30

    @pytest.mark.parametrize(
        ("network", "rows", "inputs", "outputs", "count"),
        [
            ("sd15", 8192, 320, 2560, 5),  # 64 x 64 places of two images, the gated first half of a feed-forward
            ("sd15", 154, 768, 1280, 12),  # keys and values of 77 tokens, six blocks of the deepest widths
            ("sdxl", 2048, 1280, 10240, 60),  # ten blocks deep, at six places
            ("flux-block", 4608, 3072, 12288, 1),  # image and text together in the single block
            ("flux-block", 512, 12288, 3072, 1),
        ],
    )
    def test_they_are_those_of_the_published_networks(
        self, layers: list[dict[str, Any]], network: str, rows: int, inputs: int, outputs: int, count: int
    ) -> None:
        found = {(layer["rows"], layer["inputs"], layer["outputs"]): layer["where"] for layer in layers}
        assert found[rows, inputs, outputs][network] == count

    def test_what_can_be_sparse_of_a_network_is_a_share_of_its_multiplications(
        self, script: Callable[[str], Any]
    ) -> None:
        networks = script("gpu_networks")
        convolutions, transformer = networks.eligible_share("sd15"), networks.eligible_share("flux-block")
        assert 0.2 < convolutions < 0.5
        assert transformer == 1


class TestClock:
    """Times come from the device's events alone."""

    class Event:
        now = 0.0

        def record(self) -> None:
            self.at = TestClock.Event.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, last: Any) -> float:
            return float(last.at - self.at)

    def test_pairs_are_timed_by_the_device(self, script: Callable[[str], Any]) -> None:
        bench, event = script("bench_gpu"), TestClock.Event

        def working(ms: float) -> Callable[[], None]:
            return lambda: setattr(event, "now", event.now + ms)

        given = argparse.Namespace(samples=30, budget_s=60.0)
        told = bench.pairs_of(working(3.0), working(2.0), given, 10, bench.DeviceClock(event))
        assert told["gain"] == {"value": 1.5, "low": 1.5, "high": 1.5, "pairs": 30}
        assert told["dense_us"] == pytest.approx(300)
        assert told["sparse_us"] == pytest.approx(200)
        assert told["settled"]


class TestNetworks:
    def test_random_weights_are_finite_and_their_linear_layers_two_of_four(self, script: Callable[[str], Any]) -> None:
        bench, networks = script("bench_gpu"), script("gpu_networks")
        part = next(part for part in family("flux", tiny=True).parts if part.folder == "transformer")
        network = networks.Network("flux", "transformer", part.config, 1, 8, 16)
        module = networks.built(network, "cpu")
        bench.fill(module, torch.float16, "cpu")
        chosen = bench.prune(module)
        linear = {path: layer for path, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
        assert 10 < len(chosen) <= len(linear)
        for path, layer in chosen.items():
            assert not broken(layer.weight, (2, 4)), path
            assert 0.4 < float((layer.weight == 0).float().mean()) < 0.6
        with torch.no_grad():
            answer = wrap(module.float())(*networks.inputs_of(network, module))
        assert torch.isfinite(answer).all()
        assert float(answer.std()) > 0

    def test_answers_that_differ_or_are_not_finite_are_far(self, script: Callable[[str], Any]) -> None:
        far = script("bench_gpu").largest_difference
        answer = torch.tensor([1.0, -4.0])
        assert far(answer, answer) == 0
        assert far(answer, torch.tensor([1.0, -3.0])) == 0.25
        assert far(answer, torch.tensor([1.0, float("nan")])) == float("inf")


class TestTable:
    def row(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"rows": 64, "inputs": 32, "outputs": 16, "where": {"sd15": 5}, "kind": kind, **more}

    def taken(self, gain: dict[str, Any] = GAIN) -> dict[str, Any]:
        return {"dense_us": 13.04, "sparse_us": 10.0, "gain": gain, "settled": True, "off": 0.001}

    def told(self, layers: list[dict[str, Any]], whole: list[dict[str, Any]]) -> dict[str, Any]:
        machine = {"gpu": "a GPU", "torch": "2.13.0", "cusparselt": 702, "driver_version": "unknown"}
        return {"format": 1, "machine": machine, "pairs": 50, "layers": layers, "whole": whole}

    def test_it_says_what_was_measured_and_how(self, script: Callable[[str], Any]) -> None:
        lost = {"value": 0.8, "low": 0.7, "high": 0.9, "pairs": 50}
        layers = [
            self.row("fp16", **self.taken(), searched=lost),
            self.row("bf16", **self.taken(lost), search_failed="no such algorithm"),
            self.row("int8", reason="2 rows: torch._int_mm takes 17 or more on a GPU"),
        ]
        whole = {"network": "sd15", "kind": "fp16", "share": 0.5, "linear": 9, **self.taken()}
        text = script("gpu_table").table_of(self.told(layers, [whole]))
        assert text.startswith("# 2:4 on a GPU\n")
        assert "torch 2.13.0, cusparselt 702, driver version unknown" in text
        assert "pair by pair in alternating order between two events of the device" in text
        line = next(line for line in text.splitlines() if line.startswith("| 64 x 32 -> 16"))
        assert "| 13.0 | 10.0 | 1.30 (1.25 to 1.34) | 0.80 (0.70 to 0.90) |" in line
        assert "| 0.80 (0.70 to 0.90) | not measured |" in line
        assert line.endswith("| not measured | | |")
        assert "- fp16: of 1 shapes 1 win, 0 lose" in text
        assert "- bf16: of 1 shapes 0 win, 1 lose" in text
        assert "- int8: nothing was measured." in text
        assert "- 64 x 32 -> 16, int8: 2 rows: torch._int_mm takes 17 or more on a GPU" in text
        assert "- 64 x 32 -> 16, bf16, searched: no such algorithm" in text
        assert "at most 1.33x" in text
        assert "Whole steps that reach it: sd15 in fp16." in text

    def test_every_row_of_a_table_has_as_many_cells_as_its_head(self, script: Callable[[str], Any]) -> None:
        layers = [self.row("fp16", **self.taken(), searched=GAIN), self.row("int8", reason="none")]
        facts = {"network": "sdxl", "kind": "bf16", "share": 0.7}
        text = script("gpu_table").table_of(
            self.told(layers, [{**facts, "reason": "a | b"}, {**facts, **self.taken()}])
        )
        for table in text.split("\n\n"):
            lines = [line.replace("\\|", "") for line in table.splitlines() if line.startswith("|")]
            assert len({line.count("|") for line in lines}) <= 1, table

    def test_what_was_not_measured_has_no_number(self, root: Path, tmp_path: Path) -> None:
        told = self.told([self.row(kind, reason="no kernel") for kind in ("fp16", "bf16", "int8")], [])
        (tmp_path / "gpu.json").write_text(json.dumps(told))
        done = ran(root, "ci/gpu_table.py", str(tmp_path / "gpu.json"))
        assert done.returncode == 0, done.stderr
        _, _, measured = done.stdout.partition("## Whole steps")
        assert "Not measured in this run." in measured
        assert "0.0" not in measured
        assert "nan" not in measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_measured_and_nothing_written(root: Path, tmp_path: Path) -> None:
    done = ran(root, "ci/bench_gpu.py", str(tmp_path / "out"))
    assert done.returncode == 4
    assert "not run" in done.stderr
    assert "no NVIDIA GPU" in done.stderr
    assert not done.stdout
    assert not (tmp_path / "out").exists()

"""A kit of packages for Core ML: evaluated on a host that has none, measured on one that has a (played) Core ML."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'diffusion-exporter[coreml]'")

import coreml_stand_in

from exporter.elsewhere.host import main as measure
from exporter.elsewhere.kit import write_kit
from exporter.elsewhere.merged import merge, read_result
from exporter.progress import Silent
from exporter.random_weights.families import family
from exporter.random_weights.writing import write_random
from exporter.report.record import CellRecord, RunRecord
from exporter.report.writing import read_record
from exporter.run import run_recipe
from targets.coreml import CoreMl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "darwin", reason="the run would measure with Core ML itself"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
FIDELITY = ("lowering.psnr_db", "lowering.max_error", "fidelity.teacher_forced.psnr_db")


@pytest.fixture(scope="module")
def run(tiny_recipe: Any, made_once: Callable[..., Path]) -> Path:
    """A run whose only component is a denoiser of images, for Core ML in 16 bits. Read only."""

    def carry_out(folder: Path) -> None:
        write_random(family("ddpm", tiny=True), folder / "ddpm", seed=0, progress=Silent())
        recipe = tiny_recipe(
            source={"path": str(folder / "ddpm")},
            sampling={"steps": 2},
            stages=[],
            targets={"phone": {"type": "coreml", "precision": "f16", "threads": 1}},
            measure={**tiny_recipe().measure.model_dump(), "images": 1, "calls": 1},
            gates=[
                {"metric": "lowering.psnr_db", "min": 30, "component": "denoiser"},
                {"metric": "latency.median_ms", "max": 60000, "targets": ["phone"], "component": "denoiser"},
            ],
        )
        record = run_recipe(recipe, folder / "out", progress=Silent())
        assert record.exit_code == 0, [cell.error for cell in record.cells]
        write_kit(folder / "out", "phone", folder / "kit", Silent())

    return made_once("coreml-kit", carry_out) / "out"


@pytest.fixture
def mine(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("lowered", "recordings")))


@pytest.fixture
def kit(run: Path) -> Path:
    return run.parent / "kit"


def measured_there(kit: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the kit's own script with the kit's own modules."""
    command = [sys.executable, str(kit / "measure.py"), "--out", str(folder / "out"), *words]
    clean = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=300, check=False)


def cell_of(record: RunRecord, target: str) -> CellRecord:
    (found,) = [cell for cell in record.cells if cell.target == target]
    return found


def values(cell: CellRecord) -> dict[tuple[str, str | None], float | None]:
    return {(item.name, item.component): item.value for item in cell.measurements}


def statuses(record: RunRecord, target: str) -> dict[str, str]:
    return {gate.metric: gate.status for gate in record.gates if gate.target == target}


def test_a_host_without_core_ml_evaluates_and_one_with_it_measures(
    kit: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts after each other: what the first cannot tell, the second fills in."""
    done = measured_there(kit, tmp_path, "--name", "linux", "--option", "compute_units=cpu")
    assert done.returncode == 0, done.stderr
    whole = merge(mine, tmp_path / "out" / "result.json")
    here, there = cell_of(whole, "phone"), cell_of(whole, "phone@linux")
    for name in FIDELITY:
        assert values(there)[name, "unet"] == pytest.approx(values(here)[name, "unet"], rel=1e-6), name
    latency = next(item for item in there.measurements if item.name == "latency.median_ms")
    assert latency.value is None
    assert "not run by Core ML" in latency.note
    assert statuses(whole, "phone@linux") == {"lowering.psnr_db": "passed", "latency.median_ms": "not measured"}
    target = next(target for target in whole.targets if target.name == "phone@linux")
    assert (target.options["compute_units"], target.host) == ("cpu", "linux")

    native = coreml_stand_in.install(monkeypatch, tmp_path)
    words = ["--name", "mac-cpu-and-neural-engine", "--option", "compute_units=cpu-and-neural-engine"]
    assert measure(kit, [*words, "--out", str(tmp_path / "mac")]) == 0
    assert {units for _, units in native.opened} == {"CPU_AND_NE"}
    whole = merge(mine, tmp_path / "mac" / "result.json")
    column = "phone@mac-cpu-and-neural-engine"
    assert statuses(whole, column) == {"lowering.psnr_db": "passed", "latency.median_ms": "passed"}
    there = cell_of(whole, column)
    for name in FIDELITY:
        assert values(there)[name, "unet"] == pytest.approx(values(here)[name, "unet"], rel=1e-6), name
    found = values(there)
    assert (found["latency.median_ms", "unet"] or 0) > 0
    assert (found["load_ms", None] or 0) > 0
    layers = there.evidence["unet"]["layers"]
    assert {layer["device"] for layer in layers if layer["type"] == "conv"} == {"Neural Engine"}
    assert {layer["precision"] for layer in layers if layer["type"] == "conv"} == {"f16"}
    assert any("where Core ML plans to run operations: " in note for note in there.evidence["unet"]["notes"])
    assert {cell.target for cell in whole.cells} == {"phone", "phone@linux", column}, "columns of both hosts stay"
    assert read_record(mine).cells == whole.cells
    assert column in (mine / "report.html").read_text()


def test_a_changed_package_is_refused(kit: Path, tmp_path: Path) -> None:
    altered = Path(shutil.copytree(kit, tmp_path / "kit"))
    (weights,) = altered.glob("graphs/*/model.mlpackage/Data/*/weights/weight.bin")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.unlink()  # it may be linked to the run's own
    weights.write_bytes(content)
    done = measured_there(altered, tmp_path)
    assert done.returncode != 0
    assert "weight.bin: damaged; got sha256" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("compute_units=npu", r"compute_units.*npu.*'all', 'cpu-and-neural-engine', 'cpu-and-gpu' or 'cpu'"),
        ("compute_unit=cpu", r"compute_unit: unknown key; expected .* Did you mean 'compute_units'\?"),
        ("compute_units", r"--option: got 'compute_units', expected KEY=VALUE\. Write --option compute_units=cpu"),
        ("precision=f32", r"--option: got 'precision', which .* converted with already; expected .* make another kit"),
    ],
)
def test_options_that_a_host_cannot_change_are_told_with_what_to_write(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, said: str
) -> None:
    assert measure(kit, ["--option", option, "--out", str(tmp_path / "out")]) == 2
    assert re.search(said, capsys.readouterr().err, re.DOTALL)
    assert not (tmp_path / "out").exists()


def test_a_host_without_core_ml_and_torch_is_told_what_it_lacks(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("targets.coreml.installed_version", lambda name: None if name == "torch" else "9.0")
    assert measure(kit, ["--out", str(tmp_path / "out")]) == 4
    assert "off macOS: pip install torch, or use a Mac. Run: pip install -r " in capsys.readouterr().err


def test_a_kit_holds_every_module_of_the_targets_and_asks_for_no_torch(kit: Path, root: Path) -> None:
    wanted = {file.relative_to(root) for file in root.glob("targets/**/*.py")}
    assert {file.relative_to(kit / "lib") for file in kit.glob("lib/targets/**/*.py")} == wanted
    for file in wanted:
        assert (kit / "lib" / file).read_bytes() == (root / file).read_bytes()
    asked = (kit / "requirements.txt").read_text()
    assert "coremltools==" in asked
    assert "torch" not in asked


def test_what_is_said_of_times_names_commands_that_exist(root: Path, call: Any) -> None:
    said = CoreMl().capabilities().untimed
    commands = re.findall(r"`exporter (\w+)", said)
    assert commands == ["kit", "merge"]
    for name in commands:
        code, told, _ = call(name, "--help")
        assert code == 0
        assert "RUN" in told
    (script,) = re.findall(r"bash (\S+) KIT", said)
    assert f"bash {script} KIT" in (root / script).read_text()


def test_a_package_that_core_ml_refuses_fails_its_state(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package that Core ML refuses fails its state with the place and the fix, and the exit code says so."""
    native = coreml_stand_in.install(monkeypatch, tmp_path)
    native.refuses = "no such unit"
    assert measure(kit, ["--name", "mac", "--out", str(tmp_path / "mac")]) == 5
    said = capsys.readouterr().err
    assert "0-dense: target coreml: " in said
    assert "Core ML cannot load it for all; got: no such unit" in said
    (cell,) = read_result(tmp_path / "mac" / "result.json").cells
    assert cell.status == "failed"

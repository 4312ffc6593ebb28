"""The same command again: what is reused, what is made again, and that nothing changed is trusted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file, save_file

from exporter.cells import FOLDER, Cells
from exporter.collection import collect
from exporter.errors import SourceError
from exporter.memo import FileMemo
from exporter.networks.source import check_source
from exporter.progress import Lines, Silent
from exporter.report.record import RunRecord
from exporter.report.text import render_text
from exporter.report.writing import read_record
from exporter.run import run_recipe


class Told(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.lines: list[str] = []

    def start(self, title: str, total: int) -> None:
        """Keep the title."""
        self.tasks.append(title)

    def say(self, text: str) -> None:
        """Keep the line."""
        self.lines.append(text)


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def go(recipe: Any, out: Path, **options: Any) -> tuple[RunRecord, Told]:
    told = Told()
    return run_recipe(recipe, out, progress=told, **options), told


def reused(record: RunRecord) -> dict[tuple[str, str], bool]:
    return {(cell.state, cell.target): cell.reused for cell in record.cells}


ONE = {"ort": {"type": "onnxruntime", "threads": 1}}


def test_an_unchanged_run_makes_nothing_measures_nothing_and_reads_no_file_again(out: Path, tiny_recipe: Any) -> None:
    fresh = read_record(out)
    first, _ = go(tiny_recipe(), out)  # hashes the copies that this test made
    again, told = go(tiny_recipe(), out)
    assert told.tasks == []
    assert told.lines[:2] == ["0-dense reused", f"0-dense on ort: engine reused, {_when(again, 0)}"]
    assert told.lines[-1].startswith("0 of ")
    assert [cell.measurements for cell in again.cells] == [cell.measurements for cell in fresh.cells]
    assert all(cell.reused for cell in again.cells)
    assert [cell.measured_at for cell in first.cells] == [cell.measured_at for cell in fresh.cells]
    assert not any(cell.reused for cell in fresh.cells)
    assert f"{_when(again, 0)}: 0-dense on ort" in render_text(again)
    assert _when(again, 1) in (out / "report.html").read_text()


def _when(record: RunRecord, index: int) -> str:
    return f"measured {record.cells[index].measured_at[:16].replace('T', ' ')} UTC, reused"


def test_verify_reads_every_file_of_source_and_artifacts(out: Path, tiny_recipe: Any) -> None:
    go(tiny_recipe(), out)
    _, told = go(tiny_recipe(), out, verify=True)
    read, _, asked = told.lines[-1].partition(" files")[0].partition(" of ")
    assert int(read) > 40, asked


def test_a_target_that_is_added_or_changed_is_the_only_one_that_is_made(out: Path, tiny_recipe: Any) -> None:
    two = ONE | {"other": {"type": "onnxruntime", "threads": 2}}
    added, told = go(tiny_recipe(targets=two), out)
    assert {state.reused for state in added.states} == {True}
    assert reused(added) == {
        ("0-dense", "ort"): True,
        ("0-dense", "other"): False,
        ("1-pruned", "ort"): True,
        ("1-pruned", "other"): False,
    }
    assert told.tasks
    assert all(title.endswith(("for other", "on other", "recorded calls")) for title in told.tasks), told.tasks

    three = ONE | {"other": {"type": "onnxruntime", "threads": 3}}
    kept = {path: path.stat().st_mtime_ns for path in out.glob("engines/*/ort/**/*") if path.is_file()}
    changed, told = go(tiny_recipe(targets=three), out)
    assert {state.reused for state in changed.states} == {True}
    assert [target for (_, target), again in reused(changed).items() if not again] == ["other", "other"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [title for title in told.tasks if title.startswith(("Export", "Compile"))] == [
        *(f"Compile {name} for other" for name in ("text_encoder", "unet", "vae_decoder", "unet"))
    ]

    go(tiny_recipe(targets=ONE), out)
    assert not [item["path"] for item in collect(out, dry_run=False) if item["path"].endswith("/ort")]
    assert not [*out.glob("engines/*/other"), *out.glob(f"{FOLDER}/*/other")]
    _, told = go(tiny_recipe(targets=ONE), out)
    assert told.tasks == []
    assert told.lines[-1].startswith("0 of "), "links that were removed change no file"


def test_other_prompts_are_measured(out: Path, tiny_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("a bird\na boat\na bell\n")
    measure = {"prompts": str(tmp_path / "other.txt"), "images": 3, "calls": 2, "latency_seconds": 0.2}
    record, _ = go(tiny_recipe(measure=measure, stages=[]), out)
    assert record.states[0].reused
    assert reused(record) == {("0-dense", "ort"): False}


def test_measure_again_takes_every_figure_anew(out: Path, tiny_recipe: Any) -> None:
    record, told = go(tiny_recipe(stages=[]), out, measure_again=True)
    assert reused(record) == {("0-dense", "ort"): False}
    assert told.lines[1] == "0-dense on ort: engine reused, measured now"


def test_gates_are_applied_to_reused_figures(out: Path, tiny_recipe: Any) -> None:
    gates = [{"metric": "size_bytes", "max": 1}, {"metric": "lowering.psnr_db", "min": 1}]
    record, _ = go(tiny_recipe(gates=gates, on_miss="continue"), out)
    assert all(cell.reused for cell in record.cells)
    assert record.exit_code == 3
    assert {(gate.metric, gate.status) for gate in record.gates} == {
        ("size_bytes", "missed"),
        ("lowering.psnr_db", "passed"),
    }


def test_a_cell_outlives_a_run_that_stops_before_it(out: Path, tiny_recipe: Any) -> None:
    record, _ = go(tiny_recipe(stages=[]), out, until="compile")
    assert [cell.status for cell in record.cells] == ["not run"]
    assert (out / FOLDER / "0-dense" / "ort" / "cell.json").is_file()
    record, _ = go(tiny_recipe(stages=[]), out)
    assert reused(record) == {("0-dense", "ort"): True}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "null",
        lambda text: text.replace('"value": ', '"value": 1', 1),
        lambda text: text.replace('"status": "ok"', '"status": "failed"'),
        lambda text: json.dumps({**json.loads(text), "cell": {}}),
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "checksum"}),
        lambda text: "\x00\xff",
    ],
)
def test_a_damaged_or_edited_cell_is_none(out: Path, damage: Any) -> None:
    file = out / FOLDER / "0-dense" / "ort" / "cell.json"
    key = json.loads(file.read_text())["key"]
    cells = Cells(out, FileMemo())
    found = cells.find("0-dense", "ort", key)
    assert found is not None
    assert found.reused
    assert cells.find("0-dense", "ort", "another key") is None
    assert cells.find("0-dense", "nobody", key) is None
    file.write_bytes(damage(file.read_text()).encode("latin-1", "replace"))
    assert cells.find("0-dense", "ort", key) is None


def test_a_cell_whose_image_is_damaged_is_measured_again(out: Path, tiny_recipe: Any) -> None:
    image = out / read_record(out).cells[0].images[0].path
    good = image.read_bytes()
    image.write_bytes(good[:-1] + b"x")
    record, _ = go(tiny_recipe(stages=[]), out)
    assert reused(record) == {("0-dense", "ort"): False}
    assert image.read_bytes() == good


def test_an_edited_weight_of_the_source_is_noticed(
    tiny_pipeline_folder: Path, tmp_path: Path, tiny_recipe: Any
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_pipeline_folder, source)
    file = source / "unet" / "diffusion_pytorch_model.safetensors"
    memo = FileMemo()
    before = check_source(source, memo=memo).digest
    read = list(memo.read)
    assert check_source(source, memo=memo).digest == before
    assert memo.read == read
    weights = load_file(file)
    name = min(weights)
    save_file({**weights, name: weights[name] + 1}, file, metadata={"format": "pt"})
    assert check_source(source, memo=memo).digest != before
    assert memo.read[len(read) :] == [file, file]  # its numbers are looked at and its bytes hashed
    save_file({**weights, name: weights[name] * float("nan")}, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match="NaN"):
        check_source(source, memo=memo)


def test_gates_of_states_to_come_are_pending_while_a_run_is_unfinished(out: Path, tiny_recipe: Any) -> None:
    class Stopped(Told):
        def start(self, title: str, total: int) -> None:
            super().start(title, total)
            if title == "Images 1-pruned on ort":
                raise KeyboardInterrupt

    gates = [{"metric": "size_bytes", "min": 1}, {"metric": "load_ms", "min": 0}]
    shutil.rmtree(out / FOLDER / "1-pruned")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(tiny_recipe(gates=gates), out, progress=Stopped())
    record = read_record(out)
    assert record.pending == 2
    assert "4 gates: 2 passed, 2 pending" in render_text(record)
    done, _ = go(tiny_recipe(gates=gates), out)
    assert done.pending == 0
    assert "4 gates: 4 passed" in render_text(done)
    assert list(reused(done).values()) == [True, False]


def test_an_unchanged_run_loads_no_library_that_it_has_no_use_for(out: Path, tiny_recipe: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    go(recipe, out)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    heavy = ["diffusers", "transformers", "accelerate", "torchmetrics", "torch_pruning", "onnx", "torch._dynamo"]
    code = (
        "import sys; from pathlib import Path; from exporter.progress import Silent; from exporter.recipe import "
        "read_recipe; from exporter.run import run_recipe\n"
        "record = run_recipe(read_recipe(Path(sys.argv[1])), Path(sys.argv[2]), progress=Silent())\n"
        "assert all(cell.reused for cell in record.cells)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_is_reused_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Lines().say("0-dense reused")
    assert capsys.readouterr().err == "0-dense reused\n"

"""A kit measures on a host without torch what a run measures here, and only what fits comes back into the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import pytest

import targets
from exporter.artifact import open_artifact, write_artifact
from exporter.elsewhere.facts import Result, checksum_of
from exporter.elsewhere.host import measure_kit
from exporter.elsewhere.kit import requirements, write_kit
from exporter.elsewhere.merged import merge, read_result, with_merged
from exporter.errors import ArtifactError, RecipeError
from exporter.progress import Silent
from exporter.report.record import CellRecord, ImageRecord, RunRecord
from exporter.report.writing import read_record, write_record
from exporter.run import run_recipe

pytestmark = pytest.mark.slow
RTX = targets.target("tensorrt-rtx").capabilities()
COLUMN = "ov@board"


def names_of(requirements: Iterator[str]) -> set[str]:
    """Return distributions and all that they need."""
    found: set[str] = set()
    waiting = [re.split(r"[^\w.-]", line)[0] for line in requirements]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name not in found:
            found.add(name)
            needed = distribution(name).requires or []
            waiting += [re.split(r"[^\w.-]", line)[0] for line in needed if "extra ==" not in line]
    return found


def bare_host(requirements: Path, folder: Path) -> list[str]:
    """Return a Python that knows what a file of requirements lists, and nothing else that is installed here."""
    for name in names_of(iter(requirements.read_text().split())):
        for file in distribution(name).files or ():
            top = Path(file).parts[0]
            if not (folder / top).exists() and top not in ("..", "__pycache__"):
                (folder / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    code = f"import sys; sys.path.append({str(folder)!r}); sys.argv = sys.argv[1:]; import runpy; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return [sys.executable, "-S", "-c", code]


def measured_there(kit: Path, host: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run a kit's script as its README says, with only what the host has."""
    command = [*host, str(kit / "measure.py"), *words]
    clean = {"PATH": os.environ["PATH"], "HOME": str(kit.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=kit.parent, env=clean, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def original(tiny_recipe: Any, made_once: Callable[..., Path]) -> Path:
    """A run of a quantized state. Read only."""
    recipe = tiny_recipe(
        stages=[{"quantize": {"scheme": "int8", "calibration": {"prompts": "everyday", "samples": 2, "calls": 2}}}],
        targets={"ov": {"type": "openvino", "precision": "f32", "threads": 1}},
        gates=[
            {"metric": "lowering.psnr_db", "min": 20, "component": "denoiser"},
            {"metric": "latency.median_ms", "max": "1000 * dense", "targets": ["ov"], "state": "final"},
            {"metric": "fidelity.teacher_forced.psnr_db", "min": 199, "state": "final", "component": "denoiser"},
        ],
    )
    return made_once("kit-run", lambda folder: run_recipe(recipe, folder / "out", progress=Silent())) / "out"


@pytest.fixture(scope="module")
def taken(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A run, its kit on another host, and what that host found. Read only."""
    folder = tmp_path_factory.mktemp("kit")
    run, there = folder / "run", folder / "host"
    shutil.copytree(original, run)
    write_kit(run, "ov", run / "kits" / "ov", Silent())
    there.mkdir()
    shutil.copytree(run / "kits" / "ov", there / "kit")
    (there / "packages").mkdir()
    host = bare_host(there / "kit" / "requirements.txt", there / "packages")
    no_torch = subprocess.run([*host[:-1], "import torch"], capture_output=True, text=True, check=False)
    assert "No module named 'torch'" in no_torch.stderr
    done = measured_there(there / "kit", host, "--name", "board")
    assert done.returncode == 0, done.stderr
    return run, there / "kit", there / "kit-board" / "result.json"


@pytest.fixture
def run(taken: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(taken[0], tmp_path / "run", ignore=shutil.ignore_patterns("lowered", "recordings")))


def values(record: RunRecord, target: str) -> dict[tuple[str, str, str | None], float | None]:
    return {(m.name, m.state, m.component): m.value for c in record.cells for m in c.measurements if m.target == target}


def test_another_host_finds_what_the_run_found(taken: tuple[Path, Path, Path], run: Path) -> None:
    whole = merge(run, taken[2])
    assert [cell.status for cell in whole.cells if cell.target == COLUMN] == ["ok", "ok"]
    here, there = values(whole, "ov"), values(whole, COLUMN)
    for name in ("lowering.psnr_db", "lowering.max_error", "fidelity.teacher_forced.psnr_db"):
        keys = [key for key in here if key[0] == name]
        assert len(keys) == 6  # of two states three components each
        for key in keys:
            assert there[key] == pytest.approx(here[key], rel=1e-3, abs=1e-7), key
    measured = {key for key, value in here.items() if value is not None}
    left = {name for name, _, _ in measured - {key for key, value in there.items() if value is not None}}
    assert all(name.startswith(("fidelity.image.", "fidelity.", "latency.image_ms")) for name in left)
    assert not left & {"lowering.psnr_db", "fidelity.teacher_forced.psnr_db", "latency.median_ms", "latency.over_float"}
    assert there["fidelity.image.psnr_db", "0-dense", None] is None
    quantized = next(c for c in whole.cells if (c.state, c.target) == ("1-quantized", COLUMN))
    assert {layer["precision"] for layer in quantized.evidence["unet"]["layers"]} >= {"i8"}
    paired = next(m for m in quantized.measurements if (m.name, m.component) == ("latency.median_ms", "unet"))
    assert paired.ratio is not None
    assert paired.ratio.to == "0-dense"
    over = next(m for m in quantized.measurements if m.name == "latency.over_float")
    assert {"f32"} <= set(over.detail)


def test_gates_of_the_target_hold_for_its_column_on_another_host(taken: tuple[Path, Path, Path], run: Path) -> None:
    before = read_record(run)
    whole = merge(run, taken[2])
    told = {(gate.metric, gate.state, gate.target): gate.status for gate in whole.gates}
    assert told["lowering.psnr_db", "0-dense", COLUMN] == "passed"
    assert told["latency.median_ms", "1-quantized", COLUMN] == "passed"
    assert told["fidelity.teacher_forced.psnr_db", "1-quantized", COLUMN] == "missed"
    assert [gate for gate in whole.gates if gate.target == "ov"] == before.gates
    assert whole.exit_code == 3
    assert COLUMN in (run / "report.html").read_text()
    assert COLUMN in (run / "junit.xml").read_text()
    target = next(target for target in whole.targets if target.name == COLUMN)
    assert target.host == "board"
    assert target.machine["cores"] == os.cpu_count()
    again = merge(run, taken[2])
    assert again.cells == whole.cells
    assert again.gates == whole.gates


def test_a_run_keeps_the_columns_of_its_states(
    taken: tuple[Path, Path, Path], tmp_path: Path, tiny_recipe: Any
) -> None:
    run = Path(shutil.copytree(taken[0], tmp_path / "run", symlinks=True))
    merge(run, taken[2])
    record = read_record(run)
    recipe = tiny_recipe(**{key: record.recipe[key] for key in ("stages", "targets", "gates")})
    kept = run_recipe(recipe, run, progress=Silent())
    assert [cell.target for cell in kept.cells if cell.status == "ok"] == ["ov", "ov", COLUMN, COLUMN]
    changed = tiny_recipe(
        stages=[{"prune": {"method": "magnitude", "keep_ratio": 0.5}}], targets=record.recipe["targets"]
    )
    left = run_recipe(changed, run, progress=Silent(), until="compile")
    assert all(cell.target == "ov" for cell in left.cells)
    assert any(COLUMN in note and "other states" in note for note in left.notes)


def test_an_altered_kit_is_refused_where_it_is_measured(taken: tuple[Path, Path, Path], tmp_path: Path) -> None:
    kit = Path(shutil.copytree(taken[1], tmp_path / "kit"))
    script = kit / "lib" / "exporter" / "metrics" / "fidelity.py"
    script.write_text(script.read_text().replace("10 * math.log10", "20 * math.log10"))
    with pytest.raises(ArtifactError, match=r"fidelity\.py: damaged; got .* bytes|fidelity\.py: damaged; got sha256"):
        measure_kit(kit, tmp_path / "out", "board")
    assert not (tmp_path / "out").exists()


def test_an_altered_kit_is_refused_where_its_result_comes_back(
    taken: tuple[Path, Path, Path], run: Path, tmp_path: Path
) -> None:
    kit = open_artifact(taken[1])

    def build(folder: Path) -> dict[str, Any]:
        shutil.copytree(kit.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        return {**kit.manifest.facts, "seconds": 0.1}

    made = write_artifact(tmp_path / "kit", build, kind="kit", key="0" * 64, parent=None)
    other = changed(taken[2], tmp_path, kit=made.digest)
    with pytest.raises(ArtifactError, match=f"altered; got kit {made.digest[:12]}, expected one of {kit.digest[:12]}"):
        merge(run, other)
    assert not (run / "merged").exists()


def changed(result: Path, folder: Path, **fields: Any) -> Path:
    """Write a result with other fields and a checksum that fits them."""
    found = Result.model_validate_json(result.read_text()).model_copy(update=fields)
    file = folder / "changed.json"
    file.write_text(found.model_copy(update={"checksum": checksum_of(found)}).model_dump_json())
    return file


def test_results_of_other_states_other_columns_and_damaged_ones_are_refused(
    taken: tuple[Path, Path, Path], run: Path, tmp_path: Path
) -> None:
    text = taken[2].read_text()
    (tmp_path / "damaged.json").write_text(text.replace('"samples": ', '"samples": 1', 1))
    with pytest.raises(ArtifactError, match="changed after it was written"):
        merge(run, tmp_path / "damaged.json")
    (tmp_path / "half.json").write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match=r"half\.json: not a result of this version"):
        merge(run, tmp_path / "half.json")
    with pytest.raises(ArtifactError, match="cannot be read"):
        merge(run, tmp_path / "none.json")
    cells = [CellRecord(state="0-dense", target="other", status="ok")]
    with pytest.raises(ArtifactError, match="does not fit its kit"):
        merge(run, changed(taken[2], tmp_path, cells=cells))
    with pytest.raises(ArtifactError, match="does not fit its kit"):
        merge(run, changed(taken[2], tmp_path, host="elsewhere"))
    record = read_record(run)
    other = record.states[1].model_copy(update={"digest": "f" * 64})
    write_record(record.model_copy(update={"states": [record.states[0], other]}), run)
    with pytest.raises(ArtifactError, match=r"of another 1-quantized; got .*, expected ffffffffffff"):
        merge(run, taken[2])
    assert not (run / "merged").exists()


def test_what_a_result_says_of_files_is_not_believed_and_a_damaged_one_stops_no_run(
    taken: tuple[Path, Path, Path], run: Path, tmp_path: Path
) -> None:
    found = Result.model_validate_json(taken[2].read_text())
    image = ImageRecord(prompt="a", seed=0, path="/etc/passwd", reference="/etc/passwd")
    cells = [cell.model_copy(update={"engine": "../..", "images": [image]}) for cell in found.cells]
    whole = merge(run, changed(taken[2], tmp_path, cells=cells))
    assert [(cell.images, cell.engine) for cell in whole.cells if cell.target == COLUMN] == [([], None)] * 2
    (run / "merged" / f"{COLUMN}.json").write_text("{}")
    left = with_merged(read_record(run), run)
    assert not [cell for cell in left.cells if cell.target == COLUMN]
    assert any("not a result of this version" in note for note in left.notes)
    assert left.exit_code == read_record(taken[0]).exit_code == 3


def test_a_host_without_the_runtime_or_with_a_wrong_name_is_told_so(
    taken: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, kit, _ = taken
    for left_out, told in (("openvino", "'openvino' is not installed"), ("pydantic", "pydantic is not installed")):
        packages = tmp_path / left_out
        packages.mkdir()
        host = bare_host(kit / "requirements.txt", packages)
        for path in packages.glob(f"{left_out}*"):
            path.unlink()
        done = measured_there(kit, host, "--out", str(tmp_path / "out"))
        assert done.returncode != 0
        assert told in done.stderr
        assert "requirements.txt" in done.stderr
    with pytest.raises(RecipeError, match=r"--name: got '\.\./x', expected letters"):
        measure_kit(kit, tmp_path / "out", "../x")


def test_a_kit_builds_for_devices_that_are_not_there(built: Path, tmp_path: Path, call: Any) -> None:
    if not RTX.available or RTX.runs:
        pytest.skip("needs the extra tensorrt-rtx and no RTX device")
    run = Path(shutil.copytree(built, tmp_path / "run"))
    code, said, _ = call("kit", run, "--target", "rtx", "--out", tmp_path / "kit", "--states", "1-pruned", "--quiet")
    assert code == 0
    assert "Take it to the host" in said
    assert f"tensorrt_rtx=={RTX.version}" in (tmp_path / "kit" / "requirements.txt").read_text()
    measure_kit(tmp_path / "kit", tmp_path / "there", "builder")
    code, said, _ = call("merge", run, tmp_path / "there" / "result.json")
    assert code == 0
    record = read_record(run)
    cells = {cell.state: cell for cell in record.cells if cell.target == "rtx@builder"}
    assert {cell.status for cell in cells.values()} == {"built"}
    assert (tmp_path / "there" / "engines" / "1-pruned" / "unet" / "engine.plan").is_file()
    here = next(cell for cell in record.cells if (cell.state, cell.target) == ("1-pruned", "rtx"))
    assert cells["1-pruned"].evidence["unet"]["layers"] == here.evidence["unet"]["layers"]
    unmeasured = [gate for gate in record.gates if gate.target == "rtx@builder" and gate.status == "not measured"]
    assert {gate.metric for gate in unmeasured} == {"latency.median_ms", "sparse.chosen"}


def test_a_schedule_goes_along(scheduled_run: Path, tmp_path: Path) -> None:
    run, kit, packages = Path(shutil.copytree(scheduled_run, tmp_path / "run")), tmp_path / "kit", tmp_path / "packages"
    write_kit(run, "ort", kit, Silent(), ("2-pruned",))
    packages.mkdir()
    done = measured_there(kit, bare_host(kit / "requirements.txt", packages), "--name", "board")
    assert done.returncode == 0, done.stderr
    found = read_result(tmp_path / "kit-board" / "result.json")
    record = read_record(run)
    here = {(m.name, m.component): m.value for c in record.cells if c.state == "2-pruned" for m in c.measurements}
    there = {(m.name, m.component): m for m in found.cells[-1].measurements}
    for name in ("lowering.psnr_db", "fidelity.teacher_forced.psnr_db"):
        assert there[name, "unet"].value == pytest.approx(here[name, "unet"], rel=1e-3)
    assert set(there["latency.loop_ms", "unet"].detail["patterns"]) == {"pattern-0", "pattern-1"}


def test_what_is_not_here_is_asked_for_by_our_own_bounds() -> None:
    assert [line for line in requirements("tensorrt") if line.startswith("tensorrt")] == ["tensorrt<12,>=10.13"]
    assert f"numpy=={version('numpy')}" in requirements("openvino")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--target", "openvno"), "--target: got 'openvno', expected ov."),
        (("--target", "ov", "--states", "7-none"), "--states: got '7-none', expected 0-dense | 1-quantized."),
        (("--target", "ov", "--out", "."), "exists and is no kit"),
        (("--target", "ov", "--out", "STATE"), "exists and is no kit"),
    ],
)
def test_what_a_kit_cannot_be_made_of_is_a_sentence(
    original: Path, call: Any, words: tuple[str, ...], told: str
) -> None:
    code, _, said = call("kit", original, *(original / "states" / "0-dense" if w == "STATE" else w for w in words))
    assert code == 2
    assert told in said


def test_a_folder_that_is_no_run_has_no_kit(call: Any, tmp_path: Path) -> None:
    code, _, said = call("kit", tmp_path, "--target", "ov")
    assert code == 2
    assert "expected a report.json" in said
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == "[]"

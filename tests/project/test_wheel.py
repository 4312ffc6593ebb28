"""The wheel: complete, nothing beside, and enough on its own to run the embedded recipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("exporter", "targets", "calibration")
INSTALL_SECONDS = 1500

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * INSTALL_SECONDS)]


@pytest.fixture(scope="session")
def outside(machine_environment: dict[str, str]) -> dict[str, str]:
    """The machine's own environment, in which Python finds nothing of this repository."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    return {name: value for name, value in machine_environment.items() if name not in hidden}


@pytest.fixture(scope="session")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory, outside: dict[str, str]) -> Path:
    """Built from a copy, so that no build folder is left in the repository."""
    copy, out = tmp_path_factory.mktemp("source") / "repository", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".train", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(root, copy, ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        str(file.relative_to(root))
        for package in PACKAGES
        for file in (root / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert sorted(wanted - held) == [], "missing in the wheel"
    assert sorted(held - wanted) == [], "in the wheel, but not of the packages"


def test_wheel_holds_what_is_loaded_at_run_time(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
    for kind in (
        "exporter/recipes/shapes.yaml",
        ".j2",
        "shapes/model_index.json",
        "judge/model.safetensors",
        "py.typed",
    ):
        assert any(name.endswith(kind) for name in held), kind
    assert any(name.startswith("exporter/reference/shapes/unet/") and name.endswith(".safetensors") for name in held)
    assert any(name.endswith("LICENSE") for name in held)


def test_wheel_alone_runs_the_embedded_recipe(wheel: Path, tmp_path: Path, outside: dict[str, str]) -> None:
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, with_pip=True, symlinks=os.name != "nt")
    python = environment / "bin/python"
    for asked in ("torch==2.13.0", f"diffusion-exporter[openvino] @ {wheel.as_uri()}"):
        _must([str(python), "-m", "pip", "install", "-qq", "--no-compile", asked], elsewhere, outside)

    offline = {**outside, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    where = _must([str(python), "-c", "import exporter; print(exporter.__file__)"], elsewhere, offline)
    assert Path(where.strip()).is_relative_to(environment)

    _must([str(environment / "bin/exporter"), "run", "shapes-quick", "--out", "out"], elsewhere, offline)
    record = json.loads((elsewhere / "out/report.json").read_text(encoding="utf-8"))
    assert {target["type"] for target in record["targets"]} >= {"onnxruntime", "openvino"}
    assert {cell["status"] for cell in record["cells"]} == {"ok"}
    assert (elsewhere / "out/report.html").stat().st_size > 10_000


def _must(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout

"""ci/setup.sh on a small project of the same form, with pip cut off from every index."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Setup = Callable[..., "subprocess.CompletedProcess[str]"]

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "small"
version = "1.0"
"""
BACKEND = '''
"""A build backend that needs nothing installed."""

import pathlib, zipfile

METADATA = "Metadata-Version: 2.1\\nName: small\\nVersion: 1.0\\nProvides-Extra: dev\\nProvides-Extra: openvino\\n"


def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        wheel.writestr("small.py", "")
        wheel.writestr("small-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("small-1.0.dist-info/RECORD", "")
    return name
'''


@pytest.fixture
def repository(root: Path, tmp_path: Path) -> Path:
    repository = tmp_path / "a small project"
    (repository / "ci").mkdir(parents=True)
    shutil.copy(root / "ci/setup.sh", repository / "ci/setup.sh")
    (repository / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (repository / "backend.py").write_text(BACKEND, encoding="utf-8")
    return repository


@pytest.fixture
def setup(repository: Path, tmp_path: Path, machine_environment: dict[str, str]) -> Setup:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "first-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("first.py", "")
        wheel.writestr("first-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: first\nVersion: 1.0\n")
        wheel.writestr("first-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("first-1.0.dist-info/RECORD", "")
    environment = {
        **machine_environment,
        "PYTHON": sys.executable,
        "TORCH_REQUIREMENT": "first==1.0",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": wheels.as_uri(),
    }

    def run(folder: Path = repository, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", folder / "ci/setup.sh"],
            cwd=tmp_path,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def _works(repository: Path) -> bool:
    return subprocess.run([repository / ".venv/bin/python", "-c", "import first, small"], check=False).returncode == 0


def test_the_life_of_an_environment(repository: Path, setup: Setup) -> None:
    """One flow, because making an environment is what takes the time."""
    failed = setup(TORCH_REQUIREMENT="nowhere==1.0")
    assert failed.returncode == 4
    assert "nowhere" in failed.stderr

    first = setup()
    assert first.returncode == 0, first.stdout + first.stderr
    assert "1 of 2: first==1.0" in first.stdout, "a failed installation is not taken for a complete one"
    assert _works(repository)

    second = setup()
    assert second.returncode == 0
    assert "complete and pyproject.toml is unchanged" in second.stdout
    assert "1 of 2" not in second.stdout

    marker = repository / ".venv/kept"
    marker.touch()
    with (repository / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    third = setup()
    assert third.returncode == 0, third.stderr
    assert "1 of 2" in third.stdout
    assert marker.exists(), "a complete environment is brought up to date, not made again"

    (repository / ".venv/.setup-unfinished").touch()
    fourth = setup()
    assert fourth.returncode == 0, fourth.stderr
    assert "interrupted" in fourth.stdout
    assert not marker.exists(), "an environment that may hold half a package is not trusted"
    assert _works(repository)

    moved = repository.rename(repository.with_name("moved"))
    fifth = setup(folder=moved)
    assert fifth.returncode == 0, fifth.stderr
    assert "does not work here" in fifth.stdout
    assert _works(moved)


def test_no_usable_python_is_said(setup: Setup) -> None:
    done = setup(PYTHON="no-such-python")
    assert done.returncode == 4
    assert "Install Python 3.11" in done.stderr

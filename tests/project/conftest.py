"""What the tests of the repository itself share: its files, and a Python of its own for each question about imports."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGES = ("exporter", "targets", "calibration")
TEXT = {".py", ".sh", ".toml", ".md", ".yaml", ".yml", ".json", ".j2", ".css", ".js", ".txt", ".cfg", ".ini", ""}


def _ignored(root: Path) -> list[str]:
    lines = (root / ".gitignore").read_text(encoding="utf-8").splitlines()
    return [".git", *(line.rstrip("/") for line in lines if line and not line.startswith("#"))]


def _walk(folder: Path, ignored: list[str]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in ignored):
            continue
        if entry.is_dir():
            yield from _walk(entry, ignored)
        else:
            yield entry


@pytest.fixture(scope="session")
def files(root: Path) -> list[Path]:
    """Every file of the repository that git does not ignore."""
    return list(_walk(root, _ignored(root)))


@pytest.fixture(scope="session")
def top_level(root: Path) -> set[str]:
    """Names at the top of the repository that git does not ignore."""
    ignored = _ignored(root)
    return {
        entry.name for entry in root.iterdir() if not any(fnmatch.fnmatch(entry.name, pattern) for pattern in ignored)
    }


@pytest.fixture(scope="session")
def texts(files: list[Path]) -> dict[Path, str]:
    """The text of every file that people write or read: sources, scripts, documents, recipes."""
    return {file: file.read_text(encoding="utf-8") for file in files if file.suffix in TEXT}


@pytest.fixture(scope="session")
def python_files(files: list[Path]) -> list[Path]:
    """Every Python file."""
    return [file for file in files if file.suffix == ".py"]


@pytest.fixture(scope="session")
def product(root: Path, python_files: list[Path]) -> list[Path]:
    """The Python files that users install."""
    return [file for file in python_files if file.relative_to(root).parts[0] in PACKAGES]


@pytest.fixture(scope="session")
def fresh_python(
    tmp_path_factory: pytest.TempPathFactory, machine_environment: dict[str, str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code in a new interpreter outside the repository, offline; returns the process, whatever its exit code."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {**machine_environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(folder)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )

    return run

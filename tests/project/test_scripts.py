"""The scripts of ci/ work from any folder, say what they do, and refuse with a reason."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = (
    *("ci/setup.sh", "ci/run.sh", "ci/check.sh", "ci/test.sh", "ci/gpu.sh", "ci/macos.sh", "ci/trt_stubs.sh"),
    ".ci/run",
)
BIN = Path(sys.executable).parent


def test_every_script_is_listed_here(root: Path) -> None:
    assert {str(file.relative_to(root)) for file in [*root.glob("ci/*.sh"), *root.glob(".ci/*")]} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_sound(script: str, root: Path) -> None:
    file = root / script
    assert file.stat().st_mode & stat.S_IXUSR
    text = file.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    done = _run("bash", "-n", file)
    assert done.returncode == 0, done.stderr
    if (BIN / "shellcheck").exists():
        done = _run(BIN / "shellcheck", file)
        assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not (BIN / "hadolint").exists(), reason="there is no build of hadolint for this machine")
def test_dockerfile_is_sound(root: Path) -> None:
    done = _run(BIN / "hadolint", root / "Dockerfile")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param(
            "ci/gpu.sh",
            "no NVIDIA driver",
            marks=pytest.mark.skipif(
                shutil.which("nvidia-smi") is not None, reason="this machine has an NVIDIA driver"
            ),
        ),
        pytest.param(
            "ci/macos.sh",
            "macOS only",
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="this machine runs macOS"),
        ),
    ],
)
def test_script_refuses_with_a_reason_where_the_hardware_is_missing(
    script: str, reason: str, root: Path, tmp_path: Path
) -> None:
    done = _run("bash", root / script, cwd=tmp_path)
    assert done.returncode == 4
    assert reason in done.stderr


class TestRun:
    """ci/run.sh in a repository whose set-up is done and whose `exporter` is a recorder."""

    @pytest.fixture
    def repository(self, root: Path, tmp_path: Path) -> Path:
        repository = tmp_path / "a folder with spaces"
        (repository / "ci").mkdir(parents=True)
        shutil.copy(root / "ci/run.sh", repository / "ci/run.sh")
        _script(repository / "ci/setup.sh", "echo set up")
        _script(
            repository / ".venv/bin/exporter",
            """
            printf '<%s>' "$@" && echo
            [ -z "${REPORT-}" ] || { mkdir -p "$REPORT" && touch "$REPORT/report.html"; }
            exit "${CODE-0}"
            """,
        )
        return repository

    def test_last_line_is_the_path_of_the_report(self, repository: Path, tmp_path: Path) -> None:
        out = repository / "runs/shapes"
        done = _run("bash", repository / "ci/run.sh", cwd=tmp_path, REPORT=str(out))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(out / "report.html")
        assert f"<run><shapes><--out><{out}>" in done.stdout.splitlines()

    @pytest.mark.parametrize("spelling", [["--out", "an other"], ["--out=an other"]])
    def test_options_are_passed_on_and_out_is_taken_from_the_callers_folder(
        self, spelling: list[str], repository: Path, tmp_path: Path
    ) -> None:
        arguments = ["--quiet", *spelling, "--set", "sampling.steps=2"]
        done = _run("bash", repository / "ci/run.sh", *arguments, cwd=tmp_path, REPORT=str(tmp_path / "an other"))
        assert done.stdout.splitlines()[-1] == str(tmp_path / "an other/report.html")
        assert "<run><shapes><--out><an other><--quiet><--set><sampling.steps=2>" in done.stdout.splitlines()

    def test_a_missed_gate_keeps_its_exit_code_and_shows_the_report(self, repository: Path, tmp_path: Path) -> None:
        out = repository / "runs/shapes"
        done = _run("bash", repository / "ci/run.sh", cwd=tmp_path, REPORT=str(out), CODE="3")
        assert done.returncode == 3
        assert done.stdout.splitlines()[-1] == str(out / "report.html")

    def test_without_a_report_no_path_is_printed(self, repository: Path, tmp_path: Path) -> None:
        done = _run("bash", repository / "ci/run.sh", "--dry-run", cwd=tmp_path)
        assert done.returncode == 0
        assert "report.html" not in done.stdout

    def test_out_without_a_folder_is_refused(self, repository: Path, tmp_path: Path) -> None:
        done = _run("bash", repository / "ci/run.sh", "--out", cwd=tmp_path)
        assert done.returncode == 2
        assert "Write --out DIR" in done.stderr


def _script(file: Path, body: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    file.chmod(0o755)


def _run(*command: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([*command], cwd=cwd, env=environment, capture_output=True, text=True, check=False)

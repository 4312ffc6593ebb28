"""ci/macos.sh in a repository whose set-up is done, on a machine that says it is a Mac, with recorders as tools."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from targets.coreml import UNITS

PYTHON = """
printf '<%s>' "${0##*/}" "$@" >>"$LOG" && echo >>"$LOG"
case "$1 ${2-}" in
  '-c import coremltools'*) exit "${NO_BINDINGS-0}" ;;
  '-c import json'*) exec "$REAL" "$@" ;;
  '-m pytest') exit "${TESTS-0}" ;;
  */measure.py*)
    while [ "$1" != --out ]; do shift; done
    [ "${MEASURED-0}" = 1 ] || { mkdir -p "$2" && echo '{}' >"$2/result.json"; }
    exit "${MEASURED-0}" ;;
esac
"""
EXPORTER = """printf '<%s>' "${0##*/}" "$@" >>"$LOG" && echo >>"$LOG"; exit "${MERGED-0}" """


@pytest.fixture
def repository(root: Path, tmp_path: Path) -> Path:
    made = tmp_path / "a folder with spaces"
    (made / "ci").mkdir(parents=True)
    shutil.copy(root / "ci/macos.sh", made / "ci/macos.sh")
    script(made / "ci/setup.sh", 'echo "set up $*"')
    script(made / ".venv/bin/python", PYTHON)
    script(made / ".venv/bin/exporter", EXPORTER)
    script(tmp_path / "bin/uname", "echo Darwin")
    script(tmp_path / "bin/hostname", 'echo "Ada\'s Mac_1"')
    return made


def script(file: Path, body: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    file.chmod(0o755)


def run(repository: Path, *words: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script from another folder; return how it ended, and what was called."""
    folder = repository.parent
    log = folder / "log"
    log.write_text("")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "LOG": str(log), "REAL": sys.executable, **variables}
    command = ["bash", str(repository / "ci/macos.sh"), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done, log.read_text().splitlines()


def kit(repository: Path) -> Path:
    folder = repository.parent / "my kit"
    folder.mkdir()
    (folder / "measure.py").touch()
    return folder


def test_without_a_folder_the_tests_run_alone(repository: Path) -> None:
    done, called = run(repository, TESTS="1")
    assert done.returncode == 1
    assert "set up openvino,coreml,dev" in done.stdout
    assert called[1:] == ["<python><-m><pytest><-m><macos><--durations><15>"]


def test_without_bindings_the_reason_is_told(repository: Path) -> None:
    done, called = run(repository, NO_BINDINGS="1")
    assert done.returncode == 4
    assert "macos: not run: the installed coremltools has no bindings" in done.stderr
    assert len(called) == 1


def test_a_kit_is_measured_once_per_unit_and_its_merges_are_printed(repository: Path) -> None:
    place = kit(repository)
    done, called = run(repository, "my kit")
    assert done.returncode == 0, done.stderr
    out = repository / "runs/macos"
    measured = [line for line in called if "measure.py" in line]
    names = ["cpu", "cpu-and-gpu", "cpu-and-neural-engine", "all"]
    assert set(names) == set(UNITS)
    assert measured == [
        f"<python><{place}/measure.py><--name><Ada-s-Mac_1-{unit}><--option><compute_units={unit}>"
        f"<--out><{out}/Ada-s-Mac_1-{unit}>"
        for unit in names
    ]
    told = [line for line in done.stdout.splitlines() if line.startswith("exporter merge")]
    assert told == [f"exporter merge RUN {out}/Ada-s-Mac_1-{unit}/result.json" for unit in names]


def test_a_unit_that_fails_stops_no_other_and_is_told_by_the_exit_code(repository: Path) -> None:
    kit(repository)
    done, called = run(repository, "my kit", MEASURED="5", OUT="found", HOST_NAME="-m2")
    assert done.returncode == 5
    assert len([line for line in called if "measure.py" in line]) == 4
    assert f"exporter merge RUN {repository.parent}/found/m2-cpu/result.json" in done.stdout.splitlines()
    done, called = run(repository, "my kit", MEASURED="1", OUT="found", HOST_NAME="m2")
    assert done.returncode == 1
    assert "exporter merge" not in done.stdout, "an older result is not taken for this one's"


def test_of_a_run_the_kit_is_made_and_results_are_merged(repository: Path) -> None:
    folder = repository.parent / "my run"
    folder.mkdir()
    report = '{"targets": [{"name": "ov", "type": "openvino"}, {"name": "phone", "type": "coreml", "host": ""}, %s]}'
    host = '{"name": "phone@mac", "type": "coreml", "host": "mac"}'
    (folder / "report.json").write_text(report % host)
    done, called = run(repository, "my run", MERGED="3", OUT="found")
    assert done.returncode == 3, "a missed gate is the exit code"
    found = repository.parent / "found"
    assert not [line for line in called if line.startswith("<exporter><merge>")], "no kit, nothing to measure"
    done, called = run(repository, "my run", OUT="found", HOST_NAME="m2")
    assert done.returncode == 0, done.stderr
    told = [line for line in called if line.startswith("<exporter>")]
    assert told[0] == f"<exporter><kit><{folder}><--target><phone><--out><{found}/kit-phone>"
    assert told[1] == f"<exporter><merge><{folder}><{found}/m2-cpu/result.json>"
    assert len(told) == 5
    (folder / "report.json").write_text(report % '{"name": "pad", "type": "coreml"}')
    done, _ = run(repository, "my run")
    assert done.returncode == 2
    assert "got several targets of type coreml: phone pad. Write which: bash ci/macos.sh RUN TARGET" in done.stderr
    done, called = run(repository, "my run", "pad", OUT="found")
    assert done.returncode == 0
    assert any("<--target><pad>" in line for line in called)


@pytest.mark.parametrize(
    ("words", "said"),
    [(("bin",), "bin: no kit and no run; got neither"), (("my kit", "phone"), "got 'phone' after a kit")],
)
def test_a_folder_that_is_neither_is_refused_before_any_set_up(
    repository: Path, words: tuple[str, ...], said: str
) -> None:
    kit(repository)
    done, called = run(repository, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert not called
    assert "set up" not in done.stdout

"""A full disk, Ctrl-C, and two runs in one folder, through the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from exporter.artifact import locked
from exporter.inspection import inspect_folder

COMMAND = [sys.executable, "-W", "ignore", "-m", "exporter.cli"]


@pytest.fixture(scope="module")
def recipe(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    text = {
        "name": "faults",
        "source": {"path": str(tiny_pipeline_folder)},
        "sampling": {"steps": 3, "batch": 2},
        "targets": {"ort": {"type": "onnxruntime", "threads": 1}},
        "measure": {"prompts": str(folder / "prompts.txt"), "images": 2, "calls": 1, "latency_seconds": 0.1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(text))
    return folder / "recipe.yaml"


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, check=False, timeout=300)


def _hear_control_c() -> None:
    """A process started in the background of a shell ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a file system of a fixed size cannot be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_harms_nothing_that_was_finished(recipe: Path, small_disk: Path) -> None:
    failed = command("run", recipe, "--out", small_disk / "out", "--set", "stages=[]")
    assert failed.returncode in (2, 5), failed.stderr
    assert "Traceback" not in failed.stderr
    assert "No space left" in failed.stderr or "not enough room" in failed.stderr
    if (small_disk / "out" / "states").is_dir():
        for folder in (small_disk / "out" / "states").iterdir():
            if folder.is_dir():
                inspect_folder(folder)


def test_control_c_keeps_what_is_finished_and_the_same_command_goes_on(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = subprocess.Popen(
        [*COMMAND, "run", str(recipe), "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_control_c,
    )
    begun = time.monotonic()
    while not (out / "states" / "0-dense").is_dir() and time.monotonic() - begun < 120:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said
    assert "the same command continues" in said
    assert "Traceback" not in said
    again = command("run", recipe, "--out", out)
    assert again.returncode == 0, again.stderr
    assert "Report:" in again.stdout


def test_a_second_run_into_the_same_folder_is_refused(recipe: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        second = command("run", recipe, "--out", tmp_path / "out")
    assert second.returncode == 2
    assert f"process {os.getpid()}" in second.stderr
    assert "--out" in second.stderr

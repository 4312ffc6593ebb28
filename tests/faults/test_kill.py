"""kill -9 at random moments of every stage, then the same command: nothing lost, equal digests."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from exporter.artifact import MANIFEST, open_artifact
from exporter.report.writing import read_record

KILLS = 20
STAGES = {
    "dense": ["states/0-dense"],
    "record": ["recordings/*"],
    "prune": ["states/1-pruned"],
    "tune": ["states/2-tuned"],
    "export": ["lowered/onnx-*"],
    "compile": ["lowered/onnxruntime-*", "engines/*/*"],
    "measure": ["cells/*"],
}
"""Stage -> what it makes; removed before each kill, so that the run is at work on it when it dies."""


class Runs:
    """Runs of one recipe in one folder, started by a process that has everything imported."""

    def __init__(self, recipe: Path, out: Path) -> None:
        self.recipe, self.out = recipe, out
        here = Path(__file__).resolve().parent
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", here / "zygote.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> int:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps({"recipe": str(self.recipe), "out": str(self.out)}) + "\n")
        self.server.stdin.flush()
        return int(self.line())

    def status(self) -> int:
        return int(self.line())

    def line(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline()

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()


@pytest.fixture(scope="module")
def recipe(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    tune = {"method": "distill", "steps": 6, "batch": 2, "samples": 2, "checkpoint_every": 2}
    text = {
        "name": "killed",
        "source": {"path": str(tiny_pipeline_folder)},
        "sampling": {"steps": 3, "guidance": 3.0, "batch": 2},
        "stages": [
            {"prune": {"method": "magnitude", "keep_ratio": 0.75, "round_to": 8}},
            {"tune": tune | {"prompts": str(folder / "prompts.txt")}},
        ],
        "targets": {"ort": {"type": "onnxruntime", "threads": 1}},
        "measure": {"states": "final", "prompts": str(folder / "prompts.txt"), "images": 2, "calls": 1}
        | {"latency_seconds": 0.1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(text))
    return folder / "recipe.yaml"


def digests(out: Path) -> dict[str, str]:
    """Return the digest of every artifact, after hashing all of it."""
    found = [
        path.parent
        for name in ("states/*", "recordings/*", "lowered/*", "engines/*/*")
        for path in out.glob(f"{name}/{MANIFEST}")
        if not path.parent.name.startswith(".")  # killed between the manifest and the rename: not an artifact yet
    ]
    return {str(folder.relative_to(out)): open_artifact(folder).digest for folder in found}


def remove(out: Path, patterns: list[str]) -> None:
    for pattern in patterns:
        for path in out.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)


def at_work(out: Path, patterns: list[str]) -> bool:
    """Whether one of these is being built right now."""
    return any(
        list((out / pattern).parent.parent.glob(f"{(out / pattern).parent.name}/.partial-*")) for pattern in patterns
    )


def alive(process: int) -> bool:
    """Whether a run has not ended; its parent, which waits for it, leaves no zombie."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Iterator[tuple[Runs, dict[str, str], float]]:
    """A finished run, the digests of what it made, and how long it took."""
    runs = Runs(recipe, recipe.parent / "out")
    try:
        started = time.monotonic()
        runs.start()
        assert runs.status() == 0
        whole = time.monotonic() - started
        expected = digests(runs.out)
        assert {name.partition("/")[0] for name in expected} == {"states", "recordings", "lowered", "engines"}
        yield runs, expected, whole
    finally:
        runs.close()


def seconds_at_work(runs: Runs, patterns: list[str]) -> float:
    """Return for how long a run builds these, from the first of them to the last; it finishes."""
    seen = []
    child = runs.start()
    while alive(child):
        if at_work(runs.out, patterns):
            seen.append(time.monotonic())
        time.sleep(0.001)
    assert runs.status() == 0
    return seen[-1] - seen[0] if seen else 0.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_kills_in_a_stage_change_nothing(finished: tuple[Runs, dict[str, str], float], stage: str) -> None:
    runs, expected, whole = finished
    out, patterns = runs.out, STAGES[stage]
    chance = random.Random(stage)
    killed = 0
    remove(out, patterns)
    span = whole / 3 if stage == "measure" else min(seconds_at_work(runs, patterns) + 0.02, whole / 10)
    while killed < KILLS:
        remove(out, patterns)
        child = runs.start()
        begun = time.monotonic()
        while stage != "measure" and not at_work(out, patterns) and alive(child) and time.monotonic() - begun < 20:
            time.sleep(0.001)
        time.sleep(chance.random() ** 2 * span)  # early moments, when files come and go, more often
        with contextlib.suppress(ProcessLookupError):  # it was done already: that does not count
            os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(runs.status())
        assert digests(out).items() <= expected.items()  # what is there is whole
    runs.start()
    assert runs.status() == 0
    assert digests(out) == expected
    assert read_record(out).complete
    assert all((out / image.path).is_file() for cell in read_record(out).cells for image in cell.images)
    assert not list(out.glob("**/.partial-*"))

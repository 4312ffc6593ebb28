"""Bytes on disk, peak memory of a process, and how long an engine takes to load."""

from __future__ import annotations

import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from exporter.errors import ComponentFailed
from exporter.metrics.measurement import Measurement
from exporter.metrics.place import Place

POLL_S = 0.01
MIB = 1 << 20
T = TypeVar("T")


def size_bytes(*places: Path) -> int:
    """Return the bytes of these files and folders, every file once however many hard links lead to it.

    Symbolic links are not followed and count nothing.

    Raises:
        ComponentFailed: one of them does not exist.
    """
    seen: dict[tuple[int, int], int] = {}
    for place in places:
        if not place.exists():
            msg = f"size of {place}: missing; expected a file or folder. Build it first."
            raise ComponentFailed(msg)
        for path in [place, *place.rglob("*")]:
            if path.is_file() and not path.is_symlink():
                facts = path.stat()
                seen[facts.st_dev, facts.st_ino] = facts.st_size
    return sum(seen.values())


def size_measurement(place: Place, *folders: Path) -> Measurement:
    """Return ``size_bytes`` of an engine's folders."""
    return place.measured(
        "size_bytes", float(size_bytes(*folders)), "bytes", samples=1, note="files linked twice count once"
    )


@dataclass(frozen=True)
class ChildRun:
    """A finished child process.

    Attributes:
        peak_rss_mib: the most resident memory it had.
        seconds: how long it ran.
        output: its stdout.
    """

    peak_rss_mib: float
    seconds: float
    output: str


def run_child(
    command: Sequence[str],
    *,
    timeout_s: float,
    folder: Path | None = None,
    paths: Sequence[str] = (),
    watch: Callable[[], object] = lambda: None,
) -> ChildRun:
    """Run a program and return the peak of its resident memory, children of its own not included.

    The peak is the kernel's high-water mark of that process, read while it runs: the figure that a parent gets after
    the end counts the parent's own memory at the fork.

    Args:
        command: program and arguments.
        timeout_s: after this it is killed.
        folder: to run in.
        paths: where the child's Python looks for modules first.
        watch: called again and again while it runs.

    Raises:
        ComponentFailed: it failed or ran too long; the message ends with what it wrote to stderr.
    """
    place = f"command {Path(command[0]).name}"
    start = time.monotonic()
    peak = 0.0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)} if paths else None
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    ) as child:
        try:
            process = psutil.Process(child.pid)
            while True:
                peak = max(peak, _peak_mib(process))
                watch()
                try:
                    output, errors = child.communicate(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() - start > timeout_s:
                        msg = f"{place}: ran too long; got {timeout_s:g} s, expected less. Give it more time."
                        raise ComponentFailed(msg) from None
        finally:
            child.kill()
    if child.returncode:
        raise failure_of(command, child.returncode, errors)
    return ChildRun(peak, time.monotonic() - start, output)


def failure_of(command: Any, code: int, errors: str) -> ComponentFailed:
    """Return what a program failed with.

    Args:
        command: program and arguments.
        code: that it ended with, as `subprocess` has it.
        errors: what it wrote to stderr, of which the end is told.
    """
    tail = errors.strip()[-500:]
    said = f"It said: {tail}" if tail else "It said nothing."
    place = f"command {Path(command[0]).name}"
    return ComponentFailed(f"{place}: failed; got {_ending(code)}, expected exit code 0. {said}")


def _ending(code: int) -> str:
    """Return how a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, as when memory runs out" if name == "SIGKILL" else f"{name}, a crash"


def own_peak_rss_mib() -> float:
    """Return the most resident memory that this process had so far, in MiB."""
    if (peak := _high_water_mib(os.getpid())) is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def memory_measurement(place: Place, peak_rss_mib: float) -> Measurement:
    """Return ``peak_rss_mib`` of a process of its own that loaded and ran the engine."""
    note = "highest resident memory of a process that loads the engine and runs it, libraries included"
    return place.measured("peak_rss_mib", peak_rss_mib, "MiB", samples=1, note=note)


def load_measurement(
    place: Place, load: Callable[[], T], close: Callable[[T], object], *, repeats: int = 3
) -> Measurement:
    """Return ``load_ms``: the median of several loads; the first is in the detail, because it may fill caches.

    Args:
        place: the cell.
        load: opens the engine.
        close: frees it.
        repeats: how often, at least 1.
    """
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        loaded = load()
        times.append((time.perf_counter_ns() - start) * 1e-6)
        close(loaded)
        del loaded
    note = f"median of {repeats} loads in one process, files warm"
    detail = {"first_ms": times[0], "samples_ms": times}
    return place.measured("load_ms", statistics.median(times), "ms", samples=repeats, note=note, detail=detail)


def _peak_mib(process: psutil.Process) -> float:
    """Return the peak so far, or where the system keeps none, the present value; 0 when the process is gone."""
    if (peak := _high_water_mib(process.pid)) is not None:
        return peak
    try:
        return float(process.memory_info().rss) / MIB
    except psutil.Error:
        return 0.0


def _high_water_mib(pid: int) -> float | None:
    """Return Linux's high-water mark of resident memory; None elsewhere and for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    marks = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")]
    return marks[0] if marks else None

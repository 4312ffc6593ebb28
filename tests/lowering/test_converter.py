"""The process that converts: it stays, a refusal does not end it, and one that dies is told and followed by another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from exporter.errors import ComponentFailed
from exporter.lowering.converter import Converter, Order
from targets.base import TargetError


@pytest.fixture
def converter() -> Iterator[Converter]:
    made = Converter()
    yield made
    made.close()
    assert not children()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "exporter.lowering.converting" in child.cmdline()]


def of_nothing(folder: Path, name: str = "work") -> Order:
    """Return an order for a state that is not there."""
    return Order(
        state=str(folder / "no-state"),
        component="unet",
        requested=(),
        target="coreml",
        options={},
        export={},
        recording="",
        rows=1,
        calls=1,
        facts={},
        out=str(folder / name),
    )


def test_an_order_is_the_same_on_the_other_side(tmp_path: Path) -> None:
    order = of_nothing(tmp_path)
    assert Order.of(order.text()) == order
    assert "\n" not in order.text()


def test_a_refusal_leaves_the_process_and_a_kill_is_told(converter: Converter, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no-state"):
        converter(of_nothing(tmp_path))
    (first,) = children()
    with pytest.raises(TargetError, match="no-state"):
        converter(of_nothing(tmp_path))
    assert children() == [first]
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(ComponentFailed, match="got SIGKILL, as when memory runs out"):
        converter(of_nothing(tmp_path))
    assert not children()
    with pytest.raises(TargetError, match="no-state"):
        converter(of_nothing(tmp_path))
    assert children() != [first]


_BUSY = """
import sys, time
from exporter.lowering.converter import end_with
end_with(int(sys.argv[1]))
time.sleep(99)
"""
_STARTS = """
import os, subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())]).pid, flush=True)
time.sleep(99)
"""


@pytest.mark.parametrize("imports_s", [0.0, 3.0])
def test_a_killed_run_takes_the_process_along_however_busy_it_is(imports_s: float) -> None:
    with subprocess.Popen([sys.executable, "-c", _STARTS, _BUSY], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        child = psutil.Process(int(run.stdout.readline()))
        time.sleep(imports_s)
        assert child.is_running()
        run.kill()
    until = time.monotonic() + 30
    while not is_gone(child) and time.monotonic() < until:
        time.sleep(0.1)
    assert is_gone(child)


def is_gone(process: psutil.Process) -> bool:
    """Tell whether a process has ended, also where nobody has asked how yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_what_was_begun_before_a_death_is_done_by_another_process(converter: Converter, tmp_path: Path) -> None:
    first, second = of_nothing(tmp_path, "first"), of_nothing(tmp_path, "second")
    converter.begin(first)
    converter.begin(second)
    converter.begin(second)
    (process,) = children()
    process.kill()  # long before its imports are done
    converter.settle()
    assert not Path(first.out).exists(), "half of a package is not kept"
    with pytest.raises(ComponentFailed, match="got SIGKILL"):
        converter(first)
    with pytest.raises(TargetError, match="no-state"):
        converter(second)
    assert children() not in ([], [process])

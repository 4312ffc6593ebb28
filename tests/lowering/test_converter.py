"""The process that converts: it stays, a refusal does not end it, and one that dies is told and followed by another."""

from __future__ import annotations

import os
import signal
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

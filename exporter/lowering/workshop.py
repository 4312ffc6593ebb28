"""What lowering shares over a run, and how it makes what it keeps: found done, or made, told and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibration.recording import Recording
from exporter.artifact import Artifact, Kind, reusable, write_artifact
from exporter.errors import ComponentFailed, ToolMissing
from exporter.lowering.converter import Converter
from exporter.lowering.options import ExportOptions
from exporter.memo import FileMemo
from exporter.progress import Progress
from targets.base import Target, TargetError, TargetMissing

PARTS = 100
"""Units of the bar of a compiler that says how far it is."""


@dataclass(frozen=True)
class Column:
    """One target of the recipe, resolved.

    Attributes:
        name: the recipe's name.
        target: the runtime.
        options: an instance of the target's options.
    """

    name: str
    target: Target
    options: Any


@dataclass
class Workshop:
    """What lowering shares over a run.

    Attributes:
        out: the run's folder.
        export: how components become ONNX.
        recording: of the dense pipeline.
        sampling: the recipe's sampling as it goes into the engine's facts, `size` resolved.
        scheduler: writes the recipe's scheduler into a folder.
        progress: what long work reports to.
        memo: what is known of files.
        requested: names of the components on request that are exported too.
        used: names of the folders this run needs, for garbage collection.
        converter: of components for targets that take torch networks; whoever made it closes it.
        made: what was exported, compiled and laid out instead of reused.
        seconds: what each lowering took, by step, since it was last read.
        peak_mib: the most memory that a compiling process had.
    """

    out: Path
    export: ExportOptions
    recording: Recording
    sampling: dict[str, Any]
    progress: Progress
    memo: FileMemo = field(default_factory=FileMemo)
    requested: tuple[str, ...] = ()
    used: set[str] = field(default_factory=set)
    converter: Converter = field(default_factory=Converter)
    made: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: float = 0.0

    def took(self, step: str, seconds: float) -> None:
        """Add to what a step took."""
        self.seconds[step] = round(self.seconds.get(step, 0.0) + seconds, 3)


@contextmanager
def told(column: Column, name: str) -> Iterator[None]:
    """Say of a failure which target and which component it was."""
    try:
        yield
    except TargetMissing as error:
        raise ToolMissing(f"target {column.name}: {error}") from error
    except (TargetError, ComponentFailed) as error:
        raise ComponentFailed(f"target {column.name}, {name}: {error}") from error


class Bar:
    """Moves the bar of a task to a done fraction, never back: some builders begin anew."""

    def __init__(self, progress: Progress, units: int = 1) -> None:
        self._progress, self.units, self._done = progress, units, 0

    def __call__(self, done: float) -> None:
        """Move it to this fraction."""
        units = int(done * self.units)
        if self._done < units <= self.units:
            self._progress.advance(units - self._done)
            self._done = units


def make(  # noqa: PLR0913 - what `write_artifact` takes, and a title
    shop: Workshop,
    folder: str,
    build: Callable[[Path], Mapping[str, Any]],
    *,
    kind: Kind,
    key: str,
    parent: Artifact,
    title: str,
    bar: Bar | None = None,
) -> Artifact:
    """Make an artifact of the run's folder ``lowered``, or find it done.

    Args:
        shop: notes what was made and how long it took.
        folder: its name there.
        build: as `write_artifact` takes it.
        kind: of the artifact.
        key: of what it is made from.
        parent: what it is made of.
        title: for the bar; its first word is the step whose time is noted.
        bar: where a compiler says how far it is.
    """
    shop.used.add(folder)
    final = shop.out / "lowered" / folder
    found = reusable(final, key, shop.memo)
    if found is not None:
        return found
    started, parity = time.monotonic(), shop.seconds.get("parity", 0.0)
    bar = bar or Bar(shop.progress)
    shop.progress.start(title, bar.units)
    made = write_artifact(final, build, kind=kind, key=key, parent=parent.digest, sources=[parent.path], memo=shop.memo)
    shop.made.append(title)
    bar(1.0)
    shop.progress.finish()
    shop.took(title.split()[0].lower(), time.monotonic() - started - (shop.seconds.get("parity", 0.0) - parity))
    return made

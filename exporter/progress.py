"""Progress with ETA: a bar on a terminal, plain lines elsewhere, silence when asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO


class Progress(Protocol):
    """What long work reports to."""

    def start(self, title: str, total: int) -> None:
        """Begin a task of `total` units; it ends with the next `start` or `finish`."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """Report units done; the note is shown behind the ETA, such as ``loss 0.031``."""

    def finish(self) -> None:
        """End the task."""

    def say(self, text: str) -> None:
        """Tell one thing that is no task, such as ``1-pruned reused``."""


class Silent:
    """Reports nothing."""

    def start(self, title: str, total: int) -> None:
        """Ignore."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""

    def say(self, text: str) -> None:
        """Ignore."""


class Lines:
    """Writes a line when a task runs longer than two seconds, then at most one every `every` seconds.

    Args:
        stream: where to; stderr by default, so that piped output stays clean.
        every: seconds between two lines; a terminal gets one line that is rewritten four times a second instead.
    """

    def __init__(self, stream: TextIO | None = None, every: float = 10.0) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every = 0.25 if self._terminal else every
        self._title, self._total, self._done = "", 0, 0
        self._started = self._shown = 0.0
        self._note = ""
        self._visible = False

    def start(self, title: str, total: int) -> None:
        """Begin a task."""
        self.finish()
        self._title, self._total, self._done, self._note = title, total, 0, ""
        self._started = time.monotonic()
        self._shown = self._started + 2.0 - self._every
        self._visible = False

    def advance(self, units: int = 1, note: str = "") -> None:
        """Report units done."""
        self._done += units
        self._note = note or self._note
        now = time.monotonic()
        if self._title and now - self._shown >= self._every:
            self._shown = now
            self._show(now)

    def finish(self) -> None:
        """End the task."""
        if self._title and self._visible:
            took = time.monotonic() - self._started
            text = f"{self._title}: {self._done} of {self._total} done in {took:.0f} s"
            self._stream.write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
            self._stream.flush()
        self._title = ""

    def say(self, text: str) -> None:
        """Write a line."""
        self._stream.write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
        self._stream.flush()

    def _show(self, now: float) -> None:
        took = now - self._started
        left = took / self._done * (self._total - self._done) if self._done else float("nan")
        eta = f"{left:.0f} s left" if left == left else "estimating"
        text = f"{self._title}: {self._done} of {self._total}, {eta}" + (f", {self._note}" if self._note else "")
        self._stream.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        self._stream.flush()
        self._visible = True


@contextmanager
def task(progress: Progress, title: str, total: int) -> Iterator[Progress]:
    """Report one task; it is ended whatever happens inside."""
    progress.start(title, total)
    try:
        yield progress
    finally:
        progress.finish()

"""What a run takes of this machine, from its beginning on: beside what preflight expected, it goes into the record."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from exporter.metrics.size import MIB, own_peak_rss_mib, size_bytes


def _processor_seconds() -> float:
    """Return what processors have worked for this process and for the ones it has started."""
    return sum(os.times()[:4])


@dataclass(frozen=True)
class Took:
    """What a run took.

    Attributes:
        memory_mib: the most resident memory that one of its processes had; None where this process had more before it
            began, since the system keeps one mark.
        disk_mib: that its folder holds.
        seconds: on the clock.
        processor_seconds: of all its processes.
    """

    memory_mib: float | None
    disk_mib: float
    seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class Meter:
    """Marks of the beginning of a run."""

    clock: float = field(default_factory=time.monotonic)
    worked: float = field(default_factory=_processor_seconds)
    peak_mib: float = field(default_factory=own_peak_rss_mib)

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.clock

    def took(self, out: Path, others_mib: float) -> Took:
        """Return what was taken so far.

        Args:
            out: the run's folder.
            others_mib: the most memory that a process had which this one has started.
        """
        own = own_peak_rss_mib()
        memory = max(own, others_mib) if own > self.peak_mib else None
        return Took(memory, size_bytes(out) / MIB, self.seconds, _processor_seconds() - self.worked)

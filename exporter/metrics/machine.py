"""The facts about a machine that decide how fast it is: what must be equal for two latencies to be compared."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

UNKNOWN = "unknown"
BUSY = 1.5
"""Load per core above which the machine counts as busy; the measured program itself makes about 1."""


@dataclass(frozen=True)
class Mode:
    """Under what circumstances a latency was taken.

    Attributes:
        threads: of the engine; None when it chose itself.
        cpu: model of the processor.
        cores: logical cores that this process may use.
        governor: frequency governor; ``unknown`` where the system does not say.
        turbo: ``on``, ``off`` or ``unknown``.
        power: ``mains``, ``battery`` or ``unknown``.
        settings_of_run: what else must be equal, such as batch, size, device; chosen by the caller.
        load: load average over one minute, not compared.
    """

    threads: int | None
    cpu: str
    cores: int
    governor: str
    turbo: str
    power: str
    settings_of_run: Mapping[str, Any] = field(default_factory=dict)
    load: float | None = None

    @classmethod
    def read(
        cls, threads: int | None = None, settings: Mapping[str, Any] | None = None, system: Path = Path("/sys")
    ) -> Mode:
        """Read the facts of this machine.

        Args:
            threads: of the engine that is timed.
            settings: what else must be equal for a comparison.
            system: root of the kernel's files.
        """
        return cls(
            threads=threads,
            cpu=cpu_model(),
            cores=usable_cores(),
            governor=_line(system / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            turbo=_turbo(system),
            power=_power(),
            settings_of_run=dict(settings or {}),
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )

    def settings(self) -> dict[str, Any]:
        """Return what must be equal."""
        found = asdict(self)
        del found["load"]
        return {**found.pop("settings_of_run"), **found}

    def differs(self, other: Mode) -> list[str]:
        """Return the names of the settings that differ."""
        a, b = self.settings(), other.settings()
        return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))

    def warnings(self) -> list[str]:
        """Return what makes numbers taken here doubtful."""
        found = []
        if self.load is not None and self.load > BUSY * self.cores:
            found.append(f"the machine was busy (load {self.load:.1f} on {self.cores} cores)")
        if self.power == "battery":
            found.append("on battery")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return everything, JSON-ready."""
        return {**self.settings(), "load": self.load}


def cpu_model(table: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's model name, as the system tells it."""
    try:
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or UNKNOWN


def usable_cores() -> int:
    """Return how many logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _turbo(system: Path) -> str:
    boost = _line(system / "devices/system/cpu/cpufreq/boost")
    off = _line(system / "devices/system/cpu/intel_pstate/no_turbo")
    return {"1": "on", "0": "off"}.get(boost) or {"1": "off", "0": "on"}.get(off) or UNKNOWN


def _power() -> str:
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None or battery.power_plugged is None:
        return UNKNOWN if battery else "mains"
    return "mains" if battery.power_plugged else "battery"


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip() or UNKNOWN
    except (OSError, UnicodeDecodeError):
        return UNKNOWN

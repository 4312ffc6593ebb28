"""Targets that fail in the ways real ones do."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from targets.base import Capabilities, Session, TargetError


@dataclass(frozen=True)
class NoOptions:
    """Nothing to choose."""


class Missing:
    """Its library is not installed."""

    type = "missing"
    options = NoOptions
    engine_file = "model.onnx"
    schemes = ()
    rounds_results = False

    def capabilities(self) -> Capabilities:
        """Say so."""
        return Capabilities(
            False, False, None, "", (), "pip install 'diffusion-exporter[missing]'", "'missing' is not installed."
        )

    def check(self, options: NoOptions) -> None:
        """Nothing to check."""

    def compile(self, source: Path, out: Path, options: NoOptions) -> None:
        """Never reached."""
        raise AssertionError

    def open(self, engine: Path, options: NoOptions) -> Session:
        """Never reached."""
        raise AssertionError


class Killed(Missing):
    """Its compiler takes all memory, and the kernel ends the process it is in."""

    type = "killed"

    def capabilities(self) -> Capabilities:
        """Claim to work."""
        return Capabilities(True, True, "1.0", "test device", ("f32",), "")

    def compile(self, source: Path, out: Path, options: NoOptions) -> None:
        """Leave half a file and die without a word."""
        (out / "half").write_bytes(b"x" * 100)
        os.kill(os.getpid(), signal.SIGKILL)


class Crashed(Killed):
    """Its compiler fails in a way that nobody foresaw."""

    type = "crashed"

    def compile(self, source: Path, out: Path, options: NoOptions) -> None:
        """Raise what is no TargetError."""
        raise MemoryError("std::bad_alloc")


class Broken(Missing):
    """Its compiler refuses every model."""

    type = "broken"

    def capabilities(self) -> Capabilities:
        """Claim to work."""
        return Capabilities(True, True, "1.0", "test device", ("f32",), "")

    def compile(self, source: Path, out: Path, options: NoOptions) -> None:
        """Write half a file and give up."""
        (out / "half").write_bytes(b"x" * 100)
        msg = "target broken: no kernel for this layer"
        raise TargetError(msg)

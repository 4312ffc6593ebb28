"""Has components converted for targets that take torch networks, in a process beside ours.

Converting holds several copies of the weights and may crash; the process takes them along when it ends. To start it
takes as long as to convert a small component, so that it stays for the next one unless it has grown large.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

from exporter.metrics.size import failure_of
from targets.build import raise_told

_LONGEST_S = 6 * 3600
_LARGE_MIB = 1536.0
"""What a process may have held to be used again: one that held more keeps some of it."""


@dataclass(frozen=True)
class Order:
    """What is to be converted.

    Attributes:
        state: folder of the state.
        component: its name.
        requested: components on request that the state's list has to know.
        target: type.
        options: of the target.
        export: shapes.
        recording: folder of the dense pipeline's.
        rows: of the recording, that the network is called with.
        calls: recorded calls that the engine is proven with.
        facts: for the engine's metadata.
        out: an existing, empty folder.
        rounded: ONNX file of a quantized component, which says what its weights and ranges are; empty for others.
    """

    state: str
    component: str
    requested: tuple[str, ...]
    target: str
    options: Mapping[str, Any]
    export: Mapping[str, Any]
    recording: str
    rows: int
    calls: int
    facts: Mapping[str, str]
    out: str
    rounded: str = ""

    def text(self) -> str:
        """Return it as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Order:
        """Return what `text` gave."""
        told = json.loads(text)
        return cls(**{**told, "requested": tuple(told["requested"])})


class Converter:
    """Carries orders out, one after the other; `exporter.lowering.converting` is the other side."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._child: subprocess.Popen[str] | None = None
        self._errors: IO[str]

    def __call__(self, order: Order) -> float:
        """Carry an order out.

        Returns:
            The most memory that the process had so far, in MiB.

        Raises:
            TargetMissing, TargetError, ComponentFailed, OSError: it did not succeed.
        """
        child = self._child or self._started()
        watch = threading.Timer(_LONGEST_S, child.kill)
        watch.daemon = True
        watch.start()
        try:
            answer = _asked(child, order)
        except BaseException:
            self.close()
            raise
        finally:
            watch.cancel()
        if not answer:
            child.wait()
            self._errors.seek(0)
            failure = failure_of(child.args, child.returncode, self._errors.read())
            self.close()
            raise failure
        told = json.loads(answer)
        if told["peak_mib"] > _LARGE_MIB:
            self.close()
        raise_told(answer)
        return float(told["peak_mib"])

    def close(self) -> None:
        """End the process; the next order starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
        self._child = None
        self._held.close()

    def _started(self) -> subprocess.Popen[str]:
        """Return a new process that listens."""
        file = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - `close` does
        self._errors = self._held.enter_context(file)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "exporter.lowering.converting"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        return self._child


def _asked(child: subprocess.Popen[str], order: Order) -> str:
    """Return the answer to an order; nothing where the process has died."""
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # what it died of is told by its end
        child.stdin.write(order.text() + "\n")
        child.stdin.flush()
    return child.stdout.readline()

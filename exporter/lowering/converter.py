"""Has components converted for targets that take torch networks, in a process beside ours.

Converting holds several copies of the weights and may crash; the process takes them along when it ends. To start it
takes as long as to convert a small component, so that it stays for the next one unless it has grown large.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from exporter.errors import ComponentFailed
from exporter.metrics.size import failure_of
from targets.build import raise_told

_LONGEST_S = 6 * 3600
_LOOK_S = 0.5
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
        out: folder that is made anew, and by whose name the order is known.
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


def end_with(parent: int) -> None:
    """End this process within a second of the end of the one that started it.

    A run that is killed and started again has the same work done in the same folder: two must not be at it. The end of
    the input alone would be seen only after an order, which may take minutes.

    Args:
        parent: its process id.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os._exit(1)

    if os.getppid() != parent:
        sys.exit(1)
    threading.Thread(target=watch, daemon=True).start()


class Converter:
    """Carries orders out, one after the other; `exporter.lowering.converting` is the other side."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._child: subprocess.Popen[str] | None = None
        self._errors: IO[str]
        self._waiting: deque[Order] = deque()
        self._answers: dict[str, str | ComponentFailed] = {}

    def start(self) -> None:
        """Start the process before it is needed: to import its libraries takes it seconds."""
        if self._child is None:
            self._started()

    def begin(self, order: Order) -> None:
        """Have an order carried out while something else is done; `__call__` with the same one gives the result."""
        if order.out not in self._answers and all(order.out != other.out for other in self._waiting):
            self._waiting.append(order)
            self._send(order)

    def __call__(self, order: Order) -> float:
        """Carry an order out.

        Returns:
            The most memory that the process had so far, in MiB.

        Raises:
            TargetMissing, TargetError, ComponentFailed, OSError: it did not succeed.
        """
        self.begin(order)
        while order.out not in self._answers:
            self._receive()
        answer = self._answers.pop(order.out)
        if isinstance(answer, ComponentFailed):
            raise answer
        raise_told(answer)
        return float(json.loads(answer)["peak_mib"])

    def settle(self) -> None:
        """Wait until nothing is being converted, so that nothing disturbs what is timed."""
        while self._waiting:
            self._receive()

    def close(self) -> None:
        """End the process, whatever it does."""
        self._waiting.clear()
        self._answers.clear()
        self._end()

    def _send(self, order: Order) -> None:
        out = Path(order.out)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        child = self._child or self._started()
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: its answer, which is none, tells
            child.stdin.write(order.text() + "\n")
            child.stdin.flush()

    def _receive(self) -> None:
        """Wait for the answer to the first order; where the process ends with it, another goes on with the rest."""
        answer: str | ComponentFailed = self._line()
        if isinstance(answer, str) and not answer:
            answer = self._failure()
        done = self._waiting.popleft()
        self._answers[done.out] = answer
        told = {"died": True, "peak_mib": math.inf} if isinstance(answer, ComponentFailed) else json.loads(answer)
        if told.keys() > {"peak_mib"}:
            shutil.rmtree(done.out, ignore_errors=True)  # half a package may be large
        if told["peak_mib"] > _LARGE_MIB:
            self._end()
            for order in self._waiting:
                self._send(order)

    def _line(self) -> str:
        """Return what the process answers next; nothing where it has died."""
        child = self._child
        assert child is not None
        assert child.stdout is not None
        watch = threading.Timer(_LONGEST_S, child.kill)
        watch.daemon = True
        watch.start()
        try:
            return child.stdout.readline()
        except BaseException:
            self.close()
            raise
        finally:
            watch.cancel()

    def _failure(self) -> ComponentFailed:
        assert self._child is not None
        self._child.wait()
        self._errors.seek(0)
        return failure_of(self._child.args, self._child.returncode, self._errors.read())

    def _started(self) -> subprocess.Popen[str]:
        """Return a new process that listens."""
        file = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - `_end` does
        self._errors = self._held.enter_context(file)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "exporter.lowering.converting", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        return self._child

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
        self._child = None
        self._held.close()

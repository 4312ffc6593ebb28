"""Compiles one component in a process of its own: a compiler that crashes or runs out of memory takes only that along.

``python -m targets.build MODULE:CLASS OPTIONS_JSON SOURCE OUT [PROGRESS]`` prints one JSON line: ``{}``, or what went
wrong. Into the file PROGRESS it writes what part is done, for targets that know.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from targets.base import Target, TargetError, TargetMissing, TellsProgress

_EVERY_S = 0.2


def main(arguments: Sequence[str]) -> int:
    """Compile; return the exit status, which is 0 for every failure that the JSON line tells."""
    place, options_json, source, out, *rest = arguments
    module, _, attribute = place.partition(":")
    target: Target = getattr(import_module(module), attribute)()
    found: dict[str, Any] = {}
    try:
        options = target.options(**json.loads(options_json))
        if rest and isinstance(target, TellsProgress):
            target.compile_telling(Path(source), Path(out), options, _Writer(Path(rest[0])))
        else:
            target.compile(Path(source), Path(out), options)
    except TargetError as error:
        found = {"missing" if isinstance(error, TargetMissing) else "failed": str(error)}
    except OSError as error:
        found = {"os": [error.errno, error.strerror, str(error.filename or out)]}
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


class _Writer:
    """Writes a done fraction into a file, as often as somebody can see it."""

    def __init__(self, file: Path) -> None:
        self._file, self._last = file, 0.0

    def __call__(self, done: float) -> None:
        now = time.monotonic()
        if now - self._last >= _EVERY_S:
            self._last = now
            self._file.write_text(f"{done:.4f}", encoding="ascii")


def raise_told(output: str) -> None:
    """Raise what such a process told on its stdout.

    Raises:
        TargetMissing, TargetError, OSError: as the target raised it.
    """
    told = json.loads(output.strip().splitlines()[-1])
    if "missing" in told:
        raise TargetMissing(told["missing"])
    if "failed" in told:
        raise TargetError(told["failed"])
    if "os" in told:
        raise OSError(*told["os"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

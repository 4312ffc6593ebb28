"""Loads the components of an engine in a process that imports nothing but its runtime, and calls each once.

``python -m targets.footprint TYPE OPTIONS_JSON SHAPES_JSON FOLDER...`` prints one JSON line: load and first-call times
in ms per component. The shapes, component -> input -> sizes, are what open axes are called with. Whoever
starts it reads the process's peak memory: it is the engine's own, without torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import targets
from targets.base import TargetError


def main(arguments: Sequence[str]) -> int:
    """Load every folder's engine, call each once, print what it took; return the exit status."""
    kind, options_json, shapes_json, *folders = arguments
    shapes = json.loads(shapes_json)
    target = targets.target(kind)
    options = target.options(**json.loads(options_json))
    found: dict[str, dict[str, float]] = {"load_ms": {}, "first_ms": {}}
    sessions = []
    try:
        target.check(options)  # imports the runtime, which is no part of loading an engine
        for folder in map(Path, folders):
            started = time.perf_counter()
            session = target.open(folder, options)
            ready = time.perf_counter()
            known = shapes.get(folder.name, {})
            session({spec.name: np.zeros(known.get(spec.name, spec.shape), spec.dtype) for spec in session.inputs})
            found["load_ms"][folder.name] = (ready - started) * 1e3
            found["first_ms"][folder.name] = (time.perf_counter() - ready) * 1e3
            sessions.append(session)  # all stay loaded: the peak is that of the whole engine
    except TargetError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

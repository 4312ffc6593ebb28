"""Starts runs quickly: imports everything once, then forks a run per line it reads, so that it can be killed often.

Reads JSON lines ``{"recipe": path, "out": path}``; answers with the process id, then (on a second line, when the run
has ended) with its wait status.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import diffusers  # noqa: F401
import onnxruntime  # noqa: F401
import onnxscript.optimizer
import onnxscript.rewriter
import onnxscript.version_converter  # noqa: F401
import torch
import transformers  # noqa: F401

import exporter.lowering.export
import exporter.pruners.magnitude
import exporter.tuning.distill  # noqa: F401
from exporter.progress import Silent
from exporter.recipe import read_recipe
from exporter.run import run_recipe


def main() -> None:
    """Serve until the input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            record = run_recipe(read_recipe(Path(job["recipe"])), Path(job["out"]), progress=Silent())
            os._exit(record.exit_code)
        print(child, flush=True)  # noqa: T201 - this is how it talks
        _, status = os.waitpid(child, 0)
        print(status, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

"""Runs in a peer's own environment: loads an engine folder with optimum's pipeline and writes the images it makes.

``python peer_loader.py REQUEST.json``; the request names the loader, the folder, its keywords and the calls to make.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch


def main(request_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    loader = getattr(importlib.import_module(request["module"]), request["cls"])
    pipeline = loader.from_pretrained(request["folder"], **request["keywords"])
    pipeline.set_progress_bar_config(disable=True)
    for call in request["calls"]:
        latents = torch.from_numpy(np.load(call["latents"]))
        images = pipeline(call["prompts"], latents=latents, output_type="np", **call["settings"]).images
        np.save(call["images"], images)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])

"""A whole run leaves the libraries' classes and functions as they were."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ADDED_BY_LIBRARIES = ["torch.nn.Module.smart_apply"]  # transformers does, when it first initialises weights

RECIPE = """
name: tiny
source: {{path: {source}}}
sampling: {{steps: 2, guidance: 2.0, size: 64}}
stages:
  - prune: {{method: magnitude, keep_ratio: 0.5, round_to: 8}}
targets:
  ort: {{type: onnxruntime, threads: 1}}
  ov: {{type: openvino, threads: 1}}
measure: {{prompts: {prompts}, images: 2, calls: 1, latency_seconds: 0.5}}
"""
WATCH = """
import hashlib, inspect, json, sys
import diffusers, onnx, onnxruntime, openvino, torch, torch_pruning, transformers
from diffusers.models import attention, attention_processor, resnet
from diffusers.models.unets import unet_2d_blocks

PLACES = (
    torch, torch.nn.functional, torch.nn, torch.onnx, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL,
    diffusers.StableDiffusionPipeline, diffusers.DiffusionPipeline, diffusers.ModelMixin, diffusers.ConfigMixin,
    diffusers.DPMSolverMultistepScheduler, attention, attention_processor, resnet, unet_2d_blocks,
    transformers.CLIPTextModel, transformers.CLIPTokenizer, transformers.PreTrainedModel, onnx, onnxruntime, openvino,
    torch_pruning,
)

def watched():
    for place in PLACES:
        yield place.__name__, place
        for name, thing in vars(place).items():
            if inspect.isclass(thing) and thing.__module__.split(".")[0] in {"torch", "diffusers", "transformers"}:
                yield f"{place.__name__}.{name}", thing

def functions():
    found = {}
    for path, place in watched():
        for name, thing in vars(place).items():
            thing = getattr(thing, "__func__", thing)
            if inspect.isfunction(thing):
                found[f"{path}.{name}"] = thing
    return found
"""
RUN = """
before = functions()
sys.argv = ["exporter", "run", "recipe.yaml", "--out", "out"]
from exporter.cli import main
try: main()
except SystemExit as end: code = end.code
else: code = 0
after = functions()
changed = sorted(name for name in before if after.get(name) is not before[name])
added = sorted(name for name in after if name not in before)
found = {"code": code, "watched": len(before), "changed": changed, "added": added}
with open("found.json", "w") as file: json.dump(found, file)
"""


def test_libraries_are_unchanged_after_a_run(
    tmp_path: Path, tiny_pipeline_folder: Path, fresh_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "prompts.txt").write_text("a large red circle\na small blue star\n", encoding="utf-8")
    recipe = RECIPE.format(source=tiny_pipeline_folder, prompts=tmp_path / "prompts.txt")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    done = fresh_python("-c", f"import os; os.chdir({str(tmp_path)!r})\n{WATCH}\n{RUN}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["code"] in (0, None), done.stderr
    assert found["watched"] > 2000
    assert found["changed"] == []
    assert [name for name in found["added"] if name not in ADDED_BY_LIBRARIES] == []
    assert (tmp_path / "out/report.json").is_file()

"""Engine folders load and run with the pipelines of optimum-onnx and optimum-intel, in environments of their own.

Their pins conflict with ours, so each gets a virtual environment: minutes and gigabytes, hence only on request.
EXPORTER_PEER_TESTS=1 makes them in a temporary folder, or in the folder EXPORTER_PEER_FOLDER, which is then kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import targets
from exporter.lowering.export import ExportOptions, export_component
from exporter.lowering.layout import write_layout
from exporter.lowering.stored import stored_weights
from exporter.networks.components import components
from exporter.networks.pipeline import load_pipeline
from exporter.networks.storage import open_bare
from exporter.progress import Silent
from exporter.random_weights.families import family
from exporter.random_weights.writing import write_random

REQUESTED = os.environ.get("EXPORTER_PEER_TESTS") == "1"
FOLDER = os.environ.get("EXPORTER_PEER_FOLDER")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not REQUESTED,
        reason="makes two virtual environments with optimum-onnx and optimum-intel: set EXPORTER_PEER_TESTS=1",
    ),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch.export's own
]


@dataclass(frozen=True)
class Peer:
    """One loader. `uninstall`: torchvision may come as a CUDA build, which does not import beside a CPU torch."""

    target: str
    module: str
    prefix: str
    install: tuple[str, ...]
    uninstall: tuple[str, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)


PEERS = {
    "ort": Peer(
        "onnxruntime",
        "optimum.onnxruntime",
        "ORT",
        ("optimum-onnx[onnxruntime]==0.1.0", "diffusers", "accelerate"),
    ),
    "ov": Peer(
        "openvino",
        "optimum.intel",
        "OV",
        ("optimum-intel[diffusers]==2.2.0", "accelerate"),
        ("torchvision",),
        # on processors with bf16, OpenVINO takes that by default
        {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}},
    ),
}


def interpreter(name: str, base: Path, environment: dict[str, str]) -> Path:
    """Return the peer's python; torch comes first, so that the build is the same as ours."""
    python = base / name / "bin/python"
    if python.is_file():
        return python
    peer = PEERS[name]
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # ensurepip's pip: the newest refuses a direct URL in optimum-intel's metadata
    subprocess.run([sys.executable, "-m", "venv", str(base / name)], check=True, env=environment)
    subprocess.run([*pip, f"torch=={torch.__version__.partition('+')[0]}"], check=True, env=environment)
    subprocess.run([*pip, *peer.install], check=True, env=environment)
    for module in peer.uninstall:
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", module], check=True, env=environment)
    return python


@pytest.fixture(scope="module", params=sorted(PEERS))
def peer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, machine_environment: dict[str, str]
) -> tuple[Peer, Path]:
    base = Path(FOLDER) if FOLDER else tmp_path_factory.mktemp("peers")
    return PEERS[request.param], interpreter(request.param, base, machine_environment)


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "dynamic"])
def exported(
    request: pytest.FixtureRequest, tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bool]:
    """Every component of the tiny pipeline as ONNX."""
    folder = tmp_path_factory.mktemp("onnx")
    pipeline = load_pipeline(tiny_pipeline_folder)
    options = ExportOptions(dynamic=request.param, latent=8, tokens=32)
    for part in components("StableDiffusionPipeline"):
        (folder / part.name).mkdir()
        export_component(part.name, getattr(pipeline, part.folder), folder / part.name, options)
    return folder, request.param


@pytest.fixture(scope="module")
def sdxl_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL in fp16 whose U-Net is wide enough that its graph points into the state's file."""
    wanted = family("sdxl", tiny=True)
    wide = {"block_out_channels": [64, 128]}
    parts = tuple(replace(p, config={**p.config, **wide}) if p.folder == "unet" else p for p in wanted.parts)
    out = tmp_path_factory.mktemp("sdxl") / "state"
    return write_random(replace(wanted, parts=parts), out, seed=0, progress=Silent()).folder


@pytest.fixture(scope="module")
def sdxl_exported(sdxl_state: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every component of it as ONNX, exported without weights in memory."""
    folder = tmp_path_factory.mktemp("onnx")
    options = ExportOptions(latent=8, tokens=77, external_bytes=100_000)
    for part in components("StableDiffusionXLPipeline"):
        (folder / part.name).mkdir()
        module, weights = stored_weights(open_bare(sdxl_state / part.folder, cls=part.cls), "0" * 64)
        export_component(part.name, module, folder / part.name, options, weights=weights)
    assert (folder / "unet/diffusion_pytorch_model.safetensors").is_file()
    return folder


def engine_of(exported: Path, state: Path, out: Path, target_type: str, **options: Any) -> Path:
    target = targets.target(target_type)
    for part in components(json.loads((state / "model_index.json").read_text())["_class_name"]):
        (out / part.name).mkdir(parents=True)
        target.compile(exported / part.name / "model.onnx", out / part.name, target.options(**options))
    write_layout(state, out, engine_file=target.engine_file)
    return out


def calls_for(dynamic: bool, folder: Path) -> list[dict[str, Any]]:
    """Return what to ask: the exported size, and where axes are open two prompts at another size too."""
    shapes = [(1, 8, 8), (2, 8, 16)] if dynamic else [(1, 8, 8)]
    calls = []
    for index, (rows, height, width) in enumerate(shapes):
        latents = np.random.default_rng(index).standard_normal((rows, 4, height, width), dtype=np.float32)
        np.save(folder / f"latents-{index}.npy", latents)
        settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 8 * height, "width": 8 * width}
        calls.append(
            {
                "latents": str(folder / f"latents-{index}.npy"),
                "images": str(folder / f"images-{index}.npy"),
                "prompts": ["a large red circle", "two blue squares"][:rows],
                "settings": settings,
            }
        )
    return calls


def assert_peer_draws_what_torch_draws(
    peer: tuple[Peer, Path], folder: Path, state: Path, calls: list[dict[str, Any]], environment: dict[str, str]
) -> None:
    loader, python = peer
    request = folder.with_name("request.json")
    asked = {
        "module": loader.module,
        "cls": loader.prefix + json.loads((state / "model_index.json").read_text())["_class_name"],
        "folder": str(folder),
        "keywords": dict(loader.keywords),
        "calls": calls,
    }
    request.write_text(json.dumps(asked))
    script = Path(__file__).with_name("peer_loader.py")
    ended = subprocess.run(
        [str(python), str(script), str(request)],
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "expects a non scalar timestep" not in ended.stderr
    pipeline = load_pipeline(state)
    pipeline.set_progress_bar_config(disable=True)
    for call in calls:
        latents = torch.from_numpy(np.load(call["latents"]))
        want = pipeline(call["prompts"], latents=latents, output_type="np", **call["settings"]).images
        error = float(np.mean((np.load(call["images"]) - want) ** 2))
        assert -10 * np.log10(max(error, 1e-20)) > 60


def test_the_folder_loads_and_makes_the_images_that_torch_makes(
    peer: tuple[Peer, Path],
    exported: tuple[Path, bool],
    tiny_pipeline_folder: Path,
    tmp_path: Path,
    machine_environment: dict[str, str],
) -> None:
    onnx, dynamic = exported
    folder = engine_of(onnx, tiny_pipeline_folder, tmp_path / "engine", peer[0].target)
    calls = calls_for(dynamic, tmp_path)
    assert_peer_draws_what_torch_draws(peer, folder, tiny_pipeline_folder, calls, machine_environment)


@pytest.mark.parametrize("weights", ["own", "linked"])
def test_an_sdxl_folder_whose_weights_lie_beside_its_graph_loads_too(
    weights: str,
    peer: tuple[Peer, Path],
    sdxl_exported: Path,
    sdxl_state: Path,
    tmp_path: Path,
    machine_environment: dict[str, str],
) -> None:
    if peer[0].target == "openvino" and weights == "linked":
        pytest.skip("OpenVINO's own format holds its weights always")
    options = {"weights": weights} if peer[0].target == "onnxruntime" else {}
    folder = engine_of(sdxl_exported, sdxl_state, tmp_path / "engine", peer[0].target, **options)
    if peer[0].target == "onnxruntime":
        beside = {path.name for path in (folder / "unet").iterdir() if path.suffix != ".json"} - {"model.onnx"}
        assert beside == {"own": {"model.onnx_data"}, "linked": {"diffusion_pytorch_model.safetensors"}}[weights]
    calls = calls_for(False, tmp_path)
    assert_peer_draws_what_torch_draws(peer, folder, sdxl_state, calls, machine_environment)

"""What every test gets: no network, no home of the user's, one thread, repeatable property tests, a tiny pipeline."""

from __future__ import annotations

import fcntl
import functools
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from exporter.loan import DenseLoan

MadeOnce = Callable[[str, Callable[[Path], object]], Path]

ROOT = Path(__file__).resolve().parent.parent
_MACHINE = MappingProxyType(dict(os.environ))
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

settings.register_profile(
    "repeatable",
    derandomize=True,  # a red test is red again on the next machine
    deadline=None,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def _isolated() -> tempfile.TemporaryDirectory[str]:
    """Point every cache into a fresh folder, and return it."""
    home = tempfile.TemporaryDirectory(prefix="exporter-tests-", ignore_cleanup_errors=True)
    os.environ.update(_OFFLINE)
    os.environ.update(HOME=home.name, XDG_CACHE_HOME=f"{home.name}/cache", XDG_CONFIG_HOME=f"{home.name}/config")
    for name in ("HF_HOME", "HF_TOKEN", "HF_HUB_CACHE", "TORCH_HOME", "MPLCONFIGDIR", "XDG_DATA_HOME", "NO_COLOR"):
        os.environ.pop(name, None)
    return home


# Libraries read these once, when they are imported, and pytest imports the conftest of a folder that its command line
# names, with all that it imports, before any hook of this one: only here is early enough.
_home = _isolated()


def pytest_unconfigure() -> None:
    """Remove that folder and give the process its own environment back."""
    os.environ.clear()
    os.environ.update(_MACHINE)
    _home.cleanup()


_UNTRACED = ("contract", "families", "faults", "targets")
"""Folders of tests whose lines others run too, or whose subject is no part of what coverage looks at."""


@contextmanager
def _no_tracing() -> Iterator[None]:
    """Keep coverage's tracer out: that of Python before 3.14 visits every line, of libraries too.

    It has tests take 1.4 times as long, and those that export or convert twice as long.
    """
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Keep the tracer out of the import of large libraries, and of torch's exporter and onnxscript's optimizer.

    These run millions of lines of Python that are not ours. What the exporter calls of ours, the wrappers' `forward`,
    is called for parity too.
    """
    if sys.gettrace() is not None:
        with _no_tracing():
            for name in ("torch", "diffusers", "onnxruntime", "onnxscript"):
                importlib.import_module(name)
        from exporter.lowering import export

        patch = pytest.MonkeyPatch()
        for name in ("_traced", "simplify"):
            patch.setattr(export, name, _untraced(getattr(export, name)))
        session.config.add_cleanup(patch.undo)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Leave tests of some folders untraced, fixtures and all."""
    folder = item.path.relative_to(ROOT / "tests").parts[0]
    with _no_tracing() if folder in _UNTRACED else nullcontext():
        return (yield)


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*args: Any, **keywords: Any) -> Any:
        with _no_tracing():
            return function(*args, **keywords)

    return called


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def machine_environment() -> dict[str, str]:
    """The environment the tests were started in, for the few that must use the machine as it is (pip)."""
    return {name: value for name, value in _MACHINE.items() if not name.startswith(("COVERAGE_", "COV_", "PYTEST_"))}


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Return a function from a name to a folder, which is filled once for all workers of a session. Read only."""
    own = tmp_path_factory.getbasetemp()
    everyones = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def folder_of(name: str, fill: Callable[[Path], object]) -> Path:
        folder, made = everyones / f"once-{name}", everyones / f"once-{name}.made"
        with (everyones / f"once-{name}.lock").open("w") as alone:
            fcntl.flock(alone, fcntl.LOCK_EX)
            if not made.is_file():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                fill(folder)
                made.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny_pipeline_folder(made_once: MadeOnce) -> Path:
    """A StableDiffusionPipeline folder with random weights, the same ones every time. Read only: copy it to change it.

    U-Net of two levels (32, 64 channels), 8x8 latents of 4 channels; VAE with 8x down-sampling, so 64x64 images;
    CLIP text encoder of width 32 and 32 tokens; byte-level tokenizer of 514 tokens; DPM-Solver++.
    """
    return made_once("tiny-pipeline", _save_tiny_pipeline) / "pipeline"


def _save_tiny_pipeline(folder: Path) -> None:
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    tokenizer = _byte_tokenizer(folder / "vocabulary")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            vae=_tiny_vae(),
            text_encoder=_tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=_tiny_unet(),
            scheduler=DPMSolverMultistepScheduler(
                algorithm_type="dpmsolver++", beta_schedule="scaled_linear", steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)


@pytest.fixture(scope="session")
def tiny_loan(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DenseLoan:
    """What a run lends to pruning methods, of the tiny pipeline: 3 steps at guidance 3, 2 images at a time."""
    from exporter.loan import DenseLoan
    from exporter.networks.source import check_source
    from exporter.progress import Silent
    from exporter.transforms import make_dense

    folder = tmp_path_factory.mktemp("tiny-loan")
    (folder / "prompts.txt").write_text("a cat\na dog\na hat\n")
    facts = check_source(tiny_pipeline_folder)
    dense, _ = make_dense(tiny_pipeline_folder, facts, folder / "dense")
    sampling = {"scheduler": "ddim", "steps": 3, "guidance": 3.0, "size": 64, "batch": 2}
    return DenseLoan(dense, sampling, "no target here", 5, folder / "loan", Silent())


@pytest.fixture(scope="session")
def float_graph() -> Callable[..., Path]:
    """Return a function that exports a U-Net's folder into another, two rows of 8 x 8, and returns its ONNX file."""
    from exporter.lowering.export import export_component
    from exporter.lowering.options import ExportOptions
    from exporter.lowering.quantized import write_folded
    from exporter.lowering.stored import stored_weights
    from exporter.networks.storage import open_bare

    def exported(folder: Path, out: Path, *, dynamic: bool = False) -> Path:
        options = ExportOptions(guided=False, batch=2, latent=8, tokens=32, dynamic=dynamic)
        bare, weights = stored_weights(open_bare(folder, cls="UNet2DConditionModel"), "0" * 64)
        pointing = out.with_name(f"{out.name}-pointing")
        pointing.mkdir(parents=True)
        export_component("unet", bare, pointing, options, weights=weights)
        return write_folded(pointing / "model.onnx", out)

    return exported


@pytest.fixture(scope="session")
def open_graph(tiny_pipeline_folder: Path, float_graph: Callable[..., Path], made_once: MadeOnce) -> Path:
    """The tiny pipeline's U-Net as an ONNX file whose rows, height and width are open. Read only."""
    unet = tiny_pipeline_folder / "unet"
    return made_once("open-graph", lambda made: float_graph(unet, made / "graph", dynamic=True)) / "graph/model.onnx"


@pytest.fixture(scope="session")
def tiny_graph(
    tiny_loan: DenseLoan, float_graph: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny pipeline's U-Net as an ONNX file in a folder of its own. Copies may be written beside it."""
    return float_graph(tiny_loan.dense.path / "unet", tmp_path_factory.mktemp("float") / "graph")


def _tiny_vae() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def _tiny_unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=8,  # in this class the number of heads
        cross_attention_dim=32,
    )


def _tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _byte_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a CLIPTokenizer without merges: every byte is a token, with and without the end of a word."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder.mkdir()
    letters = list(bytes_to_unicode().values())
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({name: index for index, name in enumerate(names)}), encoding="utf-8")
    merges.write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(vocab=str(vocabulary), merges=str(merges), model_max_length=32)

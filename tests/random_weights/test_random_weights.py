"""Random pipelines: of the published size, loadable by the stock libraries, repeatable, written with little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exporter.errors import ComponentFailed, RecipeError, SourceError
from exporter.networks.components import FAMILIES as SUPPORTED
from exporter.networks.source import check_source
from exporter.progress import Silent
from exporter.random_weights.families import FAMILIES, family
from exporter.random_weights.vocabularies import WORDS, write_tokenizer
from exporter.random_weights.writing import parameters_of, write_random

T5_XXL = 4_762_310_656
PUBLISHED = {
    "sd15": {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863, "safety_checker": 303_981_588},
    "sd21": {"text_encoder": 340_387_840, "unet": 865_910_724, "vae": 83_653_863},
    "sdxl": {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
    },
    "lcm": {"text_encoder": 123_060_480, "unet": 859_602_884, "vae": 83_653_863, "safety_checker": 303_981_588},
    "sd3-medium": {
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": T5_XXL,
        "transformer": 2_028_328_000,
        "vae": 83_819_683,
    },
    "flux": {"text_encoder": 123_060_480, "text_encoder_2": T5_XXL, "transformer": 11_901_408_320, "vae": 83_819_683},
    "pixart": {"text_encoder": T5_XXL, "transformer": 611_349_152, "vae": 83_653_863},
    "dit": {"transformer": 749_826_464, "vae": 83_653_863},
    "ddpm": {"unet": 35_746_307},
}
"""Numbers of parameters of the published models as the stock classes load them (the sinusoids of SD3 are a buffer)."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny pipeline of every family. Read only."""
    folder = tmp_path_factory.mktemp("tiny-families")
    for name in FAMILIES:
        write_random(family(name, tiny=True), folder / name, seed=0, progress=Silent())
    return folder


def _write(out: Path, name: str = "sd15", *, seed: int = 0, **options: Any) -> Path:
    return write_random(family(name, tiny=True), out, seed=seed, progress=Silent(), **options).folder


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_real_architecture_has_the_published_size(name: str) -> None:
    wanted = family(name, safety_checker="safety_checker" in PUBLISHED[name])
    assert parameters_of(wanted) == PUBLISHED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stock_pipeline_loads_every_weight_and_makes_an_image(name: str, tiny: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(tiny / name, local_files_only=True)
    assert type(pipeline).__name__ == family(name).pipeline
    for part in family(name, tiny=True).parts:
        network = getattr(pipeline, part.folder)
        if isinstance(network, torch.nn.Module):
            _assert_same_weights(network, _weights(tiny / name / part.folder))
    pipeline.set_progress_bar_config(disable=True)
    asked: dict[str, dict[str, Any]] = {"dit": {"class_labels": [1]}, "ddpm": {"batch_size": 1}}
    options = asked.get(name, {"prompt": "a red cat", "height": 64, "width": 64})
    options |= {"use_resolution_binning": False, "clean_caption": False} if name == "pixart" else {}
    generator = torch.Generator().manual_seed(0)
    (image,) = pipeline(**options, num_inference_steps=2, output_type="np", generator=generator).images
    assert image.shape == ((16, 16, 3) if name == "ddpm" else (64, 64, 3))
    assert np.isfinite(image).all()
    assert image.std() > 0.05


def _assert_same_weights(network: torch.nn.Module, stored: dict[str, torch.Tensor]) -> None:
    state = network.state_dict()
    tied = {"encoder.embed_tokens.weight"} if "shared.weight" in state else set()
    assert set(state) - tied == set(stored)
    for key, value in stored.items():
        assert value.dtype == torch.float16
        assert torch.equal(state[key], value.to(state[key].dtype)), key


def test_half_precision_weights_are_spread_like_those_of_a_fresh_network(tiny: Path) -> None:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh: Any = UNet2DConditionModel.from_config(json.loads((tiny / "sd15/unet/config.json").read_text()))
    stored = _weights(tiny / "sd15/unet")
    for key, value in fresh.state_dict().items():
        if value.numel() > 500:
            assert float(stored[key].float().std()) == pytest.approx(float(value.std()), rel=0.15), key
        elif value.std() == 0:
            assert torch.equal(stored[key].float(), value), key


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    first, same, other = (_write(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    files = [file.relative_to(first) for file in first.rglob("*") if file.is_file()]
    assert len(files) >= 9
    assert all((first / file).read_bytes() == (same / file).read_bytes() for file in files)
    different = {str(file) for file in files if (first / file).read_bytes() != (other / file).read_bytes()}
    assert different == {str(file) for file in files if file.suffix == ".safetensors"}


def test_shards_hold_the_same_numbers_and_the_stock_library_reads_them(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    whole, sharded = _write(tmp_path / "a"), _write(tmp_path / "b", shard_bytes=100_000)
    files = sorted((sharded / "unet").glob("*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 130_000
    index = json.loads((sharded / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    expected = _weights(whole / "unet")
    loaded: Any = UNet2DConditionModel.from_pretrained(sharded / "unet", local_files_only=True)
    assert all(torch.equal(value, expected[key].float()) for key, value in loaded.state_dict().items())
    assert check_source(sharded).parameters == check_source(whole).parameters


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_rest_cannot_do_yet_is_said_when_checked(name: str, tiny: Path) -> None:
    pipeline = family(name).pipeline
    if pipeline in SUPPORTED:
        assert check_source(tiny / name).pipeline_class == pipeline
    else:
        with pytest.raises(SourceError, match=f"unsupported pipeline family; got '{pipeline}'"):
            check_source(tiny / name)


@pytest.mark.parametrize("cls", ["CLIPTokenizer", "T5Tokenizer"])
def test_tokenizers_spell_everything_and_know_common_words(cls: str, tmp_path: Path) -> None:
    import transformers

    options: dict[str, Any] = {"model_max_length": 77} | ({"pad_token": "!"} if cls == "CLIPTokenizer" else {})
    size = write_tokenizer(cls, tmp_path, options)
    tokenizer: Any = getattr(transformers, cls).from_pretrained(tmp_path, local_files_only=True)
    assert size == len(tokenizer) <= 1024
    text = "a red photograph of zyx, 42%"
    ids = tokenizer(text).input_ids
    assert max(ids) < size
    spoken = tokenizer.decode(ids, skip_special_tokens=True)
    assert spoken.replace(" ", "") == text.replace(" ", "")
    special = 2 if cls == "CLIPTokenizer" else 1
    assert all(len(tokenizer(word).input_ids) == special + 1 for word in WORDS if len(word) > 1)
    padded = tokenizer("a", padding="max_length", truncation=True, max_length=77).input_ids
    assert len(padded) == 77


def test_every_token_has_an_embedding(tiny: Path) -> None:
    from transformers import CLIPTokenizer

    words = len(CLIPTokenizer.from_pretrained(tiny / "sdxl/tokenizer_2", local_files_only=True))
    assert words <= len(_weights(tiny / "sdxl/text_encoder_2")["text_model.embeddings.token_embedding.weight"])


def test_the_safety_checker_comes_when_asked_for(tmp_path: Path, tiny: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    assert not (tiny / "sd15/safety_checker").exists()
    out = write_random(
        family("sd15", tiny=True, safety_checker=True), tmp_path / "out", seed=0, progress=Silent()
    ).folder
    checker: Any = StableDiffusionSafetyChecker.from_pretrained(out / "safety_checker", local_files_only=True)
    _assert_same_weights(checker, _weights(out / "safety_checker"))
    index = json.loads((out / "model_index.json").read_text())
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert index["requires_safety_checker"] is True
    with pytest.raises(RecipeError, match=r"XL base 1\.0 has none"):
        family("sdxl", safety_checker=True)


def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"got 'sd155', expected sd15 .* Did you mean 'sd15'"):
        family("sd155")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").touch()
    with pytest.raises(RecipeError, match="not empty; expected a new folder"):
        _write(tmp_path / "full")
    (tmp_path / "file").touch()
    with pytest.raises(ComponentFailed, match="could not be read or written"):
        _write(tmp_path / "file/out")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RecipeError, match=r"not enough room; got 0 MB free, expected [1-9] MB"):
        _write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


@pytest.mark.slow
def test_a_large_component_takes_little_memory(tmp_path: Path, root: Path) -> None:
    """The text encoder of SD 1.5: 246 MB on disk, and far less than that beyond what importing takes."""
    code = f"""
import resource, sys
from pathlib import Path
from dataclasses import replace
from exporter.progress import Silent
from exporter.random_weights.families import family
from exporter.random_weights.writing import write_random
tiny, real = family("sd15", tiny=True), family("sd15")
write_random(tiny, Path({str(tmp_path / "tiny")!r}), seed=0, progress=Silent())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
large = replace(real, parts=tuple(part for part in real.parts if part.folder == "text_encoder"))
write_random(large, Path({str(tmp_path / "large")!r}), seed=0, progress=Silent())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "large/text_encoder/model.safetensors").stat().st_size
    shutil.rmtree(tmp_path / "large")
    assert size > 246e6
    assert int(done.stdout) * 1024 < size / 3

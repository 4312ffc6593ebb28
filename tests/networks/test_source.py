"""Every way in which a source model can be unfit is found before work begins, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.errors import SourceError
from exporter.networks.source import check_source, open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline"))


def test_an_intact_folder_has_facts(tiny_pipeline_folder: Path) -> None:
    facts = check_source(open_source(str(tiny_pipeline_folder)))
    assert facts.pipeline_class == "StableDiffusionPipeline"
    assert facts.components == {
        "text_encoder": "CLIPTextModel",
        "unet": "UNet2DConditionModel",
        "vae_decoder": "AutoencoderKL",
    }
    weights = tiny_pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert facts.sizes["unet"] == weights.stat().st_size
    assert len(facts.digest) == 64


def test_the_digest_is_of_the_content(folder: Path, tiny_pipeline_folder: Path) -> None:
    digest = check_source(folder).digest
    assert digest == check_source(tiny_pipeline_folder).digest
    (folder / "README.md").write_text("not read", encoding="utf-8")
    assert check_source(folder).digest == digest
    _change_json(folder / "scheduler/scheduler_config.json", beta_end=0.02)
    assert check_source(folder).digest != digest


def _change_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}), encoding="utf-8")


def _weights(folder: Path, part: str = "unet") -> Path:
    return next((folder / part).glob("*model.safetensors"))


def _poison(value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(_weights(folder))
        state["conv_out.bias"][0] = value
        save_file(state, _weights(folder))

    return damage


def _truncate(folder: Path) -> None:
    file = _weights(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _huge_header(folder: Path) -> None:
    _weights(folder).write_bytes((2**40).to_bytes(8, "little") + b"{}")


def _missing_shard(folder: Path) -> None:
    file = _weights(folder)
    names = dict.fromkeys(load_file(file), "diffusion_pytorch_model-00001-of-00001.safetensors")
    file.unlink()
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (
        lambda f: (f / "model_index.json").unlink(),
        r"no model_index\.json.*path: model\.safetensors, config: folder",
    ),
    "damaged index": (lambda f: (f / "model_index.json").write_text('{"a": '), r"model_index\.json: not readable JSON"),
    "binary index": (lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe\x00"), "not readable JSON"),
    "other family": (
        lambda f: _change_json(f / "model_index.json", _class_name="SanaPipeline"),
        "got 'SanaPipeline', expected one of StableDiffusionPipeline, StableDiffusionXLPipeline",
    ),
    "other network": (lambda f: _change_json(f / "model_index.json", unet=["diffusers", "X"]), "unsupported class"),
    "part not named": (lambda f: _change_json(f / "model_index.json", vae=[None]), "vae: not in the pipeline"),
    "no component": (lambda f: shutil.rmtree(f / "vae"), r"vae: missing; model_index\.json names AutoencoderKL"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), r"unet/config\.json: missing"),
    "damaged config": (lambda f: (f / "unet/config.json").write_text("]"), r"unet/config\.json: not readable"),
    "config of another class": (
        lambda f: _change_json(f / "unet/config.json", _class_name="UNet2DModel"),
        r"unet/config\.json: another class than model_index\.json names; got 'UNet2DModel'",
    ),
    "text encoder of another class": (
        lambda f: _change_json(f / "text_encoder/config.json", architectures=["T5EncoderModel"]),
        "got 'T5EncoderModel', expected 'CLIPTextModel'",
    ),
    "more inputs": (
        lambda f: _change_json(f / "unet/config.json", addition_embed_type="text_time"),
        "takes inputs that this family does not have; got addition_embed_type text_time",
    ),
    "bin only": (
        lambda f: _weights(f).rename(f / "unet/diffusion_pytorch_model.bin"),
        "pickled only.*save_pretrained",
    ),
    "ckpt only": (lambda f: _weights(f).rename(f / "unet/model.ckpt"), "pickled only"),
    "no weights": (lambda f: _weights(f).unlink(), "no weights; expected diffusion_pytorch_model.safetensors"),
    "truncated": (_truncate, "not a whole safetensors file"),
    "empty": (lambda f: _weights(f).write_bytes(b""), "not a whole safetensors file"),
    "huge header": (_huge_header, "not a whole safetensors file"),
    "missing shard": (_missing_shard, "a shard is missing"),
    "nan": (_poison(float("nan")), r"diffusion_pytorch_model\.safetensors: NaN .* tensor 'conv_out\.bias'"),
    "infinity": (_poison(float("-inf")), "NaN or infinite weights"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer: missing"),
    "empty tokenizer": (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], "tokenizer: empty"),
    "other tokenizer": (lambda f: _change_json(f / "model_index.json", tokenizer=["x", "Y"]), "tokenizer: unsupported"),
    "damaged scheduler": (lambda f: (f / "scheduler/scheduler_config.json").write_text("{"), "not readable JSON"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_an_unfit_source_is_refused_by_name(what: str, folder: Path) -> None:
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(SourceError, match=message):
        check_source(folder)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder; got nothing"):
        open_source(tmp_path / "gone")
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(SourceError, match="no such folder; got a file"):
        open_source(file)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"hub": "owner/name"}, "wrong keys"),
        ({"hub": "owner/name", "revision": "main"}, "a commit of 40"),
        ({"hub": "../name", "revision": COMMIT}, "expected owner/name"),
        ({"hub": "name", "revision": COMMIT}, "expected owner/name"),
    ],
)
def test_a_hub_source_must_be_repeatable(source: dict[str, str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(source)


def test_a_hub_source_comes_from_the_cache_when_offline(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    shutil.copytree(tiny_pipeline_folder, cached)
    found = open_source({"hub": "owner/name", "revision": COMMIT}, cache_dir=tmp_path)
    assert found == cached
    assert check_source(found).digest == check_source(tiny_pipeline_folder).digest


def test_a_hub_source_that_cannot_be_had_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be fetched and is not in the local cache"):
        open_source({"hub": "owner/name", "revision": COMMIT}, cache_dir=tmp_path)

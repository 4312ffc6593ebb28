"""Sources as people have them: variants, shards, precisions, hub caches, safety checkers; and each way to be wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.errors import SourceError
from exporter.networks.source import Choice, check_source, open_source
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.random_weights.families import family
from exporter.random_weights.writing import write_random
from exporter.transforms import make_dense

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model"


def _variant(folder: Path, word: str, dtype: torch.dtype | None = None) -> None:
    """Rename every weight file to a variant, in another precision where one is given."""
    for file in sorted(folder.glob("*/*.safetensors")):
        state = {name: value.to(dtype or value.dtype) for name, value in load_file(file).items()}
        file.unlink()
        save_file(state, file.with_name(file.name.replace(".safetensors", f".{word}.safetensors")), {"format": "pt"})


def _dense(source: Path, out: Path, choice: Choice | None = None) -> Any:
    return make_dense(source, check_source(source, choice), out / "0-dense")[0]


@pytest.mark.parametrize("word", ["fp16", "bf16"])
def test_a_variant_becomes_the_plain_weights_of_the_dense_state(word: str, half: Path, tmp_path: Path) -> None:
    before = {file.parent.name: load_file(file) for file in half.glob("*/*.safetensors")}
    dtype = torch.bfloat16 if word == "bf16" else torch.float16
    _variant(half, word, dtype)
    facts = check_source(half, Choice(variant=word))
    assert set(facts.precisions.values()) == {"BF16" if word == "bf16" else "F16"}
    dense = _dense(half, tmp_path / "out", Choice(variant=word))
    assert not list(dense.path.glob(f"*/*{word}*"))
    loaded = load_network(dense.path / "unet", cls="UNet2DConditionModel")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before["unet"][name].to(dtype).float()), name


@pytest.mark.parametrize("style", ["today", "early"])
def test_shards_of_a_variant_keep_their_index(style: str, tmp_path: Path) -> None:
    source = write_random(family("sd15", tiny=True), tmp_path / "a", seed=0, progress=Silent(), shard_bytes=90_000)
    folder = source.folder
    for index in folder.glob("*/*.index.json"):
        names = json.loads(index.read_text())["weight_map"]
        new = {name: _named(name, style) for name in set(names.values())}
        for was, now in new.items():
            (index.parent / was).rename(index.parent / now)
        weight_map = {name: new[shard] for name, shard in names.items()}
        index.with_name(index.name.replace(".json", ".fp16.json")).write_text(json.dumps({"weight_map": weight_map}))
        index.unlink()
    for file in folder.glob("*/*model.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    dense = _dense(folder, tmp_path / "out", Choice(variant="fp16"))
    assert len(list((dense.path / "unet").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 2
    whole = write_random(family("sd15", tiny=True), tmp_path / "b", seed=0, progress=Silent()).folder
    expected = load_file(whole / f"{UNET}.safetensors")
    loaded = load_network(dense.path / "unet", cls="UNet2DConditionModel").state_dict()
    assert all(torch.equal(value, expected[name].float()) for name, value in loaded.items())


def _named(name: str, style: str) -> str:
    """Return a shard's name as diffusers writes it for fp16 today, or as it did at first."""
    if style == "early":
        return name.replace(".safetensors", ".fp16.safetensors")
    return name.replace("model-", "model.fp16-")


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(half: Path) -> None:
    with pytest.raises(SourceError, match="text_encoder: no weights of variant bf16; got the one without a name"):
        check_source(half, Choice(variant="bf16"))


def test_the_variants_of_a_folder_are_listed(half: Path) -> None:
    for word in ("fp16", "non_ema"):
        shutil.copy(half / f"{UNET}.safetensors", half / f"{UNET}.{word}.safetensors")
    (half / f"{UNET}.safetensors").rename(half / f"{UNET}.bf16.safetensors")
    with pytest.raises(SourceError, match=r"none; got bf16, fp16, non_ema\. Write source\.variant: bf16"):
        check_source(half)


def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    made = write_random(family("sd15", tiny=True), tmp_path / "a", seed=0, progress=Silent(), shard_bytes=90_000)
    (shard, *_) = sorted((made.folder / "unet").glob("*-of-*.safetensors"))
    kept = shard.rename(shard.with_suffix(".away"))
    with pytest.raises(SourceError, match=rf"{shard.name}: a shard is missing; diffusion_pytorch_model"):
        check_source(made.folder)
    kept.rename(shard)
    (made.folder / f"{UNET}.safetensors.index.json").unlink()
    with pytest.raises(SourceError, match="shards without their index; got diffusion_pytorch_model-00001-of-"):
        check_source(made.folder)


def test_mixed_and_unknown_precisions_are_refused(half: Path) -> None:
    state = load_file(half / f"{UNET}.safetensors")
    save_file(state | {"conv_in.bias": state["conv_in.bias"].float()}, half / f"{UNET}.safetensors")
    with pytest.raises(SourceError, match=r"unet: mixed precisions; got .*F32 in 1 tensors such as 'conv_in\.bias'"):
        check_source(half)
    save_file({name: value.double() for name, value in state.items()}, half / f"{UNET}.safetensors")
    with pytest.raises(SourceError, match=r"unsupported number type; got F64 .*expected one of F16, BF16, F32"):
        check_source(half)


def _cache(pipeline: Path, cache: Path) -> Path:
    """Lay a pipeline out as the hub's client does: blobs, and a snapshot of links to them."""
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / COMMIT
    for number, file in enumerate(sorted(path for path in pipeline.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(pipeline)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_hub_id_is_read_from_the_cache_while_offline(half: Path, tmp_path: Path) -> None:
    _variant(half, "fp16")
    snapshot = _cache(half, tmp_path / "cache")
    source = {"hub": "owner/name", "revision": COMMIT}
    found = open_source(source, cache_dir=tmp_path / "cache", variant="fp16")
    assert found == snapshot
    dense = _dense(found, tmp_path / "out", Choice(variant="fp16"))
    assert not any(path.is_symlink() for path in dense.path.rglob("*"))
    with pytest.raises(SourceError, match=r"source owner/name at 9{12}: .* not in the local cache; got offline mode"):
        open_source(source | {"revision": "9" * 40}, cache_dir=tmp_path / "cache")


def test_the_safety_checker_is_dropped_by_default_and_kept_when_asked_for(half: Path, tmp_path: Path) -> None:
    dropped = _dense(half, tmp_path / "a")
    assert dropped.manifest.facts["facts"]["safety_checker"] == "dropped"
    assert not (dropped.path / "safety_checker").exists()
    assert any("left out" in note for note in check_source(half).notes)
    keep = Choice(safety_checker=True)
    kept = _dense(half, tmp_path / "b", keep)
    assert any("carried along" in note for note in check_source(half, keep).notes)
    assert kept.digest != dropped.digest
    from diffusers import StableDiffusionPipeline

    for folder, expected in ((dropped.path, None), (kept.path, "StableDiffusionSafetyChecker")):
        pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        checker = pipeline.safety_checker
        assert (type(checker).__name__ if checker is not None else None) == expected
        assert pipeline.config.requires_safety_checker is (expected is not None)


def test_a_safety_checker_that_cannot_be_kept_is_refused(half: Path, tiny_pipeline_folder: Path) -> None:
    with pytest.raises(SourceError, match=r"source\.safety_checker: got keep, but the source has none"):
        check_source(tiny_pipeline_folder, Choice(safety_checker=True))
    (half / "feature_extractor/preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match=r"preprocessor_config\.json: missing"):
        check_source(half, Choice(safety_checker=True))
    index = json.loads((half / "model_index.json").read_text()) | {"safety_checker": ["evil", "Code"]}
    (half / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="safety_checker: unsupported class; got 'Code'"):
        check_source(half, Choice(safety_checker=True))


def test_a_kept_safety_checker_looks_at_the_images(half: Path, tmp_path: Path) -> None:
    from exporter.networks.pipeline import load_pipeline
    from exporter.networks.safety import attach_safety_checker

    file = half / "safety_checker/model.safetensors"
    state = load_file(file)
    for name in ("concept_embeds_weights", "special_care_embeds_weights"):
        state[name] = torch.full_like(state[name], -2.0)  # every cosine is above it: every image is unsafe
    save_file(state, file, {"format": "pt"})
    kept = _dense(half, tmp_path / "out", Choice(safety_checker=True)).path
    pipeline = attach_safety_checker(load_pipeline(kept), kept)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a cat", num_inference_steps=1, height=64, width=64)
    assert made.nsfw_content_detected == [True]
    assert np.asarray(made.images[0]).max() == 0
    plain = load_pipeline(kept)
    assert attach_safety_checker(plain, _dense(half, tmp_path / "plain").path).safety_checker is None

"""One checkpoint file of every family that comes in one: the weights of its folder, as diffusers reads them too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import clip_names, save_openclip_checkpoint, save_sdxl_checkpoint, save_state, vae_names
from original_transformer import original_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporter.errors import SourceError
from exporter.networks.components import components
from exporter.networks.original_transformers import state_from_original
from exporter.networks.source import Choice, check_source
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.random_weights.families import family
from exporter.random_weights.writing import write_random
from exporter.transforms import make_dense

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def _text(pipeline: Path, folder: str) -> dict[str, Tensor]:
    return load_file(pipeline / folder / "model.safetensors")


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def _sd3(pipeline: Path, file: Path) -> None:
    save_state(
        _prefixed("model.diffusion_model.", original_state(load_file(pipeline / TRANSFORMER)))
        | vae_names(pipeline, 4)
        | _prefixed("text_encoders.clip_l.transformer.", clip_names(_text(pipeline, "text_encoder")))
        | _prefixed("text_encoders.clip_g.transformer.", clip_names(_text(pipeline, "text_encoder_2")))
        | _prefixed("text_encoders.t5xxl.transformer.", _text(pipeline, "text_encoder_3")),
        file,
    )


def _flux(pipeline: Path, file: Path) -> None:
    save_state(
        _prefixed("model.diffusion_model.", original_state(load_file(pipeline / TRANSFORMER)))
        | vae_names(pipeline, 4, "vae.")
        | _prefixed("text_encoders.clip_l.transformer.", clip_names(_text(pipeline, "text_encoder")))
        | _prefixed("text_encoders.t5xxl.transformer.", _text(pipeline, "text_encoder_2")),
        file,
    )


def _sd2(pipeline: Path, file: Path) -> None:
    save_openclip_checkpoint(pipeline, file, layers=1, levels=4)


def _sdxl(pipeline: Path, file: Path) -> None:
    save_sdxl_checkpoint(pipeline, file, layers=1, levels=4)


MAKERS: dict[str, Callable[[Path, Path], None]] = {"sd21": _sd2, "sdxl": _sdxl, "sd3-medium": _sd3, "flux": _flux}


def _config(pipeline: Path, out: Path, keep: tuple[str, ...] = ()) -> Path:
    """Copy a pipeline without weights but for the components to keep."""
    shutil.copytree(pipeline, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for folder in keep:
        shutil.copytree(pipeline / folder, out / folder, dirs_exist_ok=True)
    return out


def _dense(config: Path, file: Path, out: Path) -> Path:
    return make_dense(config, check_source(config, Choice(single_file=file)), out / "0-dense")[0].path


def _assert_same(pipeline: Path, dense: Path, pipeline_class: str) -> None:
    for part in components(pipeline_class):
        theirs = load_network(pipeline / part.folder, cls=part.cls).state_dict()
        mine = load_network(dense / part.folder, cls=part.cls).state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_of_a_family_becomes_the_weights_of_its_folder(
    name: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline, config = source_of(name), _config(source_of(name), tmp_path / "config")
    MAKERS[name](pipeline, tmp_path / "model.safetensors")
    facts = check_source(config, Choice(single_file=tmp_path / "model.safetensors"))
    assert facts.parameters == check_source(pipeline).parameters
    assert set(facts.precisions.values()) == {"F16"}
    _assert_same(pipeline, _dense(config, tmp_path / "model.safetensors", tmp_path), facts.pipeline_class)


@pytest.mark.parametrize(("name", "prefix"), [("flux", ""), ("flux", "model.diffusion_model."), ("sd3-medium", "")])
def test_a_file_with_the_transformer_alone_takes_the_rest_from_the_config_folder(
    name: str, prefix: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline, file = source_of(name), tmp_path / "model.safetensors"
    others = tuple(part.folder for part in components(family(name).pipeline) if part.folder != "transformer")
    save_state(_prefixed(prefix, original_state(load_file(pipeline / TRANSFORMER))), file)
    config = _config(pipeline, tmp_path / "config", others)
    _assert_same(pipeline, _dense(config, file, tmp_path), family(name).pipeline)
    shutil.rmtree(config / "vae")
    shutil.copytree(pipeline / "vae", config / "vae", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(SourceError, match=r"does not hold vae; .* start with first_stage_model\. or vae\., or its we"):
        check_source(config, Choice(single_file=file))


def test_a_transformer_under_the_names_of_diffusers_is_taken_as_it_is(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline, file = source_of("flux"), tmp_path / "model.safetensors"
    save_state(_prefixed("transformer.", load_file(pipeline / TRANSFORMER)), file)
    config = _config(pipeline, tmp_path / "config", ("text_encoder", "text_encoder_2", "vae"))
    _assert_same(pipeline, _dense(config, file, tmp_path), "FluxPipeline")


def test_the_first_encoder_of_sd3_is_not_projected_where_the_file_has_no_projection(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline, file = source_of("sd3-medium"), tmp_path / "model.safetensors"
    _sd3(pipeline, file)
    state = load_file(file)
    del state["text_encoders.clip_l.transformer.text_projection.weight"]
    save_file(state, file)
    dense = _dense(_config(pipeline, tmp_path / "config"), file, tmp_path)
    encoder: Any = load_network(dense / "text_encoder", cls="CLIPTextModelWithProjection")
    assert torch.equal(encoder.text_projection.weight, torch.eye(32))


@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_diffusers_reads_the_same_from_the_file(name: str, tmp_path: Path) -> None:
    """The checkpoint is one: diffusers' own loader gets from it what the folder holds."""
    import diffusers

    wanted = family(name, tiny=True)
    # diffusers tells SDXL's encoders by their widths, which have to differ then
    narrow = [
        replace(p, config={**p.config, "hidden_size": 16}) if p.folder == "text_encoder" else p for p in wanted.parts
    ]
    pipeline = write_random(replace(wanted, parts=tuple(narrow)), tmp_path / name, seed=0, progress=Silent()).folder
    config, file = _config(pipeline, tmp_path / "config"), tmp_path / "model.safetensors"
    MAKERS[name](pipeline, file)
    cls = getattr(diffusers, wanted.pipeline)
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None} if name == "sd21" else {}
    found = cls.from_single_file(
        str(file), config=str(config), local_files_only=True, torch_dtype=torch.float16, **options
    )
    for part in components(wanted.pipeline):
        theirs = getattr(found, part.folder).state_dict()
        mine = load_network(pipeline / part.folder, cls=part.cls).half().state_dict()
        assert theirs.keys() == mine.keys()
        assert all(torch.equal(theirs[key], value) for key, value in mine.items())


def test_a_modern_sd3_is_read_as_diffusers_converts_it() -> None:
    """Dual attention and normed queries, as in SD 3.5."""
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    net = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=36,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    own: dict[str, Tensor] = net.state_dict()
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(original_state(own))
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    mine = state_from_original(original_state(own), shapes, "here")
    assert mine.keys() == theirs.keys() == own.keys()
    assert all(torch.equal(mine[name], value) and torch.equal(own[name], value) for name, value in theirs.items())


def test_flux_is_read_as_diffusers_converts_it() -> None:
    """Diffusers knows Flux at its real width only: the rows are real here, and there is one column."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    with init_empty_weights():
        net = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    generator = torch.Generator().manual_seed(0)
    own = {
        name: torch.randn((value.shape[0], *(1 for _ in value.shape[1:])), generator=generator)
        for name, value in net.state_dict().items()
    }
    theirs = convert_flux_transformer_checkpoint_to_diffusers(original_state(own))
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    mine = state_from_original(original_state(own), shapes, "here")
    assert mine.keys() == theirs.keys() == own.keys()
    assert all(torch.equal(mine[name], value) and torch.equal(own[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("name", ["pixart", "dit", "lcm"])
def test_families_that_do_not_come_in_one_file_are_named(
    name: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    save_file({"a.b": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        SourceError, match=rf"{family(name).pipeline} is not read from a single file; .* StableDiffusion"
    ):
        check_source(source_of(name), Choice(single_file=tmp_path / "model.safetensors"))


def test_what_the_file_does_not_fit_is_named(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    pipeline, file = source_of("flux"), tmp_path / "model.safetensors"
    config = _config(pipeline, tmp_path / "config", ("text_encoder", "text_encoder_2", "vae"))
    save_file({"a.b": torch.ones(2)}, file)
    with pytest.raises(SourceError, match=r"no component of a FluxPipeline; got tensors such as a\.b, expected names"):
        check_source(config, Choice(single_file=file))
    state = original_state(load_file(pipeline / TRANSFORMER))
    narrow = "single_blocks.0.linear1.weight"
    save_file(state | {narrow: state[narrow][:-8].contiguous()}, file)
    with pytest.raises(
        SourceError, match=r"transformer: single_blocks\.0\.linear1\.weight: got 216 rows, expected 224"
    ):
        _dense(config, file, tmp_path)
    save_file({**state, narrow: state[narrow].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(SourceError, match=r"unsupported number type; got F8_E4M3 in .*not quantized"):
        check_source(config, Choice(single_file=file))
    save_file({name: value for name, value in state.items() if "img_in" not in name}, file)
    with pytest.raises(SourceError, match=r"got in transformer: .* 2 missing tensors, such as 'x_embedder\.bias'"):
        _dense(config, file, tmp_path)

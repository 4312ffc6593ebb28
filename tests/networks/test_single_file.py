"""One checkpoint file: the same weights as the folder it came from; what is missing or unsafe is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import save_checkpoint
from safetensors.torch import load_file, save_file

from exporter.errors import SourceError
from exporter.networks.loras import find_lora
from exporter.networks.source import Choice, check_source
from exporter.networks.storage import load_network
from exporter.transforms import make_dense

CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


@pytest.fixture
def config(half: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline's folder without weights."""
    return Path(shutil.copytree(half, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture
def file(half: Path, tmp_path: Path) -> Path:
    save_checkpoint(half, tmp_path / "model.safetensors", layers=1, levels=4)
    return tmp_path / "model.safetensors"


def _dense(config: Path, choice: Choice, out: Path) -> Any:
    return make_dense(config, check_source(config, choice), out / "0-dense")[0]


def test_a_checkpoint_becomes_the_same_weights_as_its_folder(
    half: Path, config: Path, file: Path, tmp_path: Path
) -> None:
    facts = check_source(config, Choice(single_file=file))
    assert set(facts.precisions.values()) == {"F16"}
    assert facts.parameters == check_source(half).parameters
    dense = _dense(config, Choice(single_file=file), tmp_path)
    for part, cls in CLASSES.items():
        theirs = load_network(half / part, cls=cls).state_dict()
        mine = load_network(dense.path / part, cls=cls).state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())
        assert (dense.path / part / "config.json").read_bytes() == (config / part / "config.json").read_bytes()
        stored = next((dense.path / part).glob("*.safetensors"))
        assert {value.dtype for value in load_file(stored).values()} == {torch.float16}


def test_a_checkpoint_takes_loras_and_its_digest_is_of_its_content(config: Path, file: Path, tmp_path: Path) -> None:
    name = "unet.down_blocks.0.resnets.0.conv1"
    pair = {f"{name}.lora_A.weight": torch.ones(2, 16, 3, 3), f"{name}.lora_B.weight": torch.ones(16, 2, 1, 1)}
    save_file(pair, tmp_path / "lora.safetensors")
    lora = find_lora(str(tmp_path / "lora.safetensors"), 0.5, "source.loras[0]")
    plain, fused = Choice(single_file=file), Choice(single_file=file, loras=(lora,))
    assert check_source(config, plain).digest != check_source(config, fused).digest
    weights = [
        load_network(_dense(config, choice, tmp_path / str(i)).path / "unet", cls=CLASSES["unet"]).state_dict()
        for i, choice in enumerate((plain, fused))
    ]
    changed = {key for key, value in weights[0].items() if not torch.equal(value, weights[1][key])}
    assert changed == {"down_blocks.0.resnets.0.conv1.weight"}
    state = load_file(file)
    save_file(state | {"alphas_cumprod": torch.ones(1000)}, file)
    assert set(check_source(config, plain).precisions.values()) == {"F16"}, "a schedule is no weight"
    digest = check_source(config, plain).digest
    wide = {key: value.float() if key.startswith("first_stage") else value for key, value in state.items()}
    save_file(wide, file)
    assert check_source(config, plain).digest != digest
    precisions = {"text_encoder": "F16", "unet": "F16", "vae_decoder": "F32"}
    assert check_source(config, plain).precisions == precisions, "nothing is rounded"


def _change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_what_is_no_checkpoint_of_these_configs_is_refused(config: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="may be pickled, which can run code"):
        check_source(config, Choice(single_file=tmp_path / "model.ckpt"))
    save_file({"unet.a.lora_A.weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(SourceError, match=r"a LoRA, not a model.*source\.loras"):
        check_source(config, Choice(single_file=tmp_path / "lora.safetensors"))
    state = load_file(file)
    save_file({name: value for name, value in state.items() if not name.startswith("first")}, file)
    with pytest.raises(SourceError, match=r"model\.safetensors: does not hold vae; .* or its weights in vae of source"):
        check_source(config, Choice(single_file=file))
    save_file({**state, "model.diffusion_model.out.2.bias": torch.full((4,), float("inf"))}, file)
    with pytest.raises(SourceError, match=r"NaN or infinite weights; got them in tensor 'model\.diffusion_model\.out"):
        check_source(config, Choice(single_file=file))
    save_file(state, file)
    (config / "unet/config.json").unlink()
    with pytest.raises(SourceError, match=r"unet/config\.json: missing"):
        check_source(config, Choice(single_file=file))


def test_configs_of_another_width_are_refused(config: Path, file: Path, tmp_path: Path) -> None:
    _change(config / "unet/config.json", block_out_channels=[24, 32])
    with pytest.raises(SourceError, match="does not hold the networks of"):
        _dense(config, Choice(single_file=file), tmp_path)

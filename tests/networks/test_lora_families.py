"""LoRAs of SDXL, SD3 and Flux under every name they go by: the formula on the authors' weights, and diffusers' fuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_transformer import original_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporter.errors import SourceError
from exporter.networks.loras import find_lora
from exporter.networks.original_names import original_names
from exporter.networks.source import Choice, check_source
from exporter.random_weights.families import family
from exporter.transforms import make_dense

RANK, ALPHA, WEIGHT = 4, 2.0, 0.7
DENOISER = "diffusion_pytorch_model.safetensors"
SD3_LAYERS = (
    "joint_blocks.0.x_block.attn.qkv",
    "joint_blocks.1.context_block.attn.qkv",
    "joint_blocks.0.x_block.mlp.fc1",
    "joint_blocks.0.context_block.adaLN_modulation.1",
    "joint_blocks.1.context_block.adaLN_modulation.1",
    "x_embedder.proj",
    "context_embedder",
    "final_layer.adaLN_modulation.1",
)
FLUX_LAYERS = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.txt_attn.proj",
    "double_blocks.0.txt_mlp.2",
    "single_blocks.0.linear1",
    "single_blocks.1.linear2",
    "single_blocks.1.modulation.lin",
    "guidance_in.in_layer",
    "final_layer.adaLN_modulation.1",
    "final_layer.linear",
)
OWN_LAYERS = {
    "sd3-medium": (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.add_k_proj",
        "transformer_blocks.0.ff.net.2",
    ),
    "flux": (
        "transformer_blocks.0.attn.to_out.0",
        "single_transformer_blocks.1.attn.to_v",
        "single_transformer_blocks.0.proj_mlp",
    ),
}


def _factors(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, *shape[1:], generator=generator) * 0.1
    return down, torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=generator) * 0.1


def _kohya(name: str, factors: tuple[Tensor, Tensor], prefix: str = "lora_unet_") -> dict[str, Tensor]:
    module = f"{prefix}{name.replace('.', '_')}"
    pair = {f"{module}.lora_down.weight": factors[0], f"{module}.lora_up.weight": factors[1]}
    return {**pair, f"{module}.alpha": torch.tensor(ALPHA)}


def _peft(name: str, factors: tuple[Tensor, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}.lora_A.weight": factors[0], f"{prefix}{name}.lora_B.weight": factors[1]}


def _dense(source: Path, state: dict[str, Tensor], out: Path) -> Path:
    save_file(state, out / "lora.safetensors")
    lora = find_lora(str(out / "lora.safetensors"), WEIGHT, "source.loras[0]")
    return make_dense(source, check_source(source, Choice(loras=(lora,))), out / "0-dense")[0].path


def _weights(folder: Path, part: str) -> dict[str, Tensor]:
    return load_file(next((folder / part).glob("*model.safetensors")))


def _assert_added(before: dict[str, Tensor], after: dict[str, Tensor], added: dict[str, Tensor]) -> None:
    """Check that fp16 weights became what the formula says, to the last bit, and the others stayed."""
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == added.keys()
    for name, update in added.items():
        assert torch.equal(after[name], (before[name].float() + update.reshape(before[name].shape)).half())


@pytest.mark.parametrize("style", ["kohya", "authors", "bare"])
@pytest.mark.parametrize(("name", "layers"), [("sd3-medium", SD3_LAYERS), ("flux", FLUX_LAYERS)])
def test_loras_of_the_authors_layers_are_added_to_those(
    name: str, layers: tuple[str, ...], style: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = source_of(name)
    before = original_state(_weights(source, "transformer"))
    state: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for seed, layer in enumerate(layers):
        factors = _factors(tuple(before[f"{layer}.weight"].shape), seed)
        prefix = {"authors": "diffusion_model.", "bare": ""}.get(style, "")
        state |= _kohya(layer, factors) if style == "kohya" else _peft(layer, factors, prefix)
        scale = WEIGHT * (ALPHA / RANK if style == "kohya" else 1.0)
        added[f"{layer}.weight"] = scale * (factors[1].flatten(1) @ factors[0].flatten(1))
    dense = _dense(source, state, tmp_path)
    _assert_added(before, original_state(_weights(dense, "transformer")), added)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", ""])
@pytest.mark.parametrize("name", OWN_LAYERS)
def test_loras_under_the_names_of_diffusers_are_added(
    name: str, prefix: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    before = _weights(source_of(name), "transformer")
    state: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for seed, layer in enumerate(OWN_LAYERS[name]):
        factors = _factors(tuple(before[f"{layer}.weight"].shape), seed)
        state |= _peft(layer, factors, prefix)
        added[f"{layer}.weight"] = WEIGHT * (factors[1] @ factors[0])
    _assert_added(before, _weights(_dense(source_of(name), state, tmp_path), "transformer"), added)


@pytest.mark.parametrize(
    ("name", "encoders"),
    [
        ("sdxl", {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}),
        ("sd3-medium", {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3"}),
        ("flux", {"lora_te1_": "text_encoder", "lora_te3_": "text_encoder_2"}),
    ],
)
def test_kohyas_text_encoders_are_numbered_by_their_kind(
    name: str, encoders: dict[str, str], source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = source_of(name)
    state: dict[str, Tensor] = {}
    added: dict[str, dict[str, Tensor]] = {}
    for seed, (prefix, part) in enumerate(encoders.items()):
        clip, t5 = "encoder.layers.1.self_attn.q_proj.weight", "encoder.block.1.layer.0.SelfAttention.q.weight"
        stored = next(key for key in _weights(source, part) if key.endswith((clip, t5)))
        factors = _factors(tuple(_weights(source, part)[stored].shape), seed)
        module = stored.removesuffix(".weight")
        named = module if stored == t5 else f"text_model.{module.removeprefix('text_model.')}"
        state |= _kohya(named, factors, prefix)
        added[part] = {stored: WEIGHT * ALPHA / RANK * (factors[1] @ factors[0])}
    dense = _dense(source, state, tmp_path)
    for part, updates in added.items():
        _assert_added(_weights(source, part), _weights(dense, part), updates)


def test_a_lora_of_stacked_layers_of_another_width_is_refused(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    state = _kohya("single_blocks.0.linear1", _factors((200, 32), 0))
    with pytest.raises(SourceError, match=r"shapes \[4, 32\] and \[200, 4\].* weight of shape \[224, 32\]"):
        _dense(source_of("flux"), state, tmp_path)


def _sdxl_lora(source: Path) -> dict[str, Tensor]:
    shapes = {name: tuple(value.shape) for name, value in _weights(source, "unet").items()}
    old = original_names(name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
    trained = [path for path in old if ".transformer_blocks." in path and ".norm" not in path]
    state: dict[str, Tensor] = {}
    for seed, path in enumerate(trained):
        state |= _kohya(old[path], _factors(shapes[f"{path}.weight"], seed))
    for prefix, part in {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}.items():
        for name, value in _weights(source, part).items():
            if name.endswith(("_proj.weight", "fc1.weight")):
                module = f"text_model.{name.removesuffix('.weight').removeprefix('text_model.')}"
                state |= _kohya(module, _factors(tuple(value.shape), len(state)), prefix)
    return state


def _flux_kohya_lora(source: Path) -> dict[str, Tensor]:
    """Without `linear1`, whose width diffusers takes for the published one, and `final_layer`, whose alpha it drops."""
    before = original_state(_weights(source, "transformer"))
    state: dict[str, Tensor] = {}
    for seed, layer in enumerate(FLUX_LAYERS):
        if "linear1" not in layer and layer.split(".")[0] not in ("final_layer", "guidance_in"):
            state |= _kohya(layer, _factors(tuple(before[f"{layer}.weight"].shape), seed))
    return state


def _own_lora(source: Path) -> dict[str, Tensor]:
    before, state = _weights(source, "transformer"), {}
    for seed, layer in enumerate(OWN_LAYERS["flux" if "single" in " ".join(before) else "sd3-medium"]):
        state |= _peft(layer, _factors(tuple(before[f"{layer}.weight"].shape), seed), "transformer.")
    return state


PEERS: dict[str, tuple[str, Callable[[Path], dict[str, Tensor]]]] = {
    "SDXL by kohya": ("sdxl", _sdxl_lora),
    "Flux by kohya": ("flux", _flux_kohya_lora),
    "Flux by diffusers": ("flux", _own_lora),
    "SD3 by diffusers": ("sd3-medium", _own_lora),
}


@pytest.mark.parametrize("which", PEERS)
def test_diffusers_and_peft_fuse_to_the_same_weights(
    which: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="diffusers loads LoRAs with peft, which the product does not need")
    import diffusers

    name, make = PEERS[which]
    source, state = source_of(name), make(source_of(name))
    dense = _dense(source, state, tmp_path)
    loaded: Any = getattr(diffusers, family(name).pipeline).from_pretrained(source, local_files_only=True)
    loaded.load_lora_weights(dict(state), adapter_name="one")
    loaded.fuse_lora(lora_scale=WEIGHT, components=loaded._lora_loadable_modules)
    loaded.unload_lora_weights()
    changed = 0
    for part in ("text_encoder", "text_encoder_2", "unet", "transformer"):
        net = getattr(loaded, part, None)
        if net is None:
            continue
        theirs, mine, before = net.state_dict(), _weights(dense, part), _weights(source, part)
        for key, value in mine.items():
            assert torch.allclose(theirs[key].float(), value.float(), atol=2e-3)
            if not torch.equal(before[key], value):
                changed += 1
                assert not torch.allclose(theirs[key].float(), before[key].float(), atol=1e-2)
    assert changed >= len(state) // 3

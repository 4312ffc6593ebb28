"""Save and load: what comes back is the network that was saved, or an error that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from network_samples import (
    CLASSES,
    assert_same_answers,
    config_of,
    drop_decoder_layer,
    drop_layer_pair,
    drop_text_layer,
    narrow_resnet,
    narrow_text_layer,
    network,
    shapes,
    text_encoder,
    unet,
    vae,
)
from safetensors.torch import load_file, save_file
from torch import nn

from exporter.errors import ArtifactError, ComponentFailed
from exporter.networks import storage
from exporter.networks.probe import run_probe
from exporter.networks.storage import load_network, load_surgery, parameter_count, save_network
from exporter.networks.surgery import Snapshot, Surgery, diff

DEPTH = dict(zip(CLASSES, (drop_layer_pair, drop_decoder_layer, drop_text_layer), strict=True))
WIDTH = dict(zip(CLASSES, (narrow_resnet, narrow_resnet, narrow_text_layer), strict=True))


def _edited(cls: str, edits: dict[str, Any]) -> tuple[Any, Surgery]:
    import random

    net = network(cls)
    snapshot = Snapshot.of(net)
    edits[cls](net, random.Random(1))
    return net, diff(snapshot, net)


def _save(net: Any, folder: Path, surgery: Surgery | None = None) -> Path:
    save_network(net, folder, surgery=surgery or Surgery(), original_config=config_of(net))
    return folder


def _weights(folder: Path) -> Path:
    return next(path for path in folder.glob("*model.safetensors"))


@pytest.mark.parametrize("edits", [WIDTH, DEPTH], ids=["width", "depth"])
@pytest.mark.parametrize("cls", CLASSES)
def test_an_edited_network_comes_back_bit_equal(cls: str, edits: dict[str, Any], tmp_path: Path) -> None:
    net, surgery = _edited(cls, edits)
    assert not surgery.is_empty
    again = load_network(_save(net, tmp_path, surgery), cls=cls)
    assert shapes(again) == shapes(net)
    assert_same_answers(again, net)
    assert not again.training
    assert parameter_count(again) == parameter_count(net) < parameter_count(network(cls))
    assert load_surgery(tmp_path) == surgery
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(config_of(network(cls))))


@pytest.mark.parametrize("cls", CLASSES)
def test_an_unedited_network_makes_a_stock_folder(cls: str, tmp_path: Path) -> None:
    net = network(cls)
    _save(net, tmp_path)
    assert not (tmp_path / "surgery.json").exists()
    stock, info = type(net).from_pretrained(tmp_path, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, answer in run_probe(
        stock.eval()
    ).items():  # stock weights lie unaligned in the mapped file: last bits differ
        torch.testing.assert_close(answer, run_probe(net)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_stock_folder_loads(cls: str, tmp_path: Path) -> None:
    net = network(cls)
    net.save_pretrained(tmp_path)
    assert_same_answers(load_network(tmp_path, cls=cls), net)


def test_a_stock_reload_of_an_edited_network_is_no_way_back(tmp_path: Path) -> None:
    # For missing layers diffusers raises nothing: it leaves them on the meta device and fails at the first forward.
    from diffusers import UNet2DConditionModel

    net, surgery = _edited("UNet2DConditionModel", DEPTH)
    net.save_pretrained(tmp_path / "stock")
    stock = UNet2DConditionModel.from_pretrained(tmp_path / "stock", local_files_only=True)
    assert shapes(stock) != shapes(net)
    assert any(parameter.is_meta for parameter in stock.parameters())
    net, surgery = _edited("UNet2DConditionModel", WIDTH)
    net.save_pretrained(tmp_path / "narrow")
    with pytest.raises((ValueError, RuntimeError), match=r"shape|size"):
        UNet2DConditionModel.from_pretrained(tmp_path / "narrow", local_files_only=True)
    assert shapes(load_network(_save(net, tmp_path / "ours", surgery), cls="UNet2DConditionModel")) == shapes(net)


@pytest.mark.parametrize("cls", CLASSES)
def test_half_precision_files_load_as_float32(cls: str, tmp_path: Path) -> None:
    net, surgery = _edited(cls, WIDTH)
    nn.Module.to(net, torch.float16)
    _save(net, tmp_path, surgery)
    assert {t.dtype for t in load_file(_weights(tmp_path)).values()} == {torch.float16}
    again = load_network(tmp_path, cls=cls)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert_same_answers(again, nn.Module.to(net, torch.float32))
    half = load_network(tmp_path, cls=cls, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_constant_buffers_are_real(tmp_path: Path) -> None:
    net = text_encoder()
    again: Any = load_network(_save(net, tmp_path), cls="CLIPTextModel")
    assert torch.equal(again.embeddings.position_ids, torch.arange(8)[None])
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])


def test_gradients_work_after_loading(tmp_path: Path) -> None:
    again: Any = load_network(_save(text_encoder(), tmp_path), cls="CLIPTextModel")
    again(input_ids=torch.tensor([[1, 39]])).last_hidden_state.sum().backward()
    assert again.encoder.layers[0].mlp.fc1.weight.grad is not None


def test_equal_networks_give_equal_files(tmp_path: Path) -> None:
    for name in ("one", "other"):
        net, surgery = _edited("UNet2DConditionModel", DEPTH)
        _save(net, tmp_path / name, surgery)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["config.json", "diffusion_pytorch_model.safetensors", "probe.safetensors", "surgery.json"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_saving_over_an_edited_folder_leaves_no_old_record(tmp_path: Path) -> None:
    net, surgery = _edited("CLIPTextModel", DEPTH)
    _save(net, tmp_path, surgery)
    _save(network("CLIPTextModel"), tmp_path)
    assert load_surgery(tmp_path).is_empty
    load_network(tmp_path, cls="CLIPTextModel")


def test_saving_and_loading_leave_the_global_generator_alone(tmp_path: Path) -> None:
    net = vae()
    before = torch.get_rng_state()
    load_network(_save(net, tmp_path), cls="AutoencoderKL")
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_parameters_come_back_as_one(tmp_path: Path) -> None:
    net = text_encoder()
    layers = net.encoder.layers
    layers[1].mlp.fc1.weight = layers[0].mlp.fc1.weight
    assert diff(Snapshot.of(net), net).is_empty
    again: Any = load_network(_save(net, tmp_path), cls="CLIPTextModel")
    assert again.encoder.layers[1].mlp.fc1.weight is again.encoder.layers[0].mlp.fc1.weight
    assert parameter_count(again) == parameter_count(net)
    assert_same_answers(again, net)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_is_no_longer_numbers_is_not_saved(value: float, tmp_path: Path) -> None:
    net = vae()
    with torch.no_grad():
        net.decoder.conv_in.weight[0, 0, 0, 0] = value
    with pytest.raises(ComponentFailed, match=r"decoder\.conv_in\.weight"):
        _save(net, tmp_path)


def _truncate(folder: Path) -> None:
    file = _weights(folder)
    file.write_bytes(file.read_bytes()[:-100])


def _wrong_shape(folder: Path) -> None:
    state = load_file(_weights(folder))
    state["conv_in.weight"] = state["conv_in.weight"][:8].contiguous()
    save_file(state, _weights(folder))


def _missing_tensor(folder: Path) -> None:
    state = load_file(_weights(folder))
    del state["conv_in.weight"]
    save_file(state, _weights(folder))


def _extra_tensor(folder: Path) -> None:
    state = load_file(_weights(folder))
    save_file({**state, "extra": torch.zeros(1)}, _weights(folder))


def _changed_weights(folder: Path) -> None:
    state = load_file(_weights(folder))
    state["conv_out.weight"] = state["conv_out.weight"] * 1.1
    save_file(state, _weights(folder))


def _no_probe(folder: Path) -> None:
    (folder / "probe.safetensors").unlink()


def _other_probe(folder: Path) -> None:
    save_file({"input.sample": torch.zeros(1, 4, 64, 64)}, folder / "probe.safetensors")


def _no_surgery(folder: Path) -> None:
    (folder / "surgery.json").unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _other_class(folder: Path) -> None:
    _change(folder / "config.json", _class_name="UNet2DModel")


def _odd_config(folder: Path) -> None:
    _change(folder / "config.json", block_out_channels="many")


def _huge_config(folder: Path) -> None:
    _change(folder / "config.json", layers_per_block=10**9)


def _no_weights(folder: Path) -> None:
    _weights(folder).unlink()


def _pickled(folder: Path) -> None:
    _weights(folder).rename(folder / "diffusion_pytorch_model.bin")


def _change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "not a whole safetensors file"),
        (_wrong_shape, r"conv_in\.weight: weights do not belong"),
        (_missing_tensor, "1 missing tensors, such as 'conv_in.weight'"),
        (_extra_tensor, "1 unexpected tensors, such as 'extra'"),
        (_changed_weights, "out_sample: the network does not answer as when it was saved"),
        (_no_probe, "probe.safetensors: missing beside a surgery record"),
        (_other_probe, "probe.safetensors: inputs of another network"),
        (_no_surgery, "weights do not belong to config and surgery"),
        (_no_config, r"config\.json: not readable JSON"),
        (_other_class, r"config\.json: another class; got 'UNet2DModel'"),
        (_odd_config, "cannot be built from it"),
        (_huge_config, "layers_per_block: out of range"),
        (_no_weights, "no weights; expected diffusion_pytorch_model.safetensors"),
        (_pickled, "pickled only"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_found_and_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    net, surgery = _edited("UNet2DConditionModel", DEPTH)
    _save(net, tmp_path, surgery)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        load_network(tmp_path, cls="UNet2DConditionModel")


def test_shapes_are_compared_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, surgery = _edited("UNet2DConditionModel", DEPTH)
    _save(net, tmp_path, surgery)
    _wrong_shape(tmp_path)
    read: list[str] = []
    monkeypatch.setattr(storage, "_fill", lambda *args: read.append("weights"))
    with pytest.raises(ArtifactError, match="weights do not belong"):
        load_network(tmp_path, cls="UNet2DConditionModel")
    assert not read


def test_a_probe_can_be_skipped(tmp_path: Path) -> None:
    net, surgery = _edited("UNet2DConditionModel", DEPTH)
    _save(net, tmp_path, surgery)
    _no_probe(tmp_path)
    assert_same_answers(load_network(tmp_path, cls="UNet2DConditionModel", check_probe=False), net)


def test_small_differences_of_another_machine_pass_the_probe(tmp_path: Path) -> None:
    net = unet()
    _save(net, tmp_path)
    recorded = load_file(tmp_path / "probe.safetensors")
    recorded["output.out_sample"] *= 1 + 1e-4
    save_file(recorded, tmp_path / "probe.safetensors")
    load_network(tmp_path, cls="UNet2DConditionModel")


def test_an_unknown_class_is_never_imported(tmp_path: Path) -> None:
    _save(unet(), tmp_path)
    for name in ("os.system", "UNet3DConditionModel", ""):
        with pytest.raises(ArtifactError, match="closed list"):
            load_network(tmp_path, cls=name)


def _shard(folder: Path) -> Path:
    """Split the weight file into two and write the index that names them."""
    state = load_file(_weights(folder))
    stem = _weights(folder).stem
    _weights(folder).unlink()
    names = sorted(state)
    index: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"{stem}-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    return path


def test_shards_are_read(tmp_path: Path) -> None:
    net, surgery = _edited("AutoencoderKL", DEPTH)
    _save(net, tmp_path, surgery)
    _shard(tmp_path)
    assert_same_answers(load_network(tmp_path, cls="AutoencoderKL"), net)


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    _save(vae(), tmp_path / "vae")
    index = _shard(tmp_path / "vae")
    names = json.loads(index.read_text())["weight_map"]
    (tmp_path / "outside.safetensors").write_bytes(b"")
    for bad, message in (
        (dict.fromkeys(names, "../outside.safetensors"), "outside the folder"),
        (dict.fromkeys(names, "gone.safetensors"), "a shard is missing"),
        ({**names, "more": next(iter(names.values()))}, "does not match its shards"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": bad}), encoding="utf-8")
        with pytest.raises(ArtifactError, match=message):
            load_network(tmp_path / "vae", cls="AutoencoderKL")


def test_names_of_older_libraries_are_understood(tmp_path: Path) -> None:
    text = text_encoder()
    _save(text, tmp_path / "text")
    state = {f"text_model.{name}": tensor for name, tensor in load_file(_weights(tmp_path / "text")).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(8)[None]
    save_file(state, _weights(tmp_path / "text"))
    assert_same_answers(load_network(tmp_path / "text", cls="CLIPTextModel"), text)

    decoder = vae()
    _save(decoder, tmp_path / "vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in load_file(_weights(tmp_path / "vae")).items():
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        state[name] = tensor
    assert any("query" in name for name in state)
    save_file(state, _weights(tmp_path / "vae"))
    assert_same_answers(load_network(tmp_path / "vae", cls="AutoencoderKL"), decoder)


def test_a_variant_is_not_taken_for_the_weights(tmp_path: Path) -> None:
    _save(vae(), tmp_path)
    _weights(tmp_path).rename(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ArtifactError, match=r"no weights of variant none; got fp16\. Write source\.variant: fp16"):
        load_network(tmp_path, cls="AutoencoderKL")


@pytest.mark.parametrize(
    "tied", [{"conv_in.weight": "nowhere"}, {"conv_in.weight": "conv_in.bias"}, {"x": "conv_in.bias"}, []]
)
def test_a_tie_that_is_none_is_refused(tied: Any, tmp_path: Path) -> None:
    _save(unet(), tmp_path)
    (tmp_path / "tied.json").write_text(json.dumps(tied), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"tied\.json"):
        load_network(tmp_path, cls="UNet2DConditionModel")

"""The rarer refusals: stand-ins made by hand, odd entries, full disks, probes that do not fit, hubs that say no."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from network_samples import assert_same_answers, config_of, text_encoder, unet, vae
from safetensors.torch import load_file, save_file
from torch import nn

from exporter.errors import ArtifactError, ComponentFailed, SourceError, SurgeryError
from exporter.networks.probe import example_inputs
from exporter.networks.source import open_source
from exporter.networks.standins import Bypass, Gather, Shortcut, Zero, stand_in
from exporter.networks.storage import load_network, save_network
from exporter.networks.surgery import Snapshot, StandIn, Surgery, diff
from exporter.networks.weights import check_finite

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _bare_bypass(net: Any) -> str:
    net.mid_block.attentions[0] = Bypass()  # the caller unpacks a tuple
    return "neither original, copy nor stand-in"


def _bare_zero(net: Any) -> str:
    net.mid_block = Bypass("pair")
    return "another return convention"


def _foreign_shortcut(net: Any) -> str:
    net.mid_block.resnets[0] = Shortcut(nn.Conv2d(24, 24, 1))
    return "neither original, copy nor stand-in"


def _shortcut_of_nothing(net: Any) -> str:
    net.conv_in = Shortcut(None)
    return "a shortcut that is not the one of the Conv2d"


def _gather_of_a_convolution(net: Any) -> str:
    net.conv_in = Gather(nn.Linear(4, 2), (0, 1), 16)
    return "a gather in the place of Conv2d"


def _module_where_none_was(net: Any) -> str:
    del net.mid_block.resnets[0].conv_shortcut
    net.mid_block.resnets[0].conv_shortcut = nn.Conv2d(24, 24, 1)
    return "mid_block.resnets.0"


def _new_parameter(net: Any) -> str:
    net.conv_in.gate = nn.Parameter(torch.ones(1))
    return "conv_in: parameters added or removed; got a difference in gate"


def _foreign_entry(net: Any) -> str:
    net.mid_block.resnets[0] = nn.Conv2d(24, 24, 1)
    return "mid_block.resnets.0: a list entry that is neither"


def _two_made_one(net: Any) -> str:
    net.mid_block.resnets[1].norm2 = net.mid_block.resnets[0].norm2
    return "two paths that were two"


def _hole(net: Any) -> str:
    net.mid_block.attentions.append(None)
    return "got nothing"


EDITS: tuple[Callable[[Any], str], ...] = (
    _bare_bypass,
    _bare_zero,
    _foreign_shortcut,
    _shortcut_of_nothing,
    _gather_of_a_convolution,
    _module_where_none_was,
    _new_parameter,
    _foreign_entry,
    _two_made_one,
    _hole,
)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__.strip("_"))
def test_edits_made_around_the_helpers_are_refused(edit: Callable[[Any], str]) -> None:
    net = unet()
    snapshot = Snapshot.of(net)
    message = edit(net)
    with pytest.raises(SurgeryError) as caught:
        diff(snapshot, net)
    assert message in str(caught.value)


def test_an_earlier_stand_in_that_changes_is_recorded_anew() -> None:
    net = unet()
    block = net.mid_block.resnets[0]
    whole = Snapshot.of(net)
    block.time_emb_proj = stand_in("zero", block.time_emb_proj)
    first = diff(whole, net)
    assert first.stand_in["mid_block.resnets.0.time_emb_proj"] == StandIn("zero", width=24)
    later = Snapshot.of(net)
    assert isinstance(block.time_emb_proj, Zero)
    block.time_emb_proj.out_features = 16
    second = diff(later, net, check=False)
    assert first.then(second) == diff(whole, net, check=False)


def test_copies_of_a_shortcut_and_reordered_shortcuts_are_told_apart() -> None:
    net = unet()
    resnets = net.up_blocks[1].resnets
    whole = Snapshot.of(net)
    for index in range(3):
        resnets[index] = stand_in("shortcut", resnets[index])
    net.up_blocks[1].resnets = nn.ModuleList(list(resnets))
    surgery = diff(whole, net)
    assert not surgery.keep
    assert set(surgery.stand_in) == {f"up_blocks.1.resnets.{index}" for index in range(3)}


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "file"), [(100, "config.json"), (8_000, "model.safetensors")])
def test_a_full_disk_is_named(size: int, file: str, tmp_path: Path) -> None:
    net = text_encoder()
    with _largest_file(size), pytest.raises(ComponentFailed, match=f"{file}: could not be written"):
        save_network(net, tmp_path, surgery=Surgery(), original_config=config_of(net))


def test_an_answer_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    net = vae()
    with torch.no_grad():
        net.decoder.conv_out.weight.fill_(3e38)
    with pytest.raises(ComponentFailed, match="its answer is no longer finite"):
        save_network(net, tmp_path, surgery=Surgery(), original_config=config_of(net))
    with torch.no_grad():
        net.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(SourceError, match=r"the state: NaN or infinite weights; got them in 'decoder\.conv_out\.bias'"):
        check_finite(net, place="the state")


def _drop_output(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["output.moments"]


def _cut_output(tensors: dict[str, torch.Tensor]) -> None:
    tensors["output.sample"] = tensors["output.sample"][..., :-1].contiguous()


def _poison_output(tensors: dict[str, torch.Tensor]) -> None:
    tensors["output.sample"].fill_(float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_output, "other outputs"),
        (_cut_output, "the probe has another shape"),
        (_poison_output, "does not answer as when it was saved"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_probe_of_something_else_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    net = vae()
    save_network(net, tmp_path, surgery=Surgery(), original_config=config_of(net))
    tensors = load_file(tmp_path / "probe.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "probe.safetensors")
    with pytest.raises(ArtifactError, match=message):
        load_network(tmp_path, cls="AutoencoderKL")


def test_a_network_that_does_not_run_is_refused_by_the_probe(tmp_path: Path) -> None:
    net = unet()
    surgery = Surgery(stand_in={"mid_block.attentions.0.transformer_blocks.0.norm3": StandIn("absent")})
    save_network(net, tmp_path, surgery=Surgery(), original_config=config_of(net))
    (tmp_path / "surgery.json").write_text(json.dumps(surgery.to_json()), encoding="utf-8")
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(
        {name: value for name, value in load_file(weights).items() if ".norm3." not in name or "mid" not in name},
        weights,
    )
    with pytest.raises(ArtifactError, match="does not run after its surgery"):
        load_network(tmp_path, cls="UNet2DConditionModel")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    net = vae()
    save_network(net, tmp_path, surgery=Surgery(), original_config=config_of(net))
    whole = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    whole.unlink()
    for number in (1, 2):
        save_file(state, tmp_path / f"part-{number}.safetensors")
    names = dict.fromkeys(state, "part-1.safetensors") | {"decoder.conv_in.bias": "part-2.safetensors"}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ArtifactError, match=r"is in part-1\.safetensors too"):
        load_network(tmp_path, cls="AutoencoderKL")


def test_inputs_are_known_for_the_supported_classes_only() -> None:
    with pytest.raises(SurgeryError, match="no example inputs for Linear"):
        example_inputs(nn.Linear(2, 2))
    feeds = example_inputs(unet(), batch=3, size=4, tokens=5)
    assert {name: tuple(value.shape) for name, value in feeds.items()} == {
        "sample": (3, 4, 4, 4),
        "timestep": (3,),
        "encoder_hidden_states": (3, 5, 12),
    }
    ids = example_inputs(text_encoder(), batch=2)["input_ids"]
    assert ids.shape == (2, 8)
    assert (ids[:, -1] == 39).all()


def _response() -> Any:
    """What the hub's client reads of an answer; its HTTP library differs between versions."""
    return SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
    ("error", "message"),
    [(GatedRepoError, "access is restricted"), (RepositoryNotFoundError, "no such repository")],
)
def test_a_hub_that_says_no_is_understood(error: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise error("no", response=_response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(SourceError, match=message):
        open_source({"hub": "owner/name", "revision": COMMIT})


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_a_hub_only_the_variant_that_was_asked_for_is_fetched(
    variant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, list[str]]] = []

    def fetch(repository: str, **options: Any) -> str:
        asked.append(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    open_source({"hub": "owner/name", "revision": COMMIT}, variant=variant)
    (options,) = asked
    assert not any(pattern.endswith((".bin", ".ckpt", ".py", "/*")) for pattern in options["allow_patterns"])
    stem = "unet/diffusion_pytorch_model"
    files = {
        "plain": [f"{stem}.safetensors", f"{stem}-00001-of-00002.safetensors", f"{stem}.safetensors.index.json"],
        "fp16": [f"{stem}.fp16.safetensors", f"{stem}.fp16-00001-of-00002.safetensors"],
        "bf16": [f"{stem}.bf16.safetensors"],
        "non_ema": [f"{stem}.non_ema.safetensors"],
    }
    patterns = {"allow_patterns": options["allow_patterns"], "ignore_patterns": options["ignore_patterns"]}
    fetched = {kind: list(filter_repo_objects(names, **patterns)) for kind, names in files.items()}
    index = ["unet/diffusion_pytorch_model.safetensors.index.json"]
    assert fetched["plain"] == (index if variant else files["plain"])
    assert fetched["fp16"] == (files["fp16"] if variant == "fp16" else [])
    assert fetched["bf16"] == fetched["non_ema"] == []


def test_a_hub_without_that_variant_says_which_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.bf16-00001-of-00002.safetensors"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: [*files, "unet/model.safetensors"])
    with pytest.raises(SourceError, match=r"no weights of variant none; got bf16, fp16\. Write source\.variant: bf16"):
        open_source({"hub": "owner/name", "revision": COMMIT})


def test_a_deep_copy_of_an_edited_network_is_saved_alike(tmp_path: Path) -> None:
    net = unet()
    snapshot = Snapshot.of(net)
    net.mid_block.attentions[0] = stand_in("bypass", net.mid_block.attentions[0])
    surgery = diff(snapshot, net)
    save_network(copy.deepcopy(net), tmp_path, surgery=surgery, original_config=config_of(net))
    assert_same_answers(load_network(tmp_path, cls="UNet2DConditionModel"), net)

"""Fused LoRAs answer as the network with the LoRA beside it; what does not fit is refused by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.errors import SourceError
from exporter.networks.loras import find_lora, plan_fuse
from exporter.networks.original_names import original_names
from exporter.networks.pipeline import load_pipeline
from exporter.networks.source import Choice, check_source
from exporter.networks.storage import load_network
from exporter.random_weights.families import family
from exporter.transforms import make_dense

RANK, ALPHA = 4, 2.0
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"
MODULES = {"unet": (LINEAR, OUT, CONV), "text_encoder": (TEXT,)}


class Beside(nn.Module):
    """A layer with a LoRA beside it, as the paper draws it."""

    def __init__(self, layer: Any, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.down, self.up, self.scale = layer, down.float(), up.float(), scale
        self.options = {name: getattr(layer, name) for name in ("stride", "padding") if hasattr(layer, name)}
        self.__dict__ |= self.options

    def forward(self, x: Tensor) -> Tensor:
        if self.down.ndim == 4:
            low = nn.functional.conv2d(x, self.down, **self.options)
            return self.layer(x) + self.scale * nn.functional.conv2d(low, self.up)
        return self.layer(x) + self.scale * (x @ self.down.T @ self.up.T)


def _factors(source: Path, seed: int = 0) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for folder, modules in MODULES.items():
        cls = "UNet2DConditionModel" if folder == "unet" else "CLIPTextModel"
        network = load_network(source / folder, cls=cls)
        for name in modules:
            shape = network.get_submodule(name).weight.shape
            down = torch.randn(RANK, *shape[1:], generator=generator) * 0.1
            up = torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=generator) * 0.1
            found[folder, name] = (down.half(), up.half())
    return found


def _peft(folder: str, module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{folder}.{module}.lora_A.weight": down, f"{folder}.{module}.lora_B.weight": up}


def _kohya(folder: str, module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    path = f"text_model.{module}" if folder == "text_encoder" else module
    name = f"lora_{'te' if folder == 'text_encoder' else 'unet'}_{path.replace('.', '_')}"
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return {**state, f"{name}.alpha": torch.tensor(ALPHA)}


def _early(folder: str, module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    if folder == "text_encoder":
        name = f"text_encoder.text_model.{module}.lora_linear_layer"
    elif ".to_" in module:
        head, _, tail = module.rpartition(".to_")
        name = f"unet.{head}.processor.to_{tail.removesuffix('.0')}_lora"
    else:
        name = f"unet.{module}.lora"
    return {f"{name}.down.weight": down, f"{name}.up.weight": up}


STYLES = {"peft": (_peft, 1.0), "kohya": (_kohya, ALPHA / RANK), "early diffusers": (_early, 1.0)}


def _write(path: Path, source: Path, style: str = "peft", seed: int = 0, metadata: Any = None) -> Path:
    state: dict[str, Tensor] = {}
    for (folder, module), (down, up) in _factors(source, seed).items():
        state |= STYLES[style][0](folder, module, down, up)
    save_file(state, path, metadata)
    return path


def _choice(*loras: tuple[Path, float]) -> Choice:
    return Choice(
        loras=tuple(find_lora(str(path), weight, f"source.loras[{i}]") for i, (path, weight) in enumerate(loras))
    )


def _with_loras_beside(source: Path, scales: dict[int, float]) -> Any:
    """Return the source's pipeline with LoRAs of these seeds beside its layers."""
    pipeline = load_pipeline(source)
    for seed, scale in scales.items():
        for (folder, module), (down, up) in _factors(source, seed).items():
            owner = getattr(pipeline, folder)
            owner.set_submodule(module, Beside(owner.get_submodule(module), down, up, scale))
    return pipeline


def _answers(pipeline: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 500, (1, 32), generator=generator)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        text = pipeline.text_encoder(input_ids=ids).last_hidden_state
        states = torch.randn(1, 32, text.shape[-1], generator=generator)
        return text, pipeline.unet(sample, 7, states).sample


@pytest.mark.parametrize("style", STYLES)
def test_a_fused_lora_answers_as_one_beside_the_layers(style: str, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    source = tiny_pipeline_folder
    choice = _choice((_write(tmp_path / "a.safetensors", source, style), 0.8))
    dense, _ = make_dense(source, check_source(source, choice), tmp_path / "0-dense")
    fused, plain = _answers(load_pipeline(dense.path)), _answers(load_pipeline(source))
    beside = _answers(_with_loras_beside(source, {0: 0.8 * STYLES[style][1]}))
    for mine, theirs, before in zip(fused, beside, plain, strict=True):
        assert torch.allclose(mine, theirs, atol=2e-5)
        assert float((mine - before).abs().max()) > 1e-3


def test_several_loras_add_up_and_the_state_says_which(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    source = tiny_pipeline_folder
    first, second = _write(tmp_path / "a.safetensors", source), _write(tmp_path / "b.safetensors", source, seed=1)
    choice = _choice((first, 0.5), (second, -1.0))
    facts = check_source(source, choice)
    assert facts.notes == (
        "fused before anything else: LoRA a.safetensors with weight 0.5, LoRA b.safetensors with weight -1",
    )
    dense, _ = make_dense(source, facts, tmp_path / "0-dense")
    beside = _answers(_with_loras_beside(source, {0: 0.5, 1: -1.0}))
    assert all(
        torch.allclose(*pair, atol=2e-5) for pair in zip(_answers(load_pipeline(dense.path)), beside, strict=True)
    )
    assert [entry["file"] for entry in dense.manifest.facts["facts"]["loras"]] == ["a.safetensors", "b.safetensors"]
    weights = [check_source(source, _choice((first, weight))).digest for weight in (0.5, 0.6)]
    assert len({facts.digest, *weights, check_source(source).digest}) == 4


def test_half_precision_is_added_in_float32_and_stored_as_it_was(half: Path, tmp_path: Path) -> None:
    choice = _choice((_write(tmp_path / "a.safetensors", half), 1.0))
    before = load_network(half / "unet", cls="UNet2DConditionModel").get_submodule(LINEAR).weight
    dense, _ = make_dense(half, check_source(half, choice), tmp_path / "0-dense")
    assert check_source(dense.path).precisions["unet"] == "F16"
    after = load_network(dense.path / "unet", cls="UNet2DConditionModel").get_submodule(LINEAR).weight
    down, up = _factors(half)["unet", LINEAR]
    assert torch.equal(after, (before + up.float() @ down.float()).half().float())


def test_alpha_comes_from_the_header_where_diffusers_wrote_it_there(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    options = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}, "text_encoder.lora_alpha": 4}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(options)}
    source = tiny_pipeline_folder
    choice = _choice((_write(tmp_path / "a.safetensors", source, metadata=metadata), 1.0))
    dense, _ = make_dense(source, check_source(source, choice), tmp_path / "0-dense")
    for module, scale in ((LINEAR, 2 / RANK), (OUT, 8 / RANK)):
        before = load_network(source / "unet", cls="UNet2DConditionModel").get_submodule(module).weight
        after = load_network(dense.path / "unet", cls="UNet2DConditionModel").get_submodule(module).weight
        down, up = _factors(source)["unet", module]
        assert torch.allclose(after - before, scale * up.float() @ down.float(), atol=1e-6)


def test_a_second_fuse_is_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    source = tiny_pipeline_folder
    path = _write(tmp_path / "a.safetensors", source)
    with pytest.raises(SourceError, match=r"source\.loras\[1\]: the same LoRA as source\.loras\[0\]"):
        check_source(source, _choice((path, 1.0), (path, 0.5)))
    dense, _ = make_dense(source, check_source(source, _choice((path, 1.0))), tmp_path / "0-dense")
    assert check_source(dense.path).pipeline_class == "StableDiffusionPipeline"
    other = _write(tmp_path / "b.safetensors", source, seed=1)
    with pytest.raises(SourceError, match=r"hold LoRAs already; got a\.safetensors\. A second fuse is refused"):
        check_source(dense.path, _choice((other, 1.0)))
    from diffusers import StableDiffusionPipeline

    stock: Any = StableDiffusionPipeline.from_pretrained(dense.path, local_files_only=True)
    assert all(torch.equal(*pair) for pair in zip(_answers(stock), _answers(load_pipeline(dense.path)), strict=True))


UNFIT: dict[str, tuple[dict[str, Tensor], str]] = {
    "other model": (
        {"unet.mid.to_q.lora_A.weight": torch.ones(4, 8), "unet.mid.to_q.lora_B.weight": torch.ones(8, 4)},
        r"a\.safetensors does not fit; 1 of its keys name modules that the model does not have: unet\.mid\.to_q",
    ),
    "other width": (
        {f"unet.{LINEAR}.lora_A.weight": torch.ones(4, 320), f"unet.{LINEAR}.lora_B.weight": torch.ones(320, 4)},
        r"to_q\.lora_A\.weight and .* have shapes \[4, 320\] and \[320, 4\].* weight of shape \[32, 32\]",
    ),
    "half a pair": ({f"unet.{LINEAR}.lora_A.weight": torch.ones(4, 32)}, r"to_q \(half a pair\)"),
    "dora": (
        {f"unet.{LINEAR}.lora_magnitude_vector": torch.ones(32)},
        r"make it a DoRA, and only plain LoRAs are supported: .*lora_magnitude_vector",
    ),
    "loha": (
        {"lora_unet_conv_in.hada_w1_a": torch.ones(4, 2)},
        r"make it a LoHa, and only plain LoRAs are supported: lora_unet_conv_in\.hada_w1_a",
    ),
    "lokr": (
        {"lora_unet_conv_in.lokr_w1": torch.ones(4, 2)},
        "make it a LoKr, and only plain LoRAs are supported",
    ),
    "nothing": ({"conv_in.weight": torch.ones(2, 2)}, r"are no LoRA pairs .*: conv_in\.weight"),
    "nan": ({f"unet.{LINEAR}.lora_A.weight": torch.full((4, 32), float("nan"))}, "NaN or infinite weights in"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_lora_that_does_not_fit_is_refused_by_key(what: str, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    state, message = UNFIT[what]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(SourceError, match=message):
        check_source(tiny_pipeline_folder, _choice((tmp_path / "a.safetensors", 1.0)))


def test_a_lora_must_be_safetensors_and_stay_finite(half: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"source\.loras\[0\]: no such file"):
        find_lora("nowhere.safetensors", 1.0, "source.loras[0]")
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"a\.bin may be pickled"):
        find_lora(str(tmp_path / "a.bin"), 1.0, "source.loras[0]")
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        find_lora(str(tmp_path / "a.safetensors"), 1.0, "source.loras[0]")
    state = {f"unet.{LINEAR}.lora_A.weight": torch.full((4, 16), 300.0)}
    save_file(state | {f"unet.{LINEAR}.lora_B.weight": torch.full((16, 4), 300.0)}, tmp_path / "b.safetensors")
    choice = _choice((tmp_path / "b.safetensors", 1.0))
    with pytest.raises(SourceError, match=r"not finite in torch\.float16 after the LoRAs were added"):
        make_dense(half, check_source(half, choice), tmp_path / "0-dense")
    assert not (tmp_path / "0-dense").exists()


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_original_block_names_are_those_that_diffusers_reads(name: str, tmp_path: Path) -> None:
    """Of every attention and feed-forward layer: what kohya's scripts train, and diffusers' own conversion knows."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    config = next(dict(part.config) for part in family(name, tiny=True).parts if part.folder == "unet")
    unet: Any = UNet2DConditionModel.from_config(config | {"layers_per_block": 2})
    shapes = {"unet": {key: tuple(value.shape) for key, value in unet.state_dict().items()}}
    names = original_names(key.removesuffix(".weight") for key in shapes["unet"] if key.endswith(".weight"))
    trained = {path: old for path, old in names.items() if ".transformer_blocks." in path and ".norm" not in path}
    assert len(trained) > 30
    assert len(set(names.values())) == len(names)
    kohya: dict[str, Tensor] = {}
    for path, old in trained.items():
        rows, columns = shapes["unet"][f"{path}.weight"][:2]
        module = f"lora_unet_{old.replace('.', '_')}"
        kohya |= {f"{module}.lora_down.weight": torch.ones(1, columns), f"{module}.lora_up.weight": torch.ones(rows, 1)}
        kohya[f"{module}.alpha"] = torch.tensor(1.0)
    theirs, _ = StableDiffusionXLPipeline.lora_state_dict(dict(kohya), unet_config=unet.config)
    for state in (kohya, {key: value for key, value in theirs.items() if "alpha" not in key}):
        save_file(state, tmp_path / "a.safetensors")
        plan = plan_fuse(_choice((tmp_path / "a.safetensors", 1.0)).loras, shapes, {})
        assert plan["unet"].keys() == {f"{path}.weight" for path in trained}
        for path, old in trained.items():
            (update,) = plan["unet"][f"{path}.weight"]
            assert state is not kohya or update.pair.down == f"lora_unet_{old.replace('.', '_')}.lora_down.weight"


def test_original_names_are_those_of_the_checkpoints(half: Path) -> None:
    from checkpoint import _unet

    state = load_network(half / "unet", cls="UNet2DConditionModel").state_dict()
    attended = {b: f"up_blocks.{b}.attentions.0.norm.weight" in state for b in range(8)}
    modules = [key.removesuffix(".weight") for key in state if key.endswith(".weight") and "norm" not in key]
    names = original_names(modules)
    assert {f"{path}.weight" for path in names} == {f"{module}.weight" for module in modules}
    for path, old in names.items():
        assert f"{old}.weight" == _unet(f"{path}.weight", 1, attended)

"""A graph that points into a state's own weight file: no weights read, no second copy, the same answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from exporter.errors import ComponentFailed
from exporter.lowering.export import DATA_FILE, MODEL_FILE, ExportOptions, export_component
from exporter.lowering.stored import StoredTensor, StoredWeights, stored_weights
from exporter.lowering.wrappers import signature, wrap
from exporter.networks.standins import stand_in
from exporter.networks.storage import load_network, open_bare, save_network
from exporter.networks.surgery import Snapshot, Surgery, diff
from targets.base import TargetError
from targets.selfcontained import write_self_contained

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

TOKENS, SIDE = 8, 8
LEAN = ExportOptions(latent=SIDE, tokens=TOKENS, external_bytes=1000)
STEM = {"unet": "diffusion_pytorch_model", "vae_decoder": "diffusion_pytorch_model", "text_encoder": "model"}


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=SIDE,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=256,
        mid_block_type=None,
    ).eval()


def vae() -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(32, 160),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=16,
    ).eval()


def text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    sizes = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 400, "max_position_embeddings": TOKENS, "bos_token_id": 398, "eos_token_id": 399}
    return CLIPTextModel(CLIPTextConfig(**sizes, **tokens)).eval()


MAKERS: dict[str, Callable[[], nn.Module]] = {"unet": unet, "vae_decoder": vae, "text_encoder": text}


def saved(module: nn.Module, folder: Path, dtype: torch.dtype = torch.float32, surgery: Surgery | None = None) -> Path:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    config: Any = module.config
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    save_network(nn.Module.to(module, dtype), folder, surgery=surgery or Surgery(), original_config=config)
    return folder


def exported(component: str, state: Path, out: Path, options: ExportOptions = LEAN) -> Path:
    cls = type(MAKERS[component]()).__name__
    module, weights = stored_weights(open_bare(state, cls=cls), "0" * 64)
    out.mkdir()
    export_component(component, module, out, options, weights=weights)
    return out / MODEL_FILE


def feeds(component: str) -> dict[str, np.ndarray]:
    values = np.random.default_rng(0)
    if component == "unet":
        return {
            "sample": values.standard_normal((2, 4, SIDE, SIDE), dtype=np.float32),
            "timestep": np.array(381.5, np.float32),
            "encoder_hidden_states": values.standard_normal((2, TOKENS, 256), dtype=np.float32),
        }
    if component == "vae_decoder":
        return {"latent_sample": values.standard_normal((1, 4, SIDE, SIDE), dtype=np.float32)}
    return {"input_ids": values.integers(0, 400, (1, TOKENS))}


def want(component: str, state: Path) -> np.ndarray:
    module = load_network(state, cls=type(MAKERS[component]()).__name__)
    with torch.no_grad():
        found = wrap(module)(*map(torch.from_numpy, feeds(component).values()))
    return (found[0] if isinstance(found, tuple) else found).numpy()


def in_onnxruntime(path: Path, component: str, level: str = "ORT_ENABLE_ALL") -> np.ndarray:
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([signature(MAKERS[component]()).outputs[0]], feeds(component))[0])


def in_openvino(path: Path, component: str) -> np.ndarray:
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled(feeds(component))[signature(MAKERS[component]()).outputs[0]])


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=2e-5 * np.abs(wanted).max())


def external(path: Path) -> dict[str, dict[str, str]]:
    graph = onnx.load(str(path), load_external_data=False).graph
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.external_data
    }


@pytest.mark.parametrize(
    ("component", "dtype"),
    [("text_encoder", torch.float32), ("text_encoder", torch.bfloat16), ("unet", torch.float16)],
    ids=str,
)
def test_the_graph_points_into_the_states_file(component: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = saved(MAKERS[component](), tmp_path / "state", dtype)
    path = exported(component, state, tmp_path / "out")
    weights = state / f"{STEM[component]}.safetensors"
    beside = path.parent / weights.name
    assert {item.name for item in path.parent.iterdir()} == {MODEL_FILE, weights.name}
    assert weights.samefile(beside)  # no second copy
    places = external(path)
    assert {place["location"] for place in places.values()} == {weights.name}
    stored = weights.read_bytes()
    network = load_network(state, cls=type(MAKERS[component]()).__name__)
    tensors = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    assert sum(int(place["length"]) for place in places.values()) > 0.5 * len(stored)
    for name, place in places.items():
        start, length = int(place["offset"]), int(place["length"])
        assert stored[start : start + length] == tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
    wanted = want(component, state)
    close(in_onnxruntime(path, component, "ORT_DISABLE_ALL"), wanted)
    close(in_onnxruntime(path, component), wanted)
    close(in_openvino(path, component), wanted)


def test_nothing_large_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = StoredTensor.read

    def counted(self: StoredTensor) -> Any:
        read.append(self.length)
        return original(self)

    monkeypatch.setattr(StoredTensor, "read", counted)
    state = saved(text(), tmp_path / "state")
    exported("text_encoder", state, tmp_path / "out")
    assert max(read) <= 65_536
    assert sum(read) < 0.1 * (state / "model.safetensors").stat().st_size


def test_small_networks_stay_in_one_file(tmp_path: Path) -> None:
    state = saved(text(), tmp_path / "state")
    path = exported("text_encoder", state, tmp_path / "out", replace(LEAN, external_bytes=100_000_000))
    assert [item.name for item in path.parent.iterdir()] == [MODEL_FILE]
    assert "Transpose" not in {
        node.op_type for node in onnx.load(str(path)).graph.node if node.input[0].endswith(".weight")
    }
    close(in_onnxruntime(path, "text_encoder"), want("text_encoder", state))


def test_a_network_that_uses_half_of_its_file_gets_its_half(tmp_path: Path) -> None:
    """A decoder ships without the encoder."""
    state = saved(vae(), tmp_path / "state")
    path = exported("vae_decoder", state, tmp_path / "out")
    assert {item.name for item in path.parent.iterdir()} == {MODEL_FILE, DATA_FILE}
    whole = (state / f"{STEM['vae_decoder']}.safetensors").stat().st_size
    assert (path.parent / DATA_FILE).stat().st_size < 0.75 * whole
    assert not [name for name in external(path) if name.startswith(("encoder.", "quant_conv."))]
    wanted = want("vae_decoder", state)
    close(in_onnxruntime(path, "vae_decoder"), wanted)
    close(in_openvino(path, "vae_decoder"), wanted)


def test_surgery_is_exported_too(tmp_path: Path) -> None:
    """Stand-ins with constants of their own, which no file holds, and narrower layers."""
    module: Any = unet()
    config = dict(module.config)
    before = Snapshot.of(module)
    block = module.up_blocks[1].attentions[1].transformer_blocks[0]
    block.attn1 = stand_in("zero", block.attn1)
    width = block.ff.net[0].proj.out_features
    block.ff.net[0].proj = stand_in("gather", block.ff.net[0].proj, positions=(0, 3, width // 2, width // 2 + 3))
    surgery = diff(before, module)
    state = tmp_path / "state"
    save_network(module, state, surgery=surgery, original_config=config)
    path = exported("unet", state, tmp_path / "out")
    close(in_onnxruntime(path, "unet"), want("unet", state))


def test_sharded_states_are_linked_shard_by_shard(tmp_path: Path) -> None:
    module = text()
    saved(module, tmp_path / "whole")
    state = tmp_path / "state"
    module.save_pretrained(state, max_shard_size="1MB")
    shards = {file.name for file in state.glob("*.safetensors")}
    assert len(shards) > 1
    path = exported("text_encoder", state, tmp_path / "out")
    assert {place["location"] for place in external(path).values()} == shards
    close(in_onnxruntime(path, "text_encoder"), want("text_encoder", state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_self_contained_on_request(dtype: torch.dtype, tmp_path: Path) -> None:
    state = saved(text(), tmp_path / "state", dtype)
    path = exported("text_encoder", state, tmp_path / "out")
    with pytest.raises(onnx.checker.ValidationError, match="hard"):  # why it is needed: tools refuse linked files
        onnx.load(str(path))
    out = tmp_path / "own"
    out.mkdir()
    write_self_contained(path, out)
    graph = onnx.load(str(out / MODEL_FILE)).graph
    onnx.checker.check_model(str(out / MODEL_FILE))
    weights = {tensor.name: tensor for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.name.endswith("proj/MatMul")]
    assert products
    for node in products:  # a quantizer sees a weight only where it is the constant input of the product itself
        assert node.input[1] in weights
        assert weights[node.input[1]].data_type == onnx.TensorProto.FLOAT
    assert "Cast" not in {node.op_type for node in graph.node if node.input[0] in weights}
    wanted = in_onnxruntime(path, "text_encoder")
    np.testing.assert_array_equal(in_onnxruntime(out / MODEL_FILE, "text_encoder"), wanted)


def test_self_contained_refuses_weights_that_are_not_there(tmp_path: Path) -> None:
    state = saved(text(), tmp_path / "state")
    path = exported("text_encoder", state, tmp_path / "out")
    weights = path.parent / "model.safetensors"
    short = weights.read_bytes()[:-100_000]
    weights.unlink()
    weights.write_bytes(short)
    (tmp_path / "own").mkdir()
    with pytest.raises(TargetError, match="too short"):
        write_self_contained(path, tmp_path / "own")
    weights.unlink()
    with pytest.raises(TargetError, match="cannot be read"):
        write_self_contained(path, tmp_path / "own")


def test_a_constant_made_while_running_is_refused(tmp_path: Path) -> None:
    class AutoencoderKL(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, device="meta")
            self.made = torch.ones(8, device="meta")  # neither parameter nor buffer
            self.config = FrozenDict({"latent_channels": 4})

        def decode(self, latents: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            return (self.layer(latents.movedim(1, -1)).movedim(-1, 1) + self.made,)

    file = tmp_path / "weights.safetensors"
    file.write_bytes(bytes(80))
    tensors = {
        "layer.weight": StoredTensor(file, 0, 64, "F32", (4, 4)),
        "layer.bias": StoredTensor(file, 64, 16, "F32", (4,)),
    }
    with pytest.raises(ComponentFailed, match="a constant that the network makes"):
        export_component("vae_decoder", AutoencoderKL(), tmp_path, LEAN, weights=StoredWeights(tensors, {}, ""))

"""Exported graphs answer as torch does, are named after the modules, repeat byte for byte and hold nothing unused."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from exporter.errors import ComponentFailed, SourceError
from exporter.lowering.export import DATA_FILE, MODEL_FILE, ExportOptions, export_component, weights_digest
from exporter.lowering.wrappers import signature, wrap
from exporter.networks.standins import stand_in

# torch.export pickles and copies parts of its own that are deprecated in torch; we call none of it ourselves.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

TOKENS, SIDE = 6, 8
OPTIONS = ExportOptions(latent=SIDE, tokens=TOKENS)


def small_unet() -> nn.Module:
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=12,
        mid_block_type=None,
    ).eval()


def small_vae() -> nn.Module:
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    ).eval()


def small_text() -> nn.Module:
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=48,
        eos_token_id=49,
    )
    return CLIPTextModel(config).eval()


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "unet": small_unet,
    "vae_decoder": small_vae,
    "text_encoder": small_text,
}


def scrambled(module: nn.Module) -> nn.Module:
    """Give every parameter values of its own, biases and norms too: equal ones would be stored once."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


def feeds(component: str, rows: int, side: int = SIDE, seed: int = 0) -> dict[str, np.ndarray]:
    values = np.random.default_rng(seed)
    if component == "unet":
        return {
            "sample": values.standard_normal((rows, 4, side, side), dtype=np.float32),
            "timestep": np.array(997.5 - 300 * seed, dtype=np.float32),
            "encoder_hidden_states": values.standard_normal((rows, TOKENS, 12), dtype=np.float32),
        }
    if component == "vae_decoder":
        return {"latent_sample": values.standard_normal((rows, 4, side, side), dtype=np.float32)}
    ids = values.integers(0, 48, (rows, TOKENS))
    ids[:, 3:] = 49
    return {"input_ids": ids}


def torch_answers(component: str, module: nn.Module, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = signature(module)
    with torch.no_grad():
        found = wrap(module)(*(torch.from_numpy(np.array(given[name])) for name in names.inputs))
    parts = found if isinstance(found, tuple) else (found,)
    return {name: part.numpy() for name, part in zip(names.outputs, parts, strict=True)}


def run_onnx(path: Path, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(given)), strict=True))


class Made:
    """One exported component, shared by the tests of this file."""

    def __init__(self, component: str, folder: Path) -> None:
        self.component = component
        self.module = scrambled(MAKERS[component]())
        self.path = folder / MODEL_FILE
        folder.mkdir()
        export_component(component, self.module, folder, OPTIONS)
        self.graph = onnx.load(str(self.path)).graph


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Every component is exported once, in whatever order the tests run."""
    return functools.cache(lambda component: Made(component, tmp_path_factory.mktemp("exported") / component))


@pytest.fixture(params=sorted(MAKERS))
def made(request: pytest.FixtureRequest, exports: Callable[[str], Made]) -> Made:
    return exports(request.param)


def test_it_answers_as_torch_does(made: Made) -> None:
    rows = 2 if made.component == "unet" else 1
    for seed in range(3):
        given = feeds(made.component, rows, seed=seed)
        want, got = torch_answers(made.component, made.module, given), run_onnx(made.path, given)
        assert set(got) == set(want)
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=2e-5 * np.abs(value).max())


def test_inputs_and_outputs_are_what_the_loaders_feed(made: Made) -> None:
    kinds = {
        "unet": {
            "sample": (onnx.TensorProto.FLOAT, [2, 4, SIDE, SIDE]),
            "timestep": (onnx.TensorProto.FLOAT, []),
            "encoder_hidden_states": (onnx.TensorProto.FLOAT, [2, TOKENS, 12]),
        },
        "vae_decoder": {"latent_sample": (onnx.TensorProto.FLOAT, [1, 4, SIDE, SIDE])},
        "text_encoder": {"input_ids": (onnx.TensorProto.INT64, [1, TOKENS])},
    }
    found = {
        value.name: (value.type.tensor_type.elem_type, [axis.dim_value for axis in value.type.tensor_type.shape.dim])
        for value in made.graph.input
    }
    assert found == kinds[made.component]
    outputs = [value.name for value in made.graph.output]
    assert outputs == list(signature(made.module).outputs)


def test_weights_keep_the_names_of_the_state_dict(made: Made) -> None:
    state = made.module.state_dict()
    unfolded = {re.sub(r"_(transposed|reshaped)$", "", item.name): item for item in made.graph.initializer}
    used = {
        name for name in state if not name.startswith(("encoder.", "quant_conv.")) or made.component != "vae_decoder"
    }
    large = {name for name in used if state[name].numel() > 1 and "position" not in name}
    assert large <= set(unfolded)
    for name in large:
        held = onnx.numpy_helper.to_array(unfolded[name])
        want = (
            state[name].numpy().reshape(held.shape) if unfolded[name].name.endswith("reshaped") else state[name].numpy()
        )
        np.testing.assert_array_equal(held.T if unfolded[name].name.endswith("transposed") else held, want)


def test_nodes_are_named_after_their_modules(made: Made) -> None:
    paths = {name for name, _ in made.module.named_modules()}
    assert len({node.name for node in made.graph.node}) == len(made.graph.node)
    for node in made.graph.node:
        path, _, operator = node.name.rpartition("/")
        assert path in paths
        assert re.fullmatch(rf"{node.op_type}(_\d+)?", operator)


def test_linear_weights_reach_their_products_untransposed(made: Made) -> None:
    """A quantizer sees a weight only where it is the constant input of the product itself."""
    makers = {output: node for node in made.graph.node for output in node.output}
    initializers = {item.name for item in made.graph.initializer}
    for node in made.graph.node:
        if node.op_type == "Transpose":
            assert node.input[0] not in initializers
        if node.op_type in ("Conv", "Gemm"):
            assert node.input[1] in initializers
            assert node.input[1] not in makers


def test_nothing_is_stored_that_is_not_used(made: Made) -> None:
    used = {name for node in made.graph.node for name in node.input}
    assert {item.name for item in made.graph.initializer} <= used
    stored = sum(len(item.raw_data) for item in made.graph.initializer)
    wrapped = [
        parameter
        for name, parameter in made.module.named_parameters()
        if made.component != "vae_decoder" or not name.startswith(("encoder.", "quant_conv."))
    ]
    needed = sum(parameter.numel() * 4 for parameter in wrapped)
    assert stored <= needed + 4096


def test_it_holds_no_trace_of_this_machine(made: Made) -> None:
    content = made.path.read_bytes()
    for word in (
        b"site-packages",
        b"pkg.",
        b'File "',
        b".py",
        str(Path.cwd()).encode(),
        str(made.path.parent).encode(),
    ):
        assert word not in content


def test_it_says_who_made_it_from_what(made: Made) -> None:
    model = onnx.load(str(made.path))
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert model.producer_name == "diffusion-exporter"
    assert facts == {
        "exporter.component": made.component,
        "exporter.weights_sha256": weights_digest(made.module),
    }
    assert [entry.version for entry in model.opset_import] == [20]
    assert model.graph.name == made.component


def test_the_digest_is_of_names_and_values() -> None:
    module = small_text()
    before = weights_digest(module)
    assert weights_digest(small_text()) == before
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1
    assert weights_digest(module) != before


@pytest.mark.parametrize("made", ["text_encoder", "vae_decoder"], indirect=True)
def test_equal_input_gives_equal_bytes(made: Made, tmp_path: Path) -> None:
    export_component(made.component, made.module, tmp_path, OPTIONS)
    assert (tmp_path / MODEL_FILE).read_bytes() == made.path.read_bytes()


@pytest.mark.parametrize("made", ["text_encoder"], indirect=True)
def test_large_weights_go_into_a_file_beside_the_graph(made: Made, tmp_path: Path) -> None:
    export_component(made.component, made.module, tmp_path, replace(OPTIONS, external_bytes=2000))
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL_FILE, DATA_FILE]
    assert (tmp_path / MODEL_FILE).stat().st_size < made.path.stat().st_size
    given = feeds(made.component, 1)
    want, got = run_onnx(made.path, given), run_onnx(tmp_path / MODEL_FILE, given)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    locations = {
        entry.value
        for item in onnx.load(str(tmp_path / MODEL_FILE), load_external_data=False).graph.initializer
        for entry in item.external_data
        if entry.key == "location"
    }
    assert locations == {DATA_FILE}


@pytest.mark.parametrize("component", ["vae_decoder", "text_encoder", pytest.param("unet", marks=pytest.mark.slow)])
def test_dynamic_axes_on_request(component: str, tmp_path: Path) -> None:
    module = scrambled(MAKERS[component]())
    export_component(component, module, tmp_path, replace(OPTIONS, dynamic=True))
    graph = onnx.load(str(tmp_path / MODEL_FILE)).graph
    axes = {axis.dim_param for value in graph.input for axis in value.type.tensor_type.shape.dim if axis.dim_param}
    assert axes == ({"batch"} if component == "text_encoder" else {"batch", "height", "width"})
    for rows, side in ((1, SIDE), (3, 2 * SIDE)):
        given = feeds(component, rows, side)
        want, got = torch_answers(component, module, given), run_onnx(tmp_path / MODEL_FILE, given)
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=2e-5 * np.abs(value).max())


@pytest.mark.parametrize(
    ("component", "opset", "operator"), [("vae_decoder", 21, "GroupNormalization"), ("text_encoder", 23, "Attention")]
)
def test_newer_operators_on_request(component: str, opset: int, operator: str, tmp_path: Path) -> None:
    module = scrambled(MAKERS[component]())
    export_component(component, module, tmp_path, replace(OPTIONS, opset=opset))
    model = onnx.load(str(tmp_path / MODEL_FILE))
    assert [entry.version for entry in model.opset_import] == [opset]
    assert operator in {node.op_type for node in model.graph.node}
    given = feeds(component, 1)
    want, got = torch_answers(component, module, given), run_onnx(tmp_path / MODEL_FILE, given)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=2e-5 * np.abs(value).max())


def test_a_pruned_network_with_every_stand_in_is_exported(tmp_path: Path) -> None:
    """Named after the parts that are left; those that went leave no weights behind."""
    unet: Any = small_unet()
    down, up = unet.down_blocks[0], unet.up_blocks[1]
    block = up.attentions[1].transformer_blocks[0]
    down.attentions[0] = stand_in("bypass", down.attentions[0])
    up.resnets[0] = stand_in("shortcut", up.resnets[0])
    block.attn1 = stand_in("zero", block.attn1)
    block.attn2 = stand_in("absent", block.attn2)
    block.ff.net[0].proj = stand_in("gather", block.ff.net[0].proj, positions=(0, 3, 64, 67))
    scrambled(unet)
    export_component("unet", unet, tmp_path, OPTIONS)
    given = feeds("unet", 2)
    want = torch_answers("unet", unet, given)["out_sample"]
    got = run_onnx(tmp_path / MODEL_FILE, given)["out_sample"]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5 * np.abs(want).max())
    names = {item.name for item in onnx.load(str(tmp_path / MODEL_FILE)).graph.initializer}
    assert "up_blocks.1.resnets.0.conv_shortcut.weight" in names
    assert not [
        name for name in names if name.startswith(("down_blocks.0.attentions.0", "up_blocks.1.resnets.0.conv1"))
    ]


def test_the_module_is_left_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = small_text()
    module.train()
    next(iter(module.children())).eval()
    modes = [part.training for part in module.modules()]
    before = weights_digest(module)
    with caplog.at_level(logging.WARNING):
        export_component("text_encoder", module, tmp_path, OPTIONS)
    assert [part.training for part in module.modules()] == modes
    assert weights_digest(module) == before
    assert not caplog.records


def test_a_network_that_torch_cannot_export_is_named(tmp_path: Path) -> None:
    class AutoencoderKL(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.config = FrozenDict({"latent_channels": 4})

        def decode(self, latents: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            if latents.sum() > 0:
                return (latents,)
            return (-latents,)

    with pytest.raises(ComponentFailed, match=r"^vae_decoder: torch cannot export it"):
        export_component("vae_decoder", AutoencoderKL(), tmp_path, OPTIONS)
    assert not list(tmp_path.iterdir())


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="network class: got 'Linear'"):
        export_component("unet", nn.Linear(2, 2), tmp_path, OPTIONS)
    with pytest.raises(ComponentFailed, match=r"text_encoder: opset: got 9"):
        export_component("text_encoder", small_text(), tmp_path, replace(OPTIONS, opset=9))

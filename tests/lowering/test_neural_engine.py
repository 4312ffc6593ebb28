"""The Neural Engine form answers as the network does, with its weights, over four axes and without linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from scrambled_networks import clip, made, one_level, unet
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from exporter.lowering.neural_engine import neural_engine_form
from exporter.lowering.wrappers import Sizes, example_feeds, signature, wrap
from exporter.networks.probe import example_inputs, run_probe
from exporter.networks.standins import Gather, stand_in
from exporter.networks.surgery import Snapshot, diff
from exporter.progress import Silent
from exporter.pruners import pruner
from exporter.pruners.base import PARTS, Context

SIZES = Sizes(rows=2, latent=8, tokens=6)
CLOSE = 1e-4


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= CLOSE * want.abs().max()


def assert_same(network: nn.Module, sizes: Sizes = SIZES, **options: Any) -> nn.Module:
    """Both as functions of tensors, as every target takes them; the network is as it was before."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    kept = dict(network.named_modules())
    form = neural_engine_form("part", network, **options)
    feeds = example_feeds(network, sizes)
    if signature(network).inputs[0] == "input_ids":
        feeds[0][:, 3:] = network.config.eos_token_id  # the first of them is where states are pooled
    with torch.no_grad():
        want, got = wrap(network)(*feeds), wrap(form)(*feeds)
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for one, other in pairs:
        assert_close(one, other)
    assert signature(form) == signature(network)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(one is other for one, other in zip(kept.values(), network.modules(), strict=True))
    return form


def widest(form: nn.Module, sizes: Sizes = SIZES) -> int:
    """The most axes of any tensor of a traced form: einsums stay whole there, as converters see them."""
    feeds = tuple(feed[None] if feed.ndim == 0 else feed for feed in example_feeds(form, sizes))
    with torch.no_grad():
        graph = torch.jit.trace(wrap(form), feeds, check_trace=False).inlined_graph
    operations = {node.kind() for node in graph.nodes()}
    assert {"aten::einsum", "aten::_convolution"} <= operations
    assert not operations & {"aten::linear", "aten::addmm", "aten::matmul", "aten::bmm", "aten::group_norm"}
    assert not operations & {"aten::layer_norm", "aten::scaled_dot_product_attention"}
    types = [value.type() for node in graph.nodes() for value in node.outputs()]
    ranks = [len(kind.sizes()) for kind in types if kind.kind() == "TensorType" and kind.sizes() is not None]
    assert len(ranks) > 100
    return max(ranks)


STYLES = [("sd15", "unet"), ("sd21", "unet"), ("sdxl", "unet"), ("lcm", "unet")]
STYLES += [("sd15", "text_encoder"), ("sd21", "text_encoder"), ("sdxl", "text_encoder_2")]


traces = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",  # what diffusers asserts of shapes
    "ignore:.torch.jit:DeprecationWarning",  # converters still want it
    "ignore:.is_gradient_checkpointing:FutureWarning",  # a property of transformers that tracing reads
)


@traces
@pytest.mark.parametrize(("name", "folder"), STYLES, ids=["-".join(style) for style in STYLES])
def test_every_published_style_answers_alike(name: str, folder: str) -> None:
    form = assert_same(made(name, folder))
    assert widest(form) == 4
    assert not any(isinstance(part, nn.Linear | nn.LayerNorm | nn.GroupNorm) for part in form.modules())


@traces
@pytest.mark.parametrize("folder", ["unet", "text_encoder"])
def test_the_embedded_model_answers_alike(folder: str, root: Path) -> None:
    cls = UNet2DConditionModel if folder == "unet" else CLIPTextModel
    network = cls.from_pretrained(root / "exporter/reference/shapes" / folder).eval()
    assert widest(assert_same(network)) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"only_cross_attention": True},
        {"transformer_layers_per_block": 2, "use_linear_projection": True},
        {"resnet_time_scale_shift": "scale_shift", "time_embedding_act_fn": "silu"},
        {"resnet_out_scale_factor": 2.0, "mid_block_scale_factor": 1.5, "act_fn": "mish"},
        {"mid_block_type": None, "timestep_post_act": "silu", "downsample_padding": 0},
        {"mid_block_type": "UNetMidBlock2D", "norm_eps": 0.1},
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_skip_time_act": True,
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_switches_of_the_u_net_are_kept(changes: dict[str, Any]) -> None:
    assert_same(unet(**changes))


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "quick_gelu"}, {"hidden_act": "gelu"}, {"eos_token_id": 2}, {"layer_norm_eps": 0.1}],
    ids=lambda changes: next(iter(changes)),
)
def test_switches_of_the_text_encoder_are_kept(cls: Any, changes: dict[str, Any]) -> None:
    network = clip(cls, **changes)
    form = assert_same(network)
    ids = torch.tensor([[48, 7, 49, 3, 49, 1], [48, 49, 49, 5, 6, 7]])  # pooled at 2 and at 1, or at the largest token
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0]])
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}, {"position_ids": torch.tensor([[5, 4, 3, 2, 1, 0]])}):
            want, got = network(ids, **given), form(ids, **given)
            assert want.keys() == got.keys()
            for name in want:
                assert_close(got[name], want[name])


def test_a_text_encoder_answers_objects_and_tuples() -> None:
    network = clip(CLIPTextModelWithProjection)
    form = neural_engine_form("text_encoder_2", network)
    ids = torch.randint(0, 48, (1, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = network(ids, output_hidden_states=True), form(ids, output_hidden_states=True)
        bare = form(ids, return_dict=False)
    assert len(got.hidden_states) == len(want.hidden_states) == 4
    assert_close(got.hidden_states[-2], want.hidden_states[-2])
    assert_close(got[0], want[0])
    assert torch.equal(bare[0], got.text_embeds)
    assert form(ids).hidden_states is None


def test_masks_hide_the_same() -> None:
    network = one_level()
    form, feeds = neural_engine_form("unet", network), example_inputs(network, batch=2, tokens=5)
    generator = torch.Generator().manual_seed(1)
    text = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    faint = 1 - torch.rand(2, 5, generator=generator) / 2000  # up to 5 off the scores
    pixels = (torch.rand(2, 64, generator=generator) > 0.3).long()
    with torch.no_grad():
        plain = network(**feeds).sample
        for masks in ({"encoder_attention_mask": text}, {"encoder_attention_mask": faint}, {"attention_mask": pixels}):
            want = network(**feeds, **masks).sample
            assert (want - plain).abs().max() > 1e-3
            assert_close(form(**feeds, **masks).sample, want)


@pytest.mark.parametrize("chunk", [16, 24, 1000])
def test_queries_in_chunks_answer_alike(chunk: int) -> None:
    network = unet()
    form = assert_same(network, query_chunk=chunk)
    feeds = example_inputs(network, batch=2, tokens=5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    with torch.no_grad():
        want, got = network(**feeds, encoder_attention_mask=mask).sample, form(**feeds, encoder_attention_mask=mask)
    assert_close(got.sample, want)
    assert_same(clip(), query_chunk=4)


def test_text_may_come_channels_first() -> None:
    network = unet()
    form = neural_engine_form("unet", network, channels_first_text=True)
    given, feeds = example_feeds(network, SIZES), example_feeds(form, SIZES)
    assert feeds[2].shape == (2, 12, 1, 6)
    assert torch.equal(feeds[2][:, :, 0].transpose(1, 2), given[2])
    with torch.no_grad():
        assert_close(wrap(form)(*feeds), wrap(network)(*given))
    assert_close(run_probe(form)["out_sample"], run_probe(network)["out_sample"])


def test_an_attention_without_products_of_torch_answers_alike() -> None:
    network = unet()
    network.set_attn_processor(AttnProcessor())
    assert_same(network)


@pytest.mark.parametrize("make", [unet, lambda: clip(CLIPTextModelWithProjection)], ids=["unet", "clip"])
def test_weights_are_those_of_the_network(make: Callable[[], Any]) -> None:
    network = make()
    form = neural_engine_form("part", network)
    own, formed = dict(network.named_parameters()), dict(form.named_parameters())
    assert own.keys() == formed.keys()
    for name, parameter in own.items():
        assert formed[name].data_ptr() == parameter.data_ptr(), name
        assert formed[name].numel() == parameter.numel()
    linear = {path for path, part in network.named_modules() if isinstance(part, nn.Linear)}
    assert linear
    for path in linear:
        convolution = form.get_submodule(path)
        assert type(convolution) is nn.Conv2d
        assert convolution.kernel_size == (1, 1)
    assert {path for path, _ in network.named_modules()} == {path for path, _ in form.named_modules()}
    with torch.no_grad():
        next(iter(own.values())).zero_()
    assert not next(iter(formed.values())).any()


def test_a_form_can_be_edited_without_the_network() -> None:
    network = unet()
    form = neural_engine_form("unet", network)
    form.register_forward_hook(lambda *_: None)
    form.down_blocks[0].resnets = nn.ModuleList()
    form.conv_in.weight = nn.Parameter(torch.zeros(1))
    assert not network._forward_hooks
    assert len(network.down_blocks[0].resnets) == 1
    assert network.conv_in.weight.numel() > 1
    assert copy.deepcopy(form).config == network.config


def test_a_network_without_values_has_a_form() -> None:
    network = clip().to("meta")
    form = neural_engine_form("text_encoder", network)
    assert all(parameter.is_meta for parameter in form.parameters())
    assert not form.causal_bias.is_meta


PRUNED: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {"keep_ratio": 0.5, "round_to": 4}),
    "streams": ("magnitude", {"keep_ratio": 0.6, "round_to": 4, "parts": PARTS}),
    "global": ("random", {"keep_ratio": 0.5, "round_to": 4, "ranking": "global"}),
    "blocks": ("magnitude", {"keep_ratio": 0.5, "cut": "blocks"}),
    "random-blocks": ("random", {"keep_ratio": 0.3, "cut": "blocks"}),
}


@pytest.mark.parametrize("component", ["denoiser", "text_encoder"])
@pytest.mark.parametrize("name", PRUNED)
def test_pruned_networks_answer_alike(name: str, component: str, tmp_path: Path) -> None:
    network = made("sd21", "unet") if component == "denoiser" else clip()
    before = Snapshot.of(network)
    method = pruner(PRUNED[name][0])
    options = method.options(**PRUNED[name][1], component=component)
    method(options).prune(network, Context(torch.Generator().manual_seed(0), Silent(), tmp_path))
    assert not diff(before, network).is_empty
    assert_same(network)


@pytest.mark.parametrize("preset", ["base", "small", "tiny"])
def test_a_u_net_without_pairs_answers_alike(preset: str, tmp_path: Path) -> None:
    network = unet(
        block_out_channels=(16, 16, 32),
        layers_per_block=2,
        attention_head_dim=(2, 4, 8),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    method = pruner("bk-sdm")
    method(method.options(preset=preset)).prune(network, Context(torch.Generator(), Silent(), tmp_path))
    assert_same(network)


def test_stand_ins_and_missing_parts_answer_alike() -> None:
    network = unet(transformer_layers_per_block=3)
    first, second, third = network.down_blocks[0].attentions[0].transformer_blocks
    first.attn1, second.attn1 = stand_in("zero", first.attn1), stand_in("bypass", second.attn1)
    first.attn2 = first.norm2 = None
    second.ff = stand_in("zero", second.ff)
    third.ff.net[2] = stand_in("gather", third.ff.net[2], positions=(0, 3, 4, 15))
    third.attn2.to_out[0] = stand_in("zero", third.attn2.to_out[0])
    third.attn1.to_v = stand_in("gather", third.attn1.to_v, positions=(1, 2, 9))
    resnets = network.up_blocks[0].resnets
    resnets[0] = stand_in("shortcut", resnets[0])
    resnets[1].time_emb_proj = stand_in("zero", resnets[1].time_emb_proj)
    network.up_blocks[1].attentions[0] = stand_in("bypass", network.up_blocks[1].attentions[0])
    form = assert_same(network)
    gathered = form.down_blocks[0].attentions[0].transformer_blocks[2].ff.net[2].linear
    assert type(gathered) is nn.Conv2d
    assert isinstance(third.ff.net[2], Gather)

    text = clip()
    layers = text.encoder.layers
    layers[0].self_attn, layers[1].self_attn = (stand_in(kind, layers[0].self_attn) for kind in ("zero", "bypass"))
    layers[2].mlp = stand_in("zero", layers[2].mlp)
    assert_same(text)

"""Core ML packages of networks of every supported family: converted, evaluated from disk, and compared with torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import MAKERS, clip, clip_tokenizer, t5, unet_of, vae

pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'diffusion-exporter[coreml]'")

from exporter.lowering.pinned import pin_timesteps
from exporter.lowering.wrappers import AutoencoderEncoder, Sizes, example_feeds, signature, wrap
from exporter.networks.components import FAMILIES
from exporter.networks.standins import stand_in
from exporter.progress import Silent
from exporter.pruners import pruner
from exporter.pruners.base import Context
from exporter.reference.grammar import scenes
from exporter.reference.render import render_many
from targets.coreml import CoreMl, CoreMlOptions
from targets.coreml.package import MANIFEST, Manifest
from targets.torch_source import TorchProgram

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SINGLE, HALF = 1e-5, 5e-3
"""Largest error over the largest answer, by the floats of a package."""
ONE_LEVEL = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (16,),
}
WITHOUT_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}


def sdxl_unet() -> Any:
    told = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
    return unet_of(**ONE_LEVEL, **told, mid_block_type=None, projection_class_embeddings_input_dim=6 * 8 + 20)


def pixel_unet() -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        block_out_channels=(16,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=8,
    )


def pixart() -> Any:
    """Of the size that is told resolution and aspect ratio."""
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        cross_attention_dim=24,
        caption_channels=12,
        sample_size=128,
    )


def flux() -> Any:
    """With frequencies between 1 and 0, as the real one has them and the tiny one has not."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=28,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 12, 12),
    )


def small_vae(**changes: Any) -> Any:
    two = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return vae(block_out_channels=(8, 16), norm_num_groups=4, **two, **changes)


def part(family: str, name: str) -> Callable[[Path], Any]:
    return lambda folder: getattr(MAKERS[family](folder), name)


NETWORKS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "sd-unet": ("iOS18", lambda _: unet_of(**ONE_LEVEL)),
    "sdxl-unet": ("iOS17", lambda _: sdxl_unet()),
    "lcm-unet": ("iOS16", lambda _: unet_of(**ONE_LEVEL, mid_block_type=None, time_cond_proj_dim=32)),
    "pixels-unet": ("iOS17", lambda _: pixel_unet()),
    "pixart": ("iOS16", part("PixArtAlphaPipeline", "transformer")),
    "pixart-1024": ("iOS18", lambda _: pixart()),
    "dit": ("iOS17", part("DiTPipeline", "transformer")),
    "sd3": ("iOS18", part("StableDiffusion3Pipeline", "transformer")),
    "flux": ("iOS17", lambda _: flux()),
    "clip": ("iOS16", lambda folder: clip(clip_tokenizer(folder), 16)),
    "clip-projected": ("iOS18", lambda folder: clip(clip_tokenizer(folder), 20, projection=12)),
    "t5": ("iOS17", lambda _: t5(12)),
    "decoder": ("iOS16", lambda _: small_vae()),
    "decoder-without-quant": ("iOS18", lambda _: small_vae(**WITHOUT_QUANT)),
    "encoder": ("iOS17", lambda _: AutoencoderEncoder(small_vae())),
    "encoder-without-quant": ("iOS18", lambda _: AutoencoderEncoder(small_vae(**WITHOUT_QUANT))),
}


def network(name: str, folder: Path) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return NETWORKS[name][1](folder).eval()


def kind(net: Any) -> tuple[Any, ...]:
    """What makes a network another one for a converter: class, inputs, outputs, and parts that may be missing."""
    names = signature(net)
    parts = tuple(getattr(net, part, None) is None for part in ("quant_conv", "post_quant_conv"))
    return type(net).__name__, names.inputs, tuple(name for name in names.outputs if "." not in name), parts


def test_every_component_of_every_family_is_among_the_networks(tmp_path: Path) -> None:
    known = {kind(network(name, tmp_path / name)) for name in NETWORKS}
    for family, make in MAKERS.items():
        pipeline = make(tmp_path / family)
        for component in (*FAMILIES[family].components, *FAMILIES[family].on_request):
            net = getattr(pipeline, component.folder)
            net = AutoencoderEncoder(net) if component.role == "encoder" else net
            assert kind(net) in known, f"{family}, {component.name}"
    classes = {component.cls for entry in FAMILIES.values() for component in entry.components}
    assert classes <= {name for name, *_ in known}  # StableDiffusionPipeline's too, which has no maker here


def program(net: Any, calls: tuple[dict[str, Any], ...] = (), latent: int = 8) -> TorchProgram:
    pin_timesteps(net)
    names = signature(net)
    examples = example_feeds(net, Sizes(2, latent, 8))
    inputs = {name: tensor.numpy() for name, tensor in zip(names.inputs, examples, strict=True)}
    return TorchProgram("part", wrap(net), inputs, names.outputs, calls=calls, facts={"weights_sha256": "f" * 64})


def feeds_of(net: Any, latent: int = 8) -> dict[str, Any]:
    """What is hard on a package: late timesteps, real sizes, and other numbers than it was traced with."""
    names = signature(net).inputs
    rng = np.random.default_rng(1)
    found: dict[str, Any] = {}
    for name, tensor in zip(names, example_feeds(net, Sizes(2, latent, 8)), strict=True):
        example = tensor.numpy()
        if name == "timestep":
            found[name] = np.full_like(example, 0.987 if "img_ids" in names else 987.0)
        elif name == "time_ids":
            found[name] = np.tile(np.array([[1024, 768, 8, 16, 1024, 1000]], np.float32), (len(example), 1))
        elif name == "img_ids":
            found[name] = example * 15  # of an image of 1,024 pixels
        elif name in ("txt_ids", "guidance", "resolution", "aspect_ratio"):
            found[name] = example
        elif example.dtype.kind == "i":
            found[name] = example.astype(np.int32)
        else:
            found[name] = rng.normal(size=example.shape).astype(np.float32)
    return found


def torch_answers(source: TorchProgram, feeds: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        found = source.module(*(torch.from_numpy(feeds[name]) for name in source.inputs))
    return dict(zip(source.outputs, found if isinstance(found, tuple) else (found,), strict=True))


def worst(source: TorchProgram, feeds: dict[str, Any], folder: Path, **options: Any) -> float:
    """Convert, open what was saved, and return the largest error of any output."""
    folder.mkdir()
    chosen = CoreMlOptions(**options)
    wanted = {name: value.numpy() for name, value in torch_answers(source, feeds).items()}
    CoreMl().convert(source, folder, chosen)
    session = CoreMl().open(folder, chosen)
    got = session(feeds)
    waves = {layer.precision for layer in session.evidence().layers if layer.type in ("sin", "cos")}
    assert waves <= {"f32"}, "what sines are taken of has too many digits for 16 bits"
    session.close()
    assert got.keys() == wanted.keys()
    return max(float(np.abs(got[name] - wanted[name]).max() / np.abs(wanted[name]).max()) for name in wanted)


@pytest.mark.parametrize(("precision", "bound"), [("f32", SINGLE), ("f16", HALF)])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_a_family_answers_from_its_package(
    name: str, precision: str, bound: float, tmp_path: Path
) -> None:
    net = network(name, tmp_path / "parts")
    found = worst(program(net), feeds_of(net), tmp_path / "engine", precision=precision, deployment=NETWORKS[name][0])
    assert 0 < found <= bound


def pruned(tmp_path: Path) -> Any:
    net = unet_of(**ONE_LEVEL)
    method = pruner("magnitude")
    context = Context(torch.Generator().manual_seed(0), Silent(), tmp_path)
    method(method.options(keep_ratio=0.5, round_to=4)).prune(net, context)
    return net.eval()


def less(tmp_path: Path) -> Any:
    """Without most attentions and a residual block's layers, which stand-ins take the places of."""
    del tmp_path
    net = unet_of()
    block = net.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1, block.ff = stand_in("zero", block.attn1), stand_in("zero", block.ff)
    net.up_blocks[1].attentions[0] = stand_in("bypass", net.up_blocks[1].attentions[0])
    net.up_blocks[0].resnets[0] = stand_in("shortcut", net.up_blocks[0].resnets[0])
    net.mid_block.attentions[0] = stand_in("bypass", net.mid_block.attentions[0])
    return net.eval()


@pytest.mark.parametrize("make", [pruned, less])
def test_a_pruned_u_net_answers_from_its_package(make: Callable[[Path], Any], tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        whole = unet_of(**ONE_LEVEL) if make is pruned else unet_of()
        net = make(tmp_path)
    assert sum(value.numel() for value in net.parameters()) < 0.9 * sum(value.numel() for value in whole.parameters())
    feeds = feeds_of(net)
    assert 0 < worst(program(net), feeds, tmp_path / "single", precision="f32") <= SINGLE
    assert 0 < worst(program(net), feeds, tmp_path / "half") <= HALF


def test_the_embedded_encoder_overflows_in_16_bits_and_is_kept_from_it_by_recorded_calls(tmp_path: Path) -> None:
    """A photograph-like image makes squares of above 65,504 in a group normalization."""
    from diffusers import AutoencoderKL

    import exporter.reference

    shapes = Path(exporter.reference.__file__).parent / "shapes"
    net = AutoencoderEncoder(AutoencoderKL.from_pretrained(shapes / "vae").eval())
    images = render_many(scenes(seed=5, count=2, held_out=True), 7)
    feeds = {"sample": np.ascontiguousarray(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)}
    bare = worst(program(net), feeds, tmp_path / "bare")
    assert not bare <= HALF, "the overflow must be one"
    assert worst(program(net, calls=(feeds,)), feeds, tmp_path / "kept") <= HALF
    kept = Manifest.read(tmp_path / "kept" / MANIFEST).kept_in_float
    assert {name.split("_")[0] for name in kept} == {"square", "reduce"}, "squares and their means, and nothing else"
    assert all(largest > 32752 for largest in kept.values())

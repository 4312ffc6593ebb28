"""Fixed small inputs for each network class, and what a network answers to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from exporter.errors import SurgeryError
from exporter.networks.inputs import INPUTS, as_arguments, inputs_of

FORWARD_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What the forward of a network raises when its parts do not fit each other."""

_PROBE_SIDE = 8
_PROBE_TOKENS = 8


def example_inputs(
    module: nn.Module, *, batch: int = 1, seed: int = 0, size: int | None = None, tokens: int | None = None
) -> dict[str, Tensor]:
    """Return inputs of a network, named as its exported graph names them.

    Args:
        module: of a class in `exporter.networks.inputs.INPUTS`; of an AutoencoderKL the decoder.
        batch: first axis of every input.
        seed: of the values.
        size: side of the latent; 8 by default. Not for a text encoder.
        tokens: length of the text; by default 8 for a denoiser, all positions for a text encoder.

    Returns:
        On the network's device, floats standard normal in its dtype: ``sample`` (batch, channels, size, size),
        ``timestep`` (batch,) int64 in 0..999, ``encoder_hidden_states`` (batch, tokens, width) and what else the
        network takes; or ``latent_sample`` (batch, channels, size, size); or ``input_ids`` (batch, tokens) int64, the
        last being the end token.

    Raises:
        SurgeryError: a network class without example inputs.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    side = _PROBE_SIDE if size is None else size
    cls = type(module).__name__
    if cls in _MAKERS:
        inputs = _MAKERS[cls](module, (batch, side, tokens or _PROBE_TOKENS), generator)
    elif cls in _TEXT_CLASSES:
        inputs = _text(module, batch, tokens, generator)
    else:
        raise SurgeryError(f"probe: no example inputs for {cls}.")
    parameter = next(module.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def has_probe(module: nn.Module) -> bool:
    """Tell whether `example_inputs` knows the class."""
    return type(module).__name__ in INPUTS


def _unet(module: nn.Module, sizes: tuple[int, int, int], generator: torch.Generator) -> dict[str, Tensor]:
    batch, side, tokens = sizes
    unet = cast("Any", module)
    inputs = {
        "sample": torch.randn(batch, int(unet.conv_in.in_channels), side, side, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn(batch, tokens, text_width(module), generator=generator),
    }
    if getattr(module, "channels_first_text", False):  # a form for the Neural Engine
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].transpose(1, 2)[:, :, None]
    names = inputs_of("UNet2DConditionModel", unet.config)
    if "timestep_cond" in names:
        inputs["timestep_cond"] = torch.randn(batch, int(unet.config.time_cond_proj_dim), generator=generator)
    if "time_ids" in names:
        side_ids = 8.0 * side
        pooled = int(unet.config.projection_class_embeddings_input_dim) - 6 * int(unet.config.addition_time_embed_dim)
        inputs["text_embeds"] = torch.randn(batch, pooled, generator=generator)
        inputs["time_ids"] = torch.tensor([[side_ids, side_ids, 0.0, 0.0, side_ids, side_ids]]).repeat(batch, 1)
    return inputs


def _pixels(module: nn.Module, sizes: tuple[int, int, int], generator: torch.Generator) -> dict[str, Tensor]:
    batch, side, _ = sizes
    unet = cast("Any", module)
    # Every down block but the last halves the sides; what comes up must meet what went down.
    side = max(side, 2 ** (len(unet.down_blocks) - 1))
    return {
        "sample": torch.randn(batch, int(unet.conv_in.in_channels), side, side, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
    }


def text_width(unet: nn.Module) -> int:
    """Return the width of the text states that a denoiser takes, read from its live cross-attention."""
    for name, child in unet.named_modules():
        key = getattr(child, "to_k", None) if name.endswith("attn2") else None
        if isinstance(key, nn.Linear):
            return key.in_features
        if isinstance(key, nn.Conv2d):  # a form for the Neural Engine
            return key.in_channels
    width = cast("Any", unet).config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


def _decoder(module: nn.Module, sizes: tuple[int, int, int], generator: torch.Generator) -> dict[str, Tensor]:
    batch, side, _ = sizes
    channels = int(cast("Any", module).config.latent_channels)
    return {"latent_sample": torch.randn(batch, channels, side, side, generator=generator)}


def _encoder(module: nn.Module, sizes: tuple[int, int, int], generator: torch.Generator) -> dict[str, Tensor]:
    batch, side, _ = sizes
    config = cast("Any", module).config
    side *= 2 ** (len(config.block_out_channels) - 1)
    return {"sample": torch.randn(batch, int(config.in_channels), side, side, generator=generator)}


def _text(module: nn.Module, batch: int, tokens: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    net = cast("Any", module)
    if type(module).__name__ == "T5EncoderModel":
        length = _PROBE_TOKENS if tokens is None else tokens
        ids = torch.randint(0, int(net.config.vocab_size), (batch, length), generator=generator)
        return {"input_ids": ids, "attention_mask": (torch.arange(length) < max(1, length - 2)).long().repeat(batch, 1)}
    embeddings = net.embeddings if "embeddings" in net._modules else net.text_model.embeddings
    length = int(embeddings.position_embedding.num_embeddings) if tokens is None else tokens
    words = int(embeddings.token_embedding.num_embeddings)
    ids = torch.randint(0, words, (batch, length), generator=generator)
    end = net.config.eos_token_id
    if isinstance(end, int) and 0 <= end < words:
        ids[:, -1] = end
    return {"input_ids": ids}


def _pixart(module: nn.Module, sizes: tuple[int, int, int], generator: torch.Generator) -> dict[str, Tensor]:
    batch, _, tokens = sizes
    config = cast("Any", module).config
    width = config.caption_channels or config.cross_attention_dim
    inputs = {
        **_patches(module, sizes, generator),
        "encoder_hidden_states": torch.randn(batch, tokens, int(width), generator=generator),
        "encoder_attention_mask": (torch.arange(tokens) < max(1, tokens - 2)).long().repeat(batch, 1),
    }
    if "resolution" in inputs_of("PixArtTransformer2DModel", config):
        inputs["resolution"] = torch.tensor([[1024.0, 1024.0]]).repeat(batch, 1)
        inputs["aspect_ratio"] = torch.ones(batch, 1)
    return inputs


def _patches(module: nn.Module, sizes: tuple[int, int, int], generator: torch.Generator) -> dict[str, Tensor]:
    batch, side, _ = sizes
    channels = int(cast("Any", module).config.in_channels)
    return {
        "hidden_states": torch.randn(batch, channels, side, side, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
    }


def _dit(module: nn.Module, sizes: tuple[int, int, int], generator: torch.Generator) -> dict[str, Tensor]:
    classes = int(cast("Any", module).config.num_embeds_ada_norm)
    labels = torch.randint(0, classes, (sizes[0],), generator=generator)
    return {**_patches(module, sizes, generator), "class_labels": labels}


def _sd3(module: nn.Module, sizes: tuple[int, int, int], generator: torch.Generator) -> dict[str, Tensor]:
    return {**_patches(module, sizes, generator), **_joint_text(module, sizes, generator)}


def _joint_text(module: nn.Module, sizes: tuple[int, int, int], generator: torch.Generator) -> dict[str, Tensor]:
    config = cast("Any", module).config
    batch, _, tokens = sizes
    return {
        "encoder_hidden_states": torch.randn(batch, tokens, int(config.joint_attention_dim), generator=generator),
        "pooled_projections": torch.randn(batch, int(config.pooled_projection_dim), generator=generator),
    }


def _flux(module: nn.Module, sizes: tuple[int, int, int], generator: torch.Generator) -> dict[str, Tensor]:
    batch, side, tokens = sizes
    config = cast("Any", module).config
    axis = torch.arange(side // 2, dtype=torch.float32)
    places = torch.cartesian_prod(torch.zeros(1), axis, axis)
    inputs = {
        "hidden_states": torch.randn(batch, len(places), int(config.in_channels), generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        **_joint_text(module, sizes, generator),
        "img_ids": places,
        "txt_ids": torch.zeros(tokens, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


_MAKERS = {
    "AutoencoderEncoder": _encoder,
    "AutoencoderKL": _decoder,
    "DiTTransformer2DModel": _dit,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _pixels,
}
_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")


def probe_inputs(module: nn.Module) -> dict[str, Tensor]:
    """Return `example_inputs` and, for an autoencoder, an image for its encoder, so that every weight takes part."""
    inputs = example_inputs(module)
    if type(module).__name__ == "AutoencoderKL":
        vae = cast("Any", module)
        side = 2 ** (len(vae.config.block_out_channels) - 1) * 2
        generator = torch.Generator("cpu").manual_seed(1)
        image = torch.randn(1, int(vae.config.in_channels), side, side, generator=generator)
        inputs["image"] = image.to(inputs["latent_sample"])
    return inputs


def run_probe(module: nn.Module, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return what a network answers to fixed inputs, without gradients, in evaluation mode; the mode is restored.

    Args:
        module: of a class that `example_inputs` knows.
        inputs: by default `probe_inputs`.

    Returns:
        Named as an exported graph names its outputs: ``out_sample``; ``sample`` (and ``moments`` where the inputs hold
        an ``image``); ``last_hidden_state`` and the pooled states that the text encoder has.
    """
    feeds = probe_inputs(module) if inputs is None else inputs
    net = cast("Any", module)
    with evaluating(module), torch.no_grad():
        if type(module).__name__ == "AutoencoderKL":
            answers = {"sample": net.decode(feeds["latent_sample"], return_dict=False)[0]}
            if "image" in feeds:
                answers["moments"] = net.encode(feeds["image"], return_dict=False)[0].parameters
            return answers
        answer = net(**as_arguments(feeds))
        if isinstance(answer, Mapping) and "last_hidden_state" in answer:
            return {name: value for name, value in answer.items() if isinstance(value, Tensor)}
        return {"out_sample": answer[0]}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode and every part back into the mode it was in."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def reference_copy(module: nn.Module) -> nn.Module:
    """Return the network itself where it is float32 on the CPU, else such a copy: a probe's arithmetic."""
    tensors = [*module.parameters(), *module.buffers()]
    if all(t.device.type == "cpu" and (t.dtype == torch.float32 or not t.is_floating_point()) for t in tensors):
        return module
    return nn.Module.to(copy.deepcopy(module), "cpu", torch.float32)

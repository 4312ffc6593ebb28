"""The form of a network that fits Apple's Neural Engine: channels first, convolutions for linear layers, split heads.

The Neural Engine works on four axes (rows, channels, 1, tokens), of which it keeps the last contiguous. Apple's advice
("Deploying Transformers on the Apple Neural Engine", and the README of ml-stable-diffusion): linear layers as 1x1
convolutions, attention head by head with two einsums that need no reshape, few reshapes and transposes. Converted as it
is, a network of diffusers keeps none of that.

The form is made of live modules, so it is that of a pruned network too, and of nothing that is not listed in `_RULES`.
Every module stays at its path. Which device runs what is decided on the device: no one can promise it from here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import diffusers
import torch
import transformers
from diffusers.models import (
    activations,
    attention,
    attention_processor,
    downsampling,
    embeddings,
    lora,
    resnet,
    upsampling,
)
from diffusers.models.transformers import transformer_2d
from diffusers.models.unets import unet_2d_blocks
from torch import Tensor, nn
from transformers import activations as text_activations
from transformers.models.clip import modeling_clip

from exporter.errors import ComponentFailed
from exporter.lowering import neural_engine_layers as layers
from exporter.lowering import neural_engine_text as text
from exporter.lowering import neural_engine_unet as unet
from exporter.networks.standins import Bypass, Gather, Shortcut, Zero

NETWORKS = ("UNet2DConditionModel", "CLIPTextModel", "CLIPTextModelWithProjection")
"""Classes of networks that have this form."""

_Made = TypeVar("_Made", bound=nn.Module)


def neural_engine_form(
    component: str, network: nn.Module, *, channels_first_text: bool = False, query_chunk: int | None = None
) -> nn.Module:
    """Return a network in the form that fits the Neural Engine, of the same inputs, outputs and answers.

    It is for inference and for conversion. It has the network's parameters: those of linear layers as views of four
    axes without gradients, all others themselves. Its modules have the paths and, where they stand for a whole network,
    the class names of the network's, so that what wraps and names networks takes it as one.

    Args:
        component: its name, for messages.
        network: a U-Net with text, or a text encoder of CLIP, pruned or not; unchanged.
        channels_first_text: whether a U-Net takes its text states as (rows, width, 1, tokens), as the Swift package of
            Apple feeds them, instead of (rows, tokens, width), which costs one transpose; nothing to a text encoder.
        query_chunk: how many queries attend at a time; None for all. Apple's SPLIT_EINSUM_V2 is 512: its README says
            that it can be faster on mobile devices, takes longer to compile, and advises against it for SDXL, whose
            compilation would take too long. Nothing here has measured that.

    Raises:
        ComponentFailed: the network is of a class without this form, or something in it is; the message names it.
    """
    if type(network).__name__ not in NETWORKS or type(network) not in _RULES:
        raise ComponentFailed(
            f"{component}: the Neural Engine form knows only some networks; got {type(network).__name__}, expected one "
            f"of {', '.join(NETWORKS)}. Convert this component as it is."
        )
    made = _Rewrite(component, query_chunk).form("", network)
    if isinstance(made, unet.UNet2DConditionModel):
        made.channels_first_text = channels_first_text
    return made


@dataclass
class _Rewrite:
    """One pass over a network.

    Attributes:
        component: for messages.
        query_chunk: as `neural_engine_form` takes it.
        made: what has become of a module; one that stands in two places becomes one module.
    """

    component: str
    query_chunk: int | None
    made: dict[nn.Module, nn.Module] = field(default_factory=dict)

    def form(self, path: str, module: nn.Module) -> nn.Module:
        if module not in self.made:
            rule = _RULES.get(type(module))
            if rule is None:
                raise self.unknown(
                    path, "modules of this class", type(module).__name__, "one of U-Nets with text or CLIP"
                )
            if "forward" in vars(module):
                raise self.unknown(path, "a forward set on a module", "one, as hooks of accelerate do", "its class's")
            self.made[module] = rule(self, path, module)
        return self.made[module]

    def parts(self, path: str, module: nn.Module) -> dict[str, nn.Module | None]:
        """Return the forms of a module's children."""
        prefix = f"{path}." if path else ""
        return {
            name: None if child is None else self.form(f"{prefix}{name}", child)
            for name, child in module._modules.items()
        }

    def unknown(self, path: str, what: str, got: object, expected: str) -> ComponentFailed:
        place = f"{self.component}: {path}" if path else self.component
        return ComponentFailed(
            f"{place}: the Neural Engine form does not know {what}; got {got}, expected {expected}. Convert this "
            "component as it is, or take that out of the network."
        )


_Rule = Callable[[_Rewrite, str, nn.Module], nn.Module]
_Refusal = Callable[[Any], tuple[str, object, str] | None]
"""Tells of a module what is not known, what was got and what was expected; None where all is known."""

_PRIVATE = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))


def _as(cls: type[_Made], module: nn.Module, parts: Mapping[str, nn.Module | None]) -> _Made:
    """Return a module of a class with another one's attributes and parameters, and with these children."""
    made = cls.__new__(cls)
    attributes = vars(module)
    made.__dict__.update(attributes)
    made.__dict__.update({name: copy.copy(attributes[name]) for name in _PRIVATE if name in attributes})
    made.__dict__["_modules"] = dict(parts)
    return made


def _becomes(
    cls: type[nn.Module] | None, *, only: tuple[str, ...] | None = None, refuses: _Refusal | None = None
) -> _Rule:
    """Return a rule: a module becomes one of a class, with the forms of its children.

    Args:
        cls: the class; None for the module's own.
        only: children that it may have; None for any.
        refuses: what else is not known of it.
    """

    def rule(rewrite: _Rewrite, path: str, module: nn.Module) -> nn.Module:
        for name, child in module._modules.items():
            if only is not None and child is not None and name not in only:
                place = f"{path}.{name}" if path else name
                expected = f"of {type(module).__name__} only {', '.join(only) or 'no parts'}"
                raise rewrite.unknown(place, "this part", type(child).__name__, expected)
        told = refuses(module) if refuses is not None else None
        if told is not None:
            raise rewrite.unknown(path, *told)
        return _as(type(module) if cls is None else cls, module, rewrite.parts(path, module))

    return rule


def _convolution(rewrite: _Rewrite, path: str, module: nn.Module) -> nn.Module:
    """Return the 1x1 convolution that a linear layer is over its channels, with a view of its weight."""
    if any(child is not None for child in module._modules.values()):
        raise rewrite.unknown(path, "parts of a linear layer", ", ".join(module._modules), "none: LoRAs are merged")
    weight: Tensor = cast("Any", module).weight
    bias = module._parameters["bias"]
    with torch.device("meta"):
        made = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
    made.weight = nn.Parameter(weight.detach()[:, :, None, None], requires_grad=False)
    made.register_parameter("bias", bias)
    return made.train(module.training)


def _attention(rewrite: _Rewrite, path: str, module: nn.Module) -> nn.Module:
    only = ("to_q", "to_k", "to_v", "to_out")
    made = cast("Any", _becomes(layers.Attention, only=only, refuses=_unlike_attention)(rewrite, path, module))
    made.head_width = _width(made.to_k) // made.heads
    if type(made.processor) is attention_processor.AttnProcessor2_0:  # it scales by the heads, not by what is stated
        made.scale = made.head_width**-0.5
    made.query_chunk = rewrite.query_chunk
    return cast("nn.Module", made)


def _clip_attention(rewrite: _Rewrite, path: str, module: nn.Module) -> nn.Module:
    made = cast("Any", _becomes(layers.CLIPAttention, refuses=_unlike_clip)(rewrite, path, module))
    made.query_chunk = rewrite.query_chunk
    return cast("nn.Module", made)


def _text_model(rewrite: _Rewrite, path: str, module: nn.Module) -> nn.Module:
    made = _becomes(text.CLIPTextModel)(rewrite, path, module)
    positions = cast("Any", module).embeddings.position_embedding.weight
    made.register_buffer("causal_bias", text.causal_bias(positions.shape[0], positions), persistent=False)
    return made


def _zero(rewrite: _Rewrite, path: str, module: nn.Module) -> nn.Module:
    """Return a stand-in of zeros: one that answers in its input's shape stays as it is."""
    return _becomes(layers.Zero if cast("Any", module).out_features else None)(rewrite, path, module)


def _width(layer: Any) -> int:
    """Return how many outputs a linear layer or what stands for one has; 0 where it says nothing of that."""
    weight = layer._parameters.get("weight")
    return int(getattr(layer, "out_features", 0)) if weight is None else int(weight.shape[0])


def _unlike_attention(module: Any) -> tuple[str, object, str] | None:
    processor, widths = type(module.processor), [_width(part) for part in (module.to_q, module.to_k, module.to_v)]
    if processor not in (attention_processor.AttnProcessor, attention_processor.AttnProcessor2_0):
        return "an attention of this processor", processor.__name__, "AttnProcessor or AttnProcessor2_0"
    if module.residual_connection or module.rescale_output_factor != 1:
        got = f"residual_connection {module.residual_connection}, rescale_output_factor {module.rescale_output_factor}"
        return "an attention that adds its input or is scaled", got, "False and 1"
    if len(set(widths)) != 1 or not widths[0] or widths[0] % module.heads:
        return "query, key and value of different widths", widths, f"three times one multiple of {module.heads} heads"
    return None


def _unlike_clip(module: Any) -> tuple[str, object, str] | None:
    widths = [_width(part) for part in (module.q_proj, module.k_proj, module.v_proj)]
    if len(set(widths)) != 1 or not widths[0] or widths[0] % module.head_dim:
        return "query, key and value of different widths", widths, f"three times one multiple of {module.head_dim}"
    return None


def _unlike_block(module: Any) -> tuple[str, object, str] | None:
    kind = module.norm_type
    return None if kind == "layer_norm" else ("a block that is normalized like this", kind, "layer_norm")


def _unlike_images(module: Any) -> tuple[str, object, str] | None:
    return None if module.is_input_continuous else ("what this transformer takes", "patches or codes", "images")


def _unlike_up(module: Any) -> tuple[str, object, str] | None:
    enabled = all(getattr(module, name, None) for name in ("s1", "s2", "b1", "b2"))
    return ("FreeU", "its four factors", "none: disable_freeu()") if enabled else None


def _unlike_norm(module: Any) -> tuple[str, object, str] | None:
    shape = tuple(module.normalized_shape)
    return None if len(shape) == 1 else ("a norm over several axes", shape, "one axis")


_SAMPLER = ("conv", "Conv2d_0")
_UNET = (
    "conv_in",
    "time_proj",
    "time_embedding",
    "time_embed_act",
    "add_time_proj",
    "add_embedding",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "conv_norm_out",
    "conv_act",
    "conv_out",
)
_BLOCK = ("norm1", "attn1", "norm2", "attn2", "norm3", "ff")

_STAY: tuple[type[nn.Module], ...] = (
    nn.AvgPool2d,
    nn.Conv2d,
    nn.Dropout,
    nn.Embedding,
    nn.ModuleList,
    nn.SiLU,
    nn.GELU,
    nn.Mish,
    nn.ReLU,
    attention.FeedForward,
    embeddings.Timesteps,
    unet_2d_blocks.CrossAttnDownBlock2D,
    unet_2d_blocks.DownBlock2D,
    unet_2d_blocks.ResnetDownsampleBlock2D,
    unet_2d_blocks.ResnetUpsampleBlock2D,
    unet_2d_blocks.UNetMidBlock2DCrossAttn,
    unet_2d_blocks.UNetMidBlock2D,
    text_activations.FastGELUActivation,
    text_activations.GELUActivation,
    text_activations.GELUTanh,
    text_activations.NewGELUActivation,
    text_activations.QuickGELUActivation,
    modeling_clip.CLIPEncoder,
    modeling_clip.CLIPEncoderLayer,
    modeling_clip.CLIPMLP,
    modeling_clip.CLIPTextEmbeddings,
    Bypass,
    Shortcut,
)
"""What works on each number alone, on images, or hands on what its parts answer: only its parts have another form."""

_RULES: Mapping[type[nn.Module], _Rule] = {
    **dict.fromkeys(_STAY, _becomes(None)),
    diffusers.UNet2DConditionModel: _becomes(unet.UNet2DConditionModel, only=_UNET),
    embeddings.TimestepEmbedding: _becomes(unet.TimestepEmbedding),
    resnet.ResnetBlock2D: _becomes(unet.ResnetBlock2D),
    downsampling.Downsample2D: _becomes(None, only=_SAMPLER),
    upsampling.Upsample2D: _becomes(None, only=_SAMPLER),
    unet_2d_blocks.CrossAttnUpBlock2D: _becomes(None, refuses=_unlike_up),
    unet_2d_blocks.UpBlock2D: _becomes(None, refuses=_unlike_up),
    transformer_2d.Transformer2DModel: _becomes(
        unet.Transformer2DModel, only=("norm", "proj_in", "transformer_blocks", "proj_out"), refuses=_unlike_images
    ),
    attention.BasicTransformerBlock: _becomes(unet.BasicTransformerBlock, only=_BLOCK, refuses=_unlike_block),
    attention_processor.Attention: _attention,
    activations.GEGLU: _becomes(layers.GEGLU),
    nn.Linear: _convolution,
    lora.LoRACompatibleLinear: _convolution,
    lora.LoRACompatibleConv: _becomes(None, only=()),
    nn.LayerNorm: _becomes(layers.LayerNorm, refuses=_unlike_norm),
    nn.GroupNorm: _becomes(layers.GroupNorm),
    Zero: _zero,
    Gather: _becomes(layers.Gather),
    transformers.CLIPTextModel: _text_model,
    transformers.CLIPTextModelWithProjection: _becomes(text.CLIPTextModelWithProjection),
    modeling_clip.CLIPAttention: _clip_attention,
}
"""Class of a module to what becomes of it; everything else is refused."""

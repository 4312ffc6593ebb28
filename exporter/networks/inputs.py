"""What each network takes: its inputs by name, and in which form its forward takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from exporter.errors import SourceError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Input:
    """One input of a network.

    Attributes:
        name: of the exported graph's input; the keyword of the network's forward too, or a key of `NESTED`.
        when: tells from the network's config whether it takes this input.
    """

    name: str
    when: Callable[[Config], bool] = lambda config: True


_PIXART_LARGE = 128
"""Latent side of the PixArt that is told resolution and aspect ratio."""
_TIME_COND = Input("timestep_cond", lambda config: config.get("time_cond_proj_dim") is not None)

INPUTS: Mapping[str, tuple[Input, ...]] = MappingProxyType(
    {
        "UNet2DConditionModel": (
            Input("sample"),
            Input("timestep"),
            Input("encoder_hidden_states"),
            _TIME_COND,
            Input("text_embeds", lambda config: config.get("addition_embed_type") == "text_time"),
            Input("time_ids", lambda config: config.get("addition_embed_type") == "text_time"),
        ),
        "UNet2DModel": (Input("sample"), Input("timestep")),
        "PixArtTransformer2DModel": (
            Input("hidden_states"),
            Input("encoder_hidden_states"),
            Input("timestep"),
            Input("resolution", lambda config: config.get("sample_size") == _PIXART_LARGE),
            Input("aspect_ratio", lambda config: config.get("sample_size") == _PIXART_LARGE),
            Input("encoder_attention_mask"),
        ),
        "DiTTransformer2DModel": (Input("hidden_states"), Input("timestep"), Input("class_labels")),
        "SD3Transformer2DModel": (
            Input("hidden_states"),
            Input("encoder_hidden_states"),
            Input("pooled_projections"),
            Input("timestep"),
        ),
        "FluxTransformer2DModel": (
            Input("hidden_states"),
            Input("encoder_hidden_states"),
            Input("pooled_projections"),
            Input("timestep"),
            Input("img_ids"),
            Input("txt_ids"),
            Input("guidance", lambda config: bool(config.get("guidance_embeds"))),
        ),
        "AutoencoderKL": (Input("latent_sample"),),
        "AutoencoderEncoder": (Input("sample"),),
        "CLIPTextModel": (Input("input_ids"),),
        "CLIPTextModelWithProjection": (Input("input_ids"),),
        "T5EncoderModel": (Input("input_ids"), Input("attention_mask")),
    }
)
"""Network class to its inputs, in the order of its forward; of an autoencoder those of its decoder, its other half
being `exporter.lowering.wrappers.AutoencoderEncoder`."""

NESTED: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("text_embeds", "time_ids", "resolution", "aspect_ratio"), "added_cond_kwargs")
)
"""Inputs that forward takes inside of a dictionary, to the name of that argument."""

SHARED = ("img_ids", "txt_ids")
"""Inputs without an axis of rows: one for all."""


def inputs_of(cls: str, config: Config) -> tuple[str, ...]:
    """Return the names of a network's inputs, in the order of its forward.

    Args:
        cls: network class, a key of `INPUTS`.
        config: of the network: some inputs are there for some configs only.

    Raises:
        SourceError: an unknown class.
    """
    if cls not in INPUTS:
        raise SourceError(f"network class: got {cls!r}, expected one of {', '.join(INPUTS)}.")
    return tuple(entry.name for entry in INPUTS[cls] if entry.when(config))


def takes_timestep_rows(cls: str) -> bool:
    """Tell whether a denoiser takes one timestep per row, as transformers do; U-Nets take one for all."""
    return "Transformer" in cls


def takes_timestep_as_share(cls: str) -> bool:
    """Tell whether a denoiser takes timesteps as a share of the schedule, 0 to 1, instead of 0 to 1000."""
    return cls == "FluxTransformer2DModel"


def as_arguments(feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs by name as the keyword arguments of a network's forward: some go into a dictionary."""
    arguments: dict[str, Any] = {}
    for name, value in feeds.items():
        if name in NESTED:
            arguments.setdefault(NESTED[name], {})[name] = value
        else:
            arguments[name] = value
    return arguments

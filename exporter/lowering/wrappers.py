"""Components as plain functions of tensors, with the names, types and shapes that optimum's loaders feed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from exporter.networks.chain import ANSWER, cache_input
from exporter.networks.components import Component, Role
from exporter.networks.cuts import Cut, cut_shapes, outputs_of
from exporter.networks.inputs import as_arguments, inputs_of, takes_timestep_rows
from exporter.networks.probe import example_inputs


@dataclass(frozen=True)
class Signature:
    """Names of a component's inputs and outputs.

    Attributes:
        inputs: in the order of the wrapper's forward.
        outputs: in the order in which the wrapper returns them.
        dynamic: input or output -> axis -> name of the axis, where an export on request leaves it open.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class Sizes:
    """Sizes that a component is exported with.

    Attributes:
        rows: first axis of every input but the timestep.
        latent: side of the latent.
        tokens: length of the text.
    """

    rows: int
    latent: int
    tokens: int


class DenoiserForward(nn.Module):
    """A denoiser's forward without keyword arguments, dictionaries and output objects."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._names = _inputs(net)
        self._open = signature(net).dynamic

    def forward(self, *inputs: Tensor) -> Tensor:
        """Predict noise or velocity.

        Args:
            *inputs: as `signature` names them: the sample (rows, ...) float32, scaled as the scheduler wants it; the
                timestep () or (rows,) float32, the same for every row, which may be a fraction; what else it takes.

        Returns:
            (rows, ...) float32.
        """
        rows, check = inputs[0].shape[0], cast("Any", torch)._check
        fixed = cast("Any", torch.jit).is_tracing()  # its shapes are tensors
        for name, given in zip(self._names, inputs, strict=True):
            if not fixed and self._open.get(name, {}).get(0) == "batch":
                check(given.shape[0] == rows)  # one batch: an exporter would take each input's for one of its own
        arguments = as_arguments(dict(zip(self._names, inputs, strict=True)))
        return cast("Tensor", self.net(**arguments, return_dict=False)[0])


class DecoderForward(nn.Module):
    """The decoding half of a VAE."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Tensor:
        """Decode.

        Args:
            *inputs: one: (rows, channels, height, width) float32, already divided by the VAE's scaling factor.

        Returns:
            (rows, 3, height * factor, width * factor) float32 in about [-1, 1].
        """
        return cast("Tensor", cast("Any", self.net).decode(inputs[0], return_dict=False)[0])


class AutoencoderEncoder(nn.Module):
    """The encoding half of an autoencoder, which it shares its layers, their names and the config with."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        whole = cast("Any", autoencoder)
        self.config = whole.config
        self.encoder = whole.encoder
        self.quant_conv = whole.quant_conv

    def forward(self, image: Tensor) -> Tensor:
        """Return means and logarithms of variances; see `EncoderForward`."""
        hidden = self.encoder(image)
        return cast("Tensor", hidden if self.quant_conv is None else self.quant_conv(hidden))


class EncoderForward(nn.Module):
    """The encoding half of a VAE as a function of tensors."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Tensor:
        """Encode.

        Args:
            *inputs: one: images (rows, 3, height, width) float32 in [-1, 1].

        Returns:
            (rows, 2 * channels, height / factor, width / factor) float32: the means of the latents, then the logarithms
            of their variances; neither is multiplied by the VAE's scaling factor.
        """
        return cast("Tensor", self.net(inputs[0]))


class TextForward(nn.Module):
    """A text encoder's forward without output objects."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._names = _inputs(net)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Encode a text.

        Args:
            *inputs: token ids (rows, tokens) int64 and, where the encoder takes one, the mask of the same shape.

        Returns:
            As `signature` names them: text states (rows, tokens, width), the pooled state (rows, width) where there is
            one, and for CLIP the states before every layer and behind the last, float32: optimum-intel counts layers
            from the end of these.
        """
        hidden = _has_hidden_states(self.net)
        found = self.net(**dict(zip(self._names, inputs, strict=True)), output_hidden_states=hidden)
        named = [found[name] for name in _text_outputs(self.net) if not name.startswith(_HIDDEN)]
        return (*named, *(found.hidden_states if hidden else ()))


_HIDDEN = "hidden_states."
MAIN_OUTPUT: Mapping[Role, str] = {
    "denoiser": ANSWER,
    "decoder": "sample",
    "encoder": "latent_parameters",
    "text": "last_hidden_state",
}
"""What a component is compared with dense by; parity looks at every output."""

_WRAPPERS = {
    "AutoencoderKL": DecoderForward,
    "AutoencoderEncoder": EncoderForward,
    "CLIPTextModel": TextForward,
    "CLIPTextModelWithProjection": TextForward,
    "T5EncoderModel": TextForward,
}


def signature(module: nn.Module) -> Signature:
    """Return the names of a network's inputs and outputs; of an autoencoder those of its decoder.

    Raises:
        SourceError: a network of an unknown class.
    """
    if isinstance(module, Cut):  # of fixed shapes only
        takes = (cache_input(cut) for cut in module.pattern.takes)
        return Signature((*module.names, *takes), (ANSWER, *outputs_of(module.pattern)), {})
    inputs = _inputs(module)
    wrapper = _WRAPPERS.get(type(module).__name__, DenoiserForward)
    if wrapper is DecoderForward:
        axes = {"latent_sample": _image_axes(""), "sample": _image_axes("image_")}
        return Signature(inputs, ("sample",), axes)
    if wrapper is EncoderForward:  # names as in optimum's layout
        axes = {"sample": _image_axes("image_"), "latent_parameters": _image_axes("")}
        return Signature(inputs, ("latent_parameters",), axes)
    if wrapper is TextForward:
        outputs = _text_outputs(module)
        return Signature(inputs, outputs, {name: {0: "batch"} for name in (*inputs, *outputs)})
    rows = {name: {0: "batch"} for name in inputs if name != "timestep" or takes_timestep_rows(type(module).__name__)}
    if "img_ids" in inputs:  # the latent is packed: its places are one axis
        packed = {0: "batch", 1: "places"}
        rows |= {inputs[0]: packed, "out_sample": packed, "img_ids": {0: "places"}}
        del rows["txt_ids"]
        return Signature(inputs, ("out_sample",), rows)
    if type(module).__name__ == "DiTTransformer2DModel":  # it has positions for one size only
        return Signature(inputs, ("out_sample",), {**rows, "out_sample": {0: "batch"}})
    return Signature(inputs, ("out_sample",), {**rows, inputs[0]: _image_axes(""), "out_sample": _image_axes("")})


def _image_axes(prefix: str) -> dict[int, str]:
    return {0: "batch", 2: f"{prefix}height", 3: f"{prefix}width"}


def _inputs(module: nn.Module) -> tuple[str, ...]:
    config = getattr(module, "config", {})
    return inputs_of(type(module).__name__, config if isinstance(config, Mapping) else config.to_dict())


def _text_outputs(module: nn.Module) -> tuple[str, ...]:
    """Return the outputs of a text encoder in the order in which its library answers them."""
    named = {
        "CLIPTextModel": ("last_hidden_state", "pooler_output"),
        "CLIPTextModelWithProjection": ("text_embeds", "last_hidden_state"),
        "T5EncoderModel": ("last_hidden_state",),
    }[type(module).__name__]
    return (*named, *(f"{_HIDDEN}{index}" for index in range(_layers(module) + 1 if _has_hidden_states(module) else 0)))


def _has_hidden_states(module: nn.Module) -> bool:
    """Tell whether pipelines read the states between the layers, as SDXL's do and `clip_skip` does."""
    return type(module).__name__.startswith("CLIP")


def _layers(module: nn.Module) -> int:
    """Return how many layers a CLIP text encoder has now, which surgery may have changed."""
    return len(next(part for name, part in module.named_modules() if name.endswith("encoder.layers")))


def part_of(component: Component, module: nn.Module) -> nn.Module:
    """Return what a component is of the network that its folder holds: all of it, or the encoding half."""
    return AutoencoderEncoder(module) if component.role == "encoder" else module


def wrap(module: nn.Module) -> nn.Module:
    """Return a network as a function of tensors, as `signature` names them; it shares the network's weights.

    Raises:
        SourceError: a network of an unknown class.
    """
    if isinstance(module, Cut):
        return module
    _inputs(module)
    return _WRAPPERS.get(type(module).__name__, DenoiserForward)(module)


def example_feeds(module: nn.Module, sizes: Sizes) -> tuple[Tensor, ...]:
    """Return inputs of a wrapped network, in order: of the right shapes, types and device.

    Args:
        module: the network, not wrapped; its config and first layers tell the widths.
        sizes: the other axes.

    Raises:
        SourceError: a network of an unknown class.
    """
    if isinstance(module, Cut):
        given = example_feeds(module.net, sizes)
        shapes = cut_shapes(module.net, dict(zip(module.names, given, strict=True))) if module.pattern.takes else {}
        return (*given, *(torch.zeros(shapes[cut]).to(given[0]) for cut in module.pattern.takes))
    names = _inputs(module)
    found = example_inputs(module, batch=sizes.rows, size=sizes.latent, tokens=sizes.tokens)
    if "timestep" in found:
        first = found[names[0]]
        shape = (sizes.rows,) if takes_timestep_rows(type(module).__name__) else ()
        found["timestep"] = torch.zeros(shape, dtype=first.dtype, device=first.device)
    return tuple(found[name] for name in names)

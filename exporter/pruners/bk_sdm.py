"""BK-SDM presets: layers and stages removed by hand; what is left is a stock diffusers U-Net. Needs no data.

Source: BK-SDM (arXiv 2305.15798), section 3.1, and the configs published with it. Each stage of a U-Net with two layers
per block keeps its first layer on the way down, its first and last on the way up (``base``); ``small`` loses the middle
block too, ``tiny`` the innermost stage besides. Weights are those of the dense network, as the authors start from.
Departs: any U-Net with two layers per block is taken, not that of Stable Diffusion 1 and 2 alone. Where the innermost
stage has another width than the one before it, the first layer that ``tiny`` leaves on the way up loses the input
channels that are no longer there, the last of them. Not done here: the distillation that follows, see ``distill``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import nn

from exporter.errors import RecipeError
from exporter.pruners.base import Context, Outcome

Preset = Literal["base", "small", "tiny"]
_DOWN, _UP = (0,), (0, 2)
_LAYERS = 2
_PER_STAGE = (
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "num_attention_heads",
    "only_cross_attention",
    "transformer_layers_per_block",
)
"""Keys of the config that may have one entry for each stage, from the outermost in."""


@dataclass(frozen=True)
class BkSdmOptions:
    """Recipe keys of the method ``bk-sdm``.

    Attributes:
        preset: ``base`` removes one layer of each stage's way down and up; ``small`` the middle block too; ``tiny`` the
            innermost stage besides.
    """

    preset: Preset = "base"

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: an unknown preset.
        """
        if self.preset not in get_args(Preset):
            expected = ", ".join(get_args(Preset))
            raise RecipeError(f"prune.preset: got {self.preset!r}, expected one of {expected}. Choose one.")


class BkSdm:
    """Removes layers of a U-Net by hand, so that a stock config describes what stays.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[BkSdmOptions]] = BkSdmOptions

    def __init__(self, options: BkSdmOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place.

        Raises:
            RecipeError: no U-Net with two layers per block, or no stage to lose.
        """
        from exporter.pruners.attributes import head_widths, sync  # diffusers takes seconds to import

        unet = cast("Any", network)
        config = dict(getattr(network, "config", {}))
        self._check(network, config)
        heads = head_widths(network)
        for stage in unet.down_blocks:
            _keep_layers(stage, _DOWN)
        for stage in unet.up_blocks:
            _keep_layers(stage, _UP)
        if self._options.preset != "base":
            unet.mid_block = None
        if self._options.preset == "tiny":
            _drop_innermost(unet)
        kept = set(network.modules())
        sync(network, {module: width for module, width in heads.items() if module in kept})
        return Outcome({"preset": self._options.preset}, config=_config(config, self._options.preset))

    def _check(self, network: nn.Module, config: dict[str, Any]) -> None:
        name = type(network).__name__
        if name != "UNet2DConditionModel":
            got = f"prune.method: bk-sdm cuts a UNet2DConditionModel; got {name}."
            raise RecipeError(f"{got} Choose another method for this family.")
        unet = cast("Any", network)
        down = {len(stage.resnets) for stage in unet.down_blocks}
        up = {len(stage.resnets) for stage in unet.up_blocks}
        if (down, up) != ({_LAYERS}, {_LAYERS + 1}):
            got = f"prune.method: bk-sdm keeps one of {_LAYERS} layers per block; got {sorted(down)}"
            raise RecipeError(f"{got} down and {sorted(up)} up, expected [2] and [3]. Write method: laptop-diff.")
        if self._options.preset == "tiny" and len(unet.down_blocks) < 2:
            got = "prune.preset: tiny removes the innermost stage; got a U-Net with one stage, expected two or more."
            raise RecipeError(f"{got} Write preset: small.")
        if self._options.preset != "base" and unet.mid_block is None:
            got = f"prune.preset: {self._options.preset} removes the middle block; got a U-Net without one."
            raise RecipeError(f"{got} Write preset: base.")


def _keep_layers(stage: Any, kept: tuple[int, ...]) -> None:
    stage.resnets = _chosen(stage.resnets, kept)
    if getattr(stage, "attentions", None) is not None:
        stage.attentions = _chosen(stage.attentions, kept)


def _chosen(entries: nn.ModuleList, kept: tuple[int, ...]) -> nn.ModuleList:
    """Return the list itself, shortened: records go by the identity of modules."""
    for index in sorted(set(range(len(entries))) - set(kept), reverse=True):
        del entries[index]
    return entries


def _drop_innermost(unet: Any) -> None:
    """Remove the last stage down and the first up, and the samplers between what meets then."""
    gone = unet.up_blocks[0].resnets[-1].out_channels
    del unet.down_blocks[-1]
    del unet.up_blocks[0]
    last = unet.down_blocks[-1]
    last.downsamplers = None
    unet.num_upsamplers -= 1
    _narrow(unet.up_blocks[0].resnets[0], gone, last.resnets[-1].out_channels)


def _narrow(resnet: Any, was: int, now: int) -> None:
    """Let a layer take `now` channels from below instead of `was`; those of the skip connection come behind them."""
    if was == now:
        return
    kept = torch.cat([torch.arange(min(was, now)), torch.arange(was, resnet.in_channels)])
    if now > was:
        got = f"prune.preset: tiny meets a stage of {now} channels where the layer above takes {was}; expected no more."
        raise RecipeError(f"{got} Write preset: small.")
    for module, dim in ((resnet.norm1, 0), (resnet.conv1, 1), (resnet.conv_shortcut, 1)):
        for name, parameter in list(module.named_parameters()):
            if name == "weight" or dim == 0:
                sliced = parameter.detach().index_select(dim, kept.to(parameter.device))
                module.register_parameter(name, nn.Parameter(sliced, requires_grad=parameter.requires_grad))
    resnet.norm1.num_channels = resnet.conv1.in_channels = resnet.conv_shortcut.in_channels = len(kept)


def _config(config: dict[str, Any], preset: Preset) -> dict[str, Any]:
    """Return the stock config of what stays."""
    # diffusers puts its defaults for keys that it has noted as such, whatever their values are now.
    made = {key: value for key, value in config.items() if key != "_use_default_values"}
    layers = config["layers_per_block"]
    made["layers_per_block"] = 1 if isinstance(layers, int) else [1] * len(layers)
    if preset != "base":
        made["mid_block_type"] = None
    if preset == "tiny":
        stages = len(config["block_out_channels"])
        for key in (*_PER_STAGE, "down_block_types", "layers_per_block"):
            value = made.get(key)
            if isinstance(value, list | tuple) and len(value) == stages:
                made[key] = list(value[:-1])
        for key in ("up_block_types", "reverse_transformer_layers_per_block"):
            if isinstance(made.get(key), list | tuple):
                made[key] = list(made[key][1:])
    return made

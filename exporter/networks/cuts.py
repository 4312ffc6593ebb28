"""A U-Net computed from a cut outwards: the innermost levels are left out, and what they would hand up is given.

The order of operations is that of diffusers' own forward, so that depth 0 is the network itself, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from exporter.errors import RecipeError
from exporter.networks.chain import ANSWER, Array, Chain, cache_input, cache_output
from exporter.networks.inputs import inputs_of
from exporter.networks.probe import example_inputs
from exporter.networks.schedule import Pattern, Schedule

Meet = Callable[[int, Tensor], Tensor]
"""(depth of a cut, the feature that is handed up through it) -> the feature to go on with."""

_NETWORKS = ("UNet2DConditionModel", "UNet2DModel")
_BLOCKS = (
    "AttnDownBlock2D",
    "AttnUpBlock2D",
    "CrossAttnDownBlock2D",
    "CrossAttnUpBlock2D",
    "DownBlock2D",
    "UpBlock2D",
)


def levels_of(network: nn.Module) -> int:
    """Return how many levels a U-Net has: as many cuts as that, the last of which leaves nothing.

    Raises:
        RecipeError: a network that cannot be cut, naming why.
    """
    cls = type(network).__name__
    if cls not in _NETWORKS:
        raise RecipeError(
            f"prune.method: schedules of steps are for U-Nets; got {cls}, expected one of {', '.join(_NETWORKS)}. "
            "Reusing parts of transformers is not supported: choose another method."
        )
    net = cast("Any", network)
    downs, ups = list(net.down_blocks), list(net.up_blocks)
    kinds = sorted({type(block).__name__ for block in (*downs, *ups)} - set(_BLOCKS))
    if kinds or len(downs) != len(ups):
        got = ", ".join(kinds) or f"{len(downs)} levels down and {len(ups)} up"
        raise RecipeError(f"prune.method: this {cls} cannot be cut; got {got}, expected {', '.join(_BLOCKS)}.")
    for outer in range(1, len(downs) + 1):
        made = 1 + sum(len(block.resnets) + (block.downsamplers is not None) for block in downs[:outer])
        made -= downs[outer - 1].downsamplers is not None
        read = sum(len(block.resnets) for block in ups[len(ups) - outer :])
        if made != read:
            raise RecipeError(
                f"prune.method: this {cls} cannot be cut inside of level {outer}; got {made} skip connections, "
                f"expected {read}. Choose another method."
            )
    return len(downs)


def run_unet(
    network: nn.Module,
    feeds: Mapping[str, Tensor],
    *,
    depth: int = 0,
    cached: Tensor | None = None,
    meet: Meet | None = None,
) -> Tensor:
    """Compute a U-Net without its `depth` innermost levels.

    Args:
        network: a UNet2DConditionModel or UNet2DModel that `levels_of` accepts, in evaluation mode.
        feeds: its inputs by name, as `exporter.networks.inputs` names them.
        depth: 0 to one less than the levels.
        cached: for a depth above 0, what the levels left out hand up.
        meet: is shown what is handed up through every cut outside of `depth`, innermost first.

    Returns:
        (rows, ...) its answer.
    """
    net = cast("Any", network)
    conditional = type(network).__name__ == "UNet2DConditionModel"
    sample, timestep = feeds["sample"], feeds["timestep"]
    if net.config.center_input_sample:
        sample = 2 * sample - 1.0
    if conditional:
        emb, states = _conditions(net, sample, timestep, feeds)
    else:
        emb, states = _embedding(net, sample, timestep), None
    hidden = net.conv_in(sample)
    outer = len(net.down_blocks) - depth
    residuals: tuple[Tensor, ...] = (hidden,)
    for index, block in enumerate(net.down_blocks[:outer]):
        call = _without_downsampler(block) if depth and index == outer - 1 else block
        hidden, made = call(hidden_states=hidden, temb=emb, **_text(block, states))
        residuals += made
    if depth:
        assert cached is not None
        hidden = cached
    elif net.mid_block is not None:
        text = _text(net.mid_block, states)
        hidden = net.mid_block(hidden, emb, **text)
    odd = conditional and any(side % 2**net.num_upsamplers for side in sample.shape[-2:])
    for index, block in enumerate(net.up_blocks):
        if index < depth:
            continue
        if index > depth and meet is not None:
            hidden = meet(index, hidden)
        count = len(block.resnets)
        taken, residuals = residuals[-count:], residuals[:-count]
        sized = {"upsample_size": residuals[-1].shape[2:]} if odd and residuals else {}
        hidden = block(hidden_states=hidden, temb=emb, res_hidden_states_tuple=taken, **_text(block, states), **sized)
    return _head(net, hidden, timestep)


class Cut(nn.Module):
    """A pattern of a U-Net as a function of tensors; it shares the network's weights.

    Args:
        network: the U-Net.
        pattern: what is left out, and what is handed out.
        names: of the network's inputs, in the order of its forward.
    """

    def __init__(self, network: nn.Module, pattern: Pattern, names: tuple[str, ...]) -> None:
        super().__init__()
        self.net = network
        self.pattern = pattern
        self.names = names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the answer and the features of the pattern's cuts, in their order.

        Args:
            *inputs: the network's, then the cached feature where the pattern takes one.
        """
        feeds = dict(zip(self.names, inputs, strict=False))
        seen: dict[int, Tensor] = {}

        def keep(cut: int, value: Tensor) -> Tensor:
            if cut in self.pattern.emits:
                seen[cut] = value
            return value

        cached = inputs[-1] if self.pattern.takes else None
        answer = run_unet(self.net, feeds, depth=self.pattern.depth, cached=cached, meet=keep)
        return (answer, *(seen[cut] for cut in self.pattern.emits))


def cut_shapes(network: nn.Module, feeds: Mapping[str, Tensor]) -> dict[int, tuple[int, ...]]:
    """Return the shape of what is handed up through every cut; the network is called once, so best on meta."""
    found: dict[int, tuple[int, ...]] = {}

    def look(cut: int, value: Tensor) -> Tensor:
        found[cut] = tuple(value.shape)
        return value

    with torch.no_grad():
        run_unet(network, feeds, meet=look)
    return found


def cost_shares(network: nn.Module, size: int) -> list[float]:
    """Return what a call costs at each depth, as a fraction of the whole: from 1 at depth 0 down to 0 at the last.

    Counts the operations of convolutions and products on the meta device.

    Args:
        network: a U-Net; unchanged.
        size: side of the latent.
    """
    levels = levels_of(network)
    tensors = [*network.parameters(), *network.buffers()]
    empty = {id(tensor): tensor.detach().to("meta").requires_grad_(False) for tensor in tensors}
    for parameter in network.parameters():
        empty[id(parameter)] = nn.Parameter(empty[id(parameter)], requires_grad=False)
    blank = copy.deepcopy(network, empty)  # not a second copy of the weights
    feeds = example_inputs(blank, size=size)
    shapes = cut_shapes(blank, feeds)
    counts = []
    for depth in range(levels):
        cached = torch.empty(shapes[depth], device="meta") if depth else None
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            run_unet(blank, feeds, depth=depth, cached=cached)
        counts.append(counter.get_total_flops())
    return [count / counts[0] for count in counts] + [0.0]


def _conditions(net: Any, sample: Tensor, timestep: Tensor, feeds: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the embedding of time and added conditions, and the text's states."""
    added = {name: feeds[name] for name in ("text_embeds", "time_ids") if name in feeds} or None
    states = feeds["encoder_hidden_states"]
    emb = net.time_embedding(net.get_time_embed(sample=sample, timestep=timestep), feeds.get("timestep_cond"))
    extra = net.get_aug_embed(emb=emb, encoder_hidden_states=states, added_cond_kwargs=added)
    emb = emb + extra if extra is not None else emb
    if net.time_embed_act is not None:
        emb = net.time_embed_act(emb)
    return emb, net.process_encoder_hidden_states(encoder_hidden_states=states, added_cond_kwargs=added)


def _embedding(net: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    rows = timestep.reshape(-1) * torch.ones(sample.shape[0], dtype=timestep.dtype, device=timestep.device)
    return cast("Tensor", net.time_embedding(net.time_proj(rows).to(dtype=net.dtype)))


def _text(block: Any, states: Tensor | None) -> dict[str, Tensor]:
    takes = states is not None and getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": cast("Tensor", states)} if takes else {}


def _without_downsampler(block: nn.Module) -> Callable[..., Any]:
    """Return the forward of a down block that ends before its downsampler, whose answer only inner levels read."""
    view = copy.copy(block)
    view.__dict__["_modules"] = {**block._modules, "downsamplers": None}
    return view.forward


def _head(net: Any, hidden: Tensor, timestep: Tensor) -> Tensor:
    if net.conv_norm_out:
        hidden = net.conv_act(net.conv_norm_out(hidden))
    answer = net.conv_out(hidden)
    if net.config.get("time_embedding_type") == "fourier" and type(net).__name__ == "UNet2DModel":
        answer = answer / timestep.reshape(-1, *([1] * (answer.dim() - 1)))
    return cast("Tensor", answer)


def outputs_of(pattern: Pattern) -> tuple[str, ...]:
    """Return the names of what a `Cut` answers, after the answer itself."""
    return tuple(cache_output(cut) for cut in pattern.emits)


def torch_chain(network: nn.Module, schedule: Schedule) -> Chain:
    """Return a network that answers as its schedule says, without gradients; arrays go in and come out.

    Args:
        network: a U-Net in evaluation mode, on the CPU.
        schedule: of its steps.
    """
    names = inputs_of(type(network).__name__, cast("Any", network).config)
    return Chain(schedule, [_Asked(Cut(network, pattern, names)) for pattern in schedule.patterns])


class _Asked:
    """A cut that is asked with arrays."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self._names = (*cut.names, *(cache_input(number) for number in cut.pattern.takes))

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.inference_mode():
            found = self.cut(*(torch.from_numpy(np.asarray(feeds[name])) for name in self._names))
        return {name: value.numpy() for name, value in zip((ANSWER, *outputs_of(self.cut.pattern)), found, strict=True)}

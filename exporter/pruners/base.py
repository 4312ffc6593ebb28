"""What every pruning method gets and gives: the protocol, its context, and the units it may remove."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from exporter.errors import RecipeError
from exporter.progress import Progress

PARTS = ("channels", "heads", "neurons", "streams")
"""Kinds of width: inner convolution channels, attention heads, feed-forward neurons, residual streams."""


Cuttable = Literal["denoiser", "vae_decoder", "text_encoder", "text_encoder_2", "text_encoder_3"]
"""What a method may be told to cut; which of them a source has, its family says."""


@dataclass(frozen=True)
class Context:
    """What the run lends to a method.

    Attributes:
        generator: CPU generator, the only source of randomness of a method.
        progress: where long work reports to.
        workdir: an own folder for checkpoints, kept between attempts.
        samples: recorded denoiser inputs, each a dict of keyword arguments for the network.
        evaluate: fidelity of an edited network; larger is better. None where the run offers none.
        latency_ms: median latency of an edited network on the recipe's target, in ms. None likewise.
    """

    generator: torch.Generator
    progress: Progress
    workdir: Path
    samples: Callable[[], Iterator[dict[str, Tensor]]]
    evaluate: Callable[[nn.Module], float] | None = None
    latency_ms: Callable[[nn.Module], float] | None = None


class Pruner(Protocol):
    """A pruning method.

    Attributes:
        options: frozen dataclass; its fields are the recipe's keys of the stage, `method` left out.
    """

    options: ClassVar[type[Any]]

    def __init__(self, options: Any) -> None:
        """Keep the options, an instance of `options`."""

    def prune(self, network: nn.Module, context: Context) -> None:
        """Edit the network in place; save nothing, record nothing."""


@dataclass(frozen=True)
class CutOptions:
    """Recipe keys of a method that scores units once and removes the lowest.

    Attributes:
        keep_ratio: fraction kept, in (0, 1]: of each layer's width (``channels``) or of the units (``blocks``).
        round_to: widths become multiples of it, at least 1; ignored by ``blocks``.
        cut: remove ``channels`` of layers, or whole ``blocks``.
        component: ``denoiser``, ``vae_decoder`` or a text encoder, by its name.
        protect: module path patterns (``mid_block``, ``down_blocks.*.attentions.*``) that are never touched, all below
            a match included.
        parts: which widths ``channels`` cuts. ``streams``, the residual streams that run through many blocks, cost
            most fidelity and are left alone unless named.
    """

    keep_ratio: float = field(metadata={"exclusiveMinimum": 0, "maximum": 1})
    round_to: int = field(default=8, metadata={"minimum": 1})
    cut: Literal["channels", "blocks"] = "channels"
    component: Cuttable = "denoiser"
    protect: tuple[str, ...] = ()
    parts: tuple[str, ...] = field(
        default=("channels", "heads", "neurons"), metadata={"items": {"enum": list(PARTS)}, "minItems": 1}
    )

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        if not 0 < self.keep_ratio <= 1:
            got = f"prune.keep_ratio: got {self.keep_ratio:g}, expected a number in (0, 1]."
            raise RecipeError(f"{got} Write 0.7 to keep 70 %.")
        if self.round_to < 1:
            raise RecipeError(f"prune.round_to: got {self.round_to}, expected a whole number of at least 1. Write 8.")
        for key, value, allowed in (
            ("cut", self.cut, ("channels", "blocks")),
            ("component", self.component, get_args(Cuttable)),
        ):
            if value not in allowed:
                raise RecipeError(f"prune.{key}: got {value!r}, expected one of {', '.join(allowed)}. Choose one.")
        if not self.parts or set(self.parts) - set(PARTS):
            got = f"prune.parts: got {list(self.parts)}, expected some of {', '.join(PARTS)}."
            raise RecipeError(f"{got} Write [heads, neurons] to leave convolutions alone.")


@dataclass(frozen=True)
class Share:
    """The entries of one parameter that belong to each unit of a layer.

    Attributes:
        path: the parameter's name in the network.
        parameter: the parameter itself, as it is before the cut.
        dim: the dimension that the units index.
        index: (units, entries) int64; entries along `dim` that go when the unit goes.
    """

    path: str
    parameter: nn.Parameter
    dim: int
    index: Tensor

    def rows(self, values: Tensor | None = None) -> Tensor:
        """Return (units, n) of all numbers that belong to each unit.

        Args:
            values: a tensor of the parameter's shape to take instead, such as its gradient.
        """
        source = self.parameter.detach() if values is None else values
        picked = source.movedim(self.dim, 0)[self.index.to(source.device).flatten()]
        return picked.reshape(self.index.shape[0], -1)


@dataclass(frozen=True)
class Layer:
    """One width that can be cut: units that are removed alike from every parameter they live in.

    Attributes:
        path: module path of the layer that owns the width.
        part: one of `PARTS`.
        units: how many removable units there are: channels, heads or neurons.
        unit_width: channels of one unit; the head width for heads, else 1.
        norm_groups: units stay evenly spread over this many consecutive groups, as a GroupNorm demands; else 1.
        shares: everything that goes with a unit.
    """

    path: str
    part: str
    units: int
    unit_width: int
    norm_groups: int
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class Block:
    """One residual branch, or one layer of a stack, that can be removed whole.

    Attributes:
        path: module path.
        module: the block.
        branch: its weights of two and more dimensions by name; what remains after removal (shortcut) is left out.
    """

    path: str
    module: nn.Module
    branch: tuple[tuple[str, nn.Parameter], ...]


class Importance(Protocol):
    """Scores what could be removed; larger is costlier to remove."""

    def of_units(self, layer: Layer) -> Tensor:
        """Return (layer.units,) float scores, compared within the layer."""

    def of_block(self, block: Block) -> float:
        """Return a score, compared among all blocks of the network."""

"""What every pruning method gets and gives: the protocol, its context, and the units it may remove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args, get_type_hints

import torch
from torch import Tensor, nn

from exporter.errors import RecipeError
from exporter.progress import Progress

if TYPE_CHECKING:  # seconds to import
    from calibration.calling import Drawing, Form
    from calibration.recording import Recording
    from exporter.networks.schedule import Schedule
    from exporter.tuning.data import LatentData

PARTS = ("channels", "heads", "neurons", "streams")
"""Kinds of width: inner convolution channels, attention heads, feed-forward neurons, residual streams."""


Cuttable = Literal["denoiser", "vae_decoder", "text_encoder", "text_encoder_2", "text_encoder_3"]
"""What a method may be told to cut; which of them a source has, its family says."""


class Stopwatch(Protocol):
    """Latencies on the recipe's target, at the recipe's batch and size; each is lowered, compiled and timed there."""

    @property
    def digest(self) -> str:
        """Digest of all that its latencies depend on besides the network."""

    def whole_ms(self, network: nn.Module) -> float:
        """Return the median latency of one call of a whole denoiser, with the rows that guidance needs, in ms."""

    def units_ms(self, network: nn.Module, paths: Sequence[str]) -> dict[str, float]:
        """Return the median latency of modules of a network, each exported and timed by itself, by path, in ms."""

    def control(self) -> Mapping[str, tuple[float, float, float]]:
        """Return, by kind of what was timed, the ratio of one engine to itself and its interval: noise alone."""


@dataclass(frozen=True)
class Context:
    """What the run lends to a method. All of it belongs to the dense pipeline but for the network itself.

    Attributes:
        generator: CPU generator, the only source of randomness of a method.
        progress: where long work reports to.
        workdir: an own folder for checkpoints, kept between attempts and keyed by the stage.
        loan: what methods that look at data, at the sampler or at the target need; see `borrowed`.
    """

    generator: torch.Generator
    progress: Progress
    workdir: Path
    loan: Loan | None = None

    @property
    def borrowed(self) -> Loan:
        """What was lent.

        Raises:
            RecipeError: nothing was.
        """
        if self.loan is None:
            raise RecipeError("prune.method: it needs data, and none is lent here; expected a run. Prune in a recipe.")
        return self.loan


class Loan(Protocol):
    """The dense pipeline and the target, for methods that need more than the weights."""

    @property
    def batch(self) -> int:
        """Images at a time."""

    @property
    def stopwatch(self) -> Stopwatch | str:
        """Latencies on the recipe's first usable target; where there is none, a sentence that says why."""

    @property
    def form(self) -> Form:
        """How the pipeline is called."""

    @property
    def drawing(self) -> Drawing:
        """Steps, guidance and size of the recipe's sampling."""

    def pipeline(self) -> Any:
        """Return a dense pipeline of one's own, float32, on the CPU, with the scheduler of the recipe's sampling."""

    def texts(self, prompts: str | None) -> list[str]:
        """Return the prompts of a named set or file.

        Raises:
            RecipeError: None was given, or there is no such set.
        """

    def recording(self, prompts: str | None, images: int) -> Recording:
        """Return the dense pipeline's denoiser calls while it draws the first prompts of a set, none measured on.

        Raises:
            RecipeError: as for `texts`.
        """

    def data(self, prompts: str | None, samples: int) -> LatentData:
        """Return clean latents that the dense pipeline draws for the prompts of a set, and its noise schedule.

        Raises:
            RecipeError: as for `texts`, or a scheduler without a schedule of noise.
        """


@dataclass(frozen=True)
class Outcome:
    """What a method tells of its work besides the edited network.

    Attributes:
        facts: JSON values for manifest and report: scores, correlations, predicted against measured. No paths, and no
            times, so that equal runs tell the same; a method that cuts by latency, and so may cut otherwise when it is
            run again, tells the milliseconds that it went by.
        config: a stock config that is meant to build the network as it is now. Where it does, exactly, the state is
            saved with it and without a record of edits, so that its library loads it.
        schedule: of methods that leave the network whole, what each step of the sampler computes of it.
        sparsity: name of a weight -> (n, m): the zeros that the method put; see `exporter.networks.sparsity`.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    schedule: Schedule | None = None
    sparsity: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Pruner(Protocol):
    """A pruning method.

    Attributes:
        options: frozen dataclass; its fields are the recipe's keys of the stage, `method` left out.
    """

    options: ClassVar[type[Any]]

    def __init__(self, options: Any) -> None:
        """Keep the options, an instance of `options`."""

    def prune(self, network: nn.Module, context: Context) -> Outcome:
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
        ranking: ``local`` keeps the ratio of each layer's width, ``global`` of all widths together, so that layers of
            low scores give more; scores count relative to their layer's mean. Ignored by ``blocks``, which are ranked
            together.
    """

    keep_ratio: float = field(metadata={"exclusiveMinimum": 0, "maximum": 1})
    round_to: int = field(default=8, metadata={"minimum": 1})
    cut: Literal["channels", "blocks"] = "channels"
    component: Cuttable = "denoiser"
    protect: tuple[str, ...] = ()
    parts: tuple[str, ...] = field(
        default=("channels", "heads", "neurons"), metadata={"items": {"enum": list(PARTS)}, "minItems": 1}
    )
    ranking: Literal["local", "global"] = "local"

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
            ("cut", self.cut, get_args(get_type_hints(type(self))["cut"])),
            ("component", self.component, get_args(Cuttable)),
            ("ranking", self.ranking, ("local", "global")),
        ):
            if value not in allowed:
                raise RecipeError(f"prune.{key}: got {value!r}, expected one of {', '.join(allowed)}. Choose one.")
        if not self.parts or set(self.parts) - set(PARTS):
            got = f"prune.parts: got {list(self.parts)}, expected some of {', '.join(PARTS)}."
            raise RecipeError(f"{got} Write [heads, neurons] to leave convolutions alone.")


@dataclass(frozen=True)
class DataOptions:
    """Recipe keys of a method that looks at data.

    Attributes:
        prompts: a set or file of prompts, none of those that the run measures on. The embedded model has its own.
        images: how many of them are drawn.
    """

    prompts: str | None = None
    images: int = field(default=16, metadata={"minimum": 1})

    @property
    def least_prompts(self) -> int:
        """How many prompts there have to be."""
        return self.images

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        if self.images < 1:
            raise RecipeError(f"prune.images: got {self.images}, expected a whole number of at least 1. Write 16.")


MS = "ms of one call"


def budget_facts(of: str, *, dense: float, asked: float, left: float) -> dict[str, Any]:
    """Return whether a network keeps to what was asked for, as JSON values.

    Args:
        of: what is counted: `MS` or ``parameters``.
        dense: of the network before the stage.
        asked: what may be left.
        left: what is left.
    """
    values = {"before": dense, "asked": asked, "left": left}
    plain = {name: value if value == int(value) else float(f"{value:.6g}") for name, value in values.items()}
    share = round(left / dense, 4) if dense else None
    return {"of": of, **plain, "left_over_before": share, "met": left <= asked * (1 + 1e-9)}


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

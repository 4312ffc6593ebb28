"""The closed set of modules that may take the place of a removed one: bypass, zero, shortcut, gather.

Each answers with the call signature and the return convention of what it replaces and can be exported by torch.export.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.errors import SurgeryError

Kind = Literal["bypass", "zero", "shortcut", "gather", "absent"]
"""`absent` is the one that is no module: the attribute becomes None, for callers that test for it."""

KINDS: tuple[str, ...] = get_args(Kind)

Convention = Literal["tensor", "sample", "pair"]
"""What the caller unpacks: a tensor; a tuple or an object with `sample`; a tensor and attention weights."""

_CONVENTIONS: dict[str, Convention] = {"Transformer2DModel": "sample", "CLIPAttention": "pair"}


def convention_of(module: nn.Module) -> Convention:
    """Return what callers of this module unpack from its answer."""
    if isinstance(module, Bypass | Zero):
        return module.convention
    return _CONVENTIONS.get(type(module).__name__, "tensor")


def _answer(value: Tensor, convention: Convention, return_dict: bool) -> Any:
    if convention == "pair":
        return value, None
    if convention == "tensor":
        return value
    if not return_dict:
        return (value,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=value)


class Bypass(nn.Module):
    """Returns its first input unchanged; takes the place of anything that keeps the shape.

    Args:
        convention: what callers unpack.
    """

    def __init__(self, convention: Convention = "tensor") -> None:
        super().__init__()
        self.convention: Convention = convention

    def forward(self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Return `hidden_states`, any shape and dtype, in the convention of the replaced module."""
        return _answer(hidden_states, self.convention, return_dict)


class Zero(nn.Module):
    """Returns zeros; takes the place of a branch that is added to a residual stream.

    Args:
        convention: what callers unpack.
        out_features: width of the answer's last axis; 0 keeps the input's shape.
    """

    def __init__(self, convention: Convention = "tensor", out_features: int = 0) -> None:
        super().__init__()
        self.convention: Convention = convention
        self.out_features = out_features

    def forward(self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Return zeros of the input's dtype and device: its shape, or (..., out_features) where that is set."""
        if self.out_features:
            zeros = hidden_states.new_zeros((*hidden_states.shape[:-1], self.out_features))
        else:
            zeros = torch.zeros_like(hidden_states)
        return _answer(zeros, self.convention, return_dict)


class Shortcut(nn.Module):
    """What is left of a residual block without its branch: the 1x1 convolution beside it, or nothing but the scale.

    Args:
        conv_shortcut: the block's own shortcut convolution; None where the block had equal widths.
        output_scale_factor: what the block divides its output by.
    """

    def __init__(self, conv_shortcut: nn.Module | None, output_scale_factor: float = 1.0) -> None:
        super().__init__()
        self.conv_shortcut = conv_shortcut
        self.output_scale_factor = output_scale_factor

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Return the shortcut of `input_tensor`, (batch, channels, height, width)."""
        value = input_tensor if self.conv_shortcut is None else cast("Tensor", self.conv_shortcut(input_tensor))
        return value if self.output_scale_factor == 1.0 else value / self.output_scale_factor


class Gather(nn.Module):
    """A narrower linear layer whose outputs are indexed into place; every other place is zero.

    Args:
        linear: computes the kept outputs only.
        positions: place of each of its outputs in the answer, ascending.
        out_features: width of the answer.
    """

    index: Tensor

    def __init__(self, linear: nn.Linear, positions: tuple[int, ...], out_features: int) -> None:
        super().__init__()
        check_positions(positions, out_features)
        self.linear = linear
        self.positions = tuple(positions)
        self.in_features = linear.in_features
        self.out_features = out_features
        # One entry per output: which column to take; the column after the last is the zero that `forward` appends.
        index = torch.full((out_features,), len(positions), dtype=torch.int64, device="cpu")
        index[torch.tensor(positions, dtype=torch.int64, device="cpu")] = torch.arange(len(positions), device="cpu")
        device = linear.weight.device
        self.register_buffer("index", index if device.type == "meta" else index.to(device), persistent=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (..., out_features) from (..., in_features)."""
        narrow = F.pad(self.linear(hidden_states), (0, 1))
        return narrow.index_select(-1, self.index)


STAND_INS = (Bypass, Zero, Shortcut, Gather)

CLASS_OF_KIND: dict[str, type[nn.Module]] = {"bypass": Bypass, "zero": Zero, "shortcut": Shortcut, "gather": Gather}


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a stand-in, None for any other module."""
    for kind, cls in CLASS_OF_KIND.items():
        if type(module) is cls:
            return cast("Kind", kind)
    return None


def check_positions(positions: tuple[int, ...], width: int) -> None:
    """Raise SurgeryError unless `positions` are ascending places in `range(width)`, at least one."""
    ascending = all(a < b for a, b in pairwise(positions))
    if not positions or not ascending or positions[0] < 0 or positions[-1] >= width:
        raise SurgeryError(
            f"gather: positions must be ascending, without repeats and inside the width; got {len(positions)} "
            f"from {min(positions, default=None)} to {max(positions, default=None)}, expected some of 0..{width - 1}."
        )


def stand_in(
    kind: str,
    replaced: nn.Module,
    *,
    positions: tuple[int, ...] = (),
    linear: nn.Linear | None = None,
    width: int | None = None,
) -> nn.Module | None:
    """Return what takes the place of `replaced`; the caller sets it on the parent.

    Args:
        kind: one of `KINDS`.
        replaced: the module that goes; `shortcut` takes its `conv_shortcut` over.
        positions: for `gather`, the outputs that stay.
        linear: for `gather`, the narrower layer; by default the rows `positions` of `replaced`, copied.
        width: for `gather` and `zero`, size of the answer's last axis; by default that of `replaced`.

    Returns:
        The module, or None for ``absent``.

    Raises:
        SurgeryError: the kind is unknown or cannot replace a module of this class.
    """
    name = type(replaced).__name__
    if kind == "absent":
        return None
    if kind == "bypass":
        return Bypass(convention_of(replaced)).train(replaced.training)
    if kind == "zero":
        known = _zero_width(replaced)
        return Zero(convention_of(replaced), known if width is None else width).train(replaced.training)
    if kind == "shortcut":
        return _shortcut(replaced).train(replaced.training)
    if kind == "gather":
        inner = replaced.linear if isinstance(replaced, Gather) else replaced
        if not isinstance(inner, nn.Linear):
            raise SurgeryError(f"gather: takes the place of a Linear only; got {name}.")
        size = int(cast("int", replaced.out_features)) if width is None else width
        check_positions(positions, size)
        return Gather(linear or _rows(inner, positions), positions, size).train(replaced.training)
    raise SurgeryError(f"stand_in: unknown kind; got {kind!r}, expected one of {', '.join(KINDS)}.")


def _zero_width(replaced: nn.Module) -> int:
    if isinstance(replaced, nn.Linear | Zero | Gather):
        return int(replaced.out_features)
    if isinstance(replaced, nn.modules.conv._ConvNd | nn.Embedding):
        raise SurgeryError(f"zero: cannot know the output shape of {type(replaced).__name__}; use another stand-in.")
    return 0


def _shortcut(replaced: nn.Module) -> Shortcut:
    if isinstance(replaced, Shortcut):
        return Shortcut(replaced.conv_shortcut, replaced.output_scale_factor)
    if type(replaced).__name__ != "ResnetBlock2D" or getattr(replaced, "up", False) or getattr(replaced, "down", False):
        raise SurgeryError(
            f"shortcut: takes the place of a ResnetBlock2D that does not resample; got {type(replaced).__name__}."
        )
    conv = replaced.conv_shortcut
    return Shortcut(cast("nn.Module | None", conv), float(cast("float", replaced.output_scale_factor)))


def _rows(layer: nn.Linear, positions: tuple[int, ...]) -> nn.Linear:
    """Copy the rows of a linear layer; on the meta device the copy is on it too."""
    weight, bias = layer.weight.detach(), layer.bias
    narrow = nn.Linear(
        layer.in_features, len(positions), bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    if len(positions) > layer.out_features or weight.device.type == "meta":
        return narrow
    index = torch.tensor(positions, dtype=torch.int64, device=weight.device)
    with torch.no_grad():
        narrow.weight.copy_(weight.index_select(0, index))
        if bias is not None:
            narrow.bias.copy_(bias.detach().index_select(0, index))
    return narrow

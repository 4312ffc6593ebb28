"""Random numbers for the parameters of a network that exists on the meta device only, one tensor at a time.

Scales are those of torch's own initialisation, so that answers stay finite in half precision. Every tensor has a seed
of its own, made from its name: which other tensors there are, and in which file, changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

CHUNK = 4_194_304
"""Numbers that are drawn at a time: memory stays at a few times this many bytes, however large the tensor."""

_EMBEDDING_STD = 0.02
_DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

Kind = Literal["uniform", "normal", "constant", "given"]


@dataclass(frozen=True)
class Fill:
    """What one tensor is filled with.

    Attributes:
        name: in the state dict.
        shape: of the tensor.
        kind: ``uniform`` in (-scale, scale), ``normal`` with that deviation, ``constant``, or the values ``given``.
        scale: see `kind`.
        given: float or integer values of a buffer that the network's class computes itself.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    scale: float = 0.0
    given: Tensor | None = None

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return int(torch.Size(self.shape).numel())


def fills_of(module: nn.Module) -> list[Fill]:
    """Return how each entry of a network's state dict is filled, tied ones once.

    Args:
        module: parameters on the meta device, buffers real.
    """
    tied = set(getattr(module, "_tied_weights_keys", None) or {})
    owners = {
        f"{path}.{name}" if path else name: (owner, name)
        for path, owner in module.named_modules()
        for name in owner._parameters
    }
    found = []
    for name, tensor in module.state_dict().items():
        if name in tied:
            continue
        if name in owners:
            kind, scale = _rule(*owners[name], tensor)
            found.append(Fill(name, tuple(tensor.shape), kind, scale))
        else:
            found.append(Fill(name, tuple(tensor.shape), "given", given=tensor))
    return found


def _rule(owner: nn.Module, name: str, tensor: Tensor) -> tuple[Kind, float]:
    if isinstance(owner, _DENSE):
        weight: Any = owner.weight
        return "uniform", float(weight[0].numel()) ** -0.5
    if isinstance(owner, nn.Embedding):
        return "normal", _EMBEDDING_STD
    if tensor.ndim < 2:  # scales of norms, and thresholds of the safety checker
        return "constant", 0.0 if name == "bias" else 1.0
    return "normal", float(tensor.shape[-1]) ** -0.5


def numbers(fill: Fill, seed: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the numbers of a tensor in order, flat, in chunks.

    Args:
        fill: what to fill it with.
        seed: of the network; the tensor's name is added to it.
        dtype: of the result; integers keep their own type.
    """
    if fill.given is not None:
        values = fill.given.detach().reshape(-1)
        yield values.to(dtype) if values.is_floating_point() else values
        return
    generator = torch.Generator().manual_seed(_seed(f"{seed}/{fill.name}"))
    draw = _DRAWS[fill.kind]
    for start in range(0, fill.count, CHUNK):
        part = torch.empty(min(CHUNK, fill.count - start), dtype=torch.float32)
        yield draw(part, fill.scale, generator).to(dtype)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _uniform(part: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return part.uniform_(-scale, scale, generator=generator)


def _normal(part: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return part.normal_(0.0, scale, generator=generator)


def _constant(part: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    del generator
    return part.fill_(scale)


_DRAWS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "uniform": _uniform,
    "normal": _normal,
    "constant": _constant,
}

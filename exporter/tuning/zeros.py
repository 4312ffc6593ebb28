"""Zeros of a student while it is trained: kept as they are, or moved to where they cost least and then kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from exporter.networks.sparsity import Claims, pattern_mask


class Zeros(Protocol):
    """What the training loop tells, in this order, once per optimizer step."""

    def enter(self, step: int) -> None:
        """Before the forward passes of step `step`, counted from 0: put the zeros."""

    def release(self) -> None:
        """Give back what `enter` took away; before the optimizer's step."""

    def gradients(self) -> None:
        """After the last backward pass, before clipping: make the gradients those of what is trained; releases too."""

    def leave(self, average: Mapping[str, Tensor]) -> None:
        """After the optimizer's step and the averaging: put zeros where they are final, in the average too."""


class Dense:
    """No zeros are looked after."""

    def enter(self, step: int) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Do nothing."""

    def gradients(self) -> None:
        """Do nothing."""

    def leave(self, average: Mapping[str, Tensor]) -> None:
        """Do nothing."""


class Frozen(Dense):
    """Zeros stay where they are: their gradients are zero, so no moment or decay moves them.

    Args:
        network: that is trained.
        names: of its weights that keep their zeros.
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        self._kept = {name: _Kept(network.get_parameter(name)) for name in names}

    def gradients(self) -> None:
        """Take the gradients of zeros away."""
        for kept in self._kept.values():
            kept.clear_gradient()

    def leave(self, average: Mapping[str, Tensor]) -> None:
        """Put the zeros again, whatever the optimizer did."""
        for name, kept in self._kept.items():
            kept.clear(average[name])


class Transfer:
    """SR-STE: a mask found anew at every step, the straight-through gradient, and decay of what is masked.

    The forward pass sees ``w * mask``. With g its gradient, w is trained with ``g + decay * (1 - mask) * w``. From step
    `freeze_at` on the mask of that moment is baked in and kept.

    Source: SR-STE (arXiv 2102.04010) as SparseDM's code uses it (arXiv 2404.10445).

    Args:
        network: that is trained, dense.
        claims: name of a weight -> the pattern that it shall have.
        decay: of masked weights, the lambda of SR-STE.
        freeze_at: first step with a fixed mask.
        saliency: name of a weight -> what its size is multiplied with to score it, of a shape that broadcasts.
    """

    def __init__(
        self, network: nn.Module, claims: Claims, *, decay: float, freeze_at: int, saliency: Mapping[str, Tensor]
    ) -> None:
        self._network, self._claims, self._decay, self._freeze_at = network, claims, decay, freeze_at
        self._saliency = saliency
        self._held: dict[str, tuple[Tensor, Tensor]] = {}
        self._frozen: Frozen | None = None

    @torch.no_grad()
    def enter(self, step: int) -> None:
        """Mask every weight by its size now; from `freeze_at` on for good."""
        if self._frozen is not None:
            return
        for name in self._claims:
            weight = self._network.get_parameter(name)
            mask = self._mask(name, weight)
            self._held[name] = (weight.detach().clone(), mask)
            weight.mul_(mask)
        if step >= self._freeze_at:
            self._held = {}
            self._frozen = Frozen(self._network, self._claims)

    @torch.no_grad()
    def release(self) -> None:
        """Give the dense weights back where the mask is not final."""
        for name, (dense, _) in self._held.items():
            self._network.get_parameter(name).copy_(dense)
        self._held = {}

    @torch.no_grad()
    def gradients(self) -> None:
        """Add the decay of masked weights; with a fixed mask, take their gradients away."""
        if self._frozen is not None:
            self._frozen.gradients()
        for name, (dense, mask) in self._held.items():
            weight = self._network.get_parameter(name)
            if weight.grad is not None:
                weight.grad.add_(dense * ~mask, alpha=self._decay)
        self.release()

    def leave(self, average: Mapping[str, Tensor]) -> None:
        """Put the zeros of a fixed mask again."""
        if self._frozen is not None:
            self._frozen.leave(average)

    def _mask(self, name: str, weight: Tensor) -> Tensor:
        scores = weight.detach().abs()
        if name in self._saliency:
            scores = scores * self._saliency[name].to(weight.device)
        return pattern_mask(scores, self._claims[name])


class _Kept:
    """One weight and where it is not zero."""

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight, self._mask = weight, weight.detach() != 0

    def clear_gradient(self) -> None:
        if self._weight.grad is not None:
            self._weight.grad.mul_(self._mask)

    @torch.no_grad()
    def clear(self, average: Tensor) -> None:
        self._weight.mul_(self._mask)
        average.mul_(self._mask)

"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """The average of the weights so far, with a decay that starts low so that short runs forget their start.

    Args:
        network: its parameters are the first value.
        decay: in [0, 1); 0 keeps the last weights only.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    def decay_at(self, step: int) -> float:
        """Return the decay of the `step`-th update, counted from 0: (1 + step) / (10 + step) until it reaches `decay`.

        Source: the warm-up of TensorFlow's ExponentialMovingAverage.
        """
        return min(self._decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after step `step`."""
        share = 1.0 - self.decay_at(step)
        for name, parameter in network.named_parameters():
            self.weights[name].lerp_(parameter.detach(), share)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from saved averages."""
        for name, value in weights.items():
            self.weights[name].copy_(value)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Write the averages into a network of the same shapes."""
        for name, parameter in network.named_parameters():
            parameter.copy_(self.weights[name])

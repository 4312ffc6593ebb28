"""Frequencies of timesteps as constants: a converter that computes them anew is one bit off, and a sine shows that.

A timestep of 999 times a frequency is an angle whose last bit is worth 6e-5.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

_PERIOD = 10000


class PinnedTimesteps(nn.Module):
    """What `Timesteps` of diffusers answers, bit for bit, from frequencies that were computed once.

    Args:
        given: whose settings and answers it has.
    """

    frequencies: Tensor

    def __init__(self, given: Timesteps) -> None:
        super().__init__()
        source = cast("Any", given)
        self.flip, self.scale, self.odd = source.flip_sin_to_cos, source.scale, source.num_channels % 2
        half = source.num_channels // 2
        exponents = -math.log(_PERIOD) * torch.arange(half, dtype=torch.float32)
        self.register_buffer("frequencies", torch.exp(exponents / (half - source.downscale_freq_shift)))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return sines and cosines.

        Args:
            timesteps: (rows,) of any type.

        Returns:
            (rows, channels) float32.
        """
        angles = self.scale * (timesteps[:, None].float() * self.frequencies[None, :])
        waves = [torch.sin(angles), torch.cos(angles)]
        found = torch.cat(waves[::-1] if self.flip else waves, dim=-1)
        return nn.functional.pad(found, (0, 1)) if self.odd else found


def pin_timesteps(network: nn.Module) -> None:
    """Replace a network's `Timesteps` by pinned ones, in place."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Timesteps):
                setattr(module, name, PinnedTimesteps(child))

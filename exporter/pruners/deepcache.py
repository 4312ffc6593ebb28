"""DeepCache: most steps compute the outer levels of a U-Net only and take the deep feature of the last whole step.

Source: Ma et al., DeepCache (arXiv 2312.00858), the uniform schedule ("1:N"). Removes work of steps, no weights: the
network stays whole, and the state gets a schedule. Needs the sampler, no data, gradients or training.

Departs: a cut lies between levels, not between the layers of a level, so a shallow step computes all layers of the
outer levels where the paper's smallest branch computes one of each; the non-uniform schedule is left out (``dip-go``
learns one). With ``branch: -1`` the steps between compute nothing, which is fewer steps of a sampler that keeps
its list of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from exporter.errors import RecipeError
from exporter.pruners.base import Context, Outcome


@dataclass(frozen=True)
class DeepCacheOptions:
    """Recipe keys of ``deepcache``.

    Attributes:
        interval: every so many steps the whole network is computed.
        branch: the innermost level, counted from the outside, that is still computed on the steps between: 0 for the
            outermost alone, -1 for none.
    """

    interval: int = field(default=3, metadata={"minimum": 1})
    branch: int = field(default=0, metadata={"minimum": -1})

    of_sampling: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        if self.interval < 1:
            raise RecipeError(f"prune.interval: got {self.interval}, expected a whole number of at least 1. Write 3.")
        if self.branch < -1:
            raise RecipeError(f"prune.branch: got {self.branch}, expected -1 or more. Write 0.")


class DeepCache:
    """Every n-th step computes the whole U-Net, the others its outer levels on a cached deep feature.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[DeepCacheOptions]] = DeepCacheOptions

    def __init__(self, options: DeepCacheOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Schedule the steps; the network is left as it is.

        Raises:
            RecipeError: a network that cannot be cut, or a branch that it does not have.
        """
        from exporter.pruners.sampler import Sampler  # diffusers takes seconds to import

        sampler = Sampler.of(network, context.borrowed)
        depth = sampler.levels - 1 - self._options.branch
        if depth < 1:
            raise RecipeError(
                f"prune.branch: got {self._options.branch}, expected -1 to {sampler.levels - 2}: the U-Net has "
                f"{sampler.levels} levels. Write 0."
            )
        every = self._options.interval
        return sampler.outcome([0 if index % every == 0 else depth for index in range(len(sampler.timesteps))])

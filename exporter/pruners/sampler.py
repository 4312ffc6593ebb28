"""What methods that schedule the steps of a sampler share: the sampler as the recipe drives it, the network's cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from calibration.calling import conditions
from exporter.networks.cuts import cost_shares
from exporter.networks.schedule import Schedule, schedule_for, timesteps_of
from exporter.pruners.base import Loan, Outcome


@dataclass(frozen=True)
class Sampler:
    """The dense pipeline's sampler and what a call of the network costs at each depth.

    Attributes:
        pipeline: dense, one's own.
        steps: as the pipeline is asked for.
        timesteps: of its calls of the denoiser.
        rows: rows that the denoiser answers per image.
        costs: of each depth as a fraction of the whole network's, from 1 to 0.
    """

    pipeline: Any
    steps: int
    timesteps: tuple[float, ...]
    rows: int
    costs: tuple[float, ...]

    @classmethod
    def of(cls, network: nn.Module, loan: Loan) -> Sampler:
        """Look at what is lent.

        Raises:
            RecipeError: a network that cannot be cut.
        """
        pipeline = loan.pipeline()
        side = loan.drawing.height // int(getattr(pipeline, "vae_scale_factor", 1))
        costs = tuple(cost_shares(network, side))
        given = conditions(pipeline, loan.form, [""], loan.drawing)
        rows = max((len(value) for name, value in given.items() if name not in loan.form.shared), default=1)
        timesteps = tuple(timesteps_of(pipeline.scheduler, loan.drawing.steps))
        return cls(pipeline, loan.drawing.steps, timesteps, rows, costs)

    @property
    def levels(self) -> int:
        """The depth at which nothing is computed."""
        return len(self.costs) - 1

    def share(self, depths: Sequence[int]) -> float:
        """Return what a trajectory costs with these depths, as a fraction of the whole one."""
        return sum(self.costs[depth] for depth in depths) / len(depths)

    def schedule(self, depths: Sequence[int]) -> Schedule:
        """Return the schedule of these depths."""
        return schedule_for(self.pipeline.scheduler, self.steps, depths, guided=self.rows > 1, levels=self.levels)

    def outcome(self, depths: Sequence[int], **facts: Any) -> Outcome:
        """Return what a method that chose these depths answers."""
        told = {"depths": list(depths), "costs": [round(cost, 6) for cost in self.costs]}
        share = round(self.share(depths), 6)
        return Outcome({**told, "computed_share": share, **facts}, schedule=self.schedule(depths))

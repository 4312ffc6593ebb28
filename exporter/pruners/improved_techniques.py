"""Blocks by their sensitivity under guidance, greedily, scored again as blocks go. Needs data, no gradients.

Source: a reconstruction of "Improved Techniques for Training Smaller and Faster Stable Diffusion" (Hesong Wang, Huan
Wang; ICLR 2025 workshop DeLTa). Of it only the abstract is public: structured removal of weight blocks by "an improved
performance sensitivity", a CFG-aware retraining loss (here ``tune: {method: distill, guided_share: ...}``), U-Net
parameters -46 %. That sensitivity means the loss after guidance, taken anew as blocks go, and divided by what a block
costs, is our reading of it.

Removes residual and attention blocks whole. Does not reproduce the authors' metric, data, order or step distillation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from exporter.artifact import digest_of
from exporter.errors import OutOfReach, RecipeError
from exporter.progress import task
from exporter.pruners.base import MS, Block, Context, DataOptions, Outcome, budget_facts
from exporter.pruners.latency_table import stopwatch_of
from exporter.pruners.notes import Notes, notes
from exporter.pruners.quality import METRICS, Loss, Metric, loss_of

_NOTES = "sensitivities.json"
Budget = Literal["parameters", "latency"]


@dataclass(frozen=True)
class ImprovedTechniquesOptions(DataOptions):
    """Recipe keys of ``prune: {method: improved-techniques}``.

    Attributes:
        prompts: a set or file of prompts, none of those that the run measures on. The embedded model has its own.
        images: how many of them are drawn.
        keep_ratio: fraction of the denoiser's parameters, or of its latency, that stays at most; in (0, 1].
        budget: what is kept to the ratio and divides the sensitivity: ``parameters``, or ``latency`` on the recipe's
            first target, where every unit is timed by itself and the whole after every removal.
        metric: what sensitivity is: ``guided`` (error of guided answers), ``latent`` (error of the final latents) or
            ``clip`` (fall of the CLIP score).
        reevaluate: removals until all sensitivities are taken anew.
        protect: module path patterns that are never touched.
    """

    keep_ratio: float = field(default=0.54, metadata={"exclusiveMinimum": 0, "maximum": 1})
    budget: Budget = "parameters"
    metric: Metric = "guided"
    reevaluate: int = field(default=2, metadata={"minimum": 1})
    protect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        super().__post_init__()
        if not 0 < self.keep_ratio <= 1:
            got = f"prune.keep_ratio: got {self.keep_ratio:g}, expected a number in (0, 1]."
            raise RecipeError(f"{got} Write 0.54 to keep 54 %.")
        if self.reevaluate < 1:
            got = f"prune.reevaluate: got {self.reevaluate}, expected a whole number of at least 1."
            raise RecipeError(f"{got} Write 2.")
        for key, value, known in (("budget", self.budget, get_args(Budget)), ("metric", self.metric, METRICS)):
            if value not in known:
                raise RecipeError(f"prune.{key}: got {value!r}, expected one of {', '.join(known)}. Choose one.")


class ImprovedTechniques:
    """Removes, again and again, the block whose absence costs least guided quality per parameter or millisecond.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[ImprovedTechniquesOptions]] = ImprovedTechniquesOptions

    def __init__(self, options: ImprovedTechniquesOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place; killed and called again on the same work folder, it goes on.

        Raises:
            RecipeError: nothing can be removed, or the ratio cannot be reached.
            ToolMissing: the metric or the target is not here.
            ComponentFailed: an answer is not finite.
        """
        from exporter.pruners.blocks import blocks_of, remove_blocks  # diffusers takes seconds to import
        from exporter.pruners.protect import check_patterns
        from exporter.tuning.checkpoint import digest_of_tensors

        options = self._options
        check_patterns(network, options.protect)
        loss = loss_of(options.metric, context, options.prompts, options.images)
        key = digest_of([digest_of_tensors(network.state_dict()), asdict(options)])
        with notes(context.workdir / _NOTES, key) as known:
            search = _Search(network, blocks_of(network, options), options, context)
            search.run(loss, known)
            remove_blocks(network, search.gone)
            return Outcome(search.facts(loss(network)))


class _Search:
    """The greedy search: what is gone, and what each removal was thought to cost."""

    def __init__(
        self, network: nn.Module, blocks: list[Block], options: ImprovedTechniquesOptions, context: Context
    ) -> None:
        if len(blocks) < 2:
            raise RecipeError(
                f"prune.method: {type(network).__name__} has {len(blocks)} removable blocks; expected at least two. "
                "Shorten protect, or cut channels."
            )
        self._network, self._options, self._progress = network, options, context.progress
        self._blocks = {block.path: block for block in blocks}
        self._stopwatch = stopwatch_of(context) if options.budget == "latency" else None
        self._costs = self._all_costs()
        self._order: list[tuple[str, float]] = []
        self._evaluations = 0
        self._dense = self._size()

    @property
    def gone(self) -> list[Block]:
        """Blocks that the search removes, in its order."""
        return [self._blocks[path] for path, _ in self._order]

    def run(self, loss: Loss, known: Notes) -> None:
        """Search until the budget is kept.

        Args:
            loss: what is lost by an edited network.
            known: sensitivities that were found before a kill.
        """
        limit, scores = self._options.keep_ratio * self._dense, dict[str, float]()
        while (size := self._size_without(self.gone)) > limit:
            left = [path for path in self._blocks if path not in dict(self._order)]
            if len(left) < 2:
                raise OutOfReach(
                    f"prune.keep_ratio: blocks alone do not reach it; got {self._options.keep_ratio:g}, expected "
                    f"{size / self._dense:.3f} or more, which one last block keeps. Raise it, or cut channels too.",
                    size / self._dense,
                )
            if len(self._order) % self._options.reevaluate == 0:
                scores = self._scored(left, loss, known)
            path = min(left, key=lambda name: (scores[name] / self._costs[name], name))
            self._order.append((path, scores[path]))

    def facts(self, lost: float) -> dict[str, Any]:
        """Return what the search found, and what the whole of it has cost."""
        of = "parameters" if self._stopwatch is None else MS
        asked = self._options.keep_ratio * self._dense
        return {
            "kept": budget_facts(of, dense=self._dense, asked=asked, left=self._size()),
            "metric": self._options.metric,
            "removed": [{"unit": path, "sensitivity": float(f"{score:.6g}")} for path, score in self._order],
            "evaluations": self._evaluations,
            "lost": float(f"{lost:.6g}"),
        }

    def _scored(self, left: list[str], loss: Loss, known: Notes) -> dict[str, float]:
        """Return what is lost when each of these goes too."""
        from exporter.pruners.blocks import without

        def lost(path: str) -> float:
            with without(self._network, [*self.gone, self._blocks[path]]):
                return loss(self._network)

        done, scores = " ".join(path for path, _ in self._order), {}
        with task(self._progress, f"Sensitivity, {len(self._order)} blocks removed", len(left)) as told:
            for path in left:
                scores[path] = float(known.once(f"{done} > {path}", partial(lost, path)))
                told.advance(note=path)
        self._evaluations += len(left)
        return scores

    def _all_costs(self) -> dict[str, float]:
        if self._stopwatch is not None:
            return {
                path: max(ms, 1e-6) for path, ms in self._stopwatch.units_ms(self._network, list(self._blocks)).items()
            }
        return {path: float(sum(p.numel() for _, p in block.branch)) for path, block in self._blocks.items()}

    def _size(self) -> float:
        if self._stopwatch is not None:
            return self._stopwatch.whole_ms(self._network)
        return float(sum(parameter.numel() for parameter in self._network.parameters()))

    def _size_without(self, blocks: list[Block]) -> float:
        from exporter.pruners.blocks import without

        with without(self._network, blocks):
            return self._size()

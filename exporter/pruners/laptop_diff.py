"""LAPTOP-Diff: layers by their output loss, the best set of them by an exact knapsack. Needs data, no gradients.

Source: "LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models" (arXiv 2404.11098),
of which the abstract and summaries were read and no code is public. A layer's score is the mean squared change of the
answer without it; scores are taken to add up, so that the layers to remove solve a 0-1 knapsack over parameters. The
normalized distillation that follows is ``tune: {method: distill, features: normalized}``.

Removes residual blocks, attention blocks, and single layers of transformers that stack several; what changes widths
keeps its shortcut convolution. Departs: that scores add up is measured and reported, on random sets of the size that is
removed and smaller; after half of the removal the rest is scored again, on what is left; weights may be milliseconds on
the recipe's target, in which case the whole network is timed and the budget corrected until it holds. Inputs are calls
recorded while the dense pipeline draws, spread over its steps, instead of noised training images. Not reproduced: the
authors' data and evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from exporter.artifact import digest_of
from exporter.errors import OutOfReach, RecipeError
from exporter.progress import task
from exporter.pruners.additivity import additivity, measured, random_sets
from exporter.pruners.answers import Exam
from exporter.pruners.base import MS, Block, Context, DataOptions, Outcome, budget_facts
from exporter.pruners.knapsack import cheapest
from exporter.pruners.latency_table import LatencyTable, Timed, stopwatch_of
from exporter.pruners.notes import Notes, notes
from exporter.tuning.checkpoint import digest_of_tensors

Budget = Literal["parameters", "latency"]
_FILE = "laptop-diff.json"
_TRIES = 8
_STEP = 1.03
"""How much more is asked of the table, at least, after the whole network was found too slow."""


@dataclass(frozen=True)
class LaptopDiffOptions(DataOptions):
    """Recipe keys of ``prune: {method: laptop-diff}``.

    Attributes:
        prompts: a set or file of prompts, none of those that the run measures on. The embedded model has its own.
        images: how many of them are drawn.
        keep_ratio: fraction of the denoiser's parameters, or of its latency, that stays at most; in (0, 1].
        budget: what is kept to the ratio: ``parameters``, or ``latency`` on the recipe's first target that runs here.
        timesteps: how many of the recorded steps are looked at, evenly spread.
        rescore: score what is left again after half of the removal.
        sets: how many random sets show whether scores add up; 0 leaves that out.
        protect: module path patterns that are never touched.
    """

    keep_ratio: float = field(default=0.5, metadata={"exclusiveMinimum": 0, "maximum": 1})
    budget: Budget = "parameters"
    timesteps: int = field(default=8, metadata={"minimum": 1})
    rescore: bool = True
    sets: int = field(default=48, metadata={"minimum": 0})
    protect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        super().__post_init__()
        if not 0 < self.keep_ratio <= 1:
            got = f"prune.keep_ratio: got {self.keep_ratio:g}, expected a number in (0, 1]."
            raise RecipeError(f"{got} Write 0.5 to keep half.")
        for key, least in (("timesteps", 1), ("sets", 0)):
            if getattr(self, key) < least:
                got = f"prune.{key}: got {getattr(self, key)}, expected a whole number of at least {least}."
                raise RecipeError(f"{got} Write {max(least, 8)}.")
        if self.budget not in get_args(Budget):
            expected = ", ".join(get_args(Budget))
            raise RecipeError(f"prune.budget: got {self.budget!r}, expected one of {expected}. Choose one.")


class LaptopDiff:
    """Removes the layers whose absence, summed, changes the answer least, for a given saving.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[LaptopDiffOptions]] = LaptopDiffOptions

    def __init__(self, options: LaptopDiffOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place; killed and called again on the same work folder, it goes on.

        Raises:
            RecipeError: nothing can be removed, or the ratio cannot be reached; the message gives the least that can.
            ComponentFailed: an answer is not finite.
        """
        from exporter.pruners.blocks import blocks_of, remove_blocks  # diffusers takes seconds to import
        from exporter.pruners.protect import check_patterns

        options = self._options
        if options.keep_ratio == 1.0:
            return Outcome()
        check_patterns(network, options.protect)
        blocks = blocks_of(network, options)
        if not blocks:
            got = f"prune.method: {type(network).__name__} has no removable layer; expected at least one."
            raise RecipeError(f"{got} Shorten protect, or cut channels.")
        loan = context.borrowed
        recording = loan.recording(options.prompts, options.images)
        exam = Exam.of(recording, loan.form, batch=loan.batch, steps=options.timesteps, guided=False)
        key = digest_of([digest_of_tensors(network.state_dict()), recording.digest, asdict(options)])
        with notes(context.workdir / _FILE, key) as kept:
            search = _Search(network, blocks, options, context, _Losses(network, blocks, exam, kept))
            removed = search.run()
            facts = search.facts(removed)
        remove_blocks(network, [block for block in blocks if block.path in removed])
        return Outcome(facts)


class _Losses:
    """Output losses of a network without some of its blocks, each found out once."""

    def __init__(self, network: nn.Module, blocks: Sequence[Block], exam: Exam, kept: Notes) -> None:
        self._network, self._exam, self._notes = network, exam, kept
        self._blocks = {block.path: block for block in blocks}

    def __call__(self, removed: Sequence[str]) -> float:
        """Return the mean squared change of the answer to the prompts."""
        return float(self._notes.once("loss " + " ".join(sorted(removed)), lambda: self._find(removed)))

    def _find(self, removed: Sequence[str]) -> float:
        from exporter.pruners.blocks import without

        with without(self._network, [self._blocks[path] for path in removed]):
            return self._exam.loss(self._network, f"prune, without {', '.join(removed)[:80]}").mean_cond


class _Search:
    """Scores, the knapsack, and what the whole network says to its answer."""

    def __init__(
        self, network: nn.Module, blocks: Sequence[Block], options: LaptopDiffOptions, context: Context, losses: _Losses
    ) -> None:
        self._network, self._options, self._context, self._losses = network, options, context, losses
        self._blocks = {block.path: block for block in blocks}
        self._paths = list(self._blocks)
        self._table: LatencyTable | None = None
        self._timed: list[Timed] = []
        if options.budget == "latency":
            self._table = LatencyTable.of(stopwatch_of(context), network, self._paths)
            self._total = self._table.whole
        else:
            self._total = float(sum(parameter.numel() for parameter in network.parameters()))
        self._need = (1 - options.keep_ratio) * self._total
        self._facts: dict[str, Any] = {}

    def run(self) -> list[str]:
        """Return the paths of the layers to remove."""
        alone = self._scores([])
        first = self._solve(alone, [], self._need)
        self._facts["scores"] = {path: _rounded(score) for path, score in alone.items()}
        if self._options.sets:
            self._facts["additivity"] = self._additivity(alone, len(first))
        half: list[str] = []
        scores = alone
        if self._options.rescore and len(first) > 1:
            half = self._solve(alone, [], self._need / 2)
            base = self._losses(half)
            scores = {path: joint - base for path, joint in self._scores(half).items()}
            self._facts["rescored"] = {path: _rounded(score) for path, score in scores.items()}
        if self._table is not None:
            return self._in_time(scores, half)
        return self._solve(scores, half, self._need)

    def facts(self, removed: Sequence[str]) -> dict[str, Any]:
        """Return what was found out, as JSON values."""
        alone = self._facts["scores"]
        budget: dict[str, Any] = {"total": self._total, "need": _rounded(self._need)}
        if self._table is not None:
            budget = self._table.facts(self._timed)
            budget["control"] = {kind: list(ratio) for kind, ratio in stopwatch_of(self._context).control().items()}
        if self._table is not None:
            left, of = self._whole_ms(removed), MS
        else:
            left, of = self._total - sum(self._weight(path) for path in removed), "parameters"
        asked = self._options.keep_ratio * self._total
        return {
            "kept": budget_facts(of, dense=self._total, asked=asked, left=left),
            **self._facts,
            "removed": list(removed),
            "loss_summed": _rounded(sum(alone[path] for path in removed)),
            "loss_joint": _rounded(self._losses(removed)),
            self._options.budget: budget,
        }

    def _scores(self, gone: Sequence[str]) -> dict[str, float]:
        """Return the loss without each layer that is left and those that are gone."""
        left = [path for path in self._paths if path not in gone]
        found = {}
        with task(self._context.progress, f"Output loss, {len(gone)} layers removed", len(left)) as told:
            for path in left:
                found[path] = self._losses([*gone, path])
                told.advance(note=path)
        return found

    def _weight(self, path: str) -> float:
        if self._table is not None:
            return self._table.saving(path)
        return float(sum(p.numel() for name, p in self._blocks[path].module.named_parameters() if not _stays(name)))

    def _solve(self, scores: dict[str, float], gone: Sequence[str], need: float) -> list[str]:
        """Return what is gone and the cheapest layers besides that save enough."""
        left = [path for path in self._paths if path not in gone]
        need -= sum(self._weight(path) for path in gone)
        found = cheapest([scores[path] for path in left], [self._weight(path) for path in left], need)
        if found is not None:
            return [*gone, *(left[index] for index in found)]
        if self._table is not None:
            return list(self._paths)  # only the whole network can tell whether it is enough
        least = 1 - sum(self._weight(path) for path in self._paths) / self._total
        raise self._unreachable(least)

    def _unreachable(self, least: float) -> RecipeError:
        got = f"prune.keep_ratio: layers alone do not reach it; got {self._options.keep_ratio:g} of the "
        wanted = f"{self._options.budget}, expected {least + 0.0005:.3f} or more."
        return OutOfReach(f"{got}{wanted} Raise it, shorten protect, or cut channels too.", least)

    def _in_time(self, scores: dict[str, float], half: list[str]) -> list[str]:
        """Time whole networks and ask more, or less, of the table until the best that holds the budget is found."""
        target, ask = self._options.keep_ratio * self._total, self._need
        best: list[str] = []
        tried: set[frozenset[str]] = set()
        for _ in range(_TRIES):
            removed = self._solve(scores, half, ask)
            if frozenset(removed) in tried:
                break
            tried.add(frozenset(removed))
            ms = self._whole_ms(removed)
            told = self._table
            assert told is not None
            predicted = told.whole - told.predict(removed)
            if ms <= target and (not best or self._losses(removed) < self._losses(best)):
                best = removed
            # What a millisecond of the table is worth in the whole network, here.
            exchange = predicted / max(told.whole - ms, 1e-3 * told.whole)
            ask = self._need * exchange if ms <= target else max(self._need * exchange, predicted * _STEP)
            if len(removed) == len(self._paths) and not best:
                break
        if best:
            return best
        if (ms := self._whole_ms(self._paths)) > target:
            raise self._unreachable(ms / self._total)
        return list(self._paths)

    def _whole_ms(self, removed: Sequence[str]) -> float:
        from exporter.pruners.blocks import without

        with without(self._network, [self._blocks[path] for path in removed]):
            ms = stopwatch_of(self._context).whole_ms(self._network)
        if removed and not any(timed.removed == frozenset(removed) for timed in self._timed):
            self._timed.append(Timed(frozenset(removed), ms))
            if self._table is not None:
                self._table = self._table.fitted(self._timed)
        return ms

    def _additivity(self, alone: dict[str, float], size: int) -> dict[str, Any]:
        sizes = sorted({min(len(self._paths), number) for number in (2, max(2, size // 2), max(2, size))})
        sets = random_sets(self._paths, sizes, self._options.sets, self._context.generator)
        with task(self._context.progress, "Additivity of losses", len(sets)) as told:

            def joint(removed: tuple[str, ...]) -> float:
                found = self._losses(removed)
                told.advance()
                return found

            return additivity(measured(sets, alone, joint))


def _stays(name: str) -> bool:
    return name.startswith("conv_shortcut")


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")

"""SnapFusion: robust training, then evolution of a U-Net's blocks towards a latency measured on the target.

Source: "SnapFusion: Text-to-Image Diffusion Model on Mobile Devices within Two Seconds" (arXiv 2306.00980), sections
3.1 and 3.2; no code is public. First every block learns to be dispensable: in each training step every residual and
attention block is left out with some probability, each for itself. Then the block of the lowest value, quality lost
over milliseconds saved, goes, again and again, until the network keeps to the latency; copies of blocks of the highest
value come where there is room. Milliseconds come from a table of blocks, each exported and timed alone on the recipe's
target, and every network that is chosen is timed whole.

Removes and copies blocks, and changes weights. Needs data, gradients and training. Departs: the teacher of robust
training is the dense network, not the data; quality is, by default, the error of guided answers to recorded calls, not
CLIP on images of COCO, whose noise hides small blocks; training does not go on between removals, and since a fresh copy
is not trained, one that loses quality is taken back unless ``insert: always``; what a removed block's place is worth is
offered too when there is room (it may come back). Copies are layers inside of attention blocks: see ``copies``. The
paper gives no probability; 0.1 is ours. Not reproduced: the image decoder, for which there are methods that cut
channels, and step distillation.

``preset: published`` is the U-Net that the authors found for Stable Diffusion 1.5, without any search or training. They
count cross-attention (CA) and residual (Res) blocks by resolution, so that "Mid" holds all at the lowest one:

- Down-1 (64 x 64), CA 2 to 0: ``down_blocks.0.attentions`` are bypassed.
- Down-3 (16 x 16), Res 2 to 1: ``down_blocks.2.resnets.1`` is bypassed.
- Mid (8 x 8), Res 7 to 4, counted over ``down_blocks.3`` (2), ``mid_block`` (2) and ``up_blocks.0`` (3): the paper does
  not say which; here the second of each goes.
- Up-1 (16 x 16), CA 3 to 6, Res 3 to 2: ``up_blocks.1.resnets.1`` is left its shortcut; since diffusers pairs every
  attention with a resnet, the three new attentions are second layers in ``transformer_blocks`` of the three there are:
  without norms and projections of their own.
- Up-3 (64 x 64), CA 3 to 0: ``up_blocks.3.attentions`` are bypassed.

With this mapping 756 million parameters remain of 860; the paper says 848, which no choice of the three in "Mid" gives,
so their blocks are not quite diffusers'.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from exporter.artifact import digest_of
from exporter.errors import OutOfReach, RecipeError
from exporter.pruners.base import MS, Context, DataOptions, Outcome, budget_facts
from exporter.pruners.evolution import Evolution, Genome, Habits, Insert, Means
from exporter.pruners.latency_table import stopwatch_of
from exporter.pruners.notes import notes
from exporter.pruners.quality import METRICS, Metric, loss_of
from exporter.tuning.checkpoint import digest_of_tensors
from exporter.tuning.options import DistillOptions

Preset = Literal["search", "published"]
_FILE = "snapfusion.json"
_RELATIVE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*\*\s*dense\s*\Z")
_EXAMPLE = "Write latency: 0.5 * dense, or milliseconds such as latency: 150."

PUBLISHED_REMOVED = (
    "down_blocks.0.attentions.0",
    "down_blocks.0.attentions.1",
    "down_blocks.2.resnets.1",
    "down_blocks.3.resnets.1",
    "mid_block.resnets.1",
    "up_blocks.0.resnets.1",
    "up_blocks.1.resnets.1",
    "up_blocks.3.attentions.0",
    "up_blocks.3.attentions.1",
    "up_blocks.3.attentions.2",
)
PUBLISHED_COPIED = ("up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "up_blocks.1.attentions.2")


@dataclass(frozen=True)
class SnapFusionOptions(DataOptions):
    """Recipe keys of ``prune: {method: snapfusion}``.

    Attributes:
        prompts: a set or file of prompts, none of those that the run measures on. The embedded model has its own.
        images: how many of them quality is looked at with.
        latency: what the denoiser may take on the recipe's first target that runs here: milliseconds, or a share of the
            dense network such as ``0.5 * dense``. For ``preset: published`` it is checked where it is given.
        preset: ``search``, or the ``published`` U-Net for Stable Diffusion 1.5, which needs no data.
        steps: of robust training; 0 leaves it out.
        drop: probability of each block to be left out of a training step.
        samples: latents that robust training sees.
        batch: noised latents per training step.
        learning_rate: the highest of robust training.
        metric: what quality is: ``guided`` (error of guided answers), ``latent`` (error of the final latents) or
            ``clip`` (fall of the CLIP score).
        group: blocks that go before all are valued again.
        insert: which copies stay: those by which quality ``gains``, ``always`` the most valuable that fit, or ``never``
            any.
        sets: how many random sets show whether losses add up; 0 leaves that out.
        protect: module path patterns that are never touched.
    """

    latency: float | str | None = None
    preset: Preset = "search"
    steps: int = field(default=300, metadata={"minimum": 0})
    drop: float = field(default=0.1, metadata={"minimum": 0, "exclusiveMaximum": 1})
    samples: int = field(default=96, metadata={"minimum": 1})
    batch: int = field(default=16, metadata={"minimum": 1})
    learning_rate: float = field(default=1e-4, metadata={"exclusiveMinimum": 0})
    metric: Metric = "guided"
    group: int = field(default=3, metadata={"minimum": 1})
    insert: Insert = "gains"
    sets: int = field(default=24, metadata={"minimum": 0})
    protect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        super().__post_init__()
        for key, least in (("steps", 0), ("samples", 1), ("batch", 1), ("group", 1), ("sets", 0)):
            if getattr(self, key) < least:
                got = f"prune.{key}: got {getattr(self, key)}, expected a whole number of at least {least}."
                raise RecipeError(f"{got} Write {max(least, 8)}.")
        if not 0 <= self.drop < 1:
            raise RecipeError(f"prune.drop: got {self.drop:g}, expected a number in [0, 1). Write 0.1.")
        if self.learning_rate <= 0:
            got = f"prune.learning_rate: got {self.learning_rate:g}, expected a number above 0."
            raise RecipeError(f"{got} Write 0.0001.")
        for key, known in (("preset", get_args(Preset)), ("metric", METRICS), ("insert", get_args(Insert))):
            if getattr(self, key) not in known:
                expected = ", ".join(known)
                raise RecipeError(f"prune.{key}: got {getattr(self, key)!r}, expected one of {expected}. Choose one.")
        if self.latency is None and self.preset == "search":
            raise RecipeError(f"prune.latency: missing; expected the latency to reach. {_EXAMPLE}")
        if self.latency is not None:
            self.target_ms(1.0)

    def target_ms(self, dense_ms: float) -> float:
        """Return the latency to reach in ms.

        Args:
            dense_ms: that of the dense network.

        Raises:
            RecipeError: it says no positive latency.
        """
        written = str(self.latency)
        share = _RELATIVE.match(written)
        try:
            found = float(share[1]) * dense_ms if share else float(written)
        except ValueError:
            found = 0.0
        if not 0 < found < float("inf"):
            raise RecipeError(
                f"prune.latency: got {written!r}, expected milliseconds above 0, or a share of dense. {_EXAMPLE}"
            )
        return found


class SnapFusion:
    """Trains blocks to be dispensable, then removes and copies them by value until a measured latency is met.

    Args:
        options: the recipe's keys.
    """

    options: ClassVar[type[SnapFusionOptions]] = SnapFusionOptions

    def __init__(self, options: SnapFusionOptions) -> None:
        self._options = options

    def prune(self, network: nn.Module, context: Context) -> Outcome:
        """Edit the network in place; killed and called again on the same work folder, it goes on.

        Raises:
            RecipeError: the latency cannot be reached, or the preset does not fit.
            ComponentFailed: answers or losses are not finite.
        """
        if self._options.preset == "published":
            return self._published(network, context)
        from exporter.pruners.blocks import blocks_of  # diffusers takes seconds to import
        from exporter.pruners.protect import check_patterns

        options = self._options
        check_patterns(network, options.protect)
        stopwatch = stopwatch_of(context)
        loan = context.borrowed
        key = digest_of(
            [digest_of_tensors(network.state_dict()), loan.recording(options.prompts, options.images).digest]
        )
        generator = context.generator
        seed = int(torch.randint(2**31, (), generator=generator))
        with notes(context.workdir / _FILE, digest_of([key, asdict(options), stopwatch.digest, seed])) as kept:
            loss = loss_of(options.metric, context, options.prompts, options.images)
            means = Means(loss, stopwatch, kept, context.progress, generator)
            habits = Habits(options.group, options.insert, options.sets)
            evolution = Evolution(network, blocks_of(network, options), means, habits)
            target = options.target_ms(evolution.table.whole)
            evolution.check(target)
            trained = self._train(network, context, seed) if options.steps else {}
            genome = evolution.genome(target)
            facts = {**evolution.facts(genome, target), "robust_training": trained}
            evolution.apply(genome)
        return Outcome(facts)

    def _train(self, network: nn.Module, context: Context, seed: int) -> dict[str, Any]:
        """Train the network in place while blocks drop out; return what training told."""
        from exporter.pruners.blocks import blocks_of, without
        from exporter.tuning.distill import device_of
        from exporter.tuning.training import Work, distill

        @contextmanager
        def dropping(student: nn.Module, generator: torch.Generator) -> Iterator[None]:
            blocks = blocks_of(student, options)
            dropped = torch.rand(len(blocks), generator=generator) < options.drop
            with without(student, [block for block, gone in zip(blocks, dropped.tolist(), strict=True) if gone]):
                yield

        options, loan = self._options, context.borrowed
        data = loan.data(options.prompts, options.samples)
        teacher = getattr(loan.pipeline(), loan.form.denoiser)
        chosen = DistillOptions(
            steps=options.steps,
            batch=options.batch,
            learning_rate=options.learning_rate,
            feature_weight=0.0,
            prompts=options.prompts or "",  # families that are not asked have none
            samples=options.samples,
        )
        work = Work(context.workdir / "robust", context.progress, device_of("auto"), seed, during=dropping)
        told = distill(network, teacher, data, chosen, work)
        return {name: told[name] for name in ("steps", "error_before", "error_after", "loss")}

    def _published(self, network: nn.Module, context: Context) -> Outcome:
        """Make the published U-Net; time it where a latency is given."""
        from exporter.pruners.blocks import blocks_of
        from exporter.pruners.copies import edit, edited
        from exporter.pruners.latency_table import LatencyTable, Timed

        blocks = {block.path: block for block in blocks_of(network, self._options)}
        _check_published(network, blocks)
        genome = Genome(PUBLISHED_REMOVED, PUBLISHED_COPIED)
        facts: dict[str, Any] = {"preset": "published", "removed": list(genome.removed), "copied": list(genome.copied)}
        layers = {path: f"{path}.transformer_blocks.0" for path in genome.copied}
        if self._options.latency is not None:
            stopwatch = stopwatch_of(context)
            table = LatencyTable.of(stopwatch, network, list(blocks), layers)
            with edited(network, [blocks[path] for path in genome.removed], list(layers.values())):
                ms = stopwatch.whole_ms(network)
            target = self._options.target_ms(table.whole)
            if ms > target:
                got = (
                    f"prune.latency: the published U-Net takes {ms:.4g} ms here; got {target:.4g} ms, expected as much."
                )
                raise OutOfReach(f"{got} Raise it, or write preset: search.", ms / table.whole)
            told = table.facts([Timed(frozenset(genome.removed), ms, genome.copied)])
            facts |= {"kept": budget_facts(MS, dense=table.whole, asked=target, left=ms), "latency": told}
        edit(network, [blocks[path] for path in genome.removed], list(layers.values()))
        return Outcome(facts)


def _check_published(network: nn.Module, blocks: Mapping[str, Any]) -> None:
    missing = [path for path in (*PUBLISHED_REMOVED, *PUBLISHED_COPIED) if path not in blocks]
    stages = len(getattr(network, "down_blocks", ()))
    if missing or stages != 4:
        got = f"prune.preset: published is for the U-Net of Stable Diffusion 1.5; got {type(network).__name__}"
        reason = f"without a block {missing[0]}" if missing else f"of {stages} stages"
        raise RecipeError(f"{got} {reason}. Write preset: search and a latency.")

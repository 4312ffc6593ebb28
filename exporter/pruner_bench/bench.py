"""Carries the bench out: every contestant at every latency, with every seed; what is finished is not done again."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from exporter import __version__
from exporter.artifact import Artifact, digest_of, locked, open_artifact
from exporter.errors import ExporterError, OutOfReach
from exporter.loan import DenseLoan
from exporter.preflight import check_recipe
from exporter.progress import Progress, Silent
from exporter.pruner_bench.contestants import CONTESTANTS, FEWER_STEPS, Contestant
from exporter.pruner_bench.fitting import Fitted, Fitter, first_below
from exporter.pruner_bench.rows import DENSE_ROW, REFERENCES, ZEROS, Row, Value, find, keep_row, read_rows
from exporter.pruner_bench.running import (
    DENSE,
    MEASURED_CALLS,
    Setting,
    drop_heavy,
    make_dense,
    predictions_of,
    run_stages,
    values_of,
    values_of_zeros,
)
from exporter.recordings import export_options
from exporter.stopwatch import TargetStopwatch

_LAYOUT = 1
_OF_EVERY_SEED = ("psnr_mean_db", "psnr_worst_db", "parameters", "seconds")
_SEED = 11  # of what methods draw: another noise than that of measuring and of recovery


@dataclass(frozen=True)
class Plan:
    """What a bench is to do.

    Attributes:
        contestants: in the order of the table.
        targets: fractions of dense's latency.
        seeds: how many seeds before recovery, and after the long one. What seeds after the first change before
            recovery is told by the denoiser's errors alone: they draw no images to judge.
        recovery: optimizer steps of the short recovery; 0 for none.
        long_recovery: of the long one, for the best two at the lowest latency; 0 for none.
        long_images: prompts that are drawn and judged after it.
    """

    contestants: tuple[Contestant, ...]
    targets: tuple[float, ...] = (0.75, 0.5)
    seeds: int = 3
    recovery: int = 300
    long_recovery: int = 5000
    long_images: int = 2048


def bench_pruners(plan: Plan, setting: Setting, progress: Progress) -> list[Row]:
    """Carry a bench out and return its rows; those of earlier calls on the same folder are taken as they are.

    Raises:
        ExporterError: the dense model cannot be measured. A contestant that fails has a row that says why.
    """
    setting.out.mkdir(parents=True, exist_ok=True)
    with locked(setting.out):
        work = _Work(plan, setting, progress)
        work.dense_row()
        work.zeros_row()
        for contestant in plan.contestants:
            for target in (None,) if contestant.knob is None else plan.targets:
                work.line(contestant, target)
        for contestant in work.best(2) if plan.long_recovery else ():
            work.long_line(contestant, min(plan.targets))
    return read_rows(setting.out)


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Return rows in the order of the table: dense first, then contestants, seeds ascending."""
    order = [*REFERENCES, *(contestant.name for contestant in CONTESTANTS)]
    known = [row for row in rows if row.name in order]
    return sorted(known, key=lambda row: (order.index(row.name), -(row.target or 0), row.recovery, row.seed))


def _of_same_widths(contestant: Contestant) -> Contestant:
    return next((other for other in CONTESTANTS if other.name == contestant.widths_of), contestant)


class _Work:
    """A bench under way."""

    def __init__(self, plan: Plan, setting: Setting, progress: Progress) -> None:
        self._plan, self._setting, self._progress = plan, setting, progress
        self._by_name = {contestant.name: contestant for contestant in plan.contestants}

    @property
    def _little(self) -> Setting:
        """What suffices for seeds after the first: the recorded calls, and no images to judge."""
        return replace(self._setting, images=min(MEASURED_CALLS, self._setting.images), latency_seconds=2.0)

    def dense_row(self) -> None:
        """Measure the dense model, which every run then links."""
        row = Row(name=DENSE_ROW, kind="dense", informed=False, target=None, recovery=0, seed=0, status="ok")
        row = row.model_copy(update={"key": self._key(row)})
        folder = self._setting.dense
        if find(read_rows(self._setting.out), row) is None or not (folder / "engines").is_dir():
            record = run_stages(folder, [], 0, self._setting, self._progress)
            values = values_of(record.cells[0], record.states[0], self._component)
            values |= dict.fromkeys(("latency_ratio", "latency_ratio_batch_1"), Value(value=1.0))  # by definition
            values["macs"] = Value(value=self._macs(folder / "states" / DENSE))
            keep_row(row.model_copy(update={"values": values}), self._setting.out)

    def zeros_row(self) -> None:
        """Tell what a denoiser reaches that answers nothing but zeros."""
        row = Row(name=ZEROS, kind="none", informed=False, target=None, recovery=0, seed=0, status="ok")
        row = row.model_copy(update={"key": self._key(row)})
        if find(read_rows(self._setting.out), row) is None:
            values = values_of_zeros(self._setting, self._dense, self._progress)
            keep_row(row.model_copy(update={"values": values}), self._setting.out)

    def line(self, contestant: Contestant, target: float | None) -> None:
        """Measure a contestant at one latency: before recovery with every seed, after it with the first."""
        seeds = self._plan.seeds if contestant.draws else 1
        rows = [self._row(contestant, target, 0, seed) for seed in range(seeds)]
        if self._plan.recovery and contestant.recovers:
            rows.append(self._row(contestant, target, self._plan.recovery, 0))
        known = read_rows(self._setting.out)
        open_rows = [row for row in rows if find(known, row) is None]
        if not open_rows:
            return
        try:
            value, note = self._value(contestant, target)
        except ExporterError as error:
            self._close(open_rows, "failed", str(error))
            return
        if target is not None and value is None:
            self._close(open_rows, "not reachable", note)
            return
        for seed in sorted({row.seed for row in open_rows}):
            of_seed = [row for row in open_rows if row.seed == seed]
            self._measure(contestant, value, of_seed, note, self._little if seed else self._setting)

    def long_line(self, contestant: Contestant, target: float) -> None:
        """Measure a contestant after the long recovery, with every seed."""
        rows = [self._row(contestant, target, self._plan.long_recovery, seed) for seed in range(self._plan.seeds)]
        known = read_rows(self._setting.out)
        value, note = self._value(contestant, target)
        setting = replace(self._setting, images=self._plan.long_images, states="final")
        for row in rows:
            if find(known, row) is None:
                self._measure(contestant, value, [row], note, setting)

    def best(self, count: int) -> list[Contestant]:
        """Return the contestants of the highest right-prompt rate at the lowest latency after the short recovery."""
        target = min(self._plan.targets)
        rows = [
            row
            for row in read_rows(self._setting.out)
            if row.target == target and row.recovery == self._plan.recovery and row.status == "ok" and row.recovery
        ]
        rows.sort(key=lambda row: -row.values["judge_rate"].value)
        return [self._by_name[row.name] for row in rows if row.name in self._by_name][:count]

    def _measure(
        self, contestant: Contestant, value: float | None, rows: list[Row], note: str, setting: Setting
    ) -> None:
        """Carry the stages of one seed out and keep its rows."""
        folder = setting.out / "runs" / rows[-1].id
        prune = contestant.stage(value)
        try:
            make_dense(setting, self._progress)
            if contestant.method == FEWER_STEPS:
                assert value is not None
                found, note = self._fewer_steps(round(value * setting.steps), folder, setting), ""
                for row in rows:
                    keep_row(row.model_copy(update=found), setting.out)
                return
            tuned = [setting.recovery(row.recovery) for row in rows if row.recovery]
            record = run_stages(folder, [prune, *tuned], rows[0].seed, setting, self._progress)
            cells = {cell.state: cell for cell in record.cells}
            once = self._once(contestant, folder, record.states[1].facts)
        except OutOfReach as error:
            self._close(rows, "not reachable", f"not reachable: {error.least:.2f}x")
            return
        except ExporterError as error:
            self._close(rows, "failed", str(error))
            return
        predictions = predictions_of(record.states[1].facts)
        for row in rows:
            state = record.states[2 if row.recovery else 1]
            values = {**values_of(cells[state.id], state, self._component), **once}
            if not record.states[1].reused:  # made by a call that was interrupted, which kept no time
                values["seconds"] = Value(value=record.states[1].seconds)
            if row.recovery and "1-pruned" in cells:  # recovery changes no shape: one latency for both
                before = values_of(cells["1-pruned"], record.states[1], self._component)
                values |= {name: value for name, value in before.items() if name == "latency_ratio"}
            if row.seed and not row.recovery:
                values = {name: values[name] for name in _OF_EVERY_SEED if name in values}
            told = {"values": values, "stage": prune, "note": note, "predictions": predictions}
            keep_row(row.model_copy(update=told), setting.out)
        drop_heavy(folder)

    def _fewer_steps(self, steps: int, folder: Path, setting: Setting) -> dict[str, Any]:
        from exporter.pruner_bench.fewer_steps import fewer_steps

        values = fewer_steps(steps, folder, setting, self._progress)
        drop_heavy(folder)
        return {"values": values, "note": f"{steps} steps"}

    def _once(self, contestant: Contestant, folder: Path, facts: dict[str, Any]) -> dict[str, Value]:
        """Return what does not depend on weights: multiply-accumulates, and the latency of single images."""
        state = folder / "states" / "1-pruned"
        found = {"macs": Value(value=self._macs(state) * facts.get("computed_share", 1.0))}
        if contestant.knob is None or contestant.knob.meaning != "loop":
            alone = self._stopwatch(batch=1)
            ratio = alone.whole_ms(self._network(state)) / alone.whole_ms(self._dense_network)
            found["latency_ratio_batch_1"] = Value(value=ratio)
        return found

    def _value(self, contestant: Contestant, target: float | None) -> tuple[float | None, str]:
        """Return the knob's value for a latency, and a note; None where it cannot be reached."""
        if contestant.knob is None or target is None:
            return None, ""
        if contestant.method == FEWER_STEPS or contestant.knob.meaning in ("latency", "relative"):
            return target, ""  # the method finds its own way to a latency, and measures it
        fitted = (
            self._fit_loop(contestant, target)
            if contestant.knob.meaning == "loop"
            else self._fitter.fit(_of_same_widths(contestant), target)
        )
        return fitted.value, fitted.note

    def _fit_loop(self, contestant: Contestant, target: float) -> Fitted:
        """Try the values of a knob whose networks are as fast as before, but not asked at every step."""
        assert contestant.knob is not None
        small = replace(self._setting, out=self._setting.out / "fits" / "loops", images=self._setting.batch)
        small = replace(small, latency_seconds=self._setting.latency_seconds / 2)
        make_dense(small, Silent())

        def ratio(value: float) -> float:
            folder = small.out / "runs" / f"{contestant.name}-{value:g}"
            record = run_stages(folder, [contestant.stage(value)], 0, small, self._progress)
            return values_of(record.cells[1], record.states[1], self._component)["latency_ratio"].value

        return first_below(ratio, contestant.knob.values, target)

    def _row(self, contestant: Contestant, target: float | None, recovery: int, seed: int) -> Row:
        row = Row(
            name=contestant.name,
            kind=contestant.kind,
            informed=contestant.informed,
            target=target,
            recovery=recovery,
            seed=seed,
            status="ok",
        )
        return row.model_copy(update={"key": self._key(row, contestant)})

    def _key(self, row: Row, contestant: Contestant | None = None) -> str:
        setting = {key: str(value) for key, value in vars(self._setting).items() if key != "out"}
        if row.recovery and row.recovery == self._plan.long_recovery:
            setting["images"] = str(self._plan.long_images)
        stage = None if contestant is None else contestant.stage(None)
        recovery = self._setting.recovery(row.recovery) if row.recovery else None
        return digest_of([_LAYOUT, __version__, row.id, setting, stage, recovery])

    def _close(self, rows: list[Row], status: str, note: str) -> None:
        for row in rows:
            keep_row(row.model_copy(update={"status": status, "note": note}), self._setting.out)

    @cached_property
    def _dense(self) -> Artifact:
        return open_artifact(self._setting.dense / "states" / DENSE)

    @cached_property
    def _component(self) -> str:
        from exporter.networks.components import denoiser

        return denoiser("StableDiffusionPipeline").name

    @cached_property
    def _dense_network(self) -> nn.Module:
        return self._network(self._dense.path)

    def _network(self, state: Path) -> nn.Module:
        from exporter.networks.storage import load_network
        from exporter.states import components_of

        part = next(part for part in components_of(state) if part.role == "denoiser")
        return load_network(state / part.folder, cls=part.cls)

    def _macs(self, state: Path) -> float:
        """Return the multiply-accumulates of all denoiser calls of one image."""
        from exporter.costs import cost_of
        from exporter.states import components_of, vae_scale

        part = next(part for part in components_of(state) if part.role == "denoiser")
        cost = cost_of(part, state, 0, 2, self._setting.size // vae_scale(state))
        return cost.flops / 2 * self._setting.steps

    def _stopwatch(self, batch: int) -> TargetStopwatch:
        recipe = replace(self._setting, batch=batch).recipe(self._setting.out / "fits", [], 0)
        options = replace(export_options(recipe, self._dense.path), tokens=self._tokens)
        column = check_recipe(recipe, self._setting.out / "fits" / "check", ignore_memory=True).columns[0]
        return TargetStopwatch(column, options, self._setting.out / "fits" / f"batch-{batch}", self._progress)

    @cached_property
    def _tokens(self) -> int:
        config = json.loads((self._dense.path / "text_encoder" / "config.json").read_text())
        return int(config["max_position_embeddings"])

    @cached_property
    def _fitter(self) -> Fitter:
        fits = self._setting.out / "fits"
        watch = self._stopwatch(self._setting.batch)
        loan = DenseLoan(self._dense, dict(self._setting.sampling), watch, _SEED, fits / "loan", self._progress)
        network = copy.deepcopy(self._dense_network)
        return Fitter(network, watch, loan, self._setting.tuning, fits, self._progress)

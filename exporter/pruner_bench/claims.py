"""What the bench was set up to find out: its bars, and claims of the papers, each answered by the measured rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from exporter.pruner_bench.contestants import FEWER_STEPS
from exporter.pruner_bench.rows import Row

_MOST_POINTS_LOST = 3.0
_RANKS, _OFF = 0.8, 0.1


@dataclass(frozen=True)
class Claim:
    """One statement and what became of it.

    Attributes:
        text: the statement.
        holds: None where it was not measured.
        told: the numbers.
    """

    text: str
    holds: bool | None
    told: str

    def line(self) -> str:
        """Return it as one line."""
        verdict = {True: "holds", False: "does not hold", None: "not measured"}[self.holds]
        return f"{self.text}: **{verdict}**. {self.told}"


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Return every statement that the rows answer."""
    measured = [row for row in rows if row.status == "ok"]
    return [
        _best_loses_little(measured),
        *_beats_fewer_steps(measured),
        *_informed_beat_random(measured),
        *_sums_rank(measured),
        *_tables(measured),
    ]


def _beats_fewer_steps(rows: Sequence[Row]) -> Iterator[Claim]:
    """Hold the best of each latency to the dense network that is asked less often."""
    for target in sorted({row.target for row in rows if row.name == FEWER_STEPS and row.target}, reverse=True):
        here = [row for row in rows if row.target == target and "judge_change" in row.values]
        plain = next(row for row in here if row.name == FEWER_STEPS)
        others = [row for row in here if row.name != FEWER_STEPS]
        if others:
            best = max(others, key=_change)
            when = f"after {best.recovery:,} steps" if best.recovery else "as it is"
            told = f"{_change(plain):+.1f} points to dense, against {_change(best):+.1f} of {best.name} {when}."
            yield Claim(
                f"pruning beats fewer steps of the plain sampler at {target:g}x", _change(best) > _change(plain), told
            )


def _sums_rank(rows: Sequence[Row]) -> Iterator[Claim]:
    """Tell whether losses of single units, summed, rank the losses of sets; each method's worst row counts."""
    for name, found in _predicted(rows, "spearman"):
        of_one_size = [row.predictions.get("spearman_of_one_size") for row in rows if row.name == name]
        least = min((value for value in of_one_size if value is not None), default=None)
        told = f"Spearman {min(found):.2f} over sets of all sizes" + (
            f", {least:.2f} over sets of one size, where only the choice counts." if least is not None else "."
        )
        yield Claim(
            f"the sums that {name} adds up rank what is measured, Spearman >= {_RANKS}", min(found) >= _RANKS, told
        )


def _tables(rows: Sequence[Row]) -> Iterator[Claim]:
    for name, found in _predicted(rows, "latency_error"):
        text = f"the latency table of {name} predicts whole networks within {_OFF:.0%}"
        yield Claim(text, max(found) <= _OFF, f"The largest error is {max(found):.1%}, at this size.")


def _predicted(rows: Sequence[Row], key: str) -> Iterator[tuple[str, list[float]]]:
    for name in dict.fromkeys(row.name for row in rows):
        found = [row.predictions[key] for row in rows if row.name == name and key in row.predictions]
        if found:
            yield name, found


def _change(row: Row) -> float:
    return row.values["judge_change"].value


def _best_loses_little(rows: Sequence[Row]) -> Claim:
    text = f"the best method at the lowest latency, recovered, loses at most {_MOST_POINTS_LOST:g} points"
    targets = [row.target for row in rows if row.target is not None]
    recovered = [row for row in rows if targets and row.target == min(targets) and row.recovery]
    if not recovered:
        return Claim(text, None, "No row is recovered.")
    longest = max(row.recovery for row in recovered)
    worst_of: dict[str, Row] = {}  # of the seeds of a method
    for row in sorted((row for row in recovered if row.recovery == longest), key=_change):
        worst_of.setdefault(row.name, row)
    best = max(worst_of.values(), key=_change)
    change = best.values["judge_change"]
    assert change.low is not None
    told = f"{best.name} after {longest:,} steps: {change.value:+.1f} points, its interval from {change.low:+.1f}."
    return Claim(text, change.low >= -_MOST_POINTS_LOST, told)


def _informed_beat_random(rows: Sequence[Row]) -> Iterator[Claim]:
    """Compare each informed method with the best seed of the random one of its kind and latency, before recovery."""
    kinds = sorted({(row.kind, row.target or 0.0) for row in rows if row.informed})
    for kind, target in kinds:
        here = [row for row in rows if (row.kind, row.target or 0.0) == (kind, target) and not row.recovery]
        here = [row for row in here if "psnr_mean_db" in row.values]
        chance = [row.values["psnr_mean_db"].value for row in here if row.name.startswith("random")]
        informed = [row for row in here if row.informed and row.seed == 0]
        if not chance or not informed:
            continue
        worse = [row.name for row in informed if row.values["psnr_mean_db"].value <= max(chance)]
        size = f"at {target:g}x" if target else "of one size"
        told = f"random reaches {max(chance):.1f} dB at best" + (
            f"; not beaten by {', '.join(worse)}." if worse else "."
        )
        yield Claim(f"every informed method that removes {kind} beats random {size}, before recovery", not worse, told)

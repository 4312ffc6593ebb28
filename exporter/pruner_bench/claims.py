"""What the bench was set up to find out: its bars, and claims of the papers, each answered by the measured rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from exporter.pruner_bench.contestants import CONTESTANTS, FEWER_STEPS
from exporter.pruner_bench.rows import ERRORS, ZEROS, Row, short_recovery

_MOST_POINTS_LOST = 3.0
_RANKS, _OFF = 0.8, 0.1
_NO_DIFFERENCE_DB = 0.5


@dataclass(frozen=True)
class Claim:
    """One statement and what became of it.

    Attributes:
        text: the statement.
        holds: None where it was not measured, or nothing is decided.
        told: the numbers.
        measured: whether there is a row to answer it.
    """

    text: str
    holds: bool | None
    told: str
    measured: bool = True

    @property
    def verdict(self) -> str:
        """Return what became of it, in words."""
        if self.holds is None:
            return "undecided" if self.measured else "not measured"
        return "holds" if self.holds else "does not hold"

    def line(self) -> str:
        """Return it as one line."""
        return f"{self.text}: **{self.verdict}**. {self.told}"


@dataclass(frozen=True)
class Order:
    """What a paper says of two methods: of the same size or latency, one does better than the other.

    Attributes:
        paper: whose claim it is.
        better: the line of the table that is said to be better.
        worse: the other line.
        recovered: whether the paper trains before it compares.
        trains: whether the method itself trains, as long as the short recovery: its rival is recovered then.
    """

    paper: str
    better: str
    worse: str
    recovered: bool = False
    trains: bool = False


ORDERS = (
    Order("Diff-Pruning", "diff-pruning", "random", recovered=True),
    Order("Diff-Pruning", "diff-pruning", "magnitude", recovered=True),
    Order("Diff-Pruning", "diff-pruning early cut", "taylor", recovered=True),
    Order("LAPTOP-Diff", "laptop-diff", "magnitude blocks", recovered=True),
    Order("DiP-GO", "dip-go learned", "deepcache"),
    Order("DiP-GO", "dip-go learned", "random schedule"),
    Order("Wanda", "wanda 2:4", "magnitude 2:4"),
    Order("SparseGPT", "sparsegpt 2:4", "magnitude 2:4"),
    Order("OBS-Diff", "obs-diff 2:4", "wanda 2:4"),
    Order("OBS-Diff", "obs-diff 2:4", "sparsegpt 2:4"),
    Order("SparseDM", "sparsedm 2:4", "magnitude 2:4", trains=True),
)
"""Orders that the papers' own tables show; EcoDiff, SnapFusion and the presets have no rival of their size there."""


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Return every statement that the rows answer: the bench's own, then the papers'."""
    measured = [row for row in rows if row.status == "ok"]
    return [
        _best_loses_little(measured),
        *_beats_fewer_steps(measured),
        *_informed_beat_random(measured, rows),
        *_sums_rank(measured),
        *_tables(measured),
        *_published(measured),
    ]


def _published(rows: Sequence[Row]) -> Iterator[Claim]:
    """Hold the papers' orders to both measures: the errors of single calls, and what the judge says of whole images.

    A measure that shows no difference leaves it to the other one; two that contradict each other decide nothing.
    """
    short = short_recovery(rows)
    first = [row for row in rows if not row.seed and "judge_change" in row.values]
    for order in ORDERS:
        sides = ((order.better, order.recovered), (order.worse, order.recovered or order.trains))
        better, worse = (
            {row.target: row for row in first if row.name == name and row.recovery == (short if recovered else 0)}
            for name, recovered in sides
        )
        for target in sorted(set(better) & set(worse), key=lambda value: -(value or 0)):
            if order.trains and better[target].stage["prune"].get("steps") != short:
                continue  # its rival was trained for another time
            yield _of_order(order, target, better[target], worse[target])


def _of_order(order: Order, target: float | None, better: Row, worse: Row) -> Claim:
    size = f"at {target:g}x" if target else "of one size"
    steps = max(better.recovery, worse.recovery)
    when = f"after {steps:,} steps" + (" of its own" if order.trains else "") if steps else "before recovery"
    gap = better.values["psnr_mean_db"].value - worse.values["psnr_mean_db"].value
    by_error = None if abs(gap) < _NO_DIFFERENCE_DB else gap > 0
    by_judge = _judged(better, worse)
    holds = by_judge if by_error is None else by_error if by_judge in (None, by_error) else None
    errors = [" / ".join(f"{row.values[name].value:.1f}" for name in ERRORS) for row in (better, worse)]
    told = " against ".join(
        f"{error} dB and {_change(row):+.1f} points" for error, row in zip(errors, (better, worse), strict=True)
    )
    return Claim(f"{order.paper}: {order.better} beats {order.worse}, {size}, {when}", holds, f"{told}.")


def _judged(one: Row, other: Row) -> bool | None:
    """Return whether the judge likes one more than the other; None where the intervals of their changes overlap."""
    low, high = _ends(one)
    other_low, other_high = _ends(other)
    if low > other_high:
        return True
    return False if high < other_low else None


def _ends(row: Row) -> tuple[float, float]:
    change = row.values["judge_change"]
    low, high = (change.value if end is None else end for end in (change.low, change.high))
    return low, high


def _beats_fewer_steps(rows: Sequence[Row]) -> Iterator[Claim]:
    """Hold the best of each latency to the dense network that is asked less often."""
    for target in sorted({row.target for row in rows if row.name == FEWER_STEPS and row.target}, reverse=True):
        here = [row for row in rows if row.target == target and "judge_change" in row.values]
        plain = next(row for row in here if row.name == FEWER_STEPS)
        others = [row for row in here if row.name != FEWER_STEPS]
        if others:
            best = max(others, key=_change)
            when = f"after {best.recovery:,} steps" if best.recovery else "as it is"
            plain_ends, best_ends = ("{:+.1f} to {:+.1f}".format(*_ends(row)) for row in (plain, best))
            told = (
                f"{_change(plain):+.1f} points to dense ({plain_ends}), against {_change(best):+.1f} ({best_ends}) of "
                f"{best.name} {when}."
            )
            yield Claim(f"pruning beats fewer steps of the plain sampler at {target:g}x", _judged(best, plain), told)


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
        told = f"The largest error is {max(found):.1%}, at this size"
        bare = [row.predictions.get("latency_error_without_units", 0.0) for row in rows if row.name == name]
        told += f", and {max(bare):.1%} of the network that has no unit left." if any(bare) else "."
        yield Claim(text, max(found) <= _OFF, told)


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
        return Claim(text, None, "No row is recovered.", measured=False)
    longest = max(row.recovery for row in recovered)
    worst_of: dict[str, Row] = {}  # of the seeds of a method
    for row in sorted((row for row in recovered if row.recovery == longest), key=_change):
        worst_of.setdefault(row.name, row)
    best = max(worst_of.values(), key=_change)
    change = best.values["judge_change"]
    assert change.low is not None
    told = f"{best.name} after {longest:,} steps: {change.value:+.1f} points, its interval from {change.low:+.1f}."
    return Claim(text, change.low >= -_MOST_POINTS_LOST, told)


def _informed_beat_random(rows: Sequence[Row], asked: Sequence[Row]) -> Iterator[Claim]:
    """Compare each informed method with the best seed of the random one of its kind and latency, before recovery.

    Methods that no row was `asked` of are named: the statement is about the others.
    """
    kinds = sorted({(row.kind, row.target or 0.0) for row in rows if row.informed})
    for kind, target in kinds:
        here = [row for row in rows if (row.kind, row.target or 0.0) == (kind, target) and not row.recovery]
        here = [row for row in here if "psnr_mean_db" in row.values]
        chance = [row.values["psnr_mean_db"].value for row in here if row.name.startswith("random")]
        informed = [row for row in here if row.informed and row.seed == 0]
        if not chance or not informed:
            continue
        zeros = [row.values["psnr_mean_db"].value for row in rows if row.name == ZEROS]
        worse = [row.name for row in informed if row.values["psnr_mean_db"].value <= max(chance)]
        size = f"at {target:g}x" if target else "of one size"
        told = f"random reaches {max(chance):.1f} dB at best" + (f"; not beaten by {', '.join(worse)}" if worse else "")
        told += f"; an answer of zeros has {zeros[0]:.1f} dB." if zeros else "."
        known = {row.name for row in asked if (row.target or 0.0) == target}
        whole = [
            one for one in CONTESTANTS if one.informed and one.kind == kind and (one.knob is not None) == (target > 0)
        ]
        missing = [one.name for one in whole if one.name not in known]
        told += f" Not measured: {', '.join(missing)}." if missing else ""
        which = "every informed method measured" if missing else "every informed method"
        yield Claim(f"{which} that removes {kind} beats random {size}, before recovery", not worse, told)

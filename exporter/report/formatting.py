"""Numbers and texts for people: one way to write a value, an interval, a size and a duration."""

from __future__ import annotations

import math
import re
from datetime import datetime

from exporter.metrics.measurement import Measurement
from exporter.metrics.names import METRICS
from exporter.report.record import CellRecord, GateRecord

NOT_MEASURED = "not measured"
_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")
_TIMES = "\N{MULTIPLICATION SIGN}"
_COUNTS = ("", " K", " M", " G")
_FIXED_DIGITS = {"dB": 2, "fraction": 3, "images": 0, "layers": 0}
EQUAL_DB = 200.0
"""Equal arrays count as this many dB, answers that are not finite as minus this: `exporter.metrics.fidelity`."""

_REFUSED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(text: object) -> str:
    """Return the text without what XML and a terminal cannot take: control characters and lone surrogates.

    Tabs and line ends stay; everything else that is refused becomes U+FFFD.
    """
    return _REFUSED.sub("\ufffd", str(text))


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with about `digits` significant digits; infinite and missing values by name."""
    if value is None:
        return NOT_MEASURED
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"


def quantity(value: float | None, unit: str, digits: int | None = None) -> str:
    """Return a value with its unit, in the number of digits that suits the unit.

    Args:
        value: the value in `unit`; None gives "not measured".
        unit: a unit of `Measurement`; bytes are scaled to KiB, MiB and so on.
        digits: digits behind the point (bytes: of the scaled number), instead of the usual ones.
    """
    if value is None:
        return NOT_MEASURED
    if unit == "dB" and abs(value) >= EQUAL_DB:
        return "equal" if value > 0 else "not finite"
    if not math.isfinite(value):
        return f"{number(value)} {_suffix(unit)}".rstrip()
    if unit == "bytes":
        return _scaled(value, digits)
    if digits is None and unit == "score":
        return f"{value:.4g}"
    if digits is None:
        digits = _FIXED_DIGITS.get(unit)
    huge = abs(value) >= 1e6
    text = number(value) if digits is None or huge else f"{value:.{digits}f}"
    return f"{text} {_suffix(unit)}".rstrip()


def apart(value: float, limit: float, unit: str) -> tuple[str, str]:
    """Return value and limit with enough digits to differ when they do: 44.996 and 45.000, not 45.00 and 45.00."""
    shown = quantity(value, unit), quantity(limit, unit)
    for digits in range(3, 13):
        if shown[0] != shown[1] or value == limit:
            break
        shown = quantity(value, unit, digits), quantity(limit, unit, digits)
    return shown


def interval(low: float | None, high: float | None, unit: str = "") -> str:
    """Return ``[low, high]`` of a 95 % interval, empty when there is none."""
    if low is None or high is None:
        return ""
    if unit == "bytes":
        return f"[{quantity(low, unit)}, {quantity(high, unit)}]"
    return f"[{_bare(low, unit)}, {_bare(high, unit)}]"


def ratio(measurement: Measurement) -> tuple[str, ...]:
    """Return the paired ratio to the baseline with its interval, such as 0.62 times ``0-dense``."""
    found = measurement.ratio
    if found is None:
        return ()
    return f"{found.value:.2f} {_TIMES} {found.to}", f"[{found.low:.2f}, {found.high:.2f}]"


def timestep(value: float) -> str:
    """Return a timestep or sigma: integers without a point."""
    return f"{value:.6g}"


def seconds(value: float | None) -> str:
    """Return a duration for people: ``12 ms``, ``3.1 s``, ``4 min 12 s``, ``2 h 03 min``."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED if value is None else number(value)
    if value < 1:
        return f"{value * 1000:.0f} ms" if value else "0 s"
    if value < 59.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(written: str) -> str:
    """Return an ISO 8601 time as ``2026-11-21 07:24 UTC``; what is none comes back as it is."""
    try:
        found = datetime.fromisoformat(written)
    except ValueError:
        return written
    return f"{found:%Y-%m-%d %H:%M} {found.tzname() or ''}".rstrip()


def measured(cell: CellRecord) -> str:
    """Return ``measured 2026-11-21 14:05 UTC, reused`` for a cell that an earlier run measured, else nothing."""
    return f"measured {moment(cell.measured_at)}, reused" if cell.reused else ""


def count(value: int) -> str:
    """Return a count with three digits: ``12.9 M`` parameters."""
    if abs(value) < 10_000:
        return str(value)
    power = min(len(_COUNTS) - 1, math.floor(math.log10(abs(value)) / 3))
    return f"{number(value / 1000**power)}{_COUNTS[power]}"


def plural(amount: int, word: str, many: str = "") -> str:
    """Return ``1 gate`` or ``3 gates``."""
    return f"{amount} {word if amount == 1 else many or word + 's'}"


def is_higher_better(metric: str) -> bool:
    """Return whether more of this metric is better; of latency, size, error and distance less is."""
    known = METRICS.get(metric)
    return known is not None and known.better == "higher"


def limit_sign(gate: GateRecord) -> str:
    """Return ``≥`` for a gate with `min`, ``≤`` for one with `max`; of one with both, what fits its verdict."""
    has_min, has_max = (gate.gate.get(key) is not None for key in ("min", "max"))
    if not (has_min and has_max):
        return "≤" if has_max else "≥"
    if gate.got is None or gate.limit is None:
        return "≤" if gate.gate["max"] == gate.limit else "≥"
    return "≤" if (gate.got > gate.limit) == (gate.status == "missed") else "≥"


def _bare(value: float, unit: str) -> str:
    return quantity(value, unit).removesuffix(_suffix(unit)).rstrip()


def _suffix(unit: str) -> str:
    return "" if unit in ("fraction", "score", "bytes") else unit


def _scaled(value: float, digits: int | None) -> str:
    power = 0 if abs(value) < 1024 else min(len(_SIZES) - 1, int(math.log2(abs(value)) // 10))
    scaled = value / 1024**power
    if digits is None:
        return f"{number(scaled)} {_SIZES[power]}" if power else f"{value:.0f} B"
    return f"{scaled:.{digits}f} {_SIZES[power]}"

"""One line of the bench: what was asked for, what came of it; kept as JSON, one file each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from exporter.artifact import write_text
from exporter.errors import ArtifactError

FOLDER = "rows"
DENSE_ROW, ZEROS = "dense", "answer of zeros"
REFERENCES = (DENSE_ROW, ZEROS)
"""What every table begins with: the model as it is, and what a denoiser reaches that answers nothing but zeros."""


ERRORS = ("psnr_mean_db", "psnr_worst_db")
"""Teacher-forced, over timesteps."""


class Value(BaseModel):
    """A measured number, with its 95 % interval where there is one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    low: float | None = None
    high: float | None = None


class Row(BaseModel):
    """One contestant at one latency, before or after recovery, with one seed.

    Attributes:
        name: of the contestant.
        kind: what it removes.
        informed: whether it looks at weights or data.
        target: fraction of dense's latency asked for; None for a contestant of one size.
        recovery: optimizer steps of recovery; 0 before.
        seed: of the method and of recovery.
        status: ``ok``; ``not reachable`` (see `note`, which gives the least); ``failed`` (see `note`).
        note: a sentence.
        stage: the recipe's stage that made the network.
        values: by the names of `COLUMNS`; what is missing was not measured.
        predictions: how a method's own predictions compare with what it measured, where it makes any: ``spearman`` of
            summed with joint losses over sets of all sizes, ``spearman_of_one_size`` where sums are worst, and
            ``latency_error``, the largest of its latency table for a whole network with units, and
            ``latency_error_without_units`` for the network that has none left.
        key: digest of everything that the values depend on but the machine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    informed: bool
    target: float | None = None
    recovery: int
    seed: int
    status: Literal["ok", "not reachable", "failed"]
    note: str = ""
    stage: dict[str, Any] = {}
    values: dict[str, Value] = {}
    predictions: dict[str, float] = {}
    key: str = ""

    @property
    def id(self) -> str:
        """What tells it from the others, usable as a file's name."""
        size = "fixed" if self.target is None else f"{self.target:g}x"
        return re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.name} {size} {self.recovery} seed{self.seed}")


COLUMNS: dict[str, str] = {
    "latency_ratio": "denoising loop, batch 16, × dense",
    "latency_ratio_batch_1": "denoiser, batch 1, × dense",
    "psnr_mean_db": "teacher-forced PSNR, mean of timesteps, dB",
    "psnr_worst_db": "teacher-forced PSNR, worst timestep, dB",
    "ssim": "SSIM to dense's image of the same seed",
    "judge_rate": "right-prompt rate",
    "judge_change": "right-prompt rate minus dense's, paired, points",
    "kid": "KID to dense's images",
    "parameters": "parameters of the denoiser",
    "macs": "multiply-accumulates of a loop, per image",
    "size_bytes": "bytes of the denoiser's engine",
    "seconds": "time the method took, s",
}


def short_recovery(rows: Iterable[Row]) -> int:
    """Return the steps of the shorter recovery; 0 where no row is recovered. Those of the longer have more prompts."""
    return min((row.recovery for row in rows if row.recovery), default=0)


def keep_row(row: Row, out: Path) -> None:
    """Write a row, replacing what was there."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{row.id}.json", json.dumps(row.model_dump(mode="json", exclude_none=True), indent=1) + "\n")


def read_rows(out: Path) -> list[Row]:
    """Return every row that a bench has finished.

    Raises:
        ArtifactError: a file is damaged.
    """
    return [_read(path) for path in sorted((out / FOLDER).glob("*.json"))]


def find(rows: Iterable[Row], wanted: Row) -> Row | None:
    """Return the finished row that has the id and the key of a wanted one; what failed is tried again."""
    same = (row for row in rows if row.id == wanted.id and row.key == wanted.key)
    return next((row for row in same if row.status != "failed"), None)


def _read(path: Path) -> Row:
    try:
        return Row.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path}: no row of a bench; got '{reason}'. Delete it: it is measured again.") from error

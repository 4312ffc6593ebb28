"""Cells that were measured before: kept beside the report, and reused while nothing that they depend on differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from calibration.recording import Recording
from exporter import __version__
from exporter.artifact import Artifact, digest_of, write_text
from exporter.bench import judges_identity
from exporter.memo import FileMemo
from exporter.metrics.machine import Mode
from exporter.recipe import Recipe
from exporter.report.record import CellRecord

FOLDER = "cells"
"""Of a run's folder: ``cells/<state>/<target>/cell.json``."""

_LAYOUT = 1


def shared_key(
    recipe: Recipe, dense: Artifact, recording: Recording, environment: Mapping[str, Any], memo: FileMemo
) -> str:
    """Return the digest of what the measurements of all cells of a run depend on.

    Args:
        recipe: how is measured; its gates are no part of it, they are applied to what was measured.
        dense: the dense state.
        recording: of the dense pipeline.
        environment: the machine and the versions of libraries.
        memo: what is known of the judges' files.
    """
    measure = recipe.measure.model_dump(mode="json", exclude={"states"})
    return digest_of(
        {
            "layout": [_LAYOUT, __version__],
            "measure": measure,
            "sampling": recipe.sampling.model_dump(mode="json"),
            "shapes": None if recipe.shapes is None else recipe.shapes.model_dump(mode="json"),
            "judges": judges_identity(recipe, memo),
            "dense": dense.digest,
            "recording": recording.digest,
            "environment": dict(environment),
            "mode": Mode.read().settings(),
        }
    )


def cell_key(
    shared: str, state: Artifact, engine: Artifact, *, dense_engine: Artifact | None, fixed: Artifact | None
) -> str:
    """Return the digest of everything that the measurements of one cell depend on.

    Args:
        shared: from `shared_key`.
        state: what was lowered.
        engine: its engine.
        dense_engine: what its latency is paired with, where it is.
        fixed: the denoiser with fixed shapes that it is compared with, where it is.
    """
    paired = [None if artifact is None else artifact.digest for artifact in (dense_engine, fixed)]
    return digest_of([shared, state.digest, engine.digest, *paired])


@dataclass(frozen=True)
class Cells:
    """The cells of a run that are kept, one file each.

    Attributes:
        out: the run's folder.
        memo: what is known of files.
    """

    out: Path
    memo: FileMemo

    def find(self, state: str, target: str, key: str) -> CellRecord | None:
        """Return a cell that was measured under this key; None where there is none, or it or an image is damaged."""
        try:
            content = json.loads(self._file(state, target).read_text(encoding="utf-8"))
            checksum = content.pop("checksum")
            if checksum != digest_of(content) or content["key"] != key:
                return None
            cell = CellRecord.model_validate(content["cell"])
            intact = all(self.memo.sha256(self.out / name) == sha for name, sha in content["images"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError):
            return None
        return cell.model_copy(update={"reused": True, "seconds": {}}) if intact else None

    def keep(self, cell: CellRecord, key: str) -> None:
        """Keep a cell that was measured, with the digests of its images."""
        names = sorted({name for image in cell.images for name in (image.path, image.reference)})
        plain = json.loads(json.dumps(cell.model_dump(mode="python"), default=str))
        content = {"key": key, "cell": plain, "images": {name: self.memo.sha256(self.out / name) for name in names}}
        file = self._file(cell.state, cell.target)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({**content, "checksum": digest_of(content)}) + "\n")

    def _file(self, state: str, target: str) -> Path:
        return self.out / FOLDER / state / target / "cell.json"

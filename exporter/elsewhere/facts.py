"""What a kit says about itself, and what comes back; both sides read these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exporter.artifact import digest_of
from exporter.errors import ArtifactError
from exporter.report.record import CellRecord, TargetRecord

FORMAT = 1
RESULT = "result.json"
KITS = "kits"
"""Of a run's folder: manifests of the kits that were handed out, by digest."""
HOST_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Asked(_Facts):
    """One recorded call.

    Attributes:
        timestep: of the scheduler; None for components that have none.
        feeds: input -> name of its array in ``arrays``.
    """

    timestep: float | None
    feeds: dict[str, str]


class Part(_Facts):
    """One component of a state.

    Attributes:
        name: such as ``unet``.
        is_denoiser: whether its calls make a loop.
        graph: folder of its ONNX files in the kit.
        floats: what it is held to where it is quantized: precision -> folder of its ONNX files.
        schedule: file with the schedule of its graphs; empty where there is one graph.
        output: the answer that is compared.
        asked: calls whose answers are compared, rows without the prompt first where there is guidance.
        own: array (calls, rows, ...) of what the state itself answers; empty where nothing here can compute it.
        dense: the same of the dense pipeline.
        guided: array (calls, prompts, ...) of dense's answers after guidance; empty where there is none.
        timed: inputs of one batch -> names of their arrays; one entry per step.
        products: node with a constant weight -> multiplications of a call; None where shapes are open.
        taken: how many of these weights sparse kernels could take.
    """

    name: str
    is_denoiser: bool
    graph: str
    floats: dict[str, str]
    schedule: str
    output: str
    asked: list[Asked]
    own: str
    dense: str
    guided: str
    timed: list[dict[str, str]]
    products: dict[str, int | None]
    taken: int


class KitState(_Facts):
    """One state: its id, the digest of its artifact, and its components."""

    id: str
    digest: str
    parts: list[Part]


class Kit(_Facts):
    """What a kit is for.

    Attributes:
        layout: version of this form.
        run: name of the recipe.
        exporter: version that made it.
        target: the recipe's name of the target; `type` and `options` as the recipe gives them.
        guidance: scale of the recorded calls.
        batch: images per call.
        seconds: for the timing of a component.
        recipe: the parts of the recipe that the numbers depend on, for people.
        states: dense first.
    """

    layout: int = FORMAT
    run: str
    exporter: str
    target: str
    type: str
    options: dict[str, Any]
    guidance: float
    batch: int
    seconds: float
    recipe: dict[str, Any]
    states: list[KitState]


class Result(_Facts):
    """What a host found.

    Attributes:
        layout: version of this form.
        kit: digest of the kit that was used, computed there from the files that were there.
        host: its name.
        target: what it offered; its machine is in there.
        states: id -> digest of what was measured.
        cells: one per state.
        measured_at: ISO 8601.
        seconds: that it took.
        checksum: of all this, so that a damaged file is found; it is no signature.
    """

    layout: int = FORMAT
    kit: str
    host: str = Field(pattern=f"^{HOST_NAME}$")
    target: TargetRecord
    states: dict[str, str]
    cells: list[CellRecord]
    measured_at: str
    seconds: float
    checksum: str = ""


def checksum_of(result: Result) -> str:
    """Return the checksum of a result."""
    return digest_of(result.model_copy(update={"checksum": ""}).model_dump(mode="json"))


def kit_of(facts: dict[str, Any], place: Path) -> Kit:
    """Return what the manifest of a kit says.

    Raises:
        ArtifactError: it is none, or of another version.
    """
    try:
        kit = Kit.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{place}: not a kit of this version: {where}: {first['msg']}. Make it again with `exporter kit`."
        ) from error
    return kit


def read_kit(manifest: Path) -> Kit:
    """Read the kit that a run has handed out; raises as `kit_of`."""
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))["facts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{manifest}: cannot be read: {error}. Make the kit again with `exporter kit`.") from error
    return kit_of(facts, manifest)

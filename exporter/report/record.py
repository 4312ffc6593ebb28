"""The record of one run: what `report.json` holds and every rendering reads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from exporter.metrics.measurement import Measurement

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StateRecord(_Record):
    """One version of the model.

    Attributes:
        id: ``0-dense``, ``1-pruned``, ...
        stage: the recipe's stage that made it, as written; None for dense.
        digest: sha256 of the artifact, hex.
        parent: digest of the state before it.
        parameters: component -> number of parameters.
        size_bytes: component -> bytes of its weights.
        seconds: time it took to make; 0 when reused.
        reused: whether a finished artifact was found.
        facts: what the stage recorded (surgery summary, loss curve).
    """

    id: str
    stage: dict[str, Any] | None
    digest: str
    parent: str | None
    parameters: dict[str, int]
    size_bytes: dict[str, int]
    seconds: float
    reused: bool
    facts: dict[str, Any] = {}


class TargetRecord(_Record):
    """One column: a named target of the recipe and what this machine, or another host, offers for it.

    Attributes:
        name: the recipe's name, with ``@`` and the host's behind it where it was measured there.
        type: of the target.
        options: as the recipe gives them.
        version: of the runtime; None where it is not installed.
        device: full name, empty where it is not known.
        problem: why it could not be used; empty where it could.
        host: name of another host, from `exporter merge`; empty for this machine.
        machine: of that host.
    """

    name: str
    type: str
    options: dict[str, Any]
    version: str | None
    device: str
    problem: str = ""
    host: str = ""
    machine: dict[str, Any] = {}


class ImageRecord(_Record):
    """One prompt's images in one cell; paths are relative to the report.

    Attributes:
        prompt: the text.
        seed: the seed of its initial noise.
        path: the PNG made by this state on this target.
        reference: the PNG of the dense pipeline in torch, same prompt and seed.
        problems: what the detectors found: ``nan``, ``black``, ``constant``, ``saturated``, ``size``.
    """

    prompt: str
    seed: int
    path: str
    reference: str
    problems: list[str] = []


class CellRecord(_Record):
    """One state on one target.

    Attributes:
        status: ``ok``; ``built`` where an engine is there that this machine cannot run; ``failed`` or ``not run``; for
            all but the first `error` has the reason.
        evidence: component -> `targets.base.Evidence` as JSON, layers included.
        engine: path of the engine folder relative to the report, None when there is none.
        seconds: what it took in this run, by step; empty when reused.
        measured_at: when the measurements were taken, ISO 8601; empty when they were not.
        reused: whether an earlier run took them; nothing that they depend on has changed since.
    """

    state: str
    target: str
    status: Literal["ok", "built", "failed", "not run"]
    error: str = ""
    measurements: list[Measurement] = []
    images: list[ImageRecord] = []
    evidence: dict[str, dict[str, Any]] = {}
    engine: str | None = None
    seconds: dict[str, float] = {}
    measured_at: str = ""
    reused: bool = False

    @property
    def has_engine(self) -> bool:
        """Whether there is something to measure: all of it, or what an engine shows without running."""
        return self.status in ("ok", "built")


class GateRecord(_Record):
    """A limit applied to one measurement.

    Attributes:
        gate: the recipe's gate, as written.
        status: ``passed``, ``missed`` or ``not measured``.
        limit: the limit as a number, relative ones resolved.
        got: the end of the interval that was compared (the unfavourable one), None when not measured.
        message: the sentence for people, in the form of every error.
    """

    gate: dict[str, Any]
    metric: str
    state: str
    target: str
    component: str | None = None
    timestep: float | None = None
    status: Literal["passed", "missed", "not measured"]
    limit: float | None
    got: float | None
    message: str


class RunRecord(_Record):
    """One run, whole. `complete` is False while it is under way or after it was stopped; `stopped` says why then.

    `forecast` compares memory, disk and time with what preflight expected; empty where the run found work done.
    `pending` is how many gates of an unfinished run are still to be applied. `exit_code_here` is that of this machine's
    part alone, where other hosts' results are in the record too.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    exporter_version: str
    recipe: dict[str, Any]
    started: str
    seconds: float
    complete: bool
    exit_code: int
    environment: dict[str, Any]
    sampling: dict[str, Any]
    source: dict[str, Any]
    states: list[StateRecord]
    targets: list[TargetRecord]
    cells: list[CellRecord]
    gates: list[GateRecord]
    pending: int = 0
    forecast: dict[str, dict[str, float]] = {}
    notes: list[str] = []
    stopped: str = ""
    exit_code_here: int | None = None

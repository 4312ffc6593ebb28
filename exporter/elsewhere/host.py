"""Builds and measures a kit on the host that it was taken to, with Python and the target's runtime alone.

What is measured here is measured by the very code that a run uses: the same comparison with the recorded answers, the
same timer, the same process of its own for memory. Images are not drawn, since that takes diffusers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifact import (
    Artifact,
    digest_of,
    disk_failure,
    link_file,
    link_tree,
    open_artifact,
    reusable,
    write_artifact,
    write_text,
)
from exporter.built import IMAGES, built_cell, missing
from exporter.compiling import compile_graphs, float_options, ready_target
from exporter.elsewhere.facts import HOST_NAME, RESULT, Kit, KitState, Part, Result, checksum_of, kit_of
from exporter.environment import machine
from exporter.errors import ComponentFailed, ExporterError, Interrupted, RecipeError
from exporter.metrics.fidelity import Answers, component_fidelity, guide, lowering, teacher_forced
from exporter.metrics.measurement import Measurement
from exporter.metrics.place import DENSE, Place
from exporter.metrics.placement import placement_measurements
from exporter.metrics.sparse import Weighed, sparse_measurements
from exporter.networks.schedule import SCHEDULE
from exporter.report.record import CellRecord, TargetRecord
from exporter.sessions import fitted, open_network, run_batched
from exporter.timing import Open, Timing, fed_parts, footprint, latency_of, over_float, timer_of
from exporter.validation import one_of
from targets.base import Session, Target, TargetError, engine_file_of
from targets.torch_source import FromTorch

Array = NDArray[Any]
_NO_IMAGES = (
    "images are drawn where diffusers is; other hosts are given recorded calls. Look at the decoder's fidelity."
)


@dataclass(frozen=True)
class Host:
    """What measuring a kit takes.

    Attributes:
        kit: checked.
        facts: the kit's own.
        target: its target; `options` those of the recipe.
        column: what the report calls the target on this host.
        out: folder of engines and results.
    """

    kit: Artifact
    facts: Kit
    target: Target
    options: Any
    column: str
    out: Path

    def array(self, name: str) -> Array:
        """Return an array of the kit, mapped from its file."""
        found: Array = np.load(self.kit.path / "arrays" / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return found

    def feeds(self, names: Mapping[str, str]) -> dict[str, Array]:
        """Return the arrays of a call."""
        return {name: np.asarray(self.array(array)) for name, array in names.items()}

    @property
    def ending(self) -> str:
        """Of the files that graphs are in."""
        return Path(engine_file_of(self.target, self.options)).suffix


def main(kit: Path, arguments: Sequence[str]) -> int:
    """Measure a kit and write ``result.json``; return the exit status, as the command line's."""
    parser = argparse.ArgumentParser(description="Builds the kit's engines here, checks and times them.")
    parser.add_argument("--name", default=_own_name(), help="what the report calls this host (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of engines and result.json (default: beside the kit)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the target, other than in the recipe"
    )
    given = parser.parse_args(arguments)
    out = given.out or kit.parent / f"{kit.name}-{given.name}"
    try:
        result = measure_kit(kit, out, given.name, _options(given.option))
    except (ExporterError, OSError) as caught:
        error = caught if isinstance(caught, ExporterError) else disk_failure(out, caught)
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. Engines that were built stay: the same command goes on.\n")
        return Interrupted.exit_code
    failed = [cell for cell in result.cells if cell.status == "failed"]
    for cell in failed:
        sys.stderr.write(f"{cell.state}: {cell.error}\n")
    sys.stdout.write(f"{out / RESULT}: written. On the run's machine: exporter merge RUN {RESULT}\n")
    return ComponentFailed.exit_code if failed else 0


def _options(given: Sequence[str]) -> dict[str, Any]:
    """Return options of the command line: numbers, true and false as such, all else as words.

    Raises:
        RecipeError: one has no value.
    """
    found: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"--option: got {item!r}, expected KEY=VALUE. Write --option compute_units=cpu.")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def measure_kit(folder: Path, out: Path, name: str, options: Mapping[str, Any] | None = None) -> Result:
    """Build and measure every state of a kit.

    Args:
        folder: of the kit; nothing is written there.
        out: for engines, which a later call reuses, and ``result.json``.
        name: of this host.
        options: of the target, in the place of the kit's.

    Raises:
        ArtifactError: the kit was altered.
        RecipeError: the name cannot be one.
        ToolMissing: the runtime, or a device that it needs to build, is not here.
    """
    started = time.monotonic()
    if not re.fullmatch(HOST_NAME, name):
        raise RecipeError(f"--name: got {name!r}, expected letters, digits, '.', '_' and '-'. Write --name jetson-1.")
    host = _host(folder, out, name, options or {})
    here = host.target.capabilities()
    cells: list[CellRecord] = []
    for state in host.facts.states:
        _say(f"{state.id} on {host.column}")
        try:
            cells.append(_cell(host, state, cells))
        except (ExporterError, TargetError) as error:
            cells.append(CellRecord(state=state.id, target=host.column, status="failed", error=str(error)))
    target = TargetRecord(
        name=host.column,
        type=host.facts.type,
        options=host.facts.options,
        version=here.version,
        device=here.device,
        host=name,
        machine=machine(),
    )
    result = Result(
        kit=host.kit.digest,
        host=name,
        target=target,
        states={state.id: state.digest for state in host.facts.states},
        cells=cells,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 1),
    )
    whole = result.model_copy(update={"checksum": checksum_of(result)})
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(whole.model_dump(mode="json"), indent=1)  # with infinities, which pydantic would write as null
    write_text(out / RESULT, f"{text}\n")
    return whole


def _host(folder: Path, out: Path, name: str, changed: Mapping[str, Any]) -> Host:
    kit = open_artifact(folder, kind="kit")
    facts = kit_of(kit.manifest.facts, folder)
    facts = facts.model_copy(update={"options": {**facts.options, **changed}})
    fix = f"pip install -r {folder / 'requirements.txt'}"
    target, options = ready_target(facts.target, facts.type, facts.options, fix)
    if isinstance(target, FromTorch) and (late := sorted(changed.keys() - set(target.runtime_options))):
        raise RecipeError(
            f"--option: got '{late[0]}', which the kit's engines were converted with already; expected "
            f"{one_of(target.runtime_options)}. Change it in the recipe, run that, and make another kit."
        )
    return Host(kit, facts, target, options, f"{facts.target}@{name}", out)


def _cell(host: Host, state: KitState, before: Sequence[CellRecord]) -> CellRecord:
    """Build a state and measure it, against dense where that was measured."""
    place, engine = Place(state.id, host.column), host.out / "engines" / state.id
    for part in state.parts:
        _build(host, part, part.graph, engine / part.name, host.options)
    untimed = host.target.capabilities().untimed
    if not host.target.capabilities().runs:
        weighed = {part.name: partial(Weighed, part.products, part.taken) for part in state.parts}
        return built_cell(engine, weighed, host.target, place, host.out)
    has_dense = any(cell.state == DENSE and cell.status == "ok" for cell in before)
    dense = host.out / "engines" / DENSE if has_dense else None
    found: list[Measurement] = missing(IMAGES, place, _NO_IMAGES)
    evidence: dict[str, Any] = {}
    fed: dict[Path, Mapping[str, Array]] = {}
    for part in state.parts:
        _say(f"{state.id} on {host.column}: {part.name}")
        with closing(open_network(host.target, engine / part.name, host.options)) as session:
            here = place.at(part.name)
            found += _answers(host, part, session, here)
            calls = fitted(session, [host.feeds(feeds) for feeds in part.timed])
            timer = timer_of(host.facts.seconds, host.facts.batch, host.facts.type, host.facts.options)
            timing = Timing(session, calls, here, timer, part.is_denoiser, untimed)
            found += latency_of(timing, _opens(host, dense, part.name))
            if part.floats and not untimed:
                found.append(over_float(timing, _rivals(host, part)))
            told = session.evidence()
            found += sparse_measurements(told, here, partial(Weighed, part.products, part.taken))
            found += placement_measurements(told, here)
            evidence[part.name] = told.to_json()
            fed |= fed_parts(part.name, session, calls[0], host.ending)
    found += footprint(engine, host.facts.type, host.facts.options, place, fed, untimed)
    return CellRecord(
        state=state.id,
        target=host.column,
        status="ok",
        measurements=found,
        evidence=evidence,
        engine=str(engine.relative_to(host.out)),
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _opens(host: Host, engine: Path | None, name: str) -> Open | None:
    if engine is None or not (engine / name).is_dir():
        return None
    return partial(open_network, host.target, engine / name, host.options)


def _rivals(host: Host, part: Part) -> dict[str, Open]:
    """Build the float engines of a quantized component, and return how they are opened."""
    made: dict[str, Open] = {}
    for precision, graph in part.floats.items():
        for name, options in float_options(host.target, host.options).items():
            title = name or precision
            engine = host.out / "rivals" / Path(graph).name / title
            _build(host, part, graph, engine, options)
            made[title] = partial(open_network, host.target, engine, options)
    return made


def _build(host: Host, part: Part, graph: str, engine: Path, options: Any) -> None:
    """Compile one component, or find it done by an earlier call."""
    here = host.target.capabilities()
    source = host.kit.path / graph
    key = digest_of([host.kit.part_digest(graph), part.schedule, asdict(options), here.version, here.device])

    def build(out: Path) -> Mapping[str, Any]:
        if isinstance(host.target, FromTorch):  # converted already: what was made there is what runs here
            link_tree(source, out)
            return {"component": part.name}
        try:
            compile_graphs(host.target, options, source, out)
        except TargetError as error:
            raise ComponentFailed(f"{part.name}: {error}") from error
        if part.schedule:
            link_file(host.kit.path / part.schedule, out / SCHEDULE)
        return {"component": part.name}

    if reusable(engine, key) is None:
        _say(f"build {engine.relative_to(host.out)}")
        write_artifact(engine, build, kind="compiled", key=key, parent=host.kit.digest)


def _answers(host: Host, part: Part, session: Session, place: Place) -> list[Measurement]:
    """Put the recorded calls to an engine: against its state itself, and against dense."""
    raw = np.stack([run_batched(session, host.feeds(asked.feeds))[part.output] for asked in part.asked])
    if not part.is_denoiser:
        got, own = raw[0], host.array(part.own)[0] if part.own else None
        told = [] if own is None else lowering(own, got, place)
        return [*told, component_fidelity(host.array(part.dense)[0], got, place)]
    steps = tuple(float(asked.timestep or 0) for asked in part.asked)
    dense = Answers(steps, host.array(part.guided or part.dense), host.array(part.dense))
    width = dense.guided.shape[2]
    guided = np.stack([guide(one, host.facts.guidance)[:, :width] for one in raw]) if part.guided else raw
    answers = Answers(steps, guided, raw)
    told = lowering(Answers(steps, guided, host.array(part.own)), answers, place) if part.own else []
    return [*told, teacher_forced(dense, answers, place)]


def _own_name() -> str:
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", platform.node()).strip("-._")[:63]
    return found or "host"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()

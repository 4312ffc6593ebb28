"""Writes a kit: all that another host needs to build, check and time the engines of a run for one target."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import targets
from exporter import __version__
from exporter.answering import dense_reference, own_answers
from exporter.artifact import (
    Artifact,
    digest_of,
    kind_of,
    link_file,
    link_tree,
    locked,
    open_artifact,
    write_artifact,
    write_text,
)
from exporter.bench import Bench
from exporter.elsewhere.facts import KITS, Asked, Kit, KitState, Part
from exporter.errors import ArtifactError, ExporterError, RecipeError
from exporter.lowering.engine import convert_part, export_rivals, export_state
from exporter.lowering.feeds import recorded_calls
from exporter.lowering.sparsity_report import weigh
from exporter.lowering.workshop import Column, Workshop
from exporter.lowering.wrappers import MAIN_OUTPUT
from exporter.memo import MEMO, FileMemo
from exporter.metrics.fidelity import Answers
from exporter.metrics.place import DENSE
from exporter.metrics.sparse import Weighed
from exporter.networks.components import Component
from exporter.networks.quantization import read_quantization
from exporter.networks.schedule import SCHEDULE
from exporter.progress import Progress, task
from exporter.recipe import Recipe, TargetSpec
from exporter.recordings import dense_recording, export_options, resolved_sampling
from exporter.report.writing import read_record
from exporter.states import components_of, config_of
from exporter.validation import hint, one_of, options_from
from targets.base import TargetError
from targets.torch_source import FromTorch

HOST = "exporter.elsewhere.host"
_SCRIPT = '''\
"""Builds, checks and times the engines of this kit on the machine that it lies on: python measure.py --help"""

import os
import sys
from pathlib import Path

KIT = Path(__file__).resolve().parent
sys.dont_write_bytecode = True  # nothing is written into the kit
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
sys.path.insert(0, str(KIT / "lib"))
if sys.version_info < (3, 11):
    sys.exit(f"measure.py: got Python {sys.version.split()[0]}, expected 3.11 or newer. Run it with a newer one.")
try:
    from exporter.elsewhere.host import main
except ModuleNotFoundError as error:
    fix = f"{sys.executable} -m pip install -r {KIT / 'requirements.txt'}"
    sys.exit(f"measure.py: {error.name} is not installed. Run: {fix}")
sys.exit(main(KIT, sys.argv[1:]))
'''
_README = """\
Engines of {run} for {target}, to be built, checked and timed here:

    python3 -m venv .venv
    .venv/bin/pip install -r requirements.txt
    .venv/bin/python measure.py

That writes engines and result.json beside this folder. Take result.json back: exporter merge RUN result.json

requirements.txt pins what the kit was made with. Other versions of the runtime may be installed; the result says which
was used. Nothing in this folder may be changed: its digests are checked before anything is built.
"""


@dataclass(frozen=True)
class _Making:
    """What making a kit takes.

    Attributes:
        bench: what answers are computed with.
        shop: what components are exported with.
        column: the target that it is for.
        folder: of the kit.
    """

    bench: Bench
    shop: Workshop
    column: Column
    folder: Path

    def keep(self, array: NDArray[Any]) -> str:
        """Write an array into the kit, once however often it occurs; return its name."""
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(array, order="C"), allow_pickle=False)
        name = hashlib.sha256(buffer.getbuffer()).hexdigest()[:32]
        file = self.folder / "arrays" / f"{name}.npy"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(buffer.getbuffer())
        return name

    def keep_all(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, str]:
        """Write the inputs of a call."""
        return {name: self.keep(np.asarray(array)) for name, array in feeds.items()}

    def graph(self, onnx: Artifact) -> str:
        """Put exported graphs into the kit, once however many states use them; return their folder there."""
        place = f"graphs/{onnx.path.name}"
        if not (self.folder / place).is_dir():
            link_tree(onnx.path, self.folder / place)
        return place


def write_kit(run: Path, name: str, out: Path, progress: Progress, states: tuple[str, ...] | None = None) -> Artifact:
    """Write the kit of a run for one of its targets.

    Args:
        run: its folder.
        name: the recipe's name of the target, whose runtime need not be here.
        out: the kit's folder; an older kit there is replaced.
        progress: one unit per state.
        states: beside dense; None for all that the run measured.

    Raises:
        ArtifactError: not a finished run, or a state was changed.
        RecipeError: no such target or state.
    """
    record = read_record(run)
    recipe = Recipe.model_validate(record.recipe)
    spec = _spec(recipe, name)
    target = targets.target(spec.type)
    column = Column(name, target, options_from(target.options, spec.given, f"targets.{name}"))
    known = [state.id for state in record.states]
    wrong = [state for state in states or () if state not in known]
    if wrong or DENSE not in known:
        got = wrong[0] if wrong else f"no {DENSE}"
        raise RecipeError(f"--states: got '{got}', expected {one_of(known)}.{hint(got, known)} Run the recipe first.")
    if out.exists() and kind_of(out) != "kit":
        raise ArtifactError(f"{out}: exists and is no kit; expected a new folder, or a kit to replace. Give another.")
    with locked(run):
        memo = FileMemo.load(run)
        found = {state.id: open_artifact(run / "states" / state.id, memo=memo, kind="state") for state in record.states}
        _check_states(run, {state.id: state.digest for state in record.states}, found)
        bench, shop = _tools(recipe, run, found[DENSE], memo, progress)
        chosen = [DENSE, *(state for state in known if state != DENSE and (states is None or state in states))]

        def build(folder: Path) -> Mapping[str, Any]:
            making = _Making(bench, shop, column, folder)
            with task(progress, f"Kit for {name}", len(chosen)) as told:
                made = []
                for state in chosen:
                    made.append(_state(found[state], making))
                    told.advance()
            _write_lib(folder)
            (folder / "measure.py").write_text(_SCRIPT, encoding="utf-8")
            (folder / "README.txt").write_text(_README.format(run=recipe.name, target=name), encoding="utf-8")
            lines = requirements(spec.type)
            (folder / "requirements.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
            return _facts(recipe, name, spec, bench, made).model_dump(mode="json")

        key = digest_of([record.name, name, [found[state].digest for state in chosen], __version__])
        kit = write_artifact(out, build, kind="kit", key=key, parent=found[DENSE].digest, memo=memo)
        (run / KITS).mkdir(exist_ok=True)
        write_text(run / KITS / f"{kit.digest}.json", kit.manifest.model_dump_json(indent=1) + "\n")
        write_text(run / MEMO, memo.text())
    return kit


def requirements(kind: str) -> list[str]:
    """Return what a host has to install for a type of target: the versions that are here, or our own bounds."""
    return [_pinned(name) for name in ("numpy", "psutil", "pydantic", *targets.target(kind).needs)]


def _pinned(name: str) -> str:
    try:
        return f"{name}=={version(name).partition('+')[0]}"
    except PackageNotFoundError:
        bounds = (line.partition(";")[0].strip() for line in requires("diffusion-exporter") or ())
        return next((line for line in bounds if re.match(rf"{name}(?![A-Za-z0-9._-])", line)), name)


def _spec(recipe: Recipe, name: str) -> TargetSpec:
    if name not in recipe.targets:
        raise RecipeError(f"--target: got '{name}', expected {one_of(recipe.targets)}.{hint(name, recipe.targets)}")
    return recipe.targets[name]


def _check_states(run: Path, told: Mapping[str, str], found: Mapping[str, Artifact]) -> None:
    for name, digest in told.items():
        if found[name].digest != digest:
            raise ArtifactError(
                f"{run}: report.json tells of another {name}; got {found[name].digest[:12]}, expected {digest[:12]}. "
                "Run the recipe again, so that the report and the states agree."
            )


def _tools(recipe: Recipe, run: Path, dense: Artifact, memo: FileMemo, progress: Progress) -> tuple[Bench, Workshop]:
    recording = dense_recording(recipe, dense, run, progress, memo)
    sampling = resolved_sampling(recipe, dense.path)
    export = export_options(recipe, dense.path)
    shop = Workshop(run, export, recording, sampling, progress, memo, recipe.export.requested)
    return Bench(recipe, run, dense, recording, sampling, progress), shop


def _facts(recipe: Recipe, name: str, spec: TargetSpec, bench: Bench, states: list[KitState]) -> Kit:
    plain = recipe.model_dump(mode="json", exclude_none=True)
    return Kit(
        run=recipe.name,
        exporter=__version__,
        target=name,
        type=spec.type,
        options=spec.given,
        guidance=bench.recording.guidance,
        batch=bench.sampling["batch"],
        seconds=recipe.measure.latency_seconds,
        recipe={key: plain[key] for key in ("name", "sampling", "measure", "stages", "gates") if key in plain},
        states=states,
    )


def _state(state: Artifact, making: _Making) -> KitState:
    exported = export_state(state, making.shop, making.column.target)
    parts = components_of(state.path, making.shop.requested)
    made = [_part(state, part, exported.get(part.name), making) for part in parts]
    return KitState(id=state.path.name, digest=state.digest, parts=made)


def _part(state: Artifact, component: Component, onnx: Artifact | None, making: _Making) -> Part:
    """Return what a kit holds of a component: its graph, or, for a target without graphs, what was made of it."""
    bench, config = making.bench, config_of(state.path / component.folder)
    asked = list(recorded_calls(component, config, bench.recording, bench.rows))
    batch = range(min(bench.sampling["batch"], bench.recording.count))
    timed = recorded_calls(component, config, bench.recording, batch)
    dense = dense_reference(component, bench)
    is_guided = isinstance(dense, Answers) and dense.raw.shape[1] > dense.guided.shape[1]
    guided = making.keep(dense.guided) if isinstance(dense, Answers) and is_guided else ""
    quantized = read_quantization(state.path / component.folder) is not None
    if isinstance(making.column.target, FromTorch):
        built, weighed = convert_part(state, component, onnx, making.column, making.shop), Weighed({}, 0)
    else:
        assert onnx is not None
        built, weighed = onnx, weigh(onnx.path / "model.onnx")
    rivals = export_rivals(state, component, making.column.target, making.shop) if quantized and built is onnx else {}
    return Part(
        name=component.name,
        is_denoiser=component.role == "denoiser",
        graph=making.graph(built),
        floats={scheme: making.graph(rival) for scheme, rival in rivals.items()},
        schedule=_schedule(state, component, making.folder),
        output=MAIN_OUTPUT[component.role],
        asked=[Asked(timestep=call.timestep, feeds=making.keep_all(call.feeds)) for call in asked],
        own=_own(state, component, onnx if quantized else None, making),
        dense=making.keep(_raw(dense)),
        guided=guided,
        timed=[making.keep_all(call.feeds) for call in timed],
        products=dict(weighed.products),
        taken=weighed.taken,
    )


def _own(state: Artifact, component: Component, rounded: Artifact | None, making: _Making) -> str:
    """Keep what a state itself answers; nothing where it is quantized in a way that only devices compute."""
    graphs = {} if rounded is None else {component.name: rounded.path / "model.onnx"}
    try:
        return making.keep(_raw(own_answers(state, component, making.bench, graphs)))
    except TargetError:
        if rounded is None:
            raise
        return ""


def _raw(answers: Answers | NDArray[Any]) -> NDArray[Any]:
    return answers.raw if isinstance(answers, Answers) else np.asarray(answers)[None]


def _schedule(state: Artifact, component: Component, folder: Path) -> str:
    file = state.path / component.folder / SCHEDULE
    if component.role != "denoiser" or not file.is_file():
        return ""
    place = f"schedules/{state.path.name}.json"
    link_file(file, folder / place)
    return place


def _write_lib(folder: Path) -> None:
    """Copy the modules that measuring takes, which are those that are loaded when the host's part is imported.

    Raises:
        ExporterError: torch is among them, so that the kit could not run where there is none.
    """
    code = f"import sys, {HOST}, targets.build, targets.footprint; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    if "torch" in loaded:
        raise ExporterError("exporter kit: the part for other hosts loads torch, which they need not have.")
    roots = {name: Path(str(sys.modules[name].__file__)).parent.parent for name in ("exporter", "targets")}
    ours = [name for name in loaded if name.partition(".")[0] in roots]
    named = {Path(*name.split(".")) for name in ours} | _files_of_targets(roots["targets"])
    for path in named:
        root = roots[path.parts[0]]
        source = root / path / "__init__.py" if (root / path).is_dir() else (root / path).with_suffix(".py")
        copy = folder / "lib" / source.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)  # no link: whoever edits the kit must not edit what is installed here


def _files_of_targets(root: Path) -> set[Path]:
    """Return the modules and packages of all targets, which load each other only when they are used."""
    files = (file.relative_to(root) for file in (root / "targets").rglob("*.py"))
    return {file.parent if file.stem == "__init__" else file.with_suffix("") for file in files}

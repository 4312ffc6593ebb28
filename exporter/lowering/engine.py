"""A state to an engine: each component to ONNX, checked against torch, compiled, and laid out for its loaders.

Lowered files are artifacts of their own, keyed by what they are made from: a component that a stage did not touch is
exported and compiled once, and every engine that uses it links the same files.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.schemes import FLOAT
from exporter import __version__
from exporter.artifact import Artifact, digest_of, link_tree, reusable, write_artifact
from exporter.compiling import compile_graphs
from exporter.errors import ComponentFailed, ExporterError
from exporter.lowering.converter import Converter, Order
from exporter.lowering.feeds import recorded_calls, spread
from exporter.lowering.options import ExportOptions
from exporter.lowering.swift import write_swift
from exporter.lowering.workshop import PARTS, Bar, Column, Workshop, make, told
from exporter.networks.components import Component
from exporter.networks.quantization import FILES as QUANTIZATION_FILES
from exporter.networks.quantization import read_quantization
from exporter.networks.schedule import Schedule, read_schedule
from exporter.states import components_of, config_of
from targets.base import Target, TellsProgress, engine_file_of
from targets.torch_source import FromTorch

if TYPE_CHECKING:  # seconds to import
    from torch import nn

    from exporter.lowering.stored import StoredWeights

PARITY_CALLS = 5
"""Timesteps at which an exported denoiser is compared with torch: first, last and three between."""
_GRAPHS = 2
"""Counts changes of what exported graphs answer, so that those of before are not taken for today's."""

_EXPORT_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


def export_state(state: Artifact, shop: Workshop, target: Target | None = None) -> dict[str, Artifact]:
    """Export every component of a state to ONNX, or find it done; parity with torch is enforced.

    Args:
        state: what is exported.
        shop: what lowering shares.
        target: it is for; one that takes torch networks needs graphs only of what is quantized, to be compared with.

    Raises:
        ComponentFailed: a component cannot be exported, or its ONNX answers differently from torch.
    """
    parts, few = components_of(state.path, shop.requested), isinstance(target, FromTorch)
    wanted = [part for part in parts if not few or read_quantization(state.path / part.folder) is not None]
    return {component.name: export_part(state, component, shop) for component in wanted}


def compile_state(state: Artifact, exported: Mapping[str, Artifact], column: Column, shop: Workshop) -> Artifact:
    """Compile every component on a target and lay the engine folder out.

    Args:
        state: what is compiled.
        exported: its components as graphs; a target that takes torch networks has no need of them.
        column: the target.
        shop: what lowering shares.

    Returns:
        The engine, ``OUT/engines/<state>/<target>``.

    Raises:
        ToolMissing: the runtime or the device is not here.
        ComponentFailed: the runtime refused a component.
    """
    here = column.target.capabilities()
    if isinstance(column.target, FromTorch):
        compiled = _convert_parts(state, exported, column, shop)
    else:
        compiled = {name: compile_part(onnx, name, column, shop) for name, onnx in exported.items()}
    facts = {
        "target": column.target.type,
        "options": asdict(column.options),
        "runtime": here.version,
        "device": here.device,
        "components": list(compiled),
        "sampling": shop.sampling,
        "state": state.path.name,
        "state_digest": state.digest,
    }
    key = digest_of([facts, {name: artifact.digest for name, artifact in compiled.items()}])
    final = shop.out / "engines" / state.path.name / column.name
    shop.used.add(f"{state.path.name}/{column.name}")
    found = reusable(final, key, shop.memo)
    if found is not None:
        return found

    def build(folder: Path) -> Mapping[str, Any]:
        from exporter.lowering.layout import write_layout  # diffusers takes seconds to import

        for name, artifact in compiled.items():
            link_tree(artifact.path, folder / name)
        engine_file, scheduler = engine_file_of(column.target, column.options), shop.sampling["scheduler"]
        write_layout(state.path, folder, engine_file=engine_file, scheduler=scheduler, requested=shop.requested)
        if getattr(column.options, "layout", "") == "swift":
            write_swift(folder, scheduler, shop.sampling["size"])
        return facts

    shop.made.append(f"engine {state.path.name} on {column.name}")
    sources = [state.path, *(artifact.path for artifact in compiled.values())]
    return write_artifact(final, build, kind="engine", key=key, parent=state.digest, sources=sources, memo=shop.memo)


def compile_fixed(state: Artifact, component: Component, column: Column, shop: Workshop) -> Artifact:
    """Return one component compiled with the recipe's own shapes fixed, as the measure of open ones.

    Raises:
        ToolMissing, ComponentFailed: as `export_state` and `compile_state`.
    """
    fixed = replace(shop, export=replace(shop.export, dynamic=False))
    return compile_part(export_part(state, component, fixed), component.name, column, fixed)


def tokens_of(component: Component, shop: Workshop) -> int:
    """Return the length of the text that a component was given when the dense pipeline was recorded."""
    recording = shop.recording
    if component.role == "text":
        return int(recording.fed(component.folder, 0, 1)["input_ids"].shape[1])
    states = recording.calls(0, 0, 1).given.get("encoder_hidden_states")
    return shop.export.tokens if states is None else int(states.shape[1])


def export_part(state: Artifact, component: Component, shop: Workshop) -> Artifact:
    """Export one component, or find it done; raises as `export_state`.

    What is quantized is rounded from its graph in float, which is the parent's own.
    """
    source = state.path / component.folder
    plain = export_float(state, component, shop)
    quantization = read_quantization(source)
    if quantization is None:
        return plain
    key = digest_of([state.part_digest(component.folder), component.name, plain.digest, __version__, _GRAPHS])
    work = shop.out / "work" / f"float-{key[:16]}"

    def build(out: Path) -> Mapping[str, Any]:
        from exporter.lowering.quantized import export_quantized  # seconds to import

        return export_quantized(component, source, quantization, plain, (work, out))

    title = f"Round {component.name}, state {state.path.name}"
    folder = f"onnx-{component.name}-{key[:16]}"
    return make(shop, folder, build, kind="onnx", key=key, parent=plain, title=title)


def export_float(state: Artifact, component: Component, shop: Workshop) -> Artifact:
    """Export one component as it is without quantization, or find it done; raises as `export_state`."""
    options = replace(shop.export, tokens=tokens_of(component, shop))
    digest = state.part_digest(component.folder, without=QUANTIZATION_FILES)
    versions = {name: version(name) for name in _EXPORT_LIBRARIES}
    key = digest_of([digest, component.name, asdict(options), versions, __version__, _GRAPHS])
    folder = f"onnx-{component.name}-{key[:16]}"
    place = f"{component.name}, state {state.path.name}"

    def build(out: Path) -> Mapping[str, Any]:
        from exporter.lowering.export import export_component  # seconds to import
        from exporter.lowering.parity import compare_answers, torch_answers
        from exporter.lowering.stored import stored_weights
        from exporter.lowering.wrappers import part_of
        from exporter.lowering.zeros import check_zeros
        from exporter.networks.sparsity import load_claims
        from exporter.networks.storage import load_network, open_bare

        source, name = state.path / component.folder, component.name
        bare, weights = stored_weights(open_bare(source, cls=component.cls), digest)
        schedule = read_schedule(source) if component.role == "denoiser" else None
        if schedule is not None:
            return _export_scheduled(component, (bare, weights, schedule), source, out, options, shop)
        export_component(name, part_of(component, bare), out, options, weights=weights)
        zeros = check_zeros([out / "model.onnx"], load_claims(source), name)
        started = time.monotonic()
        calls = recorded_calls(component, config_of(source), shop.recording, range(shop.sampling["batch"]))
        feeds = [(fed.timestep, fed.feeds) for fed in spread(list(calls), PARITY_CALLS)]
        # torch's network is gone again before the graph is opened: one copy of the weights in memory, not two.
        wanted = torch_answers(part_of(component, load_network(source, cls=component.cls)), feeds)
        parity = compare_answers(name, wanted, out / "model.onnx", feeds)
        shop.took("parity", time.monotonic() - started)
        return {"component": name, "parity": parity, "zeros": zeros}

    return make(shop, folder, build, kind="onnx", key=key, parent=state, title=f"Export {place}")


def export_rivals(state: Artifact, component: Component, target: Target, shop: Workshop) -> dict[str, Artifact]:
    """Export what a quantized component is timed against on a target, by what it computes in; raises as `export_state`.

    That is the component in float, and for targets that compute in the types of the graph also with 16 bits.
    """
    plain = export_float(state, component, shop)
    found = {FLOAT: plain}
    for scheme in getattr(target, "float_rivals", ()):
        key = digest_of([plain.digest, component.name, scheme, __version__, _GRAPHS])
        work = shop.out / "work" / f"float-{key[:16]}"

        def build(out: Path, scheme: str = scheme, work: Path = work) -> Mapping[str, Any]:
            from exporter.lowering.quantized import export_narrow  # seconds to import

            return export_narrow(component, scheme, plain, (work, out))

        title = f"Round {component.name} to {scheme}, state {state.path.name}"
        folder = f"onnx-{component.name}-{key[:16]}"
        found[scheme] = make(shop, folder, build, kind="onnx", key=key, parent=plain, title=title)
    return found


def _export_scheduled(
    component: Component,
    parts: tuple[nn.Module, StoredWeights, Schedule],
    source: Path,
    out: Path,
    options: ExportOptions,
    shop: Workshop,
) -> Mapping[str, Any]:
    """Export every pattern of a schedule; `parts` are the network without weights, where these lie, the schedule."""
    from exporter.lowering.scheduled import check_patterns, export_patterns  # seconds to import
    from exporter.lowering.zeros import check_zeros
    from exporter.networks.sparsity import load_claims
    from exporter.networks.storage import load_network

    bare, weights, schedule = parts
    export_patterns(component, bare, weights, schedule, out, options)
    zeros = check_zeros(sorted(out.glob("pattern-*.onnx")), load_claims(source), component.name)
    started = time.monotonic()
    network, rows = load_network(source, cls=component.cls), range(shop.sampling["batch"])
    parity = check_patterns(component, network, schedule, shop.recording, out, rows, PARITY_CALLS)
    shop.took("parity", time.monotonic() - started)
    return {"component": component.name, "parity": parity, "zeros": zeros}


def compile_part(onnx: Artifact, name: str, column: Column, shop: Workshop) -> Artifact:
    """Compile one exported component, or find it done; raises as `compile_state`."""
    target, here = column.target, column.target.capabilities()
    key = digest_of([onnx.digest, target.type, asdict(column.options), here.version, here.device, __version__])
    folder = f"{target.type}-{name}-{key[:16]}"

    bar = Bar(shop.progress, PARTS if isinstance(target, TellsProgress) else 1)

    def build(out: Path) -> Mapping[str, Any]:
        with told(column, name):
            peak_mib = compile_graphs(column.target, column.options, onnx.path, out, bar)
            shop.peak_mib = max(shop.peak_mib, peak_mib)
        return {"component": name, "target": target.type, "options": asdict(column.options)}

    title = f"Compile {name} for {column.name}"
    return make(shop, folder, build, kind="compiled", key=key, parent=onnx, title=title, bar=bar)


def _convert_parts(
    state: Artifact, exported: Mapping[str, Artifact], column: Column, shop: Workshop
) -> dict[str, Artifact]:
    """Convert every component; where one fails, the others are there when it is mended."""
    found, failed = dict[str, Artifact](), dict[str, ComponentFailed]()
    for part in components_of(state.path, shop.requested):
        try:
            found[part.name] = convert_part(state, part, exported.get(part.name), column, shop)
        except ComponentFailed as error:
            failed[part.name] = error
    if failed:
        first, *others = failed
        also = f" Failed too: {', '.join(others)}." if others else ""
        raise ComponentFailed(f"{failed[first]}{also}") from failed[first]
    return found


def expect_conversions(columns: Sequence[Column], converter: Converter) -> None:
    """Start the process that converts where one of the targets will need it."""
    if any(isinstance(column.target, FromTorch) for column in columns):
        converter.start()


def begin_conversions(state: Artifact, columns: Sequence[Column], shop: Workshop) -> None:
    """Have a state's components converted while they are exported for other targets: each takes one core.

    What is quantized waits for its rounded graph.
    """
    for column in columns:
        if not isinstance(column.target, FromTorch):
            continue
        with suppress(ExporterError):  # the cell meets it too, and tells it as its own
            for part in components_of(state.path, shop.requested):
                if read_quantization(state.path / part.folder) is None and not _is_scheduled(state, part):
                    order, key, folder = _conversion(state, part, None, column, shop)
                    if reusable(shop.out / "lowered" / folder, key, shop.memo) is None:
                        shop.converter.begin(order)


def convert_part(
    state: Artifact, component: Component, rounded: Artifact | None, column: Column, shop: Workshop
) -> Artifact:
    """Convert one component for a target that takes torch networks, or find it done; raises as `compile_state`.

    What is `rounded`, a quantized component exported, says what its weights and ranges are.
    """
    if _is_scheduled(state, component):
        raise ComponentFailed(
            f"target {column.name}: it cannot run the several graphs of a schedule. Choose openvino or onnxruntime."
        )
    order, key, folder = _conversion(state, component, rounded, column, shop)

    def build(out: Path) -> Mapping[str, Any]:
        with told(column, component.name):
            shop.peak_mib = max(shop.peak_mib, shop.converter(order))
        for made in Path(order.out).iterdir():
            made.rename(out / made.name)
        Path(order.out).rmdir()
        return {"component": component.name, "target": column.target.type, "options": asdict(column.options)}

    title = f"Convert {component.name} for {column.name}"
    return make(shop, folder, build, kind="compiled", key=key, parent=state, title=title)


def _is_scheduled(state: Artifact, component: Component) -> bool:
    return component.role == "denoiser" and read_schedule(state.path / component.folder) is not None


def _conversion(
    state: Artifact, component: Component, rounded: Artifact | None, column: Column, shop: Workshop
) -> tuple[Order, str, str]:
    """Return what is to be done to convert a component, the key of what comes of it, and the name of its folder."""
    target, here = column.target, column.target.capabilities()
    digest, versions = state.part_digest(component.folder), {name: version(name) for name in _EXPORT_LIBRARIES}
    export = asdict(replace(shop.export, tokens=tokens_of(component, shop)))
    asked = [component.name, target.type, asdict(column.options), export, shop.recording.digest]
    key = digest_of([digest, asked, versions, here.version, __version__, _GRAPHS])
    folder = f"{target.type}-{component.name}-{key[:16]}"
    order = Order(
        state=str(state.path),
        component=component.name,
        requested=shop.requested,
        target=target.type,
        options=asdict(column.options),
        export=export,
        recording=str(shop.recording.folder),
        rows=shop.sampling["batch"],
        calls=PARITY_CALLS,
        facts={"weights_sha256": digest},
        out=str(shop.out / "work" / folder),
        rounded="" if rounded is None else str(rounded.path / "model.onnx"),
    )
    return order, key, folder

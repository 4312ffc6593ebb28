"""Compiles exported graphs for a target, each in a process of its own; needs no torch."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import targets
from exporter.errors import RecipeError, ToolMissing
from exporter.metrics.size import run_child
from exporter.validation import hint, one_of, options_from
from targets.base import Target, TargetError, TargetMissing
from targets.build import raise_told

_LONGEST_S = 6 * 3600


def ready_target(name: str, kind: str, given: Mapping[str, Any], fix: str = "") -> tuple[Target, Any]:
    """Return a target that can be compiled for here, and its options, checked.

    Args:
        name: the recipe's.
        kind: type of the target.
        given: its options as the recipe has them.
        fix: how its runtime is installed; the target's own command by default.

    Raises:
        RecipeError: no such type, or options that cannot be honoured.
        ToolMissing: the runtime or the device is not here.
    """
    if kind not in targets.TARGETS:
        known = targets.TARGETS
        raise RecipeError(f"targets.{name}.type: got '{kind}', expected {one_of(known)}.{hint(kind, known)}")
    target = targets.target(kind)
    options: Any = options_from(target.options, given, f"targets.{name}")
    here = target.capabilities()
    if not here.available:
        raise ToolMissing(f"target {name}: {here.reason} Run: {fix or here.install}")
    try:
        target.check(options)
    except TargetMissing as error:
        raise ToolMissing(f"target {name}: {error}") from error
    except TargetError as error:
        raise RecipeError(f"targets.{name}: {error}") from error
    return target, options


def compile_graphs(
    target: Target, options: Any, source: Path, out: Path, told: Callable[[float], object] = lambda done: None
) -> float:
    """Compile what was exported of one component: one graph, or those of its schedule, which then share their weights.

    Args:
        target: to compile for.
        options: of the target.
        source: folder with ``model.onnx``, or with ``pattern-*.onnx``.
        out: an existing, empty folder.
        told: called with the done fraction, of targets that know it.

    Returns:
        The most memory that a compiling process had, in MiB.

    Raises:
        TargetMissing, TargetError, ComponentFailed: it did not succeed.
    """
    graphs = sorted(source.glob("pattern-*.onnx"))
    if not graphs:
        return _compile(target, options, source / "model.onnx", out, told)
    join = getattr(target, "join", None)
    if join is None:
        raise TargetError("it cannot run the several graphs of a schedule. Choose openvino or onnxruntime.")
    parts = [out / graph.stem for graph in graphs]
    peaks = []
    for graph, part in zip(graphs, parts, strict=True):
        part.mkdir()
        peaks.append(_compile(target, options, graph, part, told))
    join(parts, out, options)
    return max(peaks)


def run_telling(command: Sequence[str], watch: Callable[[], object] = lambda: None) -> float:
    """Run a process that tells as `targets.build` does how it ended.

    Args:
        command: that starts it.
        watch: called again and again while it runs.

    Returns:
        The most memory that it had, in MiB.

    Raises:
        TargetMissing, TargetError, ComponentFailed: it did not succeed.
    """
    child = run_child(command, timeout_s=_LONGEST_S, paths=sys.path, watch=watch)
    raise_told(child.output)
    return child.peak_rss_mib


def float_options(target: Target, options: Any) -> dict[str, Any]:
    """Return the options under which a float graph is the rival of a quantized one, by what it then computes in.

    These are the options' own precision and the device's fastest; a target without such an option has one rival,
    under the empty word.
    """
    own = getattr(options, "precision", "")
    if not own:
        return {"": options}
    names = dict.fromkeys([own, *target.capabilities().precisions[-1:]])
    return {name: replace(options, precision=name) for name in names}


def _compile(target: Target, options: Any, source: Path, out: Path, told: Callable[[float], object]) -> float:
    """Compile in a process of its own, so that a crash, or the kernel's hand when memory runs out, ends only that.

    Returns:
        The most memory that it had, in MiB.

    Raises:
        TargetMissing, TargetError, ComponentFailed: it did not succeed.
    """
    asked = json.dumps(asdict(options))
    command = [sys.executable, "-m", "targets.build", targets.TARGETS[target.type], asked, str(source), str(out)]
    with tempfile.TemporaryDirectory(prefix="exporter-") as folder:
        file = Path(folder) / "progress"

        def watch() -> None:
            with contextlib.suppress(OSError, ValueError):  # not written yet, or not whole
                told(float(file.read_text(encoding="ascii")))

        return run_telling([*command, str(file)], watch)

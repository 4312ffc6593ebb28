"""Latencies of networks and of their parts on a target, for methods that cut by time: lowered, compiled, timed there.

What is timed later is timed pair by pair against the first of its kind, so that a machine that is busy for a while
slows both: a latency here is a ratio, times the milliseconds of that first one.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from exporter.artifact import digest_of, write_text
from exporter.compiling import compile_graphs
from exporter.errors import ComponentFailed, ToolMissing
from exporter.lowering.options import ExportOptions
from exporter.lowering.workshop import Column
from exporter.metrics.latency import Timer
from exporter.networks.fingerprint import structure_of
from exporter.networks.probe import evaluating
from exporter.progress import Progress, task
from targets.base import Session, TargetError, TargetMissing

Feeds = dict[str, NDArray[Any]]
WHOLE, UNITS = "whole", "units"
_KNOWN, _FEEDS = "latencies.json", "feeds.safetensors"
_TIMER = Timer(samples=20, budget_s=30.0)
_ORDER_SEED = 0


class TargetStopwatch:
    """Times denoisers and parts of them on one target; see `exporter.pruners.base.Stopwatch`.

    Latency does not depend on weights: networks of equal structure are measured once, also over several processes.

    Args:
        column: the target.
        export: how the recipe exports the denoiser: batch, rows of guidance, size, tokens. Shapes are fixed here.
        folder: what was measured is kept here, and the engines that later ones are compared with.
        progress: one unit per part of a network.
        timer: takes the times.
    """

    def __init__(
        self, column: Column, export: ExportOptions, folder: Path, progress: Progress, timer: Timer = _TIMER
    ) -> None:
        self._column, self._export = column, replace(export, dynamic=False)
        self._folder, self._progress, self._timer = folder, progress, timer

    @property
    def digest(self) -> str:
        """Digest of the target, its options and its machine, and of the recipe's batch and size."""
        return self._key("")

    def whole_ms(self, network: nn.Module) -> float:
        """Return the median latency of one call of a denoiser, in ms.

        Raises:
            ToolMissing: the runtime or device is not here.
            ComponentFailed: it cannot be exported, compiled or run.
        """
        from exporter.lowering.export import export_component  # seconds to import
        from exporter.lowering.wrappers import Sizes, example_feeds, signature

        def build(out: Path) -> Feeds:
            export_component("denoiser", network, out, self._export)
            rows = self._export.batch * (2 if self._export.guided else 1)
            tensors = example_feeds(network, Sizes(rows, self._export.latent, self._export.tokens))
            return {name: _array(value) for name, value in zip(signature(network).inputs, tensors, strict=True)}

        return self._measured(WHOLE, self._key(structure_of(network)), build)

    def units_ms(self, network: nn.Module, paths: Sequence[str]) -> dict[str, float]:
        """Return the median latency of modules of a denoiser, each alone, with what it is given in one forward pass.

        Equal modules with equal inputs are measured once, in random order, one in memory at a time.

        Raises:
            ToolMissing, ComponentFailed: as `whole_ms`.
        """
        seen = self._watch(network, paths)
        by_key = {unit.key: (path, unit) for path, unit in seen.items()}
        known = self._known(UNITS)
        open_keys = sorted(key for key in by_key if key not in known)
        random.Random(_ORDER_SEED).shuffle(open_keys)
        if not known and open_keys:  # the largest is the steadiest to compare the others with
            largest = max(open_keys, key=lambda key: by_key[key][1].inputs.stat().st_size)
            open_keys = [largest, *(key for key in open_keys if key != largest)]
        with task(self._progress, f"Time units on {self._column.name}", len(open_keys)) as told:
            for key in open_keys:
                path, unit = by_key[key]
                self._measured(UNITS, key, partial(self._build_unit, path, unit))
                told.advance(note=path)
        shutil.rmtree(self._folder / "inputs", ignore_errors=True)
        timed = self._known(UNITS)
        return {path: timed[unit.key] for path, unit in seen.items()}

    def control(self) -> dict[str, tuple[float, float, float]]:
        """Return, for whole networks and for units, the ratio of one engine timed against itself: median, low, high."""
        return {kind: tuple(found["control"]) for kind, found in self._read().items() if found["control"]}

    def _measured(self, kind: str, key: str, build: Callable[[Path], Feeds]) -> float:
        """Return a latency, known or taken now and kept at once."""
        self._folder.mkdir(parents=True, exist_ok=True)
        known = self._known(kind)
        if key in known:
            return known[key]
        anchor = self._folder / _anchor(kind)
        with self._engine(key, build) as engine:
            if not known:
                self._keep(kind, key, *self._first(engine, anchor))
            else:
                with self._opened(engine) as mine, self._opened(anchor) as first:
                    ratio = self._timer.interleaved(mine, first).ratio(kind).value
                self._keep(kind, key, ratio * next(iter(known.values())))
        return self._known(kind)[key]

    def _first(self, engine: Path, anchor: Path) -> tuple[float, tuple[float, float, float]]:
        """Keep the first engine of a kind; time it against itself, and a unit against a whole network."""
        shutil.rmtree(anchor, ignore_errors=True)
        engine.replace(anchor)
        with self._opened(anchor) as mine, self._opened(anchor) as again:
            pairs = self._timer.interleaved(mine, again)
        ratio, ms = pairs.ratio("itself"), pairs.a.median_ms
        whole = self._known(WHOLE)
        if whole and anchor.name != _anchor(WHOLE):  # one scale for units and whole networks
            with self._opened(anchor) as mine, self._opened(self._folder / _anchor(WHOLE)) as first:
                ms = self._timer.interleaved(mine, first).ratio(WHOLE).value * next(iter(whole.values()))
        return ms, (round(ratio.value, 4), round(ratio.low, 4), round(ratio.high, 4))

    @contextmanager
    def _engine(self, key: str, build: Callable[[Path], Feeds]) -> Iterator[Path]:
        """Export and compile into a folder that is gone afterwards."""
        folder = self._folder / f"partial-{key[:16]}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "onnx").mkdir(parents=True)
        (folder / "engine").mkdir()
        try:
            feeds = build(folder / "onnx")
            compile_graphs(self._column.target, self._column.options, folder / "onnx", folder / "engine")
            shutil.rmtree(folder / "onnx")
            save_arrays(feeds, folder / "engine" / _FEEDS)
            yield folder / "engine"
        except TargetMissing as error:
            raise ToolMissing(f"target {self._column.name}: {error}") from error
        except TargetError as error:
            raise ComponentFailed(f"target {self._column.name}: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _opened(self, engine: Path) -> Iterator[Callable[[], object]]:
        feeds = load_arrays(engine / _FEEDS)
        session: Session = self._column.target.open(engine, self._column.options)
        # A runtime may drop an input that nothing reads.
        taken = {spec.name: feeds[spec.name] for spec in session.inputs}
        try:
            yield lambda: session(taken)
        finally:
            session.close()

    def _watch(self, network: nn.Module, paths: Sequence[str]) -> dict[str, _Unit]:
        """Run a network once and note what each module is given; inputs of what is not measured yet go to files."""
        from exporter.lowering.wrappers import Sizes, example_feeds, wrap

        seen: dict[str, _Unit] = {}
        known = self._known(UNITS)
        inputs = self._folder / "inputs"
        inputs.mkdir(parents=True, exist_ok=True)

        def look(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                leaves, spec = tree_flatten((args, kwargs))
                tensors = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
                constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
                shapes = {name: [list(value.shape), str(value.dtype)] for name, value in tensors.items()}
                key = self._key([structure_of(module), shapes, repr(constants), str(spec)])
                file = inputs / f"{key}.safetensors"
                if key not in known and not file.exists():
                    save_file(
                        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, file
                    )
                seen[path] = _Unit(key, module, spec, constants, file)

            return note

        rows = self._export.batch * (2 if self._export.guided else 1)
        feeds = example_feeds(network, Sizes(rows, self._export.latent, self._export.tokens))
        with ExitStack() as hooks, evaluating(network), torch.no_grad():
            for path in paths:
                hook = network.get_submodule(path).register_forward_pre_hook(look(path), with_kwargs=True)
                hooks.callback(hook.remove)
            wrap(network)(*feeds)
        missing = [path for path in paths if path not in seen]
        if missing:
            raise ComponentFailed(f"stopwatch: {missing[0]} takes no part in a forward pass; expected modules that do.")
        return seen

    def _build_unit(self, path: str, unit: _Unit, out: Path) -> Feeds:
        from exporter.lowering.export import export_function

        stored = load_file(unit.inputs)
        order = sorted(stored, key=int)
        tensors = tuple(stored[name] for name in order)
        wrapped = _Alone(unit.module, unit.spec, unit.constants, tuple(int(name) for name in order))
        with evaluating(unit.module):
            export_function(path, wrapped, tensors, out, self._export)
        return {f"input_{index}": _array(value) for index, value in enumerate(tensors)}

    def _key(self, what: object) -> str:
        here = self._column.target.capabilities()
        target = [self._column.target.type, asdict(self._column.options), here.version, here.device]
        return digest_of([what, target, asdict(self._export)])

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self._folder / _KNOWN
        if not path.is_file():
            return {kind: {"ms": {}, "control": []} for kind in (WHOLE, UNITS)}
        return cast("dict[str, dict[str, Any]]", json.loads(path.read_text(encoding="utf-8")))

    def _known(self, kind: str) -> dict[str, float]:
        """Return what is known by key, the first measured first; nothing where its engine is gone."""
        found: dict[str, float] = self._read()[kind]["ms"]
        return found if (self._folder / _anchor(kind)).is_dir() else {}

    def _keep(self, kind: str, key: str, ms: float, control: Sequence[float] = ()) -> None:
        every = self._read()
        if control:
            every[kind] = {"ms": {}, "control": list(control)}
        every[kind]["ms"][key] = ms
        write_text(self._folder / _KNOWN, json.dumps(every))


@dataclass(frozen=True)
class _Unit:
    """One module as a forward pass called it: tensors in a file, the rest as constants."""

    key: str
    module: nn.Module
    spec: TreeSpec
    constants: tuple[Any, ...]
    inputs: Path


def _anchor(kind: str) -> str:
    return f"first-{kind}"


class _Alone(nn.Module):
    """A module as a function of the tensors that it is given, wherever in its arguments they are."""

    def __init__(self, net: nn.Module, spec: TreeSpec, constants: tuple[Any, ...], places: tuple[int, ...]) -> None:
        super().__init__()
        self.net = net
        self._spec, self._constants, self._places = spec, constants, places

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return every tensor that the module answers."""
        leaves = list(self._constants)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        return tuple(leaf for leaf in tree_leaves(self.net(*args, **kwargs)) if isinstance(leaf, Tensor))


def _array(value: Tensor) -> NDArray[Any]:
    return value.detach().cpu().contiguous().numpy()

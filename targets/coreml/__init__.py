"""Core ML: a torch network to ML Programs for iPhone, iPad and Mac, run by Core ML there and evaluated elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from targets.base import (
    Capabilities,
    Profiled,
    TargetError,
    TargetMissing,
    check_threads,
    graph_path,
    installed_version,
    require,
)
from targets.coreml.package import MANIFEST
from targets.coreml.weights import check_weights
from targets.torch_source import TorchProgram

PLACE = "target coreml"
INSTALL = "pip install 'diffusion-exporter[coreml]'"
DEPLOYMENTS = ("iOS16", "iOS17", "iOS18")
UNITS = ("all", "cpu-and-neural-engine", "cpu-and-gpu", "cpu")
_UNTIMED = (
    "evaluated with torch, not run by Core ML: its time says nothing about a device. Take a kit to a Mac: `exporter "
    "kit RUN --target NAME`, there `bash ci/macos.sh KIT` or its measure.py, then `exporter merge RUN result.json`"
)


@dataclass(frozen=True)
class CoreMlOptions:
    """Options of the target ``coreml``.

    Attributes:
        deployment: the oldest system that the packages are for; macOS 13, 14 and 15 go with iOS 16, 17 and 18.
        precision: of what is computed; in ``f16``, what overflows on recorded inputs stays in 32 bits, and so does the
            way from the timestep to its sines.
        weights: what weights of over 2,048 numbers are stored as: ``palette-2``, ``-4``, ``-6`` and ``-8`` (indices
            into tables), ``int8``, ``int4`` (by blocks of 32), ``sparse`` (zeros left out, the rest exact), and
            ``sparse-palette-N`` and ``sparse-int8``. What each needs of the system is checked.
        group: output channels that share a palette, from iOS 18 on; 0 for one table per weight.
        neural_engine: write U-Nets and CLIP text encoders in the form that Apple advises for the Neural Engine; other
            networks stay as they are.
        layout: ``swift`` adds a folder with the names and shapes that Apple's Swift package StableDiffusion takes; it
            needs the form for the Neural Engine, and a batch of one image.
        chunks: packages that the denoiser is cut into, each below 1 GB, as iOS wants them; 1 leaves it whole.
        compute_units: which units Core ML may choose from, where it runs.
        license: of the model, as its makers state it; goes into the packages.
        threads: of the evaluation where there is no Core ML; None for one per core.
    """

    deployment: Literal["iOS16", "iOS17", "iOS18"] = "iOS17"
    precision: Literal["f16", "f32"] = "f16"
    weights: Literal[
        "float",
        "palette-2",
        "palette-4",
        "palette-6",
        "palette-8",
        "int8",
        "int4",
        "sparse",
        "sparse-palette-4",
        "sparse-palette-6",
        "sparse-palette-8",
        "sparse-int8",
    ] = "float"
    group: int = field(default=0, metadata={"minimum": 0})
    neural_engine: bool = False
    layout: Literal["plain", "swift"] = "plain"
    chunks: Literal[1, 2, 4] = 1
    compute_units: Literal["all", "cpu-and-neural-engine", "cpu-and-gpu", "cpu"] = "all"
    license: str = ""
    threads: int | None = field(default=None, metadata={"minimum": 1})


class CoreMl:
    """Makes packages for Core ML; runs them with it on a Mac, and evaluates them elsewhere."""

    type = "coreml"
    options = CoreMlOptions
    engine_file = MANIFEST
    needs = ("coremltools",)
    schemes = ("int8", "int8-weights", "palette-2", "palette-4", "palette-6", "palette-8")
    rounds_results = False
    runtime_options = ("compute_units", "threads")

    def capabilities(self) -> Capabilities:
        """Say what this machine can do."""
        version = installed_version("coremltools")
        if version is None:
            return Capabilities(False, False, None, "", (), INSTALL, "'coremltools' is not installed.")
        if runs_core_ml():
            from targets.coreml.device import machine_name

            return Capabilities(True, True, version, f"Core ML on {machine_name()}", ("f32", "f16"), INSTALL)
        if installed_version("torch") is None:
            reason = "'torch' is not installed, which evaluates packages off macOS: pip install torch, or use a Mac."
            return Capabilities(False, False, version, "", (), INSTALL, reason)
        device = "ML Programs evaluated with torch, not Core ML"
        return Capabilities(True, True, version, device, ("f32", "f16"), INSTALL, untimed=_UNTIMED)

    def check(self, options: CoreMlOptions) -> None:
        """Raise TargetMissing or TargetError when these options cannot be honoured on this machine."""
        check_threads(options.threads, PLACE)
        allowed = {
            "deployment": DEPLOYMENTS,
            "precision": ("f16", "f32"),
            "chunks": (1, 2, 4),
            "layout": ("plain", "swift"),
            "compute_units": UNITS,
        }
        for name, words in allowed.items():
            got = getattr(options, name)
            if got not in words:
                expected = ", ".join(map(str, words))
                raise TargetError(f"{PLACE}: {name}: got {got!r}, expected one of {expected}. Write {words[0]}.")
        if options.layout == "swift" and (not options.neural_engine or options.chunks == 4):
            got = f"neural_engine: {str(options.neural_engine).lower()}, chunks: {options.chunks}"
            raise TargetError(
                f"{PLACE}: layout: swift: got {got}, expected neural_engine: true, since Apple's package feeds text "
                "states channels first, and chunks: 1 or 2, which is what it loads. Write these."
            )
        check_weights(options.weights, options.deployment, options.group)
        here = self.capabilities()
        if not here.available:
            raise TargetMissing(f"{PLACE}: {here.reason} Run: {here.install}")
        if runs_core_ml():
            coremltools()  # its import takes seconds, which belong to no opening

    def compile(self, source: Path, out: Path, options: CoreMlOptions) -> None:
        """Refuse: packages are made from the torch network, see `convert`.

        Raises:
            TargetError: always.
        """
        raise TargetError(f"{PLACE}: {source}: got an ONNX file, expected a torch network. Run a recipe on its state.")

    def convert(self, program: TorchProgram, out: Path, options: CoreMlOptions) -> None:
        """Convert a network into `out`: ``coreml.json`` and the packages that it names.

        Raises:
            TargetMissing: coremltools is not here.
            TargetError: the network does not convert, or what came of it breaks one of Core ML's limits.
        """
        self.check(options)
        from targets.coreml.convert import convert

        convert(program, out, options)

    def join(self, parts: Sequence[Path], out: Path, options: CoreMlOptions) -> None:
        """Refuse: every package holds weights of its own.

        Raises:
            TargetError: always.
        """
        raise TargetError(f"{PLACE}: it cannot run the several graphs of a schedule. Choose openvino or onnxruntime.")

    def open(self, engine: Path, options: CoreMlOptions) -> Profiled:
        """Load the packages of a component: with Core ML on a Mac, for evaluation elsewhere."""
        self.check(options)
        from targets.coreml.session import CoreMlSession

        return CoreMlSession(graph_path(engine, self.engine_file), options, core_ml=runs_core_ml())


def runs_core_ml() -> bool:
    """Tell whether packages can be run by Core ML on this machine."""
    return sys.platform == "darwin"


def coremltools() -> object:
    """Return the library, its remarks on other packages' versions left out.

    Raises:
        TargetMissing: it is not installed.
    """
    import logging

    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return require("coremltools", PLACE, INSTALL)
    finally:
        logger.setLevel(level)

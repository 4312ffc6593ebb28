"""Networks in memory, for targets that are not compiled from ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from targets.base import Array


@dataclass(frozen=True)
class TorchProgram:
    """A network in memory, and what is known of it.

    Attributes:
        name: of the component.
        module: a `torch.nn.Module` in evaluation mode that takes the inputs in order and returns the outputs.
        inputs: name -> example of the shape that is compiled, in order. Where one is a scalar, the module takes it with
            one axis as well.
        outputs: names, in order.
        shapes: further shapes, each as long as `inputs`, that the engine takes too.
        calls: recorded inputs of the network, to prove the engine with.
        about: input, output or (empty name) component -> what it is, in a sentence.
        ports: input or output -> what the engine calls it, and how it takes it (`targets.coreml.package.FORMS`), where
            a loader of its own expects that; `inputs` and `calls` are as callers give them all the same.
        stored: path of a module -> how its weight is stored, where its state says so; others as the options say.
        facts: strings that go into the engine's metadata, ``weights_sha256`` among them.
        prefix: of the paths of modules in `module`, which nobody outside knows.
        is_denoiser: whether it is the network that the others are small beside.
    """

    name: str
    module: Any
    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[tuple[int, ...], ...], ...] = ()
    calls: tuple[Mapping[str, Array], ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    is_denoiser: bool = False


@runtime_checkable
class FromTorch(Protocol):
    """A target that is compiled from a network in memory, and takes no ONNX.

    Attributes:
        runtime_options: those that an engine can be opened with other than it was converted with.
    """

    runtime_options: tuple[str, ...]

    def convert(self, program: TorchProgram, out: Path, options: Any) -> None:
        """Build an engine, as `Target.compile` does; the module may be changed by it."""

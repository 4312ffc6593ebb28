"""What every tuning method gets and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import nn

from calibration.calling import Form
from exporter.progress import Progress

if TYPE_CHECKING:  # seconds to import
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Shelf:
    """Where training data is kept for every stage of a run, so that the same latents are not drawn twice.

    Attributes:
        folder: holds chunks under the digest of what they were made from.
        seed: what is drawn follows from it.
    """

    folder: Path
    seed: int


@dataclass(frozen=True)
class TuneContext:
    """What the run lends to a method.

    Attributes:
        seed: everything random follows from it.
        progress: where long work reports to.
        workdir: an own folder for data and checkpoints, kept between attempts and keyed by the stage.
        prompts: the prompts of a named set or file.
        steps: denoising steps of the recipe's sampling.
        guidance: its guidance scale.
        size: its image side in pixels.
        form: how the dense pipeline is called.
        shelf: of training data; by default an own one.
        sparsity: name of a weight -> (n, m): zeros of the student that must stay; see `exporter.networks.sparsity`.
    """

    seed: int
    progress: Progress
    workdir: Path
    prompts: Callable[[str], list[str]]
    steps: int
    guidance: float
    size: int
    form: Form = Form()  # noqa: RUF009 - frozen
    shelf: Shelf | None = None
    sparsity: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Tuner(Protocol):
    """A tuning method.

    Attributes:
        options: frozen dataclass; its fields are the recipe's keys of the stage, `method` left out.
    """

    options: ClassVar[type[Any]]

    def __init__(self, options: Any) -> None:
        """Keep the options, an instance of the class attribute `options`."""

    def tune(self, student: nn.Module, teacher: DiffusionPipeline, context: TuneContext) -> dict[str, Any]:
        """Train the student's weights in place towards the teacher's denoiser; return facts as JSON values.

        Facts are equal for equal runs, interrupted or not: no times, no paths.
        """

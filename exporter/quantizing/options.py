"""The recipe's keys of a stage that quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import ConfigDict

from calibration.schemes import NARROW, PALETTE_MIXED
from exporter.errors import RecipeError
from exporter.validation import options_from


@dataclass(frozen=True)
class CalibrationOptions:
    """What ranges are fitted on.

    Attributes:
        prompts: set or file of prompts; other than those that are measured. The embedded model has its own.
        samples: images that the dense pipeline draws for the first of them, and whose calls are recorded.
        calls: how many of the recorded calls ranges are fitted on, each of as many images as the recipe's batch.
        timesteps: which steps these are of: at even distances, one at random out of equal parts of the trajectory, or
            more of them where the answer changes fast.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # pydantic's own way for dataclasses

    prompts: str | None = None
    samples: int = field(default=16, metadata={"minimum": 1})
    calls: int = field(default=16, metadata={"minimum": 1})
    timesteps: Literal["uniform", "stratified", "informative"] = "stratified"

    @property
    def least_prompts(self) -> int:
        """How many prompts there have to be."""
        return self.samples


@dataclass(frozen=True)
class QuantizeOptions:
    """Weights, or weights and activations, as small numbers.

    Attributes:
        scheme: of every unit that the plan does not name.
        component: the network; denoiser, or a name such as text_encoder.
        calibration: what ranges of activations are fitted on.
        smoothness: how much of the difference between a linear layer's input channels goes into its weights, from 0
            (none) to 1 (all); SmoothQuant's alpha.
        group_size: inputs of a linear layer that share a scale of 4 bits.
        results: of convolutions: ``int8`` rounds them too, which ONNX Runtime's and TensorRT's integer kernels need,
            ``float`` does not, which is more exact; ``auto`` does it where a target of the recipe needs it.
        limit_db: where it is given, the plan is made by measurement: the one that saves most of all whose answers to
            recorded calls keep this PSNR to the float network's, the worst call's.
        size: of ``palette-mixed``: the share of the weights' size in 16 bits that they may take, in place of a limit.
        objective: what it saves: time on the recipe's first target, or bytes; palettes save bytes in any case.
        require_speedup: how many times as fast as in float, at its fastest precision, the component has to be on every
            target; a gate. Without it the report tells all the same what is no faster.
        plan: a file that says the scheme of some units: one a line, its module path and the scheme.
    """

    scheme: Literal[
        "int8",
        "int8-weights",
        "int4-weights",
        "fp16",
        "bf16",
        "fp8",
        "palette-2",
        "palette-4",
        "palette-6",
        "palette-8",
        "palette-mixed",
    ]
    component: str = "denoiser"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    smoothness: float = field(default=0.5, metadata={"minimum": 0, "maximum": 1})
    group_size: int = field(default=64, metadata={"minimum": 1})
    results: Literal["auto", "float", "int8"] = "auto"
    limit_db: float | None = None
    size: float | None = field(default=None, metadata={"exclusiveMinimum": 0, "maximum": 1})
    objective: Literal["latency", "bytes"] = "latency"
    require_speedup: float | None = field(default=None, metadata={"exclusiveMinimum": 0})
    plan: str | None = None

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        for place, value in (
            ("calibration.samples", self.calibration.samples),
            ("calibration.calls", self.calibration.calls),
            ("group_size", self.group_size),
        ):
            if value < 1:
                raise RecipeError(f"quantize.{place}: got {value}, expected a whole number of at least 1. Write 16.")
        if self.require_speedup is not None and not self.require_speedup > 0:
            got = f"quantize.require_speedup: got {self.require_speedup:g}, expected a number above 0."
            raise RecipeError(f"{got} Write 1 for no slower than in float.")
        if self.limit_db is not None and self.scheme in NARROW:
            got = f"quantize.limit_db: got {self.limit_db:g} for {self.scheme}, expected a scheme that rounds."
            raise RecipeError(f"{got} Leave it out: what overflows on recorded inputs stays in float anyhow.")
        self._check_budget()
        if not 0 <= self.smoothness <= 1:
            got = f"quantize.smoothness: got {self.smoothness:g}, expected a number from 0 to 1."
            raise RecipeError(f"{got} Write 0.5.")

    def _check_budget(self) -> None:
        """Refuse budgets that leave a mixed plan nothing to decide on, or nothing to decide by."""
        if self.size is not None and not 0 < self.size <= 1:
            got = f"quantize.size: got {self.size:g}, expected a number above 0 and at most 1."
            raise RecipeError(f"{got} Write 0.3 for three tenths of the weights in 16 bits.")
        if self.scheme != PALETTE_MIXED and self.size is not None:
            got = f"quantize.size: got {self.size:g} for {self.scheme}, expected it for {PALETTE_MIXED} alone."
            raise RecipeError(f"{got} Leave it out, or write scheme: {PALETTE_MIXED}.")
        if self.scheme == PALETTE_MIXED and (self.size is None) == (self.limit_db is None):
            got = "neither" if self.size is None else f"size {self.size:g} and limit_db {self.limit_db:g}"
            raise RecipeError(
                f"quantize.scheme: {PALETTE_MIXED}: got {got}, expected exactly one of size and limit_db: either the "
                "bytes are given and the error is the least, or the other way round. Write size: 0.3 alone."
            )


def quantize_options(given: Mapping[str, Any], place: str, prompts: str | None) -> QuantizeOptions:
    """Check the keys of a stage.

    Args:
        given: what the recipe says.
        place: key path for the errors.
        prompts: what ranges are fitted on where the recipe does not say.

    Raises:
        RecipeError: unknown key, missing key or wrong value.
    """
    options = options_from(QuantizeOptions, given, place)
    known = options.calibration.prompts or prompts
    return replace(options, calibration=replace(options.calibration, prompts=known))

"""The recipe: the only thing a user writes. Parsed, checked and frozen here, without loading torch.

The options of a pruner, a tuning method or a target belong to that method: `options_from` checks them against its
frozen dataclass with the same errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from exporter.errors import Findings, RecipeError
from exporter.validation import hint, one_of, problems
from exporter.yaml_recipe import read_yaml, take_out

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
STAGES = {"prune": "pruned", "tune": "tuned", "quantize": "quantized"}
"""Stage -> the word its state's id ends with."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraSpec(_Part):
    """A LoRA that is added to the weights before anything else."""

    path: str = Field(description="a safetensors file")
    weight: Annotated[float, Field(ge=-10, le=10, description="how much of it is added; 1 is as trained")] = 1.0


class Source(_Part):
    """Where the dense model comes from: a folder or file (`path`), or a hub id with a pinned revision."""

    path: str | None = Field(
        None,
        description="folder of a diffusers pipeline, a safetensors checkpoint (with 'config'), or reference:shapes for "
        "the embedded one",
    )
    config: str | None = Field(
        None,
        description="for a checkpoint: local folder with model_index.json, configs, tokenizer and scheduler",
    )
    hub: str | None = Field(None, description="hub id, owner/name", pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str | None = Field(None, description="commit of the hub repository, 40 hex digits")
    variant: str | None = Field(
        None, description="variant of the weight files, such as fp16 or bf16", pattern=r"^\w[\w-]*$"
    )
    loras: tuple[LoraSpec, ...] = Field((), description="LoRAs that are fused before anything else, in this order")
    safety_checker: Literal["keep", "drop"] = Field(
        "drop", description="whether the source's safety checker goes into states and engines"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        if (self.path is None) == (self.hub is None):
            msg = "needs either 'path' (a folder or file) or 'hub' (owner/name with 'revision')"
            raise ValueError(msg)
        if self.hub is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            msg = "needs 'revision', the 40 hex digits of a commit, so that the build can be repeated"
            raise ValueError(msg)
        if self.config is not None and (self.path is None or Path(self.path).is_dir()):
            msg = "takes 'config' only beside the 'path' of a single checkpoint file"
            raise ValueError(msg)
        if self.config is not None and self.variant is not None:
            msg = "takes no 'variant' for a single checkpoint file"
            raise ValueError(msg)
        return self


class Sampling(_Part):
    """How images are made, for recording, measuring and as defaults of the engine."""

    scheduler: Literal["source", "dpm-solver++", "ddim", "euler"] = Field(
        "source", description="'source' keeps the scheduler of the source model"
    )
    steps: Annotated[int, Field(ge=1, le=1000, description="denoising steps")] = 20
    guidance: Annotated[float, Field(ge=0, le=100, description="guidance scale; at most 1 means unguided")] = 7.5
    size: Annotated[int | None, Field(ge=8, le=4096, description="image side in pixels; default: the source's")] = None
    batch: Annotated[int, Field(ge=1, le=64, description="images per denoiser call; guidance doubles the rows")] = 1


class Export(_Part):
    """How components become ONNX."""

    opset: Annotated[int, Field(ge=18, le=23, description="ONNX opset")] = 20
    dynamic: bool = Field(False, description="dynamic batch and size; fixed shapes run faster")
    vae_encoder: bool = Field(False, description="the VAE's encoder too, which drawing from an image needs")

    @property
    def requested(self) -> tuple[str, ...]:
        """Names of the components on request."""
        return ("vae_encoder",) if self.vae_encoder else ()


class Shapes(_Part):
    """Ranges that engines accept instead of one fixed shape; latency is measured at every named value."""

    batch: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field((1,), description="images per denoiser call")
    size: tuple[Annotated[int, Field(ge=8, le=4096)], ...] = Field(
        (), description="image sides in pixels; default: the size of sampling"
    )

    @field_validator("batch", "size")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            msg = f"got {list(value)}, expected rising numbers, such as [1, 4]"
            raise ValueError(msg)
        return value

    @field_validator("batch")
    @classmethod
    def _some(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            msg = "got no value, expected at least one, such as [1, 4]"
            raise ValueError(msg)
        return value


class Measure(_Part):
    """What is measured after each state."""

    states: Literal["all", "final"] | tuple[str, ...] = "all"
    prompts: str = Field("shapes-validation", description="a named set, or a txt, csv or jsonl file")
    images: Annotated[int, Field(ge=1, le=100_000, description="images per state and target")] = 32
    calls: Annotated[int, Field(ge=1, le=1024, description="images whose denoiser calls are compared")] = 8
    seed: Annotated[int, Field(ge=0, le=2**31, description="seed of the first image; image i uses seed + i")] = 0
    judge: str | None = Field(None, description="folder of a CLIPModel; the embedded judge for the embedded model")
    latency_seconds: Annotated[float, Field(gt=0, le=3600, description="time budget per component for latency")] = 20.0


class GateSpec(_Part):
    """A limit on a measurement: a number, or relative to dense, such as ``0.95 * dense`` or ``dense - 2``."""

    metric: str
    min: float | str | None = None
    max: float | str | None = None
    targets: tuple[str, ...] | Literal["all"] = "all"
    state: str = Field("all", description="a state id, 'final' or 'all'")
    component: str | None = Field(
        None, description="unet, denoiser, all, ...; default: the whole pipeline, the denoiser for latency, else all"
    )

    @model_validator(mode="after")
    def _one_limit(self) -> GateSpec:
        if self.min is None and self.max is None:
            msg = "needs 'min' or 'max'"
            raise ValueError(msg)
        return self


class TargetSpec(BaseModel):
    """A named column: a target type and that type's own options."""

    model_config = ConfigDict(frozen=True, extra="allow")
    type: str

    @property
    def given(self) -> dict[str, Any]:
        """The options as written."""
        return dict(self.model_extra or {})


class StageSpec(_Part):
    """One stage: exactly one of `prune`, `tune` and `quantize`, with its method or scheme and the options of that."""

    prune: dict[str, Any] | None = None
    tune: dict[str, Any] | None = None
    quantize: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        if not isinstance(value, Mapping) or len(value) != 1:
            msg = f"expected exactly one of {one_of(STAGES)} with its options, such as {{prune: {{method: magnitude}}}}"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _has_method(self) -> StageSpec:
        if not isinstance(self.given.get(self.chooser), str):  # a ValueError, which pydantic turns into its own
            msg = f"{self.kind}.{self.chooser}: missing; expected the name of a {self.chooser} (see `exporter pruners`)"
            raise ValueError(msg)  # noqa: TRY004
        return self

    @property
    def kind(self) -> str:
        """``prune``, ``tune`` or ``quantize``."""
        return next((kind for kind in STAGES if getattr(self, kind) is not None), "tune")

    @property
    def chooser(self) -> str:
        """The key that says how: ``scheme`` of quantization, else ``method``."""
        return "scheme" if self.kind == "quantize" else "method"

    @property
    def given(self) -> dict[str, Any]:
        """Method, or scheme, and options as written."""
        return dict(getattr(self, self.kind) or {})

    @property
    def method(self) -> str:
        """Name of the method, or of the scheme."""
        return str(self.given[self.chooser])

    @property
    def options(self) -> dict[str, Any]:
        """The options without the method; a scheme is one of them."""
        return {key: value for key, value in self.given.items() if key != "method"}


class Recipe(_Part):
    """A whole recipe; see the README for one."""

    name: str
    source: Source
    seed: Annotated[int, Field(ge=0, le=2**31, description="seed of everything random in the stages")] = 0
    sampling: Sampling = Sampling()
    stages: tuple[StageSpec, ...] = ()
    export: Export = Export()
    shapes: Shapes | None = Field(None, description="engines that accept a range; default: one fixed shape")
    targets: dict[str, TargetSpec]
    measure: Measure = Measure()
    gates: tuple[GateSpec, ...] = ()
    on_miss: Literal["stop", "continue"] = "stop"
    unmeasured: Literal["warn", "fail"] = "warn"

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        return _plain(value)

    @field_validator("targets")
    @classmethod
    def _plain_names(cls, value: dict[str, TargetSpec]) -> dict[str, TargetSpec]:
        if not value:
            msg = "needs at least one target, such as {ort: {type: onnxruntime}}"
            raise ValueError(msg)
        for name in value:
            _plain(name)
        return value

    @model_validator(mode="after")
    def _names_exist(self) -> Recipe:
        wrong = []
        if self.shapes is not None:
            for key, values, own in (
                ("batch", self.shapes.batch, self.sampling.batch),
                ("size", self.shapes.size, self.sampling.size),
            ):
                if values and own is not None and not values[0] <= own <= values[-1]:
                    wrong.append(f"shapes.{key}: got {list(values)}, expected a range that holds sampling.{key}, {own}")
        for index, gate in enumerate(self.gates):
            for name in () if gate.targets == "all" else gate.targets:
                if name not in self.targets:
                    msg = f"gates[{index}].targets: got '{name}', expected {one_of(self.targets)}"
                    wrong.append(msg + hint(name, self.targets))
            if gate.state not in (*self.state_ids, "all", "final"):
                known = one_of([*self.state_ids, "all", "final"])
                wrong.append(f"gates[{index}].state: got '{gate.state}', expected {known}")
        known = f"expected all, final or a list of {one_of(self.state_ids)}"
        chosen = self.measure.states if isinstance(self.measure.states, tuple) else ()
        wrong += [f"measure.states: got '{name}', {known}" for name in chosen if name not in self.state_ids]
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @property
    def state_ids(self) -> tuple[str, ...]:
        """Ids of all states, dense first."""
        made = (f"{index + 1}-{STAGES[stage.kind]}" for index, stage in enumerate(self.stages))
        return ("0-dense", *made)

    @property
    def measured_states(self) -> tuple[str, ...]:
        """Ids of the states that are lowered and measured; dense always is, as the baseline."""
        if self.measure.states == "all":
            return self.state_ids
        chosen = {self.state_ids[-1]} if self.measure.states == "final" else set(self.measure.states)
        return tuple(name for name in self.state_ids if name == "0-dense" or name in chosen)


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    folder = resources.files("exporter") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe_path(given: str) -> Path:
    """Return the file of a recipe given as a path or as the name of one that ships.

    Raises:
        RecipeError: there is no such file.
    """
    path = Path(given)
    if path.is_file():
        return path
    shipped = recipe_names()
    if given in shipped:
        return Path(str(resources.files("exporter") / "recipes" / f"{given}.yaml"))
    msg = f"{given}: no such recipe; expected a YAML file or one of {', '.join(shipped)}.{hint(given, shipped)}"
    raise RecipeError(msg)


def read_recipe(path: Path | str, settings: Iterable[str] = ()) -> Recipe:
    """Read, change and check a recipe.

    Args:
        path: the YAML file.
        settings: changes such as ``stages[0].prune.keep_ratio=0.5``; the value is read as YAML.

    Raises:
        RecipeError: with one line per problem, each with its key path.
    """
    found = Findings()
    recipe = read_mended(Path(path), settings, found)
    found.raise_all()
    assert recipe is not None
    return recipe


def read_mended(path: Path, settings: Iterable[str], found: Findings) -> Recipe | None:
    """Read a recipe as far as it goes: what is wrong is gathered and left out, so that the rest can be checked too.

    Args:
        path: the YAML file.
        settings: as for `read_recipe`.
        found: takes one error per problem.

    Returns:
        The recipe without the keys that are wrong; None where it is none without them.

    Raises:
        RecipeError: the file cannot be read as a mapping.
    """
    raw = read_yaml(path, settings)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        found.errors += [RecipeError(line) for line in problems(error, path.name, "", _keys_at)]
        harmless = all(item["type"] == "extra_forbidden" for item in error.errors())
        mendable = all(take_out(raw, item["loc"]) for item in error.errors())
    try:
        return Recipe.model_validate(raw) if mendable else None
    except ValidationError as error:
        if harmless:  # unknown keys hide nothing but the checks of several keys together
            found.errors += [RecipeError(line) for line in problems(error, path.name, "", _keys_at)]
        return None


def _plain(value: str) -> str:
    if not _NAME.fullmatch(value):
        msg = f"got '{value[:80]}', expected letters, digits, '.', '_' and '-' (it becomes a folder name)"
        raise ValueError(msg)
    return value


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    models: dict[str, type[BaseModel]] = {
        "source": Source,
        "sampling": Sampling,
        "stages": StageSpec,
        "export": Export,
        "shapes": Shapes,
        "measure": Measure,
        "gates": GateSpec,
    }
    model = models.get(str(loc[0]), Recipe) if loc else Recipe
    model = LoraSpec if "loras" in loc else model
    return list(model.model_fields)

"""An engine folder as a diffusers pipeline: checked first, then loaded, then called like any other.

The stock pipeline class runs unchanged; only its networks are replaced by modules that call engine sessions. So the
sampler, guidance, tokenizer and image processing are diffusers' own, and measuring uses the same class as users do.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
from numpy.typing import NDArray
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

import targets
from exporter.artifact import Artifact, open_artifact
from exporter.errors import ArtifactError, ComponentFailed, RecipeError, ToolMissing
from exporter.networks.chain import ChainSession
from exporter.networks.inputs import inputs_of
from exporter.networks.pipeline import assemble
from exporter.networks.safety import attach_safety_checker
from exporter.networks.schedule import Schedule, check_guidance, check_sampler
from exporter.sessions import open_network, run_batched
from exporter.states import components_of, config_of
from exporter.validation import options_from
from targets.base import Session, TargetError, TargetMissing, engine_file_of

log = logging.getLogger(__name__)
Array = NDArray[Any]


@dataclass(frozen=True)
class EngineFacts:
    """What an engine folder says about itself; its manifest's facts.

    Attributes:
        target: target type.
        options: the target's options.
        runtime: version of the runtime it was compiled with.
        device: the device it was compiled for.
        portable: whether another device of the same family may load it.
        components: names of the compiled components.
        sampling: the recipe's sampling: steps, guidance, size, batch, scheduler.
        state: id of the state; `state_digest` its digest.
    """

    target: str
    options: dict[str, Any]
    runtime: str
    device: str
    components: tuple[str, ...]
    sampling: dict[str, Any]
    state: str
    state_digest: str

    @property
    def ending(self) -> str:
        """Of the files that its graphs are in."""
        target = targets.target(self.target)
        return Path(engine_file_of(target, options_from(target.options, self.options, "engine"))).suffix

    @classmethod
    def of(cls, artifact: Artifact) -> EngineFacts:
        """Read the facts of an engine; ArtifactError when they do not fit."""
        facts = artifact.manifest.facts
        try:
            return cls(**{**facts, "components": tuple(facts["components"])})
        except (TypeError, KeyError) as error:
            msg = f"{artifact.path}: not an engine of this version; its facts do not fit. Compile it again."
            raise ArtifactError(msg) from error


def check_engine(folder: Path) -> tuple[Artifact, EngineFacts]:
    """Check an engine folder against its digests, this device and these versions, before anything is loaded.

    Raises:
        ArtifactError: a file is missing or changed, or the engine was compiled with another runtime version.
        ToolMissing: the runtime or the device it needs is not here.
    """
    artifact = open_artifact(folder, kind="engine")
    facts = EngineFacts.of(artifact)
    if facts.target not in targets.TARGETS:
        known = ", ".join(targets.TARGETS)
        msg = f"{folder}: unknown target type; got '{facts.target}', expected one of {known}. Update this package."
        raise ArtifactError(msg)
    target = targets.target(facts.target)
    here = target.capabilities()
    if not here.runs:
        msg = f"{folder}: target '{facts.target}' cannot run here: {here.reason} Run: {here.install}"
        raise ToolMissing(msg)
    if here.version != facts.runtime:
        msg = (
            f"{folder}: compiled with another version of {facts.target}; got {here.version} here, expected "
            f"{facts.runtime}. Install that version, or compile again with `exporter run`."
        )
        raise ArtifactError(msg)
    try:
        target.check(options_from(target.options, facts.options, f"{folder}: options"))
    except TargetMissing as error:
        raise ToolMissing(f"{folder}: this device cannot run the engine: {error}") from error
    except TargetError as error:
        raise ArtifactError(f"{folder}: {error}") from error
    return artifact, facts


def open_sessions(folder: Path, facts: EngineFacts, names: tuple[str, ...] | None = None) -> dict[str, Session]:
    """Load the sessions of an engine folder that was checked; all components by default."""
    target = targets.target(facts.target)
    options: Any = options_from(target.options, facts.options, f"{folder}: options")
    sessions: dict[str, Session] = {}
    try:
        for name in names or facts.components:
            sessions[name] = open_network(target, folder / name, options)
    except TargetMissing as error:
        close_sessions(sessions)
        raise ToolMissing(f"{folder / name}: {error}") from error
    except TargetError as error:
        close_sessions(sessions)
        raise ComponentFailed(f"{folder / name}: could not be loaded: {error}") from error
    return sessions


def open_session(folder: Path, facts: EngineFacts) -> Session:
    """Load one compiled component that lies in a folder of its own, with the options of an engine."""
    return open_sessions(folder.parent, facts, (folder.name,))[folder.name]


def close_sessions(sessions: Mapping[str, Session]) -> None:
    """Free every session."""
    for session in sessions.values():
        session.close()


@contextmanager
def sessions_of(folder: Path, facts: EngineFacts) -> Iterator[dict[str, Session]]:
    """Sessions of an engine folder, freed at the end."""
    sessions = open_sessions(folder, facts)
    try:
        yield sessions
    finally:
        close_sessions(sessions)


def load(folder: str | Path) -> DiffusionPipeline:
    """Load an engine folder as a diffusers pipeline that runs on its engines.

    Args:
        folder: ``OUT/engines/<state>/<target>``.

    Returns:
        The stock pipeline class of the source model; call it with a prompt as usual. Steps and guidance default to
        diffusers' own; `EngineFacts.sampling` has what the engine was measured with.

    Raises:
        ArtifactError: a file was changed, or versions do not fit.
        ToolMissing: the runtime or the device is not here.
    """
    folder = Path(folder)
    _, facts = check_engine(folder)
    return cast("DiffusionPipeline", attach_safety_checker(pipeline_of(folder, open_sessions(folder, facts)), folder))


def pipeline_of(folder: Path, sessions: Mapping[str, Session]) -> DiffusionPipeline:
    """Put sessions into the stock pipeline of an engine folder."""
    parts: dict[str, Any] = {}
    for component in components_of(folder, sessions):
        config = config_of(folder / component.name)
        names = inputs_of(component.inputs_as, config)
        module = _MODULES[component.role](sessions[component.name], config, names)
        if component.role == "encoder":  # the pipeline knows one VAE, whose decoder stands there already
            parts[component.folder].encoder = module
        else:
            parts[component.folder] = module
    made = assemble(folder, parts)
    made.set_progress_bar_config(disable=True)
    for part in parts.values():
        if isinstance(part, Denoiser):
            part.owner = weakref.ref(made)
    return made


class _Engine(nn.Module):
    """A module without parameters that answers from a session.

    Args:
        session: what answers.
        config: of the network that it stands for; pipelines read it.
        names: of the network's inputs, in the order of its forward.
    """

    def __init__(self, session: Session, config: Mapping[str, Any], names: tuple[str, ...]) -> None:
        super().__init__()
        self.session = session
        self.config = FrozenDict(config)
        self.names = names

    @property
    def dtype(self) -> torch.dtype:
        """The pipeline prepares its tensors in this type."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Tensors cross into the runtime from here."""
        return torch.device("cpu")

    def answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Run the session on a call of the network's forward; dictionaries of inputs are opened; see `run_batched`.

        Raises:
            ComponentFailed: an input that the engine needs is not there.
        """
        named = dict(zip(self.names, args, strict=False))
        for name, value in kwargs.items():
            named |= value if isinstance(value, Mapping) else {name: value}
        missing = [spec.name for spec in self.session.inputs if named.get(spec.name) is None]
        if missing:
            msg = f"engine: called without {', '.join(missing)}; expected {', '.join(self.names)}. Call it with them."
            raise ComponentFailed(msg)
        feeds = {spec.name: _array(named[spec.name], len(spec.shape)) for spec in self.session.inputs}
        return {name: torch.from_numpy(array) for name, array in run_batched(self.session, feeds).items()}


def _array(value: Any, rank: int) -> Array:
    """Return an input as an array; a timestep comes as a number, as one per call or as one per row."""
    array: Array = torch.as_tensor(value).numpy(force=True)
    return array.reshape(-1)[0].reshape(()) if rank == 0 else array


class Denoiser(_Engine):
    """Stands where the pipeline expects its denoiser; with a schedule, only under the sampler that this is for."""

    owner: Callable[[], Any] = staticmethod(lambda: None)
    _checked: Any = None

    @property
    def add_embedding(self) -> Any:
        """What SDXL's pipeline asks about the layer that takes the added conditions: its width."""
        width = self.config.get("projection_class_embeddings_input_dim")
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """What Flux's pipeline wraps every call in; an engine keeps nothing between calls."""
        del name
        yield

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Predict; inputs as the network that it stands for takes them, float32.

        Raises:
            RecipeError: the denoiser's schedule is for another sampler, or for guidance where there is none.
            ComponentFailed: a call that the schedule does not have next.
        """
        if isinstance(self.session, ChainSession):
            self._check(self.session.schedule)
        sample = self.answer(args, kwargs)["out_sample"]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check(self, schedule: Schedule) -> None:
        pipeline = self.owner()
        if pipeline is None:
            return
        if pipeline.scheduler is not self._checked:
            check_sampler(schedule, pipeline.scheduler, "engine", RecipeError)
            self._checked = pipeline.scheduler
        check_guidance(schedule, getattr(pipeline, "do_classifier_free_guidance", schedule.guided), "engine")


class Encoder(_Engine):
    """The encoding half of a VAE, where the recipe asked for it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return means and logarithms of variances of the latents of images (b, 3, h, w) float32 in [-1, 1]."""
        return self.answer((images,), {})["latent_parameters"]


class Decoder(_Engine):
    """Stands where the pipeline expects its VAE; it encodes only where the recipe asked for that."""

    def __init__(self, session: Session, config: Mapping[str, Any], names: tuple[str, ...]) -> None:
        super().__init__(session, config, names)
        self.encoder: Encoder | None = None

    def encode(self, images: torch.Tensor, return_dict: bool = True) -> Any:
        """Encode images (b, 3, h, w) float32 in [-1, 1] to a distribution of latents, as `AutoencoderKL` does.

        Raises:
            ComponentFailed: the engine has no encoder.
        """
        if self.encoder is None:
            msg = (
                "engine: vae_encoder: not compiled; expected it, since an image is to be encoded. Write "
                "export: {vae_encoder: true} in the recipe and run it again."
            )
            raise ComponentFailed(msg)
        found = DiagonalGaussianDistribution(self.encoder(images))
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def decode(self, latents: torch.Tensor, return_dict: bool = True, **_: object) -> Any:
        """Decode latents (b, c, h, w) float32, already divided by the scaling factor, to images in [-1, 1]."""
        sample = self.answer((latents,), {})["sample"]
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class TextEncoder(_Engine):
    """Stands where the pipeline expects a text encoder."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Encode token ids (b, tokens) int64 to what the network's library answers: states, pooled, of every layer."""
        if "attention_mask" in self.names and kwargs.get("attention_mask") is None:
            ids = args[0] if args else kwargs["input_ids"]
            kwargs["attention_mask"] = torch.ones_like(ids)  # as the network itself does
        found = self.answer(args, kwargs)
        layers = [name for name in found if name.startswith("hidden_states.")]
        states = tuple(found.pop(f"hidden_states.{index}") for index in range(len(layers)))
        hidden = states or None
        if "text_embeds" in found:
            return CLIPTextModelOutput(**found, hidden_states=hidden)
        return BaseModelOutputWithPooling(**found, hidden_states=hidden)


_MODULES: dict[str, type[_Engine]] = {"denoiser": Denoiser, "decoder": Decoder, "encoder": Encoder, "text": TextEncoder}

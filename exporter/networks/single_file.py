"""A checkpoint that is one safetensors file: checked, and turned into component folders, one at a time.

The file holds weights only; everything else, and components that the file does not hold, come from a local folder.
Where diffusers' own converters work on names alone, they are used; nothing is loaded as a pipeline, nothing is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.errors import ArtifactError, SourceError
from exporter.memo import FileMemo
from exporter.networks.components import Component
from exporter.networks.original_transformers import state_from_original
from exporter.networks.probe import FORWARD_FAILURES
from exporter.networks.weights import PRECISIONS, WEIGHT_STEMS, TensorFact, check_finite_files, opened, read_headers

_LDM = "model.diffusion_model."
_BARE = re.compile(r"(double_blocks|joint_blocks|transformer_blocks)\.0\.")
"""What a file of a transformer without a prefix holds."""

_OTHERS = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.", "model_ema.")
_UNET, _VAE = (_LDM,), ("first_stage_model.", "vae.")
_TRANSFORMER = (_LDM, "transformer.", "")
_CLIP_L, _CLIP_G = ("text_encoders.clip_l.transformer.",), ("text_encoders.clip_g.transformer.",)
_T5 = ("text_encoders.t5xxl.transformer.",)

LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "StableDiffusionPipeline": {
            "text_encoder": ("cond_stage_model.transformer.", "cond_stage_model.model."),
            "unet": _UNET,
            "vae": _VAE,
        },
        "StableDiffusionXLPipeline": {
            "text_encoder": ("conditioner.embedders.0.transformer.",),
            "text_encoder_2": ("conditioner.embedders.1.model.",),
            "unet": _UNET,
            "vae": _VAE,
        },
        "StableDiffusion3Pipeline": {
            "text_encoder": _CLIP_L,
            "text_encoder_2": _CLIP_G,
            "text_encoder_3": _T5,
            "transformer": _TRANSFORMER,
            "vae": _VAE,
        },
        "FluxPipeline": {"text_encoder": _CLIP_L, "text_encoder_2": _T5, "transformer": _TRANSFORMER, "vae": _VAE},
    }
)
"""Pipeline class to component folder to what its tensors may be prefixed with in one file."""


@dataclass(frozen=True)
class Held:
    """One component in a checkpoint.

    Attributes:
        prefix: of its tensors.
        names: of its tensors, with the prefix.
        precision: safetensors' name of their widest type; all are converted to it, so that nothing is lost.
    """

    prefix: str
    names: tuple[str, ...]
    precision: str


def refuse_pickles(path: Path) -> None:
    """Raise SourceError for a checkpoint file that is not safetensors, by its name alone."""
    if path.suffix != ".safetensors":
        raise SourceError(
            f"{path}: a single file may be pickled, which can run code; expected a file ending in .safetensors. Where "
            "you trust it, convert it with diffusers: from_single_file(file).save_pretrained(folder)."
        )


def check_single_file(path: Path, pipeline_class: str, memo: FileMemo | None = None) -> dict[str, Held]:
    """Return what `held_by` does, after checking that every number of the file is finite; not where `memo` knows.

    Raises:
        SourceError: as `held_by`, or numbers are not finite.
    """
    held = held_by(path, pipeline_class)
    check_finite_files([path], memo)
    return held


def held_by(path: Path, pipeline_class: str) -> dict[str, Held]:
    """Return the components that a checkpoint holds, by folder, from its header alone.

    Args:
        path: the file.
        pipeline_class: of the config folder beside it.

    Raises:
        SourceError: not safetensors, damaged, a LoRA, of a family that is not read from one file, of an unsupported
            number type, or without any component of the family.
    """
    refuse_pickles(path)
    facts = read_headers([path], SourceError)
    if any(".lora_" in name or "_lora." in name or ".lora." in name for name in facts):
        raise SourceError(f"{path}: a LoRA, not a model. Give the model as source, and this under source.loras.")
    if pipeline_class not in LAYOUTS:
        raise SourceError(
            f"{path}: {pipeline_class} is not read from a single file; got its configs, expected those of one of "
            f"{', '.join(LAYOUTS)}. Give a pipeline folder as source.path."
        )
    held = {folder: _held(path, facts, prefixes) for folder, prefixes in LAYOUTS[pipeline_class].items()}
    found = {folder: part for folder, part in held.items() if part is not None}
    if not found:
        raise SourceError(
            f"{path}: no component of a {pipeline_class}; got tensors such as {', '.join(sorted(facts)[:3])}, expected "
            f"names that start with {_prefixes(LAYOUTS[pipeline_class].values())}. Give the configs of the same model."
        )
    return found


def absent_from(path: Path, pipeline_class: str, part: Component) -> str:
    """Return what is wrong where neither a checkpoint nor its config folder holds a component."""
    return (
        f"{path}: does not hold {part.folder}; expected tensors whose names start with "
        f"{_prefixes([LAYOUTS[pipeline_class][part.folder]])}, or its weights in {part.folder} of source.config."
    )


def _prefixes(given: Iterable[tuple[str, ...]]) -> str:
    return " or ".join(dict.fromkeys(prefix for prefixes in given for prefix in prefixes if prefix))


def _held(path: Path, facts: Mapping[str, TensorFact], prefixes: tuple[str, ...]) -> Held | None:
    for prefix in prefixes:
        names = tuple(name for name in facts if name.startswith(prefix) and (prefix or not name.startswith(_OTHERS)))
        if names and (prefix or any(_BARE.match(name) for name in names)):
            used = {facts[name].dtype for name in names if facts[name].dtype.startswith(("F", "BF"))}
            unknown = used - PRECISIONS.keys()
            if unknown:
                raise SourceError(
                    f"{path}: unsupported number type; got {', '.join(sorted(unknown))} in {names[0]}, expected one of "
                    f"{', '.join(PRECISIONS)}. Use a checkpoint that was not quantized."
                )
            return Held(prefix, names, next(iter(used)) if len(used) == 1 else "F32")
    return None


def convert_single_file(path: Path, config: Path, part: Component, held: Held, out: Path) -> None:
    """Write the weights of one network of a checkpoint into its component folder.

    Args:
        path: the checkpoint.
        config: folder of the pipeline's configs.
        part: which component.
        held: of it, from `check_single_file`.
        out: a folder of a pipeline; the component's folder in it holds its config.

    Raises:
        SourceError: the file does not hold the network that the config describes.
    """
    from exporter.networks.storage import build_network, open_bare  # seconds to import

    network = build_network(config / part.folder, cls=part.cls)
    with opened(path, SourceError) as handle:
        state = {name.removeprefix(held.prefix): handle.get_tensor(name) for name in held.names}
    try:
        converted = _converted(network, state, held.prefix, f"{path}: {part.folder}")
    except FORWARD_FAILURES as error:
        raise _unfit(path, config, part, f"{type(error).__name__}: {str(error)[:200]}") from error
    folder, dtype = out / part.folder, PRECISIONS[held.precision]
    file = folder / f"{WEIGHT_STEMS[part.cls]}.safetensors"
    save_file({name: _stored(tensor, dtype) for name, tensor in converted.items()}, file, {"format": "pt"})
    try:
        open_bare(folder, cls=part.cls)
    except ArtifactError as error:
        raise _unfit(path, config, part, str(error).replace(str(folder), part.folder)) from error


def _unfit(path: Path, config: Path, part: Component, what: str) -> SourceError:
    return SourceError(
        f"{path}: does not hold the networks of {config}; got in {part.folder}: {what} Give the checkpoint and the "
        "configs of the same model."
    )


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def _converted(network: nn.Module, state: dict[str, Tensor], prefix: str, place: str) -> dict[str, Tensor]:
    """Return a network's weights under its own names; names that it has already stay as they are."""
    from diffusers.loaders import single_file_utils as library

    cls, own = type(network).__name__, network.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    config: Any = network.config
    if cls == "UNet2DConditionModel":
        return dict(library.convert_ldm_unet_checkpoint({f"{_LDM}{k}": v for k, v in state.items()}, config))
    if cls == "AutoencoderKL":
        return dict(library.convert_ldm_vae_checkpoint({f"{_VAE[0]}{k}": v for k, v in state.items()}, config))
    if cls.startswith("CLIPTextModel"):
        if "positional_embedding" in state:  # OpenCLIP's own names, with query, key and value in one
            given = {f"{prefix}{name}": tensor for name, tensor in state.items()}
            state = dict(library.convert_open_clip_checkpoint(network, given, prefix=prefix))
        return _clip(network, state)
    if cls == "T5EncoderModel":
        return {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}
    return state_from_original(state, shapes, place)


def _clip(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    own = network.state_dict()
    nested = any(name.startswith("text_model.") for name in own)
    named = {name if nested else name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    wanted = "text_projection.weight"
    if wanted in own and wanted not in named:  # SD3's checkpoints leave out the first encoder's: it is not projected
        named[wanted] = torch.eye(*own[wanted].shape)
    # Towers are stored whole: a projection that the pipeline does not use, constants, a scale of the training.
    unused = {"logit_scale"} | {name for name in named if name.endswith("position_ids")}
    unused |= {wanted} if wanted not in own else set()
    return {name: tensor for name, tensor in named.items() if name not in unused}

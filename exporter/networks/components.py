"""The one table of what a pipeline family consists of, and the closed lists of classes that a folder may name.

A new family is one entry of `FAMILIES` and, where it brings new classes, one line each in the lists below it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal, get_args

from exporter.errors import ArtifactError, RecipeError, SourceError

Role = Literal["denoiser", "decoder", "encoder", "text"]


@dataclass(frozen=True)
class Component:
    """One network of a pipeline.

    Attributes:
        name: how recipe and report call it, such as ``vae_decoder``.
        folder: the sub-folder of the pipeline that holds it, such as ``vae``; its attribute on the pipeline too.
        cls: the class that builds it, a key of `NETWORK_CLASSES`.
        role: what it does in the pipeline.
        optional: whether a pipeline may come without it.
    """

    name: str
    folder: str
    cls: str
    role: Role
    optional: bool = False

    @property
    def inputs_as(self) -> str:
        """Key of `exporter.networks.inputs.INPUTS` under which its inputs stand."""
        return "AutoencoderEncoder" if self.role == "encoder" else self.cls


_UNET = Component("unet", "unet", "UNet2DConditionModel", "denoiser")
_VAE = Component("vae_decoder", "vae", "AutoencoderKL", "decoder")
_VAE_ENCODER = Component("vae_encoder", "vae", "AutoencoderKL", "encoder")
_CLIP = Component("text_encoder", "text_encoder", "CLIPTextModel", "text")
_PIXELS = (Component("unet", "unet", "UNet2DModel", "denoiser"),)
_T5 = Component("text_encoder", "text_encoder", "T5EncoderModel", "text")
_CLIP_2 = Component("text_encoder_2", "text_encoder_2", "CLIPTextModelWithProjection", "text")
_BETAS = ("source", "dpm-solver++", "ddim", "euler")


@dataclass(frozen=True)
class Family:
    """One pipeline class: its networks, and how the runtime makes and calls it.

    Attributes:
        components: its networks, in the order in which a prompt passes through them.
        on_request: further networks that a recipe may ask for; drawing from a prompt takes none of them.
        tokenizers: folders of its tokenizers.
        asked: what says which image is wanted: a text, the name or number of a class, or nothing.
        guidance: how the guidance scale takes effect: the denoiser answers a second row without the prompt
            (``rows``), it gets the scale as an input (``input``), or there is none.
        conditional_first: whether, of the two rows, the one with the prompt comes first.
        sized: whether the image size is an argument; otherwise it is the model's own.
        multiple: image sides are multiples of the VAE's scale times this; 0 stands for the denoiser's patch size.
        latent: side of the latent that the model was made for, where the denoiser's config does not say.
        distills: whether distillation can make its noise (from a schedule of betas) and its data (from prompts).
        schedulers: values of the recipe's ``sampling.scheduler`` that it can be driven with.
        source_schedulers: classes that its own scheduler may have; empty for any of `SCHEDULER_CLASSES`.
        options: plain values of ``model_index.json`` that its constructor takes.
        absent: arguments of its constructor that are set here: parts that an engine has none of.
        extra: arguments of every call.
    """

    components: tuple[Component, ...]
    on_request: tuple[Component, ...] = (_VAE_ENCODER,)
    tokenizers: tuple[str, ...] = ("tokenizer",)
    asked: Literal["prompt", "class_labels", "batch_size"] = "prompt"
    guidance: Literal["rows", "input", "none"] = "rows"
    conditional_first: bool = False
    sized: bool = True
    multiple: int = 1
    latent: int = 0
    distills: bool = True
    schedulers: tuple[str, ...] = _BETAS
    source_schedulers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    absent: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


_NO_IMAGES: Mapping[str, Any] = MappingProxyType({"feature_extractor": None, "image_encoder": None})
_NO_CHECKER: Mapping[str, Any] = MappingProxyType(
    {**_NO_IMAGES, "safety_checker": None, "requires_safety_checker": False}
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "StableDiffusionPipeline": Family((_CLIP, _UNET, _VAE), absent=_NO_CHECKER),
        "StableDiffusionXLPipeline": Family(
            (
                _CLIP,
                _CLIP_2,
                _UNET,
                _VAE,
            ),
            tokenizers=("tokenizer", "tokenizer_2"),
            options=("force_zeros_for_empty_prompt",),
            absent=MappingProxyType({**_NO_IMAGES, "add_watermarker": False}),
        ),
        "LatentConsistencyModelPipeline": Family(
            (_CLIP, _UNET, _VAE),
            guidance="input",
            schedulers=("source",),
            source_schedulers=("LCMScheduler",),
            absent=_NO_CHECKER,
        ),
        "DDPMPipeline": Family(
            _PIXELS,
            on_request=(),
            tokenizers=(),
            asked="batch_size",
            guidance="none",
            sized=False,
            schedulers=("source", "ddim", "dpm-solver++"),
            source_schedulers=("DDPMScheduler", "DDIMScheduler"),
        ),
        "DDIMPipeline": Family(
            _PIXELS,
            on_request=(),
            tokenizers=(),
            asked="batch_size",
            guidance="none",
            sized=False,
            schedulers=("source", "ddim"),
            source_schedulers=("DDIMScheduler", "DDPMScheduler"),
        ),
        "PixArtAlphaPipeline": Family(
            (_T5, Component("transformer", "transformer", "PixArtTransformer2DModel", "denoiser"), _VAE),
            multiple=0,
            # Sizes are the recipe's own, and what caption cleaning needs may be installed or not.
            extra=MappingProxyType({"use_resolution_binning": False, "clean_caption": False}),
        ),
        "DiTPipeline": Family(
            (Component("transformer", "transformer", "DiTTransformer2DModel", "denoiser"), _VAE),
            tokenizers=(),
            asked="class_labels",
            conditional_first=True,
            sized=False,
            multiple=0,
            distills=False,
            schedulers=("source", "ddim", "dpm-solver++"),
            source_schedulers=("DDIMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"),
            options=("id2label",),
        ),
        "StableDiffusion3Pipeline": Family(
            (
                Component("text_encoder", "text_encoder", "CLIPTextModelWithProjection", "text"),
                _CLIP_2,
                Component("text_encoder_3", "text_encoder_3", "T5EncoderModel", "text", optional=True),
                Component("transformer", "transformer", "SD3Transformer2DModel", "denoiser"),
                _VAE,
            ),
            tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
            multiple=0,
            distills=False,
            schedulers=("source",),
            source_schedulers=("FlowMatchEulerDiscreteScheduler",),
            absent=_NO_IMAGES,
        ),
        "FluxPipeline": Family(
            (
                _CLIP,
                Component("text_encoder_2", "text_encoder_2", "T5EncoderModel", "text"),
                Component("transformer", "transformer", "FluxTransformer2DModel", "denoiser"),
                _VAE,
            ),
            tokenizers=("tokenizer", "tokenizer_2"),
            guidance="input",
            multiple=2,
            latent=128,
            distills=False,
            schedulers=("source",),
            source_schedulers=("FlowMatchEulerDiscreteScheduler",),
            absent=_NO_IMAGES,
        ),
    }
)
"""Pipeline class to what it consists of."""


FORMER_NAMES: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("DiTTransformer2DModel", "PixArtTransformer2DModel"), "Transformer2DModel")
)
"""Network class to the name that it has in folders of before diffusers 0.30."""

NETWORK_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "AutoencoderKL": "diffusers:AutoencoderKL",
        "CLIPTextModel": "transformers:CLIPTextModel",
        "CLIPTextModelWithProjection": "transformers:CLIPTextModelWithProjection",
        "DiTTransformer2DModel": "diffusers:DiTTransformer2DModel",
        "FluxTransformer2DModel": "diffusers:FluxTransformer2DModel",
        "PixArtTransformer2DModel": "diffusers:PixArtTransformer2DModel",
        "SD3Transformer2DModel": "diffusers:SD3Transformer2DModel",
        "T5EncoderModel": "transformers:T5EncoderModel",
        "UNet2DConditionModel": "diffusers:UNet2DConditionModel",
        "UNet2DModel": "diffusers:UNet2DModel",
    }
)

PIPELINE_CLASSES: Mapping[str, str] = MappingProxyType({name: f"diffusers:{name}" for name in FAMILIES})

TOKENIZER_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "CLIPTokenizer": "transformers:CLIPTokenizer",
        "CLIPTokenizerFast": "transformers:CLIPTokenizerFast",
        "T5Tokenizer": "transformers:T5Tokenizer",
        "T5TokenizerFast": "transformers:T5TokenizerFast",
    }
)

SCHEDULER_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        name: f"diffusers:{name}"
        for name in (
            "DDIMScheduler",
            "DDPMScheduler",
            "DEISMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "LCMScheduler",
            "LMSDiscreteScheduler",
            "PNDMScheduler",
            "UniPCMultistepScheduler",
        )
    }
)


def family(pipeline_class: str) -> Family:
    """Return the table's entry of a pipeline class.

    Raises:
        SourceError: the family is not supported.
    """
    found = FAMILIES.get(pipeline_class)
    if found is None:
        raise SourceError(
            f"model_index.json: unsupported pipeline family; got {pipeline_class!r}, expected one of "
            f"{', '.join(FAMILIES)}. Use a model of a supported family."
        )
    return found


def components(pipeline_class: str) -> tuple[Component, ...]:
    """Return the networks of a pipeline class.

    Raises:
        SourceError: the family is not supported.
    """
    return family(pipeline_class).components


def is_absent(index: Mapping[str, Any], part: str) -> bool:
    """Tell whether ``model_index.json`` says that a pipeline comes without a part."""
    return index.get(part) in (None, [None, None])


def present_components(
    pipeline_class: str, index: Mapping[str, Any], requested: Collection[str] = ()
) -> tuple[Component, ...]:
    """Return the networks that a pipeline has: all of its class, but for optional ones that it comes without.

    Args:
        pipeline_class: a key of `FAMILIES`.
        index: what its ``model_index.json`` holds.
        requested: names of components on request that are wanted too; names of others make no difference.

    Raises:
        SourceError: the family is not supported.
    """
    asked = [part for part in family(pipeline_class).on_request if part.name in requested]
    usual = [part for part in components(pipeline_class) if not (part.optional and is_absent(index, part.folder))]
    return (*usual, *asked)


def check_requested(pipeline_class: str, requested: Collection[str]) -> None:
    """Refuse components on request that a family does not have.

    Raises:
        RecipeError: one of them.
        SourceError: the family is not supported.
    """
    have = [part.name for part in family(pipeline_class).on_request]
    for name in requested:
        if name not in have:
            others = [other for other, entry in FAMILIES.items() if name in [part.name for part in entry.on_request]]
            raise RecipeError(
                f"export.{name}: {pipeline_class} has no such component; got true, expected a pipeline of "
                f"{', '.join(others) or 'another family'}. Remove export.{name}."
            )


def present_tokenizers(pipeline_class: str, index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the tokenizers that a pipeline has: without those of text encoders that it comes without.

    Raises:
        SourceError: the family is not supported.
    """
    gone = {part.folder for part in components(pipeline_class) if part.optional and is_absent(index, part.folder)}
    return tuple(
        name for name in family(pipeline_class).tokenizers if name.replace("tokenizer", "text_encoder") not in gone
    )


def is_named(cls: str, stated: object) -> bool:
    """Tell whether a file that states this class means `cls`."""
    return stated in (cls, FORMER_NAMES.get(cls, cls))


def component(pipeline_class: str, name: str) -> Component:
    """Return one network by its name, or by its role (``denoiser``).

    Raises:
        SourceError: the family is not supported or has no such component.
    """
    entries = components(pipeline_class)
    for entry in entries:
        if name == entry.name or (name == entry.role and name in get_args(Role)):
            return entry
    names = ", ".join(["denoiser", *(entry.name for entry in entries)])
    raise SourceError(f"component: {pipeline_class} has no such component; got {name!r}, expected one of {names}.")


def denoiser(pipeline_class: str) -> Component:
    """Return the component that predicts noise or velocity.

    Raises:
        SourceError: the family is not supported.
    """
    return component(pipeline_class, "denoiser")


def class_from(table: Mapping[str, str], name: str, place: str) -> Any:
    """Import and return the class that a closed table holds under `name`.

    Args:
        table: one of the tables of this file, name to ``module:attribute``.
        name: what a file on disk asked for; never imported unless it is a key of the table.
        place: where it was read, for the message.

    Raises:
        ArtifactError: the name is not in the table.
    """
    if name not in table:
        raise ArtifactError(
            f"{place}: a class that is not in the closed list; got {name!r}, expected one of {', '.join(table)}. "
            "Do not load artifacts from elsewhere without reading them."
        )
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)

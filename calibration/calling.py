"""How a pipeline is called and what its networks are given: plain data, so that one recorder serves every family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from calibration.errors import CalibrationError

_CLIP: Mapping[str, tuple[str, ...]] = {"text_encoder": ("input_ids",)}


@dataclass(frozen=True)
class Form:
    """What one family's pipelines take; the defaults are those of StableDiffusionPipeline.

    Attributes:
        denoiser: the pipeline's attribute that holds it.
        inputs: of the denoiser, in the order of its forward; the first is the sample, one is ``timestep``.
        texts: the pipeline's text encoders, each with the names of its inputs.
        tokenizers: attributes of the pipeline.
        decoder: the pipeline's attribute of the autoencoder; empty where the denoiser makes the image itself.
        asked: the argument that says which image: ``prompt`` (a text), ``class_labels`` (the name or number of a
            class), or ``batch_size`` (nothing but how many).
        guidance: whether the guidance scale is an argument.
        conditional_first: whether, of the two rows that the denoiser answers with guidance, the one with the prompt
            comes first.
        sized: whether height and width are arguments.
        shared: inputs of the denoiser without an axis of rows.
        extra: further arguments of every call.
    """

    denoiser: str = "unet"
    inputs: tuple[str, ...] = ("sample", "timestep", "encoder_hidden_states")
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(_CLIP))
    tokenizers: tuple[str, ...] = ("tokenizer",)
    decoder: str = "vae"
    asked: Literal["prompt", "class_labels", "batch_size"] = "prompt"
    guidance: bool = True
    conditional_first: bool = False
    sized: bool = True
    shared: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> tuple[str, ...]:
        """Inputs of the denoiser besides sample and timestep: what stays the same over the steps."""
        return tuple(name for name in self.inputs[1:] if name != "timestep")


@dataclass(frozen=True)
class Drawing:
    """How images are made.

    Attributes:
        steps: denoising steps.
        guidance: guidance scale.
        height: in pixels; `width` likewise.
    """

    steps: int
    guidance: float
    height: int
    width: int


def draw(
    pipeline: Any,
    form: Form,
    texts: Sequence[str],
    seeds: Sequence[int],
    drawing: Drawing,
    *,
    output_type: str = "np",
) -> Any:
    """Call a pipeline: one image per text, each from the noise of its own seed.

    Args:
        pipeline: the stock diffusers pipeline, on torch networks or on engines.
        form: of its family.
        texts: prompts, or names or numbers of classes; only counted where the family takes none.
        seeds: one per text.
        drawing: steps, guidance and size.
        output_type: as diffusers has it.

    Returns:
        What the pipeline answers as images: for ``np`` (n, height, width, 3) float in 0 to 1.

    Raises:
        CalibrationError: a class that the model does not have.
    """
    arguments: dict[str, Any] = {
        form.asked: _asked(pipeline, form, texts),
        "num_inference_steps": drawing.steps,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "output_type": output_type,
        **form.extra,
    }
    if form.guidance:
        arguments["guidance_scale"] = drawing.guidance
    if form.sized:
        arguments |= {"height": drawing.height, "width": drawing.width}
    images = pipeline(**arguments).images
    if isinstance(images, np.ndarray) and images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    return images


def _asked(pipeline: Any, form: Form, texts: Sequence[str]) -> Any:
    if form.asked == "prompt":
        return list(texts)
    if form.asked == "batch_size":
        return len(texts)
    labels: Mapping[str, int] = getattr(pipeline, "labels", {})
    return [_class(text, labels, int(pipeline.transformer.config.num_embeds_ada_norm)) for text in texts]


def _class(text: str, labels: Mapping[str, int], count: int) -> int:
    if text.isdecimal() and int(text) < count:
        return int(text)
    if text not in labels:
        known = f" or a name such as {next(iter(labels))!r}" if labels else ""
        msg = f"prompt {text!r}: not a class of this model; expected a number from 0 to {count - 1}{known}. Change it."
        raise CalibrationError(msg)
    return labels[text]


def named_inputs(form: Form, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a denoiser was called with by name; dictionaries of inputs are opened.

    Raises:
        CalibrationError: a tensor that the form does not name, or one that is missing.
    """
    named = dict(zip(form.inputs, args, strict=False))
    for name, value in kwargs.items():
        named |= value if isinstance(value, Mapping) else {name: value}
    extra = [name for name, value in named.items() if isinstance(value, Tensor) and name not in form.inputs]
    missing = [name for name in form.inputs if named.get(name) is None]
    if extra or missing or len(args) > len(form.inputs):
        msg = (
            f"recording: inputs that a recording does not hold; got {extra or missing or len(args)}, "
            f"expected {', '.join(form.inputs)}. Use a pipeline without them."
        )
        raise CalibrationError(msg)
    return {name: named[name] for name in form.inputs}


def conditions(pipeline: Any, form: Form, texts: Sequence[str], drawing: Drawing) -> dict[str, Tensor]:
    """Return what the denoiser is given for these texts besides sample and timestep; it is asked, but never answers.

    Args:
        pipeline: the torch pipeline.
        form: of its family.
        texts: as for `draw`.
        drawing: with ``guidance`` above 1 where the family answers two rows, the rows come as the pipeline orders them.

    Returns:
        Name to (rows, ...).
    """
    named = first_inputs(pipeline, form, texts, drawing)
    return {name: named[name] for name in form.given}


def first_inputs(pipeline: Any, form: Form, texts: Sequence[str], drawing: Drawing) -> dict[str, Any]:
    """Return all that the denoiser is first asked with; the pipeline's scheduler is set to these steps afterwards.

    Args:
        pipeline: as for `conditions`.
        form: of its family.
        texts: as for `draw`.
        drawing: as for `conditions`.

    Raises:
        CalibrationError: the denoiser is never asked.
    """
    seen: dict[str, Any] = {}

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        for name, value in named_inputs(form, args, kwargs).items():
            seen[name] = value.detach() if isinstance(value, Tensor) else value
        raise _Enough

    handle = getattr(pipeline, form.denoiser).register_forward_pre_hook(look, with_kwargs=True)
    shown = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        draw(pipeline, form, texts, range(len(texts)), drawing)
    except _Enough:
        return seen
    finally:
        handle.remove()
        pipeline.set_progress_bar_config(**shown)
    raise CalibrationError(
        f"{form.denoiser}: never asked while drawing; expected at least one step. Sample more steps."
    )


class _Enough(Exception):  # noqa: N818 - no error: ends a call whose first denoiser inputs are all that is wanted
    """Raised from inside of a pipeline and caught here."""

"""Facts of a state folder that need nothing but its JSON files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from calibration.calling import Form
from exporter.errors import ArtifactError, SourceError
from exporter.networks.components import Component, Family, denoiser, family, present_components, present_tokenizers
from exporter.networks.inputs import SHARED, inputs_of
from exporter.networks.reading import read_object


def pipeline_class_of(folder: Path) -> str:
    """Return the pipeline class that a folder's ``model_index.json`` names, supported or not."""
    return str(read_object(folder / "model_index.json", ArtifactError).get("_class_name"))


def family_of(folder: Path) -> Family:
    """Return the table's entry of a folder's pipeline class; SourceError where it has none."""
    return family(pipeline_class_of(folder))


def components_of(folder: Path, requested: Collection[str] = ()) -> tuple[Component, ...]:
    """Return the networks of a pipeline folder, with those on request that are named.

    Raises:
        SourceError: its family is not supported.
    """
    index = read_object(folder / "model_index.json", ArtifactError)
    return present_components(pipeline_class_of(folder), index, requested)


def scheduler_of(folder: Path) -> str:
    """Return the class of the scheduler that a pipeline folder comes with."""
    stated = read_object(folder / "model_index.json", ArtifactError).get("scheduler")
    return str(stated[1]) if isinstance(stated, list) and len(stated) > 1 else ""


def config_of(folder: Path) -> dict[str, Any]:
    """Return the config of a component folder."""
    return read_object(folder / "config.json", ArtifactError)


def form_of(state: Path) -> Form:
    """Return how the pipeline of a state is called, for the recorder."""
    parts, entry = components_of(state), family_of(state)
    asked = next(part for part in parts if part.role == "denoiser")
    return Form(
        denoiser=asked.folder,
        inputs=inputs_of(asked.cls, config_of(state / asked.folder)),
        texts={
            part.folder: inputs_of(part.cls, config_of(state / part.folder)) for part in parts if part.role == "text"
        },
        tokenizers=present_tokenizers(pipeline_class_of(state), read_object(state / "model_index.json", ArtifactError)),
        decoder=next((part.folder for part in parts if part.role == "decoder"), ""),
        asked=entry.asked,
        guidance=entry.guidance != "none",
        conditional_first=entry.conditional_first,
        sized=entry.sized,
        shared=SHARED,
        extra=entry.extra,
    )


def is_guided_by_rows(state: Path, guidance: float) -> bool:
    """Tell whether the denoiser answers two rows per image at this guidance scale."""
    config = config_of(state / denoiser(pipeline_class_of(state)).folder)
    return family_of(state).guidance == "rows" and guidance > 1 and config.get("time_cond_proj_dim") is None


def vae_scale(state: Path) -> int:
    """Return how many image pixels a latent pixel stands for, along one side; 1 where there is no autoencoder."""
    if not any(part.role == "decoder" for part in components_of(state)):
        return 1
    return int(2 ** (len(config_of(state / "vae")["block_out_channels"]) - 1))


def size_step(state: Path) -> int:
    """Return what image sides must be a multiple of."""
    entry = family_of(state)
    config = config_of(state / denoiser(pipeline_class_of(state)).folder)
    return vae_scale(state) * (entry.multiple or int(config["patch_size"]))


def image_size(wanted: int | None, state: Path) -> int:
    """Return the image side that a recipe asks for, or the model's own where it asks for none.

    Raises:
        SourceError: neither says.
    """
    return wanted or own_size(state)


def own_size(state: Path) -> int:
    """Return the image side that the denoiser was made for.

    Raises:
        SourceError: its config does not say.
    """
    folder = denoiser(pipeline_class_of(state)).folder
    size = config_of(state / folder).get("sample_size") or family_of(state).latent
    if not isinstance(size, int):
        raise SourceError(
            f"{state / folder / 'config.json'}: sample_size: got {size!r}, expected a number, since images are square. "
            "Write sampling.size in the recipe."
        )
    return size * vae_scale(state)

"""The safety checker of a pipeline: carried along from the source to the engine, or left out, as the recipe says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from exporter.errors import ArtifactError, SourceError
from exporter.memo import FileMemo
from exporter.networks.reading import read_object
from exporter.networks.weights import check_finite_files, precision_of, read_headers, weight_files

CHECKER, IMAGES = "safety_checker", "feature_extractor"
SAFETY_PARTS = (CHECKER, IMAGES)
"""The folders that go together."""

CHECKER_CLASS = "StableDiffusionSafetyChecker"
IMAGE_CLASSES = ("CLIPImageProcessor", "CLIPFeatureExtractor")
"""The second is what older libraries called the first."""

INDEX_ENTRIES: Mapping[str, list[str]] = {
    CHECKER: ["stable_diffusion", CHECKER_CLASS],
    IMAGES: ["transformers", IMAGE_CLASSES[0]],
}
"""What `model_index.json` says of the two."""


def has_safety_checker(index: Mapping[str, Any]) -> bool:
    """Tell whether a pipeline comes with one, by its `model_index.json`."""
    entry = index.get(CHECKER)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def safety_files(
    folder: Path, index: Mapping[str, Any], variant: str | None, memo: FileMemo | None = None
) -> list[Path]:
    """Return the files of a source's safety checker and its image processor, after checking them.

    Raises:
        SourceError: there is none, or it is damaged or of another class.
    """
    if not has_safety_checker(index):
        raise SourceError("source.safety_checker: got keep, but the source has none. Write drop, or leave the key out.")
    for part, known in ((CHECKER, (CHECKER_CLASS,)), (IMAGES, IMAGE_CLASSES)):
        entry = index.get(part)
        named = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if named not in known:
            raise SourceError(f"{folder}: {part}: unsupported class; got {named!r}, expected {known[0]!r}.")
    files = [folder / CHECKER / "config.json", folder / IMAGES / "preprocessor_config.json"]
    for file in files:
        if not file.is_file():
            raise SourceError(f"{file}: missing. Fetch the model again.")
        read_object(file, SourceError)
    weights = weight_files(folder / CHECKER, CHECKER_CLASS, SourceError, variant=variant)
    precision_of(folder / CHECKER, read_headers(weights, SourceError))
    check_finite_files(weights, memo)
    return [*files, *weights, *(weights[0].parent.glob("*.index*.json") if len(weights) > 1 else [])]


def attach_safety_checker(pipeline: Any, folder: Path) -> Any:
    """Give a pipeline the safety checker that its folder carries, in torch; one that carries none stays as it is.

    Raises:
        ArtifactError: the checker's files are damaged.
    """
    index = read_object(folder / "model_index.json", ArtifactError)
    if not has_safety_checker(index):
        return pipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    try:
        options = {"local_files_only": True}
        checker = StableDiffusionSafetyChecker.from_pretrained(
            str(folder / CHECKER), use_safetensors=True, torch_dtype=torch.float32, **options
        )
        images = CLIPImageProcessor.from_pretrained(str(folder / IMAGES), **options)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{folder / CHECKER}: cannot be loaded; got {str(error)[:200]}. Restore the original folder."
        ) from error
    pipeline.register_modules(**{CHECKER: checker.eval(), IMAGES: images})
    pipeline.register_to_config(requires_safety_checker=True)
    return pipeline

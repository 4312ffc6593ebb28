"""A state folder or a source folder as a diffusers pipeline object; every class it names must be in a closed table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from exporter.errors import ArtifactError
from exporter.networks.components import (
    PIPELINE_CLASSES,
    SCHEDULER_CLASSES,
    TOKENIZER_CLASSES,
    class_from,
    family,
    is_absent,
    is_named,
    present_components,
)
from exporter.networks.reading import read_object
from exporter.networks.storage import load_network

MODEL_INDEX = "model_index.json"


def load_pipeline(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Return the diffusers pipeline of a folder, pruned components included, without a safety checker.

    Args:
        folder: `model_index.json`, a sub-folder per component, tokenizers and scheduler.
        dtype: of all weights in memory.

    Raises:
        SourceError: the pipeline family is not supported.
        ArtifactError: the folder is damaged or names a class that is not in the closed tables.
    """
    index = read_object(folder / MODEL_INDEX, ArtifactError)
    name = index.get("_class_name")
    parts: dict[str, Any] = {}
    for component in present_components(name if isinstance(name, str) else repr(name), index):
        named = named_class(index, component.folder, folder)
        if not is_named(component.cls, named):
            raise ArtifactError(
                f"{folder / MODEL_INDEX}: {component.folder}: another class; got {named!r}, expected {component.cls!r}."
            )
        parts[component.folder] = load_network(folder / component.folder, cls=component.cls, dtype=dtype)
    return assemble(folder, parts)


def assemble(folder: Path, networks: Mapping[str, Any]) -> Any:
    """Return the diffusers pipeline of a folder, made of these networks and the folder's tokenizers and scheduler.

    Args:
        folder: of a state or an engine.
        networks: attribute of the pipeline to what stands there.

    Raises:
        SourceError: the pipeline family is not supported.
        ArtifactError: the folder is damaged or names a class that is not in the closed tables.
    """
    index = read_object(folder / MODEL_INDEX, ArtifactError)
    name = str(index.get("_class_name"))
    entry = family(name)
    parts = {**entry.absent, **{key: index[key] for key in entry.options if key in index}, **networks}
    parts |= {part.folder: None for part in entry.components if part.optional and part.folder not in networks}
    for tokenizer in entry.tokenizers:
        parts[tokenizer] = None if is_absent(index, tokenizer) else load_tokenizer(folder, tokenizer)
    parts["scheduler"] = load_scheduler(folder)
    pipeline_class = class_from(PIPELINE_CLASSES, name, str(folder / MODEL_INDEX))
    return pipeline_class(**parts)


def named_class(index: dict[str, Any], part: str, folder: Path) -> str:
    """Return the class that `model_index.json` names for a part; only the last of its two words counts."""
    entry = index.get(part)
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise ArtifactError(
            f"{folder / MODEL_INDEX}: {part}: no class; expected [library, class]. Restore the original file."
        )
    return entry[1]


def load_tokenizer(folder: Path, name: str = "tokenizer") -> Any:
    """Return a tokenizer of a pipeline folder.

    Raises:
        ArtifactError: its class is not in the closed table, or its files are damaged.
    """
    return _load_part(folder, name, TOKENIZER_CLASSES)


def load_scheduler(folder: Path) -> Any:
    """Return the scheduler of a pipeline folder.

    Raises:
        ArtifactError: its class is not in the closed table, or its config is damaged.
    """
    return _load_part(folder, "scheduler", SCHEDULER_CLASSES)


def _load_part(folder: Path, part: str, table: Any) -> Any:
    index = read_object(folder / MODEL_INDEX, ArtifactError)
    named = named_class(index, part, folder)
    cls = class_from(table, named, f"{folder / MODEL_INDEX}: {part}")
    if not (folder / part).is_dir():
        raise ArtifactError(f"{folder / part}: missing. Restore the original folder.")
    try:
        return cls.from_pretrained(str(folder / part), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / part}: not a {named}; got {str(error)[:200]}. Restore the original folder."
        ) from error

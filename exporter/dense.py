"""The dense state's files, from a source: copied under plain names, or converted from one file; LoRAs fused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from exporter.errors import SourceError
from exporter.networks.components import family, present_components
from exporter.networks.loras import FUSED, fuse, fused_entry, plan_fuse
from exporter.networks.reading import read_object
from exporter.networks.safety import INDEX_ENTRIES
from exporter.networks.single_file import convert_single_file, held_by
from exporter.networks.source import MODEL_INDEX, SourceFacts, shapes_of
from exporter.networks.weights import plain_name


def fill_dense(source: Path, facts: SourceFacts, folder: Path) -> None:
    """Write a pipeline folder that holds what was chosen of a source.

    Args:
        source: the source's folder.
        facts: what `check_source` found there.
        folder: an existing, empty folder.

    Raises:
        SourceError: a single file does not hold the networks of its configs, or a LoRA makes weights infinite.
    """
    index = json.loads((source / MODEL_INDEX).read_text(encoding="utf-8"))
    folders = {name.partition("/")[0] for name in facts.files}
    kept = {name: value for name, value in index.items() if name.startswith("_") or name in folders}
    entry = family(facts.pipeline_class)
    kept |= {name: index[name] for name in entry.options if name in index}
    kept |= {name: [None, None] if value is None else value for name, value in entry.absent.items()}
    gone = [part.folder for part in entry.components if part.optional and part.folder not in folders]
    kept |= {name: [None, None] for name in (*gone, *(t for t in entry.tokenizers if t not in folders))}
    if facts.safety_checker == "kept":
        kept |= {**INDEX_ENTRIES, "requires_safety_checker": True}
    if facts.loras:
        kept[FUSED] = fused_entry(facts.loras)
    (folder / MODEL_INDEX).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for name in facts.files:
        if "/" in name:
            _copy(source / name, folder / plain_name(name, facts.variant), facts.variant)
    if facts.single_file is not None:
        _convert(Path(facts.single_file), source, facts.pipeline_class, folder)
    _fuse(facts, index, folder)


def _convert(file: Path, source: Path, pipeline_class: str, folder: Path) -> None:
    held = held_by(file, pipeline_class)
    for part in present_components(pipeline_class, read_object(source / MODEL_INDEX, SourceError)):
        if part.folder in held:
            convert_single_file(file, source, part, held[part.folder], folder)


def _copy(file: Path, copy: Path, variant: str | None) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    if variant is not None and ".safetensors.index" in file.name:
        index = json.loads(file.read_text(encoding="utf-8"))
        index["weight_map"] = {name: plain_name(shard, variant) for name, shard in index["weight_map"].items()}
        copy.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(file, copy)


def _fuse(facts: SourceFacts, index: dict[str, Any], folder: Path) -> None:
    if not facts.loras:
        return
    parts = present_components(facts.pipeline_class, index)
    plan = plan_fuse(facts.loras, shapes_of(folder, parts), index)
    for part in parts:
        if part.folder in plan:
            fuse(folder / part.folder, part.cls, plan[part.folder])

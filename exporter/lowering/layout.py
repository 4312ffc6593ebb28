"""An engine folder as optimum's loaders expect it: `model_index.json`, a config per component, tokenizer, scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from exporter.artifact import link_file, link_tree
from exporter.errors import ArtifactError, ComponentFailed
from exporter.networks.components import NETWORK_CLASSES, family, present_components, present_tokenizers
from exporter.networks.pipeline import MODEL_INDEX, load_scheduler, named_class
from exporter.networks.reading import read_object
from exporter.networks.safety import INDEX_ENTRIES, SAFETY_PARTS, has_safety_checker
from exporter.networks.schedule import SCHEDULE
from exporter.sampling import use_scheduler

_PATHS = ("_name_or_path", "name_or_path")
"""Keys under which libraries keep the folder that something was loaded from."""
_SCHEDULER = "scheduler"
_NOTE = "README.txt"
_SCHEDULED = """\
This denoiser is several graphs that share one file of weights. schedule.json says which of them answers at which step
of which sampler, and what each takes from an earlier step. `exporter generate` and `exporter.runtime.load` carry that
out. Loaders of other packages, optimum's among them, cannot: they look for one graph and find none.
"""


def write_layout(
    state: Path, folder: Path, *, engine_file: str, scheduler: str = "source", requested: tuple[str, ...] = ()
) -> None:
    """Complete a folder that holds the compiled components, each in a sub-folder of its name.

    The result loads with ``ORTStableDiffusionPipeline`` or ``OVStableDiffusionPipeline``, whichever fits the target;
    with a denoiser whose steps follow a schedule, with `exporter.runtime.load` only, which a file beside it says.

    Args:
        state: folder of the state that was lowered: `model_index.json`, configs, tokenizer, scheduler.
        folder: with ``unet/model.onnx`` and so on in place; unchanged files are linked into it, not copied.
        engine_file: the file that each component must have, `targets.base.engine_file_of`.
        scheduler: a value of the recipe's ``sampling.scheduler``.
        requested: names of the components on request that are there too.

    Raises:
        ComponentFailed: a compiled component is missing.
        ArtifactError: a file of the state is missing or damaged.
    """
    index = read_object(state / MODEL_INDEX, ArtifactError)
    name = str(index.get("_class_name"))
    entries, tokenizers = present_components(name, index, requested), present_tokenizers(name, index)
    for entry in entries:
        place = folder / entry.name
        if (state / entry.folder / SCHEDULE).exists():
            link_file(state / entry.folder / SCHEDULE, place / SCHEDULE)
            (place / _NOTE).write_text(_SCHEDULED, encoding="utf-8")
        elif not (place / engine_file).exists():
            raise ComponentFailed(f"{place}: not compiled; expected {engine_file} in it. Compile it again.")
        config = read_object(state / entry.folder / "config.json", ArtifactError)
        _write(place / "config.json", _portable(config))
    for tokenizer in tokenizers:
        _write_tokenizer(state / tokenizer, folder / tokenizer)
    scheduler_class = _write_scheduler(state, folder, scheduler)
    parts = {
        _SCHEDULER: ["diffusers", scheduler_class],
        **{part: ["transformers", named_class(index, part, state)] for part in tokenizers},
        **{entry.folder: [NETWORK_CLASSES[entry.cls].partition(":")[0], entry.cls] for entry in entries},
    }
    absent = {part: [None, None] if value is None else value for part, value in family(name).absent.items()}
    gone = [part.folder for part in family(name).components if part not in entries]
    absent |= {part: [None, None] for part in (*gone, *(t for t in family(name).tokenizers if t not in tokenizers))}
    facts = {
        "_class_name": name,
        "_diffusers_version": index.get("_diffusers_version"),
        **{key: index[key] for key in family(name).options if key in index},
    }
    if has_safety_checker(index):
        absent |= {**INDEX_ENTRIES, "requires_safety_checker": True}
        for part in SAFETY_PARTS:
            link_tree(state / part, folder / part)
    _write(folder / MODEL_INDEX, {**facts, **parts, **absent})


def _write_tokenizer(source: Path, folder: Path) -> None:
    if not source.is_dir():
        raise ArtifactError(f"{source}: missing; expected the tokenizer's files. Restore the original folder.")
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.name == "tokenizer_config.json":
            _write(folder / path.name, _portable(read_object(path, ArtifactError)))
        elif path.is_file():
            link_file(path, folder / path.name)
    fast = source / "tokenizer.json"
    if fast.is_file() and not (source / "vocab.json").exists():
        _write_slow_tokenizer(read_object(fast, ArtifactError).get("model"), folder)


def _write_slow_tokenizer(model: Any, folder: Path) -> None:
    """Write the two files that transformers before 5 reads, which is what optimum-onnx runs with."""
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return
    _write(folder / "vocab.json", model["vocab"])
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")


def _write_scheduler(state: Path, folder: Path, name: str) -> str:
    """Write the scheduler's folder; return its class."""
    holder = SimpleNamespace(scheduler=load_scheduler(state))
    use_scheduler(holder, name)
    holder.scheduler.save_pretrained(str(folder / _SCHEDULER))
    config = folder / _SCHEDULER / "scheduler_config.json"
    _write(config, _portable(json.loads(config.read_text(encoding="utf-8"))))
    return type(holder.scheduler).__name__


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _PATHS}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""The source model: a local pipeline folder or a fixed revision on a hub, and every check before work begins."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from exporter.errors import SourceError
from exporter.memo import FileMemo
from exporter.networks.components import (
    FAMILIES,
    SCHEDULER_CLASSES,
    TOKENIZER_CLASSES,
    Component,
    family,
    is_named,
    present_components,
    present_tokenizers,
)
from exporter.networks.loras import Lora, plan_fuse
from exporter.networks.reading import read_object
from exporter.networks.safety import SAFETY_PARTS, has_safety_checker, safety_files
from exporter.networks.single_file import Held, absent_from, check_single_file
from exporter.networks.weights import (
    PRECISIONS,
    WEIGHT_STEMS,
    check_finite_files,
    precision_of,
    present_names,
    read_headers,
    variants_of,
    weight_files,
)

MODEL_INDEX = "model_index.json"

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_ENDINGS = ("json", "txt", "model")
_UNET_EXTRAS = (
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
)


_VARIANT_FILE = re.compile(r"/[\w-]+?\.(\w+)(?:-\d+-of-\d+)?\.safetensors\Z")
_VARIANTS = ("fp16", "bf16", "fp32", "ema", "non_ema")
"""Variants that repositories hold beside the weights; of these only the one that was asked for is fetched."""


@dataclass(frozen=True)
class Choice:
    """What a recipe chooses of a source, beside its place.

    Attributes:
        variant: of the weight files, such as ``fp16``.
        safety_checker: whether it is carried along.
        loras: added to the weights, in this order.
        single_file: holds weights; the source's folder holds configs, tokenizers, scheduler, and what is not in it.
    """

    variant: str | None = None
    safety_checker: bool = False
    loras: tuple[Lora, ...] = ()
    single_file: Path | None = None


@dataclass(frozen=True)
class SourceFacts:
    """What a source model is.

    Attributes:
        pipeline_class: such as ``StableDiffusionPipeline``.
        components: component name (``unet``) to class name.
        sizes: component name to bytes of its weight files.
        parameters: component name to how many numbers they hold.
        files: paths, relative to the folder, of every file that loading reads.
        digest: sha256 over names and contents of every file that loading reads.
        precisions: component name to the number type of its weights, such as ``F16``.
        variant: of the weight files.
        safety_checker: ``kept``, ``dropped`` or ``none`` (the source has none).
        loras: added to the weights.
        single_file: path of the file that holds weights.
    """

    pipeline_class: str
    components: Mapping[str, str]
    sizes: Mapping[str, int]
    parameters: Mapping[str, int]
    files: tuple[str, ...]
    digest: str
    precisions: Mapping[str, str]
    variant: str | None = None
    safety_checker: str = "none"
    loras: tuple[Lora, ...] = ()
    single_file: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report says of the source."""
        told = {
            "kept": "the safety checker of the source is carried along (source.safety_checker: keep); "
            "measurements are made without it",
            "dropped": "the safety checker of the source is left out (source.safety_checker: drop)",
        }
        fused = [f"LoRA {Path(lora.path).name} with weight {lora.weight:g}" for lora in self.loras]
        notes = [told[self.safety_checker]] if self.safety_checker in told else []
        return (*notes, *([f"fused before anything else: {', '.join(fused)}"] if fused else []))


def open_source(
    source: str | Path | Mapping[str, str], *, cache_dir: Path | None = None, variant: str | None = None
) -> Path:
    """Return the local folder of a source model.

    Args:
        source: a folder, or ``{"hub": "owner/name", "revision": commit}``; the commit is 40 hexadecimal digits, so that
            a run can be repeated. Of a repository only JSON, text, tokenizer models and safetensors are fetched.
        cache_dir: of the hub's client; by default its own.
        variant: of the weight files to fetch.

    Raises:
        SourceError: no such folder, or the repository cannot be had.
    """
    if isinstance(source, Mapping):
        return _from_hub(source, cache_dir, variant)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise SourceError(
            f"{folder}: no such folder; got {what}, expected a diffusers pipeline folder with {MODEL_INDEX}. "
            "Check source.path in the recipe."
        )
    return folder


def _from_hub(source: Mapping[str, str], cache_dir: Path | None, variant: str | None) -> Path:
    if set(source) != {"hub", "revision"}:
        raise SourceError(f"source: wrong keys; got {', '.join(sorted(source))}, expected hub and revision.")
    repository, revision = source["hub"], source["revision"]
    if not _REPOSITORY.match(repository):
        raise SourceError(f"source.hub: got {repository!r}, expected owner/name.")
    if not _COMMIT.match(revision):
        raise SourceError(
            f"source.revision: got {revision!r}, expected a commit of 40 hexadecimal digits. "
            "A branch moves; copy the commit from the repository's history."
        )
    parts = {part.folder for entry in FAMILIES.values() for part in entry.components}
    tokenizers = {name for entry in FAMILIES.values() for name in entry.tokenizers}
    folders = sorted({*parts, *tokenizers, "scheduler", *SAFETY_PARTS})
    endings = [*_ENDINGS, f"{variant}*safetensors" if variant else "safetensors"]
    whole = [MODEL_INDEX, *(f"{f}/*.{end}" for f in folders for end in endings)]
    folder = _snapshot(repository, revision, whole, _ignored(variant), cache_dir)
    if not any(folder.glob("*/*.safetensors")):
        _refuse_variant(repository, revision, variant)
    return folder


def _refuse_variant(repository: str, revision: str, variant: str | None) -> None:
    """Raise naming the variants that a repository holds, where the one that was asked for is none of them."""
    from huggingface_hub import is_offline_mode, list_repo_files
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline_mode():
        return  # what the local cache holds is all that can be said: `check_source` does
    try:
        names = list_repo_files(repository, revision=revision)
    except (HfHubHTTPError, OSError):
        return
    found = {match[1] for name in names if (match := _VARIANT_FILE.search(name))}
    if found:
        raise SourceError(
            f"source {repository} at {revision[:12]}: no weights of variant {variant or 'none'}; got "
            f"{', '.join(sorted(found))}. Write source.variant: {min(found)}."
        )


def _ignored(variant: str | None) -> list[str]:
    return [f"*.{name}{mark}*" for name in _VARIANTS if name != variant for mark in (".", "-")]


def _snapshot(repository: str, revision: str, allow: list[str], ignore: list[str], cache_dir: Path | None) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    place = f"source {repository} at {revision[:12]}"
    try:
        found = snapshot_download(
            repository, revision=revision, allow_patterns=allow, ignore_patterns=ignore, cache_dir=cache_dir
        )
    except GatedRepoError as error:
        raise SourceError(
            f"{place}: access is restricted. Accept its terms on the hub and log in: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{place}: no such repository, or no access to it. Check source.hub, or: hf auth login"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        what = "offline mode (HF_HUB_OFFLINE)" if is_offline_mode() else str(error).split("\n", 1)[0][:200]
        raise SourceError(
            f"{place}: cannot be fetched and is not in the local cache; got {what}. "
            "Go online once, or give a local folder as source.path."
        ) from error
    return Path(found)


def check_source(folder: Path, choice: Choice | None = None, memo: FileMemo | None = None) -> SourceFacts:
    """Return what a source folder holds, after checking all of it that loading will read.

    Args:
        folder: from `open_source`.
        choice: what the recipe chooses of it; by default the plain weights and nothing else.
        memo: what is known of files: of those it knows, only headers are read.

    Raises:
        SourceError: anything is missing, damaged, not safe to load or not supported; the message names the file.
    """
    chosen, memo = choice or Choice(), memo or FileMemo()
    path = folder / MODEL_INDEX
    if not path.is_file():
        raise SourceError(
            f"{folder}: not a pipeline folder; got no {MODEL_INDEX}, expected one. A single checkpoint file is given "
            "as source: {path: model.safetensors, config: folder}."
        )
    index = read_object(path, SourceError)
    name = index.get("_class_name")
    entry = family(name if isinstance(name, str) else repr(name))
    files: list[Path] = [path]
    sizes: dict[str, int] = {}
    parameters: dict[str, int] = {}
    precisions: dict[str, str] = {}
    networks = present_components(str(name), index)
    held = check_single_file(chosen.single_file, str(name), memo) if chosen.single_file is not None else {}
    for component in networks:
        _check_config(folder, component, index)
        if component.folder in held:
            read = _from_config(folder, component, held[component.folder])
        elif chosen.single_file is not None and not variants_of(folder / component.folder, WEIGHT_STEMS[component.cls]):
            raise SourceError(absent_from(chosen.single_file, str(name), component))
        else:
            read = _from_weights(folder, component, chosen.variant, memo)
        files += [folder / component.folder / "config.json", *read.files]
        sizes[component.name] = read.size
        parameters[component.name] = read.parameters
        precisions[component.name] = read.precision
    own = {name: cls for name, cls in SCHEDULER_CLASSES.items() if name in (entry.source_schedulers or (name,))}
    tokenizers = present_tokenizers(str(name), index)
    for part, table in (*((part, TOKENIZER_CLASSES) for part in tokenizers), ("scheduler", own)):
        files += _check_part(folder, part, index, table)
    files += safety_files(folder, index, chosen.variant, memo) if chosen.safety_checker else []
    if chosen.loras:
        plan_fuse(chosen.loras, shapes_of(folder, networks), index)
    names = tuple(sorted(file.relative_to(folder).as_posix() for file in files))
    return SourceFacts(
        str(name),
        {c.name: c.cls for c in networks},
        sizes,
        parameters,
        names,
        _digest(folder, files, chosen, memo),
        precisions,
        chosen.variant,
        _fate(chosen, index),
        chosen.loras,
        None if chosen.single_file is None else str(chosen.single_file),
    )


def shapes_of(folder: Path, parts: tuple[Component, ...]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the tensors that the configs of a pipeline's networks ask for: component folder to name to shape."""
    from exporter.networks.storage import build_network  # seconds to import

    networks = {part.folder: build_network(folder / part.folder, cls=part.cls) for part in parts}
    return {name: {key: tuple(t.shape) for key, t in net.state_dict().items()} for name, net in networks.items()}


@dataclass(frozen=True)
class _Weights:
    """What is known of one component's weights."""

    files: list[Path]
    size: int
    parameters: int
    precision: str


def _from_weights(folder: Path, component: Component, variant: str | None, memo: FileMemo) -> _Weights:
    place = folder / component.folder
    weights = weight_files(place, component.cls, SourceError, variant=variant)
    headers = read_headers(weights, SourceError)
    precision = precision_of(place, headers)
    check_finite_files(weights, memo)
    indexes = sorted(place.glob("*.safetensors.index*.json")) if len(weights) > 1 else []
    size = sum(file.stat().st_size for file in weights)
    return _Weights([*weights, *indexes], size, sum(prod(fact.shape) for fact in headers.values()), precision)


def _from_config(folder: Path, component: Component, held: Held) -> _Weights:
    """Return what a network will be that a single checkpoint file holds."""
    from exporter.networks.storage import build_network

    network = build_network(folder / component.folder, cls=component.cls)
    parameters = sum(tensor.numel() for tensor in present_names(component.cls, network.state_dict()).values())
    return _Weights([], parameters * PRECISIONS[held.precision].itemsize, parameters, held.precision)


def _digest(folder: Path, files: list[Path], chosen: Choice, memo: FileMemo) -> str:
    contents: list[Any] = sorted((file.relative_to(folder).as_posix(), memo.sha256(file)) for file in files)
    contents += [["lora", lora.sha256, lora.weight] for lora in chosen.loras]
    if chosen.single_file is not None:
        contents.append(["single file", memo.sha256(chosen.single_file)])
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _fate(chosen: Choice, index: Mapping[str, Any]) -> str:
    if not has_safety_checker(index):
        return "none"
    return "kept" if chosen.safety_checker else "dropped"


def _named(index: Mapping[str, Any], part: str, path: Path) -> str:
    entry = index.get(part)
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise SourceError(f"{path}: {part}: not in the pipeline; got {entry!r:.80}, expected [library, class].")
    return entry[1]


def _check_config(folder: Path, component: Component, index: Mapping[str, Any]) -> None:
    """Check that a component's folder and config are in order."""
    place = folder / component.folder
    named = _named(index, component.folder, folder / MODEL_INDEX)
    if not is_named(component.cls, named):
        raise SourceError(
            f"{folder / MODEL_INDEX}: {component.folder}: unsupported class; got {named!r}, expected {component.cls!r}."
        )
    if not place.is_dir():
        raise SourceError(f"{place}: missing; {MODEL_INDEX} names {component.cls} there. Fetch the model again.")
    path = place / "config.json"
    if not path.is_file():
        raise SourceError(f"{path}: missing. Fetch the model again.")
    config = read_object(path, SourceError)
    architectures = config.get("architectures")
    stated = config.get("_class_name") or (
        architectures[0] if isinstance(architectures, list) and architectures else None
    )
    if stated is not None and not is_named(component.cls, stated):
        raise SourceError(
            f"{path}: another class than {MODEL_INDEX} names; got {stated!r}, expected {component.cls!r}."
        )
    extras = [key for key in _UNET_EXTRAS if component.role == "denoiser" and config.get(key) is not None]
    added = config.get("addition_embed_type")
    if added is not None and (added != "text_time" or "text_encoder_2" not in index):
        extras.append(f"addition_embed_type {added}")
    if extras:
        raise SourceError(
            f"{path}: it takes inputs that this family does not have; got {', '.join(extras)}, expected none."
        )


def _check_part(folder: Path, part: str, index: Mapping[str, Any], table: Mapping[str, str]) -> list[Path]:
    named = _named(index, part, folder / MODEL_INDEX)
    if named not in table:
        raise SourceError(
            f"{folder / MODEL_INDEX}: {part}: unsupported class; got {named!r}, expected one of {', '.join(table)}."
        )
    if not (folder / part).is_dir():
        raise SourceError(f"{folder / part}: missing; {MODEL_INDEX} names {named} there. Fetch the model again.")
    files = sorted(p for end in ("json", "txt", "model") for p in (folder / part).glob(f"*.{end}") if p.is_file())
    if not files:
        raise SourceError(f"{folder / part}: empty; expected the files of a {named}. Fetch the model again.")
    for file in files:
        if part == "scheduler" and file.suffix == ".json":
            read_object(file, SourceError)
    return files

"""Writes a pipeline folder of a family with random weights, component by component."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from exporter.artifact import disk_failure
from exporter.errors import RecipeError
from exporter.progress import Progress, task
from exporter.random_weights.families import SAFETY_PARTS, Family, Part
from exporter.random_weights.filling import Fill, fills_of, numbers
from exporter.random_weights.shards import Entry, split, write_shards
from exporter.random_weights.vocabularies import write_tokenizer

SHARD_BYTES = 4 * 2**30
_MEGA = 10**6
_MODULES = {
    "diffusers": "diffusers",
    "transformers": "transformers",
    "stable_diffusion": "diffusers.pipelines.stable_diffusion.safety_checker",
}
_TRANSFORMERS_STEM, _DIFFUSERS_STEM = "model", "diffusion_pytorch_model"


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        folder: the pipeline folder.
        pipeline: its class.
        parameters: component folder to how many numbers its weights hold.
        size_bytes: of all weight files.
    """

    folder: Path
    pipeline: str
    parameters: dict[str, int]
    size_bytes: int


def write_random(
    wanted: Family, out: Path, *, seed: int, progress: Progress, shard_bytes: int = SHARD_BYTES
) -> Written:
    """Write a pipeline folder with random fp16 weights; the same seed gives the same bytes.

    Args:
        wanted: from `exporter.random_weights.families.family`.
        out: the folder to make; may be there and empty.
        seed: of all weights.
        progress: reports megabytes.
        shard_bytes: larger components are split into files of at most this size.

    Raises:
        RecipeError: `out` holds something, or there is not enough room.
        ComponentFailed: the disk is full or not writable; nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out}: not empty; expected a new folder. Give another one, or remove it.")
    plans = _plans(wanted)
    size = sum(_entry(fill).size for fills in plans.values() for fill in fills)
    _check_room(out, size)
    partial = out.parent / f".partial-{out.name}-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        with task(progress, f"Write {wanted.like}", size // _MEGA):
            for part in wanted.parts:
                _write_part(part, partial / part.folder, _Job(plans.get(part.folder, []), seed, shard_bytes, progress))
        _write_index(wanted, partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise disk_failure(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Written(out, wanted.pipeline, parameters_of(wanted, plans), size)


def parameters_of(wanted: Family, plans: Mapping[str, list[Fill]] | None = None) -> dict[str, int]:
    """Return how many parameters each component has, tied ones once; buffers do not count."""
    found = _plans(wanted) if plans is None else plans
    return {folder: sum(fill.count for fill in fills if fill.kind != "given") for folder, fills in found.items()}


def _plans(wanted: Family) -> dict[str, list[Fill]]:
    return {part.folder: fills_of(_build(part)) for part in wanted.parts if _is_network(part)}


@dataclass
class _Job:
    """The weights of one part: what fills them, and how they are stored."""

    fills: list[Fill]
    seed: int
    shard_bytes: int
    progress: Progress
    waiting: int = 0

    def count(self, size: int) -> None:
        """Report bytes as whole megabytes."""
        self.waiting += size
        self.progress.advance(self.waiting // _MEGA)
        self.waiting %= _MEGA


def _is_network(part: Part) -> bool:
    return not part.cls.endswith(("Tokenizer", "Scheduler", "ImageProcessor"))


def _check_room(out: Path, size: int) -> None:
    place = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise RecipeError(
            f"{out}: not enough room; got {free // _MEGA} MB free, expected {-(-size // _MEGA)} MB. "
            "Give another folder, or free some space."
        )


def _build(part: Part) -> nn.Module:
    """Return the network with its parameters on the meta device and its buffers real."""
    cls = getattr(import_module(_MODULES[part.library]), part.cls)
    with init_empty_weights(include_buffers=False):
        if part.library == "diffusers":
            network: nn.Module = cls.from_config(dict(part.config))
        else:
            network = cls(cls.config_class(**part.config))
    return network


def _write_part(part: Part, folder: Path, job: _Job) -> None:
    folder.mkdir()
    if part.cls.endswith("Tokenizer"):
        write_tokenizer(part.cls, folder, part.config)
    elif part.cls.endswith("Scheduler"):
        facts = {"_class_name": part.cls, "_diffusers_version": version("diffusers")}
        _write_json(folder / "scheduler_config.json", {**facts, **part.config})
    elif part.cls.endswith("ImageProcessor"):
        _write_json(folder / "preprocessor_config.json", {"image_processor_type": part.cls, **part.config})
    else:
        _write_network(part, folder, job)


def _write_network(part: Part, folder: Path, job: _Job) -> None:
    network: Any = _build(part)
    if part.library == "diffusers":
        network.save_config(folder)
    else:
        # float32 is what plain `from_pretrained` then loads, as it does for the components of diffusers.
        network.config.architectures, network.config.dtype = [part.cls], torch.float32
        network.config.save_pretrained(folder)
    del network
    by_name = {fill.name: fill for fill in job.fills}

    def values(entry: Entry) -> Iterator[Tensor]:
        for piece in numbers(by_name[entry.name], f"{job.seed}/{part.folder}", torch.float16):
            yield piece
            job.count(piece.numel() * piece.element_size())

    stem = _DIFFUSERS_STEM if part.library == "diffusers" else _TRANSFORMERS_STEM
    write_shards(folder, stem, split([_entry(fill) for fill in job.fills], job.shard_bytes), values)


def _entry(fill: Fill) -> Entry:
    integer = fill.given is not None and not fill.given.is_floating_point()
    return Entry(fill.name, fill.shape, fill.given.dtype if integer and fill.given is not None else torch.float16)


def _write_index(wanted: Family, folder: Path) -> None:
    index: dict[str, Any] = {"_class_name": wanted.pipeline, "_diffusers_version": version("diffusers")}
    index |= wanted.index
    if "requires_safety_checker" in index:
        index |= {name: [None, None] for name in (*SAFETY_PARTS, "image_encoder")}
        index["requires_safety_checker"] = any(part.folder == "safety_checker" for part in wanted.parts)
    index |= {part.folder: [part.library, part.cls] for part in wanted.parts}
    if wanted.classes:
        index["id2label"] = {str(number): f"class {number}" for number in range(wanted.classes)}
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

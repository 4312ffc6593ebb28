"""Checkpoints: one safetensors file that is replaced whole, so that a kill leaves the old or the new one."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """What was saved.

    Attributes:
        step: how many steps were done.
        tensors: by name, on the CPU.
    """

    step: int
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names start with ``prefix.``, without it."""
        return {name[len(prefix) + 1 :]: value for name, value in self.tensors.items() if name.startswith(f"{prefix}.")}


def write(path: Path, tensors: Mapping[str, Tensor], *, key: str, step: int = 0) -> None:
    """Replace the file at `path`, synced, in one rename.

    Args:
        path: a safetensors file.
        tensors: any device; stored as they are.
        key: of everything that the tensors depend on; see `read`.
        step: how many steps were done.
    """
    temporary = path.with_name(f".partial-{path.name}")
    stored = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    save_file(stored, temporary, metadata={"key": key, "step": str(step)})
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def read(path: Path, *, key: str) -> Checkpoint | None:
    """Return what is at `path`, or None where there is nothing that was made from the same `key`."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            facts = stored.metadata() or {}
            if facts.get("key") != key:
                return None
            return Checkpoint(int(facts["step"]), {name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    except SafetensorError:
        return None  # written by something else; making it again is always right


SECONDS = 60.0
"""Work of less time is done again after a kill."""


class Sparing:
    """A checkpoint that is replaced at most once a minute, and not at all by work that ends before.

    Args:
        path: a safetensors file; its folder is made.
        key: of everything that the tensors depend on; see `read`.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key, self._written = path, key, time.monotonic()

    def read(self) -> Checkpoint | None:
        """Return what an interrupted run left; see `read`."""
        return read(self._path, key=self._key)

    def offer(self, step: int, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write the tensors where a minute has passed since the last time."""
        if time.monotonic() - self._written >= SECONDS:
            self.keep(step, tensors())

    def keep(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors, whenever the last time was."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write(self._path, tensors, key=self._key, step=step)
        self._written = time.monotonic()


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 hex over names, types, shapes and bytes of tensors on any device."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Read a recording: denoiser calls, text states, final latents and images, a slice at a time from mapped files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from calibration.errors import CalibrationError
from calibration.index import Index, Shard, file_digest, read_index

Floats = NDArray[np.float32]
Given = dict[str, NDArray[Any]]
PER_STEP = ("sample", "cond", "uncond", "guided")
"""Tensors with a leading axis of steps; `uncond` and `guided` only where there is guidance."""


@dataclass(frozen=True)
class Call:
    """What the denoiser was asked at one step and what it answered, for n prompts; floats are float32.

    Attributes:
        step: index of the call.
        timestep: as the denoiser got it.
        sample: (n, ...), after the scheduler's input scaling, before it is doubled for guidance.
        given: its other inputs with the prompts, by name, each (n, ...).
        given_uncond: the same without them; None where it did not answer without.
        cond: (n, ...) answer to the prompts.
        uncond: (n, ...) answer without them; None likewise.
        guided: (n, ...) answer that the scheduler got; `cond` itself without guidance.
    """

    step: int
    timestep: float
    sample: Floats
    given: Given
    given_uncond: Given | None
    cond: Floats
    uncond: Floats | None
    guided: Floats


class Recording:
    """A recorded run of a pipeline. Only what is asked for is read, so memory does not grow with its size.

    Args:
        folder: where it lies.
        index: its index; `Recording.open` is the usual way.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.index = index

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> Recording:
        """Return the recording in a folder.

        Args:
            folder: what `record` wrote.
            verify: hash every shard; otherwise only sizes and headers are compared.

        Raises:
            CalibrationError: something is missing or is not what was written.
        """
        recording = cls(folder, read_index(folder))
        for shard in recording.index.shards:
            recording._check(shard, verify=verify)
        return recording

    def __len__(self) -> int:
        """Return the number of prompts."""
        return self.count

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(self.index.prompts)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, in order."""
        return tuple(self.index.prompts)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of each prompt's initial noise."""
        return tuple(self.index.seeds)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The scheduler's timestep of every denoiser call."""
        return tuple(self.index.timesteps)

    @property
    def guidance(self) -> float:
        """Guidance scale."""
        return self.index.guidance

    @property
    def digest(self) -> str:
        """Digest of the whole recording, hex: two with the same digest hold the same bytes."""
        return self.index.digest

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of numbers taken on it must know."""
        return tuple(self.index.notes)

    def calls(self, step: int, start: int = 0, stop: int | None = None) -> Call:
        """Return one step's denoiser call for prompts `start` to `stop`.

        Raises:
            CalibrationError: there is no such step or prompt, or the files cannot be read.
        """
        if not 0 <= step < len(self.timesteps):
            msg = f"recording {self.folder}: no such step; got {step}, expected 0 to {len(self.timesteps) - 1}. "
            raise CalibrationError(msg + "Ask for a recorded step.")
        guided = self.index.guided
        cond = self._read("cond", start, stop, step)
        return Call(
            step=step,
            timestep=self.timesteps[step],
            sample=self._read("sample", start, stop, step),
            given={name: self._read(f"given.{name}", start, stop) for name in self.index.given},
            given_uncond={name: self._read(f"given_uncond.{name}", start, stop) for name in self.index.given}
            if guided
            else None,
            cond=cond,
            uncond=self._read("uncond", start, stop, step) if guided else None,
            guided=self._read("guided", start, stop, step) if guided else cond,
        )

    def each_call(self, batch: int | None = None) -> Iterator[Call]:
        """Yield every call: step by step, inside a step in batches of prompts (all at once for None)."""
        size = batch or self.count
        for step in range(len(self.timesteps)):
            for start in range(0, self.count, size):
                yield self.calls(step, start, min(start + size, self.count))

    def fed(self, part: str, start: int = 0, stop: int | None = None) -> Given:
        """Return what a text encoder got for the prompts, or the decoder for the images, by input.

        Args:
            part: attribute of the pipeline, such as ``text_encoder`` or ``vae`` (``latent_sample`` as `decode` got it).
            start: first prompt.
            stop: the prompt behind the last; None for all.

        Raises:
            CalibrationError: nothing was fed to such a part, or there are no such prompts.
        """
        prefix = f"fed.{part}."
        names = [name for name in self.index.fed if name.startswith(prefix)]
        if not names:
            msg = (
                f"recording {self.folder}: nothing was fed to {part!r}; got {', '.join(self.index.fed)}. Record again."
            )
            raise CalibrationError(msg)
        return {name.removeprefix(prefix): self._read(name, start, stop) for name in names}

    def images(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Return the final images, (n, height, width, 3) uint8."""
        return self._read("images", start, stop)

    def expect(self, **wanted: object) -> None:
        """Check that this is a recording of what the caller means.

        Args:
            **wanted: fields of `calibration.index.Index`, such as ``model``, ``steps``, ``guidance``, ``height``,
                ``scheduler``, ``prompts_digest``, with the value that each must have.

        Raises:
            CalibrationError: one differs; the message names it.
        """
        for field, value in wanted.items():
            have = getattr(self.index, field)
            if have != value:
                msg = f"recording {self.folder}: of another {field}; got {have!r}, expected {value!r}. Record again."
                raise CalibrationError(msg)

    def _names(self) -> tuple[str, ...]:
        index = self.index
        fixed = (*(f"given.{name}" for name in index.given), *index.fed, "images")
        if not index.guided:
            return ("sample", "cond", *fixed)
        return (*PER_STEP, *(f"given_uncond.{name}" for name in index.given), *fixed)

    def _check(self, shard: Shard, *, verify: bool) -> None:
        path = self.folder / shard.file
        if path.is_symlink() or not path.is_file():
            msg = f"{path}: missing; expected a file of {shard.bytes} bytes. Record again."
            raise CalibrationError(msg)
        if path.stat().st_size != shard.bytes:
            msg = f"{path}: wrong size; got {path.stat().st_size} bytes, expected {shard.bytes}. Record again."
            raise CalibrationError(msg)
        if verify and (found := file_digest(path)) != shard.sha256:
            msg = f"{path}: changed since it was written; got sha256 {found}, expected {shard.sha256}. Record again."
            raise CalibrationError(msg)
        try:
            with safe_open(path, framework="numpy") as file:
                shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            msg = f"{path}: not a safetensors file; got '{error}', expected recorded tensors. Record again."
            raise CalibrationError(msg) from error
        for name in self._names():
            lead = [len(self.timesteps), shard.count] if name in PER_STEP else [shard.count]
            if shapes.get(name, [])[: len(lead)] != lead:
                msg = f"{path}: tensor '{name}': wrong shape; got {shapes.get(name)}, expected {lead} and more. "
                raise CalibrationError(msg + "Record again.")

    def _read(self, name: str, start: int, stop: int | None, step: int | None = None) -> NDArray[Any]:
        stop = self.count if stop is None else stop
        if not 0 <= start < stop <= self.count:
            msg = f"recording {self.folder}: no such prompts; got {start} to {stop}, expected 0 to {self.count}. "
            raise CalibrationError(msg + "Ask for recorded prompts.")
        parts = []
        for shard in self.index.shards:
            first, last = max(start - shard.start, 0), min(stop - shard.start, shard.count)
            if first < last:
                try:
                    with safe_open(self.folder / shard.file, framework="numpy") as file:
                        tensor = file.get_slice(name)
                        parts.append(tensor[first:last] if step is None else tensor[step, first:last])
                except (SafetensorError, OSError) as error:
                    msg = f"{self.folder / shard.file}: cannot be read; got '{error}', expected '{name}'. Record again."
                    raise CalibrationError(msg) from error
        return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))

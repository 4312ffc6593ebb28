"""What a recording says about itself: `index.json`, its digest, and the names of the tensors in its shards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calibration.errors import CalibrationError

INDEX_FILE = "index.json"
MAX_INDEX_BYTES = 1 << 28
LAYOUT = 2
"""Version of what a recording holds."""


class Shard(BaseModel):
    """One file of a recording: all steps of some consecutive prompts.

    Attributes:
        file: its name inside the recording.
        sha256: of the whole file, hex.
        bytes: its size.
        start: index of its first prompt.
        count: how many prompts it holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: str = Field(pattern=r"^shard-\d{5}\.safetensors$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)
    start: int = Field(ge=0)
    count: int = Field(ge=1)


class Index(BaseModel):
    """Everything about a recording but the tensors.

    Attributes:
        version: of this layout.
        pipeline: class of the pipeline.
        model: digest of what was recorded, as the caller names it; may be empty.
        prompt_set: name of the prompts.
        prompts_digest: see `calibration.prompts.PromptSet`.
        prompts: the texts.
        seeds: one per prompt, of the CPU generator that makes its initial noise.
        steps: steps asked for; a scheduler may call the denoiser more often.
        timesteps: the scheduler's timestep of every denoiser call.
        guidance: guidance scale.
        guided: whether the denoiser answered every call with and without the prompt.
        inputs: of the denoiser by name: the sample first, ``timestep``, and what it is given besides.
        fed: what text encoders and decoder were fed, as ``fed.<attribute of the pipeline>.<input>``.
        height: of the images in pixels.
        width: of the images in pixels.
        scheduler: its class.
        scheduler_config: its settings.
        truncated: indices of prompts that are longer than the tokenizer takes.
        notes: what a reader of the numbers must know.
        shards: the files, in the order of the prompts.
        digest: sha256 over all of the above, hex.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    version: Literal[2] = 2
    pipeline: str
    model: str
    prompt_set: str
    prompts_digest: str
    prompts: list[str] = Field(min_length=1)
    seeds: list[int]
    steps: int = Field(ge=1)
    timesteps: list[float] = Field(min_length=1)
    guidance: float
    guided: bool
    inputs: list[str] = Field(min_length=2)
    fed: list[str]
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    scheduler: str
    scheduler_config: dict[str, Any]
    truncated: list[int]
    notes: list[str]
    shards: list[Shard] = Field(min_length=1)
    digest: str = ""

    @model_validator(mode="after")
    def _shards_cover_prompts(self) -> Index:
        nexts = [shard.start + shard.count for shard in self.shards]
        if [shard.start for shard in self.shards] != [0, *nexts[:-1]] or nexts[-1] != len(self.prompts):
            msg = "shards do not follow one another over the prompts"
            raise ValueError(msg)
        if len(self.seeds) != len(self.prompts):
            msg = "one seed per prompt is needed"
            raise ValueError(msg)
        return self

    @property
    def given(self) -> list[str]:
        """Inputs of the denoiser besides sample and timestep."""
        return [name for name in self.inputs[1:] if name != "timestep"]

    def computed_digest(self) -> str:
        """Return the sha256 of everything but the digest itself, hex."""
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()

    def signed(self) -> Index:
        """Return this with its digest filled in."""
        return self.model_copy(update={"digest": self.computed_digest()})


def read_index(folder: Path) -> Index:
    """Return the index of a recording, its digest checked.

    Raises:
        CalibrationError: it is missing, malformed, or not what was written.
    """
    path = folder / INDEX_FILE
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            msg = f"{path}: too large; expected at most {MAX_INDEX_BYTES} bytes. Record again."
            raise CalibrationError(msg)
        index = Index.model_validate_json(path.read_bytes())
    except OSError as error:
        msg = f"{path}: cannot be read; got '{error.strerror}', expected a recording's index. Record again."
        raise CalibrationError(msg) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        msg = f"{path}: not a recording's index; got '{first['msg']}' at '{where}'. Record again."
        raise CalibrationError(msg) from error
    if index.digest != index.computed_digest():
        msg = f"{path}: changed since it was written; got digest {index.computed_digest()}, "
        raise CalibrationError(msg + f"expected {index.digest}. Record again.")
    return index


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

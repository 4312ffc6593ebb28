"""Weight files on disk: which there are, what their headers say, whether their numbers are numbers.

Headers are read without reading weights; nothing but safetensors is ever opened.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from exporter.errors import ArtifactError, ExporterError, SourceError
from exporter.memo import FileMemo
from exporter.networks.reading import read_object

WEIGHT_STEMS: Mapping[str, str] = {
    "AutoencoderKL": "diffusion_pytorch_model",
    "CLIPTextModel": "model",
    "CLIPTextModelWithProjection": "model",
    "DiTTransformer2DModel": "diffusion_pytorch_model",
    "FluxTransformer2DModel": "diffusion_pytorch_model",
    "PixArtTransformer2DModel": "diffusion_pytorch_model",
    "SD3Transformer2DModel": "diffusion_pytorch_model",
    "StableDiffusionSafetyChecker": "model",
    "T5EncoderModel": "model",
    "UNet2DConditionModel": "diffusion_pytorch_model",
    "UNet2DModel": "diffusion_pytorch_model",
}
"""Network class to the name that its library gives the weight file, without the ending."""

PRECISIONS: Mapping[str, torch.dtype] = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Number types of weights that are read, under safetensors' names."""

_INTEGERS = frozenset({"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL"})
_CHUNK = 16_777_216

_Fact = TypeVar("_Fact")

_SECOND_NAME = ("T5EncoderModel", "encoder.embed_tokens.weight")
"""What T5 has under two names; folders have it under one of them or both."""

_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class TensorFact:
    """One tensor as a header states it.

    Attributes:
        shape: sizes of its axes.
        dtype: safetensors' own name, such as ``F16``.
        file: where it is.
        stored: the name it has there.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    stored: str


def weight_files(
    folder: Path, cls: str, error: type[ExporterError] = ArtifactError, *, variant: str | None = None
) -> list[Path]:
    """Return the safetensors files of one network: one, or the shards that an index names.

    Args:
        folder: of the component.
        cls: network class, a key of `WEIGHT_STEMS`.
        error: what to raise where there are none or one is missing.
        variant: the word between name and ending, such as ``fp16``; None for files without one.
    """
    stem = WEIGHT_STEMS[cls]
    word = f".{variant}" if variant else ""
    whole = folder / f"{stem}{word}.safetensors"
    if whole.is_file():
        return [whole]
    index = folder / f"{stem}.safetensors.index{word}.json"
    if index.is_file():
        return _shards(index, error)
    there = variants_of(folder, stem)
    if there:
        names = ", ".join(name or "the one without a name" for name in there)
        fix = f"Write source.variant: {there[0]}." if there[0] else "Leave source.variant out."
        raise error(f"{folder}: no weights of variant {variant or 'none'}; got {names}. {fix}")
    _refuse_other_files(folder, stem, error)
    raise error(f"{folder}: no weights; expected {stem}.safetensors. Fetch the folder again.")


def variants_of(folder: Path, stem: str) -> list[str]:
    """Return the variants whose weights a component folder holds, the one without a name as an empty word."""
    found = set()
    for path in folder.glob(f"{stem}*"):
        match = re.fullmatch(
            rf"{re.escape(stem)}(?:\.([\w-]+?))?\.safetensors|{re.escape(stem)}\.safetensors\.index(?:\.([\w-]+))?\.json",
            path.name,
        )
        if match:
            found.add(match[1] or match[2] or "")
    shards = [name for name in found if re.search(r"-\d{5}-of-\d{5}$", name)]
    return sorted(found.difference(shards))


def plain_name(name: str, variant: str | None) -> str:
    """Return the name of a weight file or index without its variant."""
    return re.sub(rf"\.{re.escape(variant)}(?=[.-])", "", name) if variant else name


def precision_of(place: Path, headers: Mapping[str, TensorFact]) -> str:
    """Return the one floating-point type of a network's weights, as safetensors names it.

    Raises:
        SourceError: there are several, or it is none that the program computes with.
    """
    found: dict[str, list[str]] = {}
    for name, fact in headers.items():
        if fact.dtype not in _INTEGERS:
            found.setdefault(fact.dtype, []).append(name)
    what = ", ".join(f"{dtype} in {len(names)} tensors such as {names[0]!r}" for dtype, names in found.items())
    unknown = found.keys() - PRECISIONS.keys()
    if unknown:
        raise SourceError(f"{place}: unsupported number type; got {what}, expected one of {', '.join(PRECISIONS)}.")
    if len(found) > 1:
        raise SourceError(
            f"{place}: mixed precisions; got {what}, expected one for the whole component. Load it with diffusers or "
            "transformers in one dtype and save it again."
        )
    return next(iter(found), "F32")


def _refuse_other_files(folder: Path, stem: str, error: type[ExporterError]) -> None:
    shards = sorted(p.name for p in folder.glob(f"{stem}*-of-*.safetensors"))
    if shards:
        raise error(
            f"{folder}: shards without their index; got {', '.join(shards[:4])}, expected "
            f"{stem}.safetensors.index.json beside them. Fetch the folder again."
        )
    pickled = sorted(p.name for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise error(
            f"{folder}: weights are pickled only, which can run code; got {', '.join(pickled[:4])}, "
            f"expected {stem}.safetensors. Where you trust them, convert: load the pipeline with diffusers and call "
            "save_pretrained(folder, safe_serialization=True)."
        )


def _shards(index: Path, error: type[ExporterError]) -> list[Path]:
    names = read_object(index, error).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
        raise error(f"{index}: no weight_map; expected tensor names with file names. Fetch the file again.")
    files = []
    for name in sorted(set(names.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise error(f"{index}: a shard outside the folder; got {name!r}, expected a file name.")
        if not (index.parent / name).is_file():
            raise error(f"{index.parent / name}: a shard is missing; {index.name} names it. Fetch the folder again.")
        files.append(index.parent / name)
    _check_index(index, names, files, error)
    return files


def _check_index(index: Path, names: Mapping[str, str], files: list[Path], error: type[ExporterError]) -> None:
    stored = {(name, fact.file.name) for name, fact in read_headers(files, error).items()}
    wrong = sorted({name for name, _ in stored ^ set(names.items())})
    if wrong:
        raise error(
            f"{index}: does not match its shards; got {len(wrong)} tensors that differ, such as {wrong[0]!r}. "
            "Fetch the folder again."
        )


@contextmanager
def opened(path: Path, error: type[ExporterError]) -> Iterator[Any]:
    """Open a safetensors file; what is wrong with it is raised as `error`."""
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            yield handle
    except (SafetensorError, OSError) as cause:
        raise error(
            f"{path}: not a whole safetensors file; got {str(cause)[:200]} at {_size(path)} bytes, expected what its "
            "header promises. Fetch it again."
        ) from cause


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def read_headers(files: Iterable[Path], error: type[ExporterError] = ArtifactError) -> dict[str, TensorFact]:
    """Return every tensor of these files by its stored name, from the headers alone.

    Raises:
        ExporterError: `error`, where a file is truncated or a tensor is in two of them.
    """
    found: dict[str, TensorFact] = {}
    for path in files:
        with opened(path, error) as handle:
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                if name in found:
                    raise error(f"{path}: tensor {name!r} is in {found[name].file.name} too. Fetch the folder again.")
                part = handle.get_slice(name)
                found[name] = TensorFact(tuple(part.get_shape()), str(part.get_dtype()), path, name)
    return found


def read_spans(path: Path, error: type[ExporterError] = ArtifactError) -> dict[str, tuple[int, int]]:
    """Return where each stored tensor of a safetensors file lies: first byte in the file and number of bytes.

    Raises:
        ExporterError: `error`, where the file is not whole.
    """
    with opened(path, error), path.open("rb") as stream:  # the library has checked the header that is read here again
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    start = 8 + length
    return {
        name: (start + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def present_names(cls: str, headers: Mapping[str, _Fact]) -> dict[str, _Fact]:
    """Return the tensors under the names that today's classes use, where a folder was written by older libraries.

    transformers 4 put ``text_model.`` before the names of a text encoder and saved its constant ``position_ids``; early
    diffusers named the projections of the autoencoder's attention differently.
    """
    found: dict[str, _Fact] = {}
    for name, fact in headers.items():
        new = name
        if cls == "CLIPTextModel":
            new = name.removeprefix("text_model.")
            if new == "embeddings.position_ids":
                continue
        if name == "text_model.embeddings.position_ids" or (cls, name) == _SECOND_NAME:
            continue
        if cls == "AutoencoderKL" and ".attentions." in name:
            for old, today in _OLD_ATTENTION.items():
                new = new.replace(old, today)
        found[new] = fact
    return found


def check_finite(module: nn.Module, *, place: str = "") -> None:
    """Raise SourceError naming the first parameter or buffer of a network that holds NaN or infinity."""
    for name, tensor in module.state_dict().items():
        if tensor.device.type != "meta" and not is_finite(tensor):
            raise SourceError(f"{place or type(module).__name__}: NaN or infinite weights; got them in {name!r}.")


def check_finite_files(files: Iterable[Path], memo: FileMemo | None = None) -> None:
    """Raise SourceError naming file and tensor where weights on disk hold NaN or infinity; not where `memo` knows."""
    memo = memo or FileMemo()
    for path in files:
        memo.recall(path, "finite", partial(_check_finite_file, path))


def _check_finite_file(path: Path) -> bool:
    with opened(path, SourceError) as handle:
        for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
            if not is_finite(handle.get_tensor(name)):
                raise SourceError(
                    f"{path}: NaN or infinite weights; got them in tensor {name!r}, expected finite numbers. "
                    "Use an intact copy of the model."
                )
    return True


def is_finite(tensor: Tensor) -> bool:
    """Tell whether no number of a tensor is NaN or infinite; looked at in chunks, so that little memory is needed."""
    if not tensor.is_floating_point():
        return True
    return all(
        bool(torch.isfinite(part).all())
        for part in tensor.detach().reshape(-1).tensor_split(max(1, tensor.numel() // _CHUNK))
    )

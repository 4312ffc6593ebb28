"""A package as several that are called in turn, since iOS loads no program of more than about a gigabyte of weights."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from targets.base import TargetError
from targets.coreml import PLACE, coremltools

LARGEST_BYTES = 1_000_000_000


def chunked(path: Path, count: int) -> list[Path]:
    """Replace a package by chunks of about equal size, ``chunk-1.mlpackage`` and so on; return them in order.

    Args:
        path: the package.
        count: of chunks: a power of two, since each cut makes two halves.

    Raises:
        TargetError: the program cannot be cut, or a chunk is still too large.
    """
    library: Any = coremltools()
    parts = [path]
    while len(parts) < count:
        parts = [half for part in parts for half in _halves(library, part)]
    found = []
    for index, part in enumerate(parts, start=1):
        place = path.with_name(f"chunk-{index}.mlpackage")
        part.rename(place)
        found.append(place)
    sizes = [package_bytes(place) for place in found]
    if max(sizes) > LARGEST_BYTES:
        raise TargetError(
            f"{PLACE}: {path.parent.name}: chunks: got {max(sizes) / 1e9:.2f} GB in the largest of {count}, expected "
            f"at most {LARGEST_BYTES / 1e9:g} GB each. Write chunks: {2 * count}, or smaller weights."
        )
    return found


def package_bytes(path: Path) -> int:
    """Return the bytes of a package."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _halves(library: Any, path: Path) -> tuple[Path, Path]:
    """Cut a package in two, which take its place."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        try:
            library.models.utils.bisect_model(
                str(path), folder, merge_chunks_to_pipeline=False, check_output_correctness=False
            )
        except Exception as error:  # its splitter raises whatever its parts raise
            raise TargetError(
                f"{PLACE}: {path}: coremltools cannot cut it in two; got {type(error).__name__}: {error}. "
                "Write chunks: 1, or smaller weights."
            ) from error
        halves = []
        for number in (1, 2):
            half = path.with_name(f"{path.stem}-{number}.mlpackage")
            (Path(folder) / f"{path.stem}_chunk{number}.mlpackage").rename(half)
            _describe(library, path, half)
            halves.append(half)
    shutil.rmtree(path)
    return halves[0], halves[1]


def _describe(library: Any, whole: Path, half: Path) -> None:
    """Give a half what the whole says of itself, which the splitter leaves out."""
    spec, told = library.utils.load_spec(str(half)), library.utils.load_spec(str(whole)).description
    own = spec.description
    own.metadata.CopyFrom(told.metadata)
    known = {entry.name: entry.shortDescription for entry in (*told.input, *told.output)}
    for entry in (*own.input, *own.output):
        entry.shortDescription = known.get(entry.name, "passed on between the chunks")
    file = next(half.glob("Data/*/model.mlmodel"))
    file.write_bytes(spec.SerializeToString())

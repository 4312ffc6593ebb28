"""Several compiled graphs of one network side by side in one folder, with the weights that they share stored once."""

from __future__ import annotations

import filecmp
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

import numpy as np

from targets.base import TargetError

IR_WEIGHTS = "openvino_model.bin"
_ALIGNMENT = 64


def join_files(parts: Sequence[Path], out: Path, engine_file: str) -> None:
    """Move graphs whose weights lie in files of equal names; each graph takes the name of its folder.

    Args:
        parts: folders inside of `out`, which go.
        out: gets ``<part><ending of engine_file>`` of each and the other files once.
        engine_file: the graph's file in every part.

    Raises:
        TargetError: two files of one name that differ.
    """
    for part in parts:
        for file in sorted(part.iterdir()):
            name = f"{part.name}{file.suffix}" if file.name == engine_file else file.name
            final = out / name
            if not final.exists():
                file.rename(final)
            elif not final.samefile(file) and not filecmp.cmp(final, file, shallow=False):
                raise TargetError(
                    f"{final}: graphs of one network have weights of their own; got different {name}, expected one "
                    "file. Let the target leave weights in shared files."
                )
        shutil.rmtree(part)


def join_ir(parts: Sequence[Path], out: Path, engine_file: str) -> None:
    """Put OpenVINO graphs into one folder: equal constants are stored once, in one file that all of them read.

    Args:
        parts: folders inside of `out`, which go.
        out: gets ``<part>.xml`` of each, and `IR_WEIGHTS`.
        engine_file: the graph's file in every part, its weights beside it as ``.bin``.
    """
    places: dict[bytes, int] = {}
    with (out / IR_WEIGHTS).open("wb") as stream:
        for part in parts:
            graph = ElementTree.parse(part / engine_file)
            values = (part / engine_file).with_suffix(".bin")
            held = np.memmap(values, np.uint8, "r") if values.stat().st_size else np.zeros(0, np.uint8)
            for data in graph.iterfind(".//layer[@type='Const']/data"):
                start, size = int(data.attrib["offset"]), int(data.attrib["size"])
                data.set("offset", str(_place(held[start : start + size], places, stream)))
            graph.write(out / f"{part.name}.xml", encoding="utf-8", xml_declaration=True)
            del held
            shutil.rmtree(part)


def _place(values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], places: dict[bytes, int], stream: BinaryIO) -> int:
    """Return where these bytes lie in the stream; they are written where they do not yet."""
    key = hashlib.sha256(values.data).digest() + len(values).to_bytes(8, "little")
    if key not in places:
        stream.write(bytes(-stream.tell() % _ALIGNMENT))
        places[key] = stream.tell()
        stream.write(values.data)
    return places[key]

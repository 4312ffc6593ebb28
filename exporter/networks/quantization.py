"""How a component of a state is quantized: which unit in which scheme, beside the ranges that were fitted for it.

The weights of such a state are its parent's: what integers become of them is decided where the graph is written, so one
state serves every runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from exporter.errors import ArtifactError
from exporter.networks.reading import read_object

QUANTIZATION, FIT, TABLE = "quantization.json", "quantization.safetensors", "quantization.txt"
"""Files of a component's folder; the last one is the plan as a table, for people."""
FILES = (QUANTIZATION, FIT, TABLE)
_FORMAT = 1


@dataclass(frozen=True)
class Quantization:
    """What is quantized and how.

    Attributes:
        plan: module path -> scheme; the longest path that a layer's name begins with decides, the empty one holds all.
        group: inputs that share a scale of 4 bits.
        results: whether what convolutions in 8 bits answer is rounded too.
        wide: paths of modules, not of what is in them, that overflow in fp16 and stay in float.
        calibration: digest of the recording that ranges were fitted on; empty where none was needed.
    """

    plan: Mapping[str, str] = field(default_factory=dict)
    group: int = 64
    results: bool = False
    wide: tuple[str, ...] = ()
    calibration: str = ""


def write_quantization(folder: Path, told: Quantization) -> None:
    """Write ``quantization.json`` into a component's folder."""
    content = {"format": _FORMAT, **asdict(told)}
    (folder / QUANTIZATION).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_quantization(folder: Path) -> Quantization | None:
    """Return how the component in a folder is quantized; None where it is not.

    Raises:
        ArtifactError: the file is damaged, or of another version.
    """
    path = folder / QUANTIZATION
    if not path.is_file():
        return None
    content = read_object(path, ArtifactError)
    plan, group, results, wide = (content.get(key) for key in ("plan", "group", "results", "wide"))
    sound = (
        content.get("format") == _FORMAT
        and isinstance(plan, dict)
        and all(isinstance(scheme, str) for scheme in plan.values())
        and isinstance(group, int)
        and isinstance(results, bool)
        and isinstance(wide, list)
        and all(isinstance(path, str) for path in wide)
        and isinstance(content.get("calibration"), str)
    )
    if not sound:
        raise ArtifactError(
            f"{path}: not a quantization of format {_FORMAT}; got {str(content)[:80]}. Make the state again."
        )
    assert isinstance(plan, dict)
    assert isinstance(group, int)
    assert isinstance(wide, list)
    return Quantization(plan, group, bool(results), tuple(wide), str(content["calibration"]))

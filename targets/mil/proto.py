"""The messages of Core ML's own format, without the rest of the library that ships them.

``coremltools`` carries modules generated from the format's definition; they need nothing but protobuf. Importing them
in the usual way runs the whole library, which takes seconds, loads torch and complains of what is not on this machine.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from targets.base import TargetMissing

_INSTALL = "pip install 'diffusion-exporter[coreml]'"
_LIBRARY, _ALIAS = "coremltools", "targets_mil_messages"


@cache
def messages() -> tuple[Any, Any]:
    """Return the generated modules of models and of ML Programs.

    Raises:
        TargetMissing: coremltools is not installed, or its messages do not load.
    """
    try:
        package = _loaded_elsewhere() or _alone()
        return import_module(f"{package}.Model_pb2"), import_module(f"{package}.MIL_pb2")
    except ImportError as error:
        raise TargetMissing(
            f"ML Program: the messages of '{_LIBRARY}' are not installed or do not load ({error}). Run: {_INSTALL}"
        ) from error


def _loaded_elsewhere() -> str | None:
    """Return the name of the modules where the library itself was imported already."""
    name = f"{_LIBRARY}.proto"
    return name if f"{name}.Model_pb2" in sys.modules else None


def _alone() -> str:
    """Make the folder of the messages a package under a name of ours; return the name."""
    library = importlib.util.find_spec(_LIBRARY)
    if library is None or library.origin is None:
        raise ModuleNotFoundError(f"No module named '{_LIBRARY}'", name=_LIBRARY)
    folder = Path(library.origin).parent / "proto"
    if not (folder / "Model_pb2.py").is_file():
        raise ModuleNotFoundError(f"no {folder / 'Model_pb2.py'}", name=_LIBRARY)
    package = ModuleType(_ALIAS)
    package.__path__ = [str(folder)]
    sys.modules[_ALIAS] = package
    return _ALIAS

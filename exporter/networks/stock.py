"""Whether a network is exactly what a config of its library builds, so that it needs no record of edits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from exporter.networks.fingerprint import structure_of
from exporter.networks.probe import FORWARD_FAILURES


def is_built_by(module: nn.Module, config: Mapping[str, Any]) -> bool:
    """Tell whether a diffusers config builds a network of these modules, names, shapes and sizes.

    Args:
        module: the network, edited or not; its own config is not looked at.
        config: as in ``config.json``.
    """
    from accelerate import init_empty_weights  # seconds to import

    try:
        with init_empty_weights(include_buffers=False):
            built = cast("Any", type(module)).from_config(dict(config))
    except FORWARD_FAILURES:
        return False
    return _below(built) == _below(module)


_LABELS = frozenset({"resolution_idx"})
"""Attributes that number a stage, for FreeU alone; the number of what stays is another once stages are gone."""


def _below(module: nn.Module) -> list[Any]:
    """Return the structure of everything but the network's own attributes, which repeat its config.

    A part that is not there is None, among a module's attributes or among its parts: neither counts.
    """
    return [
        [path, cls, shapes, {name: value for name, value in given.items() if path and _counts(name, value)}]
        for path, cls, shapes, given in structure_of(module)
    ]


def _counts(name: str, value: Any) -> bool:
    return name not in _LABELS and value != ["NoneType", "None"]

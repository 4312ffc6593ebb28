"""Replay of a surgery record on a network as its untouched config builds it."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

from exporter.errors import ArtifactError, SurgeryError
from exporter.networks.record import Resize, StandIn, Surgery
from exporter.networks.standins import stand_in

_RESTORE = "Restore the original file."
_MAX_COPIES = 4
_MAX_MODULES = 200_000


def replay(module: nn.Module, surgery: Surgery, *, place: str = "surgery.json") -> None:
    """Edit a network in place as a record says: lists first, then stand-ins, then sizes.

    Args:
        module: built from the original config, on the meta device or for real. Resized parameters keep device and dtype
            and hold zeros until weights are loaded.
        surgery: the record.
        place: where it was read, for messages.

    Raises:
        ArtifactError: the record does not fit this network.
    """
    for path in sorted(surgery.keep, key=_depth):
        _keep(module, path, surgery.keep[path], f"{place}: keep.{path}")
    for path in sorted(surgery.stand_in, key=_depth):
        _stand_in(module, path, surgery.stand_in[path], f"{place}: stand_in.{path}")
    for path, resize in surgery.resize.items():
        _resize(_find(module, path, f"{place}: resize.{path}"), resize, f"{place}: resize.{path}")


def _depth(path: str) -> tuple[int, str]:
    return path.count("."), path


def _find(module: nn.Module, path: str, place: str) -> nn.Module:
    """Return the sub-module at a path, by registered modules only: no attribute of an object is followed."""
    found: nn.Module | None = module
    for part in path.split(".") if path else []:
        found = None if found is None else found._modules.get(part)
    if found is None:
        raise ArtifactError(
            f"{place}: no such module; got {path!r}, expected one of {type(module).__name__}. {_RESTORE}"
        )
    return found


def _keep(module: nn.Module, path: str, kept: tuple[int, ...], place: str) -> None:
    entries = _find(module, path, place)
    if not isinstance(entries, nn.ModuleList | nn.Sequential):
        raise ArtifactError(f"{place}: not a list; got {type(entries).__name__}, expected ModuleList. {_RESTORE}")
    was = list(entries._modules.values())
    if any(index >= len(was) for index in kept) or any(kept.count(index) > _MAX_COPIES for index in set(kept)):
        raise ArtifactError(
            f"{place}: indices that the list does not have; got {list(kept)[:16]}, expected some of 0..{len(was) - 1}, "
            f"each at most {_MAX_COPIES} times. {_RESTORE}"
        )
    if len(set(kept)) < len(kept):
        copies = sum(1 for _ in entries.modules()) * _MAX_COPIES
        if copies + sum(1 for _ in module.modules()) > _MAX_MODULES:
            raise ArtifactError(f"{place}: too many copies; expected at most {_MAX_MODULES} modules. {_RESTORE}")
    now: list[nn.Module | None] = []
    used: set[int] = set()
    for index in kept:
        now.append(copy.deepcopy(was[index]) if index in used else was[index])
        used.add(index)
    slots = cast("dict[str, nn.Module | None]", entries._modules)
    slots.clear()
    slots.update((str(position), entry) for position, entry in enumerate(now))


def _stand_in(module: nn.Module, path: str, entry: StandIn, place: str) -> None:
    parent_path, _, name = path.rpartition(".")
    parent, replaced = _find(module, parent_path, place), _find(module, path, place)
    width = entry.width or None
    if entry.kind == "zero":
        width = entry.width
    try:
        new = stand_in(entry.kind, replaced, positions=entry.positions, width=width)
    except SurgeryError as error:
        raise ArtifactError(f"{place}: {error} {_RESTORE}") from error
    if new is None:
        setattr(parent, name, None)
    else:
        setattr(parent, name, new.train(replaced.training))


def _resize(module: nn.Module, resize: Resize, place: str) -> None:
    for name, shape in resize.parameters.items():
        if name not in module._parameters:
            raise ArtifactError(
                f"{place}: no such parameter; got {name!r}, expected one of {type(module).__name__}. {_RESTORE}"
            )
        was = module._parameters[name]
        if shape is None:
            module._parameters[name] = None
            continue
        if was is not None and len(was.shape) != len(shape):
            raise ArtifactError(
                f"{place}.{name}: another number of axes; got {list(shape)}, expected {len(was.shape)} axes. {_RESTORE}"
            )
        like = was if was is not None else next(iter(module.parameters()), None)
        dtype, device = (torch.float32, torch.device("meta")) if like is None else (like.dtype, like.device)
        trainable = like is None or like.requires_grad
        module._parameters[name] = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=trainable)
    for name, value in resize.attributes.items():
        _set_attribute(module, name, value, place)


def _set_attribute(module: nn.Module, name: str, value: Any, place: str) -> None:
    """Set one attribute of the closed list, in the type that the module has there."""
    was = vars(module).get(name)
    fits = (isinstance(was, int) and not isinstance(was, bool) and isinstance(value, int)) or (
        isinstance(was, float) and isinstance(value, float)
    )
    if isinstance(was, tuple) and isinstance(value, tuple) and len(was) == len(cast("tuple[int, ...]", value)):
        fits = True
    if not fits:
        raise ArtifactError(
            f"{place}.{name}: does not fit {type(module).__name__}; got {value!r}, expected a value like {was!r}. "
            f"{_RESTORE}"
        )
    setattr(module, name, value)

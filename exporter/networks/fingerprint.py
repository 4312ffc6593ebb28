"""What can be compared about one module before and after an edit: attributes, shapes, hooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

RUNTIME_ATTRIBUTES = frozenset(
    {
        "_gradient_checkpointing_func",
        "_is_hf_initialized",
        "_output_capturing_hooks_installed",
        "gradient_checkpointing",
        "name_or_path",
    }
)
"""Attributes of diffusers and transformers that change nothing about an answer."""

FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

HARMLESS_HOOK_MODULES = frozenset({"transformers.utils.output_capturing"})
"""transformers leaves these on a network once it was asked for hidden states; they do nothing unless asked again."""

_OWN_OF_MODULE = frozenset(vars(nn.Module()))
_MAX_BUFFER_COMPARED = 1_000_000


@dataclass(frozen=True)
class Same:
    """A value that equals only itself; holding it keeps its identity from being given to another object."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return a comparable form of everything that was set on the module besides parameters, buffers and children."""
    return {
        name: fingerprint(value)
        for name, value in vars(module).items()
        if name not in _OWN_OF_MODULE and name not in RUNTIME_ATTRIBUTES
    }


def fingerprint(value: object, depth: int = 0) -> Any:
    """Return something that is equal for equal plain data and different for anything that may behave differently."""
    if value is None or isinstance(value, str | bool | int | float | torch.dtype | torch.device):
        return (type(value).__name__, repr(value))
    if depth > 6:
        return Same(value)
    if isinstance(value, list | tuple):
        return (type(value).__name__, *(fingerprint(v, depth + 1) for v in value))
    if isinstance(value, set | frozenset):
        return ("set", *sorted(repr(v) for v in value))
    if isinstance(value, Mapping):
        return ("mapping", *((repr(k), fingerprint(v, depth + 1)) for k, v in value.items()))
    if isinstance(value, torch.Tensor | nn.Module) or (callable(value) and not _is_plain_object(value)):
        return Same(value)
    if _is_plain_object(value):
        return (f"{type(value).__module__}.{type(value).__qualname__}", fingerprint(vars(value), depth + 1))
    return Same(value)


def _is_plain_object(value: object) -> bool:
    """Tell whether its class and its own attributes describe an object (configs, processors)."""
    library = type(value).__module__.partition(".")[0] in ("diffusers", "transformers")
    return library and hasattr(value, "__dict__")


def hooks_of(module: nn.Module) -> dict[str, tuple[Same, ...]]:
    """Return the hooks that are set, by kind, without those that change nothing."""
    found = {}
    for kind in FORWARD_HOOKS:
        hooks = getattr(module, kind, None) or {}
        kept = [hook for hook in hooks.values() if getattr(hook, "__module__", "") not in HARMLESS_HOOK_MODULES]
        if kept:
            found[kind] = tuple(Same(hook) for hook in kept)
    return found


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...] | None]:
    """Return the shape of each of the module's own parameters, None where a declared one is absent."""
    return {name: None if p is None else tuple(p.shape) for name, p in module._parameters.items()}


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """Return shape, persistence and, for small constant buffers, the values of the module's own buffers."""
    found: dict[str, Any] = {}
    for name, buffer in module._buffers.items():
        if buffer is None:
            found[name] = None
            continue
        constant = name in module._non_persistent_buffers_set
        values: tuple[Any, ...] = ()
        if constant and buffer.numel() <= _MAX_BUFFER_COMPARED and buffer.device.type != "meta":
            values = tuple(buffer.detach().cpu().flatten().tolist())
        found[name] = (tuple(buffer.shape), constant, values)
    return found


def structure_of(module: nn.Module) -> list[Any]:
    """Return all that decides what a module computes but for the values of its weights, as JSON data."""
    return [
        [path, type(part).__qualname__, sorted(parameter_shapes(part).items()), _plain(attributes_of(part))]
        for path, part in module.named_modules()
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Same):
        return getattr(value.value, "__qualname__", type(value.value).__qualname__)
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value if not _is_note(entry)]
    return value if value is None or isinstance(value, str | bool | int | float) else repr(value)


def _is_note(entry: Any) -> bool:
    """Tell whether it is an entry of a config that its library keeps for itself: a path, or names in random order."""
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) and entry[0].startswith("'_")

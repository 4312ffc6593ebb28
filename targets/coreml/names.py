"""Which torch module an operation of a converted program came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def module_paths(operations: Sequence[Any], root: Any) -> dict[str, str]:
    """Return operation -> path of its torch module, as far as that is certain.

    A trace tells the classes of the modules on the way to an operation and the last part of their names. Entries of a
    list go by their numbers alone there, so that the tree is searched for the modules which fit; where several do,
    the part of the path that they share is told, with ``...`` for the rest.

    Args:
        operations: of coremltools' program, with their scopes.
        root: the module that was traced.
    """
    known: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}
    found = {}
    for operation in operations:
        scopes = {str(key).rpartition(".")[2]: tuple(map(str, value)) for key, value in operation.scopes.items()}
        names = scopes.get("TORCHSCRIPT_MODULE_NAME", ())
        classes = scopes.get("TORCHSCRIPT_MODULE_TYPE", ())
        if not names or len(names) != len(classes):
            continue
        key = (names[:-1], classes[:-1])  # the last ones are the operation's own
        if key not in known:
            known[key] = _shared(_paths(root, *key))
        if known[key]:
            found[str(operation.name)] = known[key]
    return found


def _paths(module: Any, names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Return the paths of the modules that lie at the end of these names and classes."""
    if not names:
        return [""]
    found = []
    for path, child in _children(module):
        if path.rpartition(".")[2] == names[0] and type(child).__name__ == classes[0]:
            found += [f"{path}.{rest}".rstrip(".") for rest in _paths(child, names[1:], classes[1:])]
    return found


def _children(module: Any) -> list[tuple[str, Any]]:
    """Return the modules in a module, those in lists in the place of the lists, which a trace does not name."""
    found: list[tuple[str, Any]] = []
    for name, child in module.named_children():
        found.append((name, child))
        if type(child).__name__ in ("ModuleList", "ModuleDict"):
            found += [(f"{name}.{path}", inner) for path, inner in _children(child)]
    return found


def _shared(paths: Sequence[str]) -> str:
    if len(paths) < 2:
        return paths[0] if paths else ""
    parts = [path.split(".") for path in paths]
    common: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join([*common, "..."]) if common else ""

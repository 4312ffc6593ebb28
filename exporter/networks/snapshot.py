"""Snapshot of a network before an edit, and the difference after it, as a surgery record.

Modules are matched by identity, since deleting an entry of a list renumbers the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from exporter.errors import SurgeryError
from exporter.networks.fingerprint import attributes_of, buffers_of, hooks_of, parameter_shapes
from exporter.networks.record import ATTRIBUTES, Resize, Scalar, StandIn, Surgery
from exporter.networks.standins import Bypass, Gather, Shortcut, Zero, convention_of, kind_of
from exporter.networks.wiring import check_runnable

Lists = nn.ModuleList | nn.Sequential


@dataclass(eq=False)
class Node:
    """One module as it was; `module` is held so that its identity is not given to another object."""

    module: nn.Module
    attributes: dict[str, Any]
    parameters: dict[str, tuple[int, ...] | None]
    buffers: dict[str, Any]
    hooks: dict[str, Any]
    children: dict[str, Node | None] = field(default_factory=dict)
    paths: int = 1


@dataclass(frozen=True)
class Snapshot:
    """A network before an edit.

    Attributes:
        root: the network and, below it, every module, by original name.
        tied: groups of (identity of the module's node, parameter name) that share one storage.
    """

    root: Node
    tied: tuple[frozenset[tuple[int, str]], ...]

    @classmethod
    def of(cls, module: nn.Module) -> Snapshot:
        """Return a snapshot: names, identities, attributes and shapes of every module; no weights are copied."""
        nodes: dict[int, Node] = {}
        root = _node(module, nodes)
        tied = tuple(
            frozenset((id(nodes[id(module.get_submodule(path))]), name) for path, name in group)
            for group in tied_parameters(module)
        )
        return cls(root, tied)


def diff(snapshot: Snapshot, module: nn.Module, *, check: bool = True) -> Surgery:
    """Return what was edited since the snapshot.

    Args:
        snapshot: of the same network object, before the edit.
        module: the network, edited in place.
        check: whether to run the network once on small inputs, so that something that does not run is refused.

    Raises:
        SurgeryError: an edit cannot be recorded or the network no longer runs; the message names the module.
    """
    walk = _Walk()
    walk.compare(snapshot.root, module, "", exact=True)
    _check_aliases(walk, module)
    _check_tied(walk, snapshot, module)
    if check:
        check_runnable(module)
    return Surgery(walk.keep, walk.stand_in, walk.resize)


def tied_parameters(module: nn.Module) -> list[list[tuple[str, str]]]:
    """Return groups of (module path, parameter name) of different modules whose parameters share storage."""
    groups: dict[int, dict[tuple[int, str], tuple[str, str]]] = {}
    for path, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or not parameter.numel():
                continue
            meta = parameter.device.type == "meta"
            key = -id(parameter) if meta else parameter.untyped_storage().data_ptr()
            groups.setdefault(key, {})[id(owner), name] = (path, name)
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def _node(module: nn.Module, seen: dict[int, Node]) -> Node:
    if id(module) in seen:
        seen[id(module)].paths += 1
        return seen[id(module)]
    node = Node(module, attributes_of(module), parameter_shapes(module), buffers_of(module), hooks_of(module))
    seen[id(module)] = node
    for name, child in module._modules.items():
        node.children[name] = None if child is None else _node(child, seen)
    return node


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _error(path: str, what: str, fix: str) -> SurgeryError:
    return SurgeryError(f"{path or 'the network'}: {what}. {fix}")


@dataclass
class _Walk:
    """Collects the record while walking the network as it was and as it is side by side."""

    keep: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stand_in: dict[str, StandIn] = field(default_factory=dict)
    resize: dict[str, Resize] = field(default_factory=dict)
    before: dict[str, tuple[Node, int]] = field(default_factory=dict)
    """Path now to what was there, and the identity of what is there now."""
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def compare(self, node: Node, now: nn.Module, path: str, *, exact: bool = False) -> None:
        """Record the difference of one module and everything below it.

        Args:
            node: as it was.
            now: as it is.
            path: as it is.
            exact: whether another object of the same class is refused.
        """
        if now is not node.module and kind_of(now) is not None:
            self._replaced(node, now, path)
            return
        if type(now) is not type(node.module) or (exact and now is not node.module):
            raise _error(
                path,
                f"replaced by something that is no stand-in; got {type(now).__name__}, "
                f"expected {type(node.module).__name__} or bypass, zero, shortcut, gather",
                "Use exporter.networks.standins.stand_in.",
            )
        if now is node.module and kind_of(now) is not None and attributes_of(now) != node.attributes:
            self._replaced(node, now, path)
            return
        pair = (id(node), id(now))
        if pair not in self._seen:
            self._own(node, now, path)
        self._seen.add(pair)
        self.before[path] = (node, id(now))
        if isinstance(now, Lists):
            self._list(node, now, path)
        else:
            self._children(node, now, path)

    def _own(self, node: Node, now: nn.Module, path: str) -> None:
        _check_behaviour(node, now, path)
        shapes = parameter_shapes(now)
        if set(shapes) != set(node.parameters):
            names = ", ".join(sorted(set(shapes) ^ set(node.parameters)))
            raise _error(path, f"parameters added or removed; got a difference in {names}", "Edit shapes, not names.")
        parameters = {name: shape for name, shape in shapes.items() if shape != node.parameters[name]}
        attributes = _changed_attributes(node, now, path)
        if parameters or attributes:
            self.resize[path] = Resize(parameters, attributes)

    def _children(self, node: Node, now: nn.Module, path: str) -> None:
        if set(now._modules) != set(node.children):
            names = ", ".join(sorted(set(now._modules) ^ set(node.children)))
            raise _error(
                path, f"sub-modules added or removed; got a difference in {names}", "Replace, do not add or delete."
            )
        for name, child in now._modules.items():
            self._child(node.children[name], child, _join(path, name))

    def _child(self, was: Node | None, child: nn.Module | None, path: str) -> None:
        if was is None and child is not None:
            raise _error(path, f"a module where there was none; got {type(child).__name__}", "Remove it.")
        if was is not None and child is None:
            self.stand_in[path] = StandIn("absent")
        if was is not None and child is not None:
            self.compare(was, child, path)

    def _list(self, node: Node, now: nn.Module, path: str) -> None:
        was, entries = list(node.children.values()), list(now._modules.values())
        kept = _match(was, entries, path)
        if kept != tuple(range(len(was))):
            self.keep[path] = kept
        for position, (origin, entry) in enumerate(zip(kept, entries, strict=True)):
            self._child(was[origin], entry, _join(path, str(position)))

    def _replaced(self, node: Node, now: nn.Module, path: str) -> None:
        """Record a stand-in and, whole, the sizes of what it holds."""
        _check_behaviour(None, now, path)
        kind = kind_of(now) or "bypass"
        if isinstance(now, Bypass | Zero) and now.convention != convention_of(node.module):
            raise _error(
                path,
                f"a stand-in with another return convention; got {now.convention!r}, expected "
                f"{convention_of(node.module)!r} as {type(node.module).__name__} has it",
                "Make it with exporter.networks.standins.stand_in.",
            )
        if isinstance(now, Gather):
            self.stand_in[path] = StandIn(kind, now.positions, now.out_features)
        else:
            self.stand_in[path] = StandIn(kind, width=now.out_features if isinstance(now, Zero) else 0)
        self.before[path] = (node, id(now))
        inside = _inside(node, now, path)
        for name, child in inside.items():
            inner = _join(path, name)
            self.before[inner] = (_node(child, {}), id(child))
            _check_behaviour(None, child, inner)
            attributes = {key: _scalar(getattr(child, key)) for key in ATTRIBUTES if hasattr(child, key)}
            self.resize[inner] = Resize(parameter_shapes(child), attributes)


def _inside(node: Node, now: nn.Module, path: str) -> dict[str, nn.Module]:
    """Return what a stand-in holds, after checking that replay will find the same there."""
    if isinstance(now, Gather):
        if not isinstance(node.module, nn.Linear | Gather):
            raise _error(
                path, f"a gather in the place of {type(node.module).__name__}", "It stands in for a Linear only."
            )
        return {"linear": now.linear}
    if not isinstance(now, Shortcut):
        return {}
    had = node.children.get("conv_shortcut")
    scale = getattr(node.module, "output_scale_factor", None)
    if scale is None or (had is None) != (now.conv_shortcut is None) or float(scale) != float(now.output_scale_factor):
        raise _error(
            path,
            f"a shortcut that is not the one of the {type(node.module).__name__} it replaces",
            "Make it with exporter.networks.standins.stand_in.",
        )
    if had is None or now.conv_shortcut is None:
        return {}
    if type(now.conv_shortcut) is not type(had.module):
        raise _error(path, f"its conv_shortcut is a {type(now.conv_shortcut).__name__}", "Keep the block's own.")
    return {"conv_shortcut": now.conv_shortcut}


def _scalar(value: Any) -> Scalar:
    return tuple(value) if isinstance(value, tuple | list) else value


def _check_behaviour(node: Node | None, now: nn.Module, path: str) -> None:
    """Refuse what changes the answer of a module and cannot be written down."""
    if "forward" in vars(now) or "__call__" in vars(now):
        raise _error(path, "its forward was patched", "Replace the module by a stand-in instead.")
    hooks = hooks_of(now)
    if hooks != (node.hooks if node else {}) or any("forward" in kind for kind in hooks):
        raise _error(
            path, f"a hook is set; got {', '.join(hooks) or 'none where there was one'}", "Remove it after use."
        )
    if node is not None and buffers_of(now) != node.buffers:
        raise _error(
            path, f"a buffer changed; got {', '.join(sorted(buffers_of(now)))}", "Only parameters may be resized."
        )


def _changed_attributes(node: Node, now: nn.Module, path: str) -> dict[str, Scalar]:
    was, attributes = node.attributes, attributes_of(now)
    changed: dict[str, Scalar] = {}
    for name in sorted(set(was) | set(attributes)):
        if was.get(name) == attributes.get(name):
            continue
        place = _join(path, name)
        if name not in was:
            raise _error(place, "a new attribute", "A record holds sizes only: keep what you need outside the network.")
        if name not in attributes:
            raise _error(place, "an attribute was deleted", "Leave it.")
        value = getattr(now, name)
        sizes = isinstance(value, tuple) and all(type(v) is int for v in value)
        if name not in ATTRIBUTES or not (type(value) in (int, float) or sizes):
            what = (
                "the attention processor was changed" if name == "processor" else "an attribute that cannot be recorded"
            )
            raise _error(
                place, f"{what}; got {type(value).__name__}", f"Recordable are {', '.join(sorted(ATTRIBUTES))}."
            )
        changed[name] = value
    return changed


def _match(was: list[Node | None], entries: list[nn.Module | None], path: str) -> tuple[int, ...]:
    """Return, for each entry of a list, the original index it comes from."""
    place = {id(node.module): index for index, node in enumerate(was) if node is not None}
    found: list[int | None] = [None if entry is None else place.get(id(entry)) for entry in entries]
    known = [index for index in found if index is not None]
    if len(known) != len(set(known)):
        raise _error(
            path, "the same module twice in one list", "A repeat is a copy with weights of its own: deepcopy it."
        )
    free = [index for index in range(len(was)) if index not in set(known)]
    for position, entry in enumerate(entries):
        if found[position] is None:
            found[position] = _origin(was, entry, free, _window(found, position, len(was)), _join(path, str(position)))
            if found[position] in free:
                free.remove(found[position] or 0)
    return tuple(index for index in found if index is not None)


def _window(found: list[int | None], position: int, count: int) -> tuple[int, int]:
    """Return the original indices between which an entry lies, by its neighbours."""
    left = next((index for index in reversed(found[:position]) if index is not None), -1)
    right = next((index for index in found[position + 1 :] if index is not None), count)
    return left, right


def _origin(
    was: list[Node | None], entry: nn.Module | None, free: list[int], window: tuple[int, int], path: str
) -> int:
    """Return the original index for an entry that is no original: what it replaces, or what it is a copy of."""
    left, right = window
    between = [index for index in free if left < index < right]
    order = [*between, *(index for index in free if index not in between)]
    if entry is None:
        order = [index for index in order if was[index] is None]
    elif kind_of(entry) is None:
        alike = [index for index, node in enumerate(was) if node is not None and _alike(node, entry)]
        used = sorted((index for index in alike if index not in free), key=lambda index: abs(index - left))
        copied = [index for index in used if _same_values(was[index], entry)]
        order = [*copied, *(i for i in between if i in alike), *used, *(i for i in order if i in alike)]
    else:
        every = [*order, *(index for index in range(len(was)) if index not in free)]
        order = [index for index in every if (node := was[index]) is not None and _may_replace(node, entry)]
    if not order:
        what = "nothing" if entry is None else type(entry).__name__
        raise _error(path, f"a list entry that is neither original, copy nor stand-in; got {what}", "Use stand_in.")
    return order[0]


def _alike(node: Node, entry: nn.Module) -> bool:
    """Tell whether an entry has the classes and names of a module, whatever its sizes and what was replaced inside."""
    if type(node.module) is not type(entry):
        return False
    if isinstance(entry, Lists):
        return True
    if set(node.children) != set(entry._modules):
        return False
    pairs = [(node.children[name], child) for name, child in entry._modules.items() if child is not None]
    return all(was is not None and (kind_of(child) is not None or _alike(was, child)) for was, child in pairs)


def _same_values(node: Node | None, entry: nn.Module) -> bool:
    """Tell whether an entry holds the weights of a module as it is now, as a fresh copy does."""
    if node is None:
        return False
    pairs = zip(node.module.parameters(), entry.parameters(), strict=False)
    return all(a.shape == b.shape and a.device.type != "meta" and torch.equal(a, b) for a, b in pairs)


def _may_replace(node: Node, entry: nn.Module) -> bool:
    if isinstance(entry, Shortcut):
        had = node.children.get("conv_shortcut")
        return (had.module if had else None) is entry.conv_shortcut
    if isinstance(entry, Gather):
        return isinstance(node.module, nn.Linear | Gather)
    return not isinstance(entry, Bypass | Zero) or entry.convention == convention_of(node.module)


def _check_aliases(walk: _Walk, module: nn.Module) -> None:
    """Refuse modules that came to be, or ceased to be, one object under two paths."""
    paths: dict[int, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        paths.setdefault(id(child), []).append(path)
    for group in paths.values():
        nodes = {id(walk.before[path][0]) for path in group if path in walk.before}
        if len(group) > 1 and (len(nodes) > 1 or any(path in walk.stand_in for path in group)):
            raise _error(" and ".join(group), "one module under two paths that were two", "Copy it.")
    found: dict[int, list[tuple[str, Node, int]]] = {}
    for path, (node, identity) in walk.before.items():
        found.setdefault(id(node), []).append((path, node, identity))
    for matched in found.values():
        # A copied list entry brings every path of what it holds along, so copies alone keep this ratio.
        if len({identity for _, _, identity in matched}) > max(1, len(matched) // matched[0][1].paths):
            names = " and ".join(path for path, _, _ in matched)
            raise _error(names, "one module under two paths became two", "Replace it under both paths or not at all.")


def _check_tied(walk: _Walk, snapshot: Snapshot, module: nn.Module) -> None:
    """Refuse parameters that newly share storage, and tied ones that no longer do."""
    for group in tied_parameters(module):
        origins = {(id(walk.before[path][0]), name) for path, name in group if path in walk.before}
        if len(origins) < len(group) or not any(origins <= tied for tied in snapshot.tied):
            names = " and ".join(_join(path, name) for path, name in group)
            raise _error(names, "parameters came to share storage", "Clone them.")
    for tied in snapshot.tied:
        storages: dict[int, str] = {}
        for path, (node, _) in walk.before.items():
            for name, parameter in module.get_submodule(path)._parameters.items():
                if (id(node), name) in tied and parameter is not None:
                    storages[parameter.untyped_storage().data_ptr()] = _join(path, name)
        if len(storages) > 1:
            raise _error(" and ".join(storages.values()), "tied parameters came apart", "Edit the one they share.")
